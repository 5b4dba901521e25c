"""Long-tailed training data: whether they are, and which classes have many images and which few."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from lskd import LskdError
from lskd.base.images import class_folders, class_images
from lskd_study.claims.contrasts import Measure
from lskd_study.plan.plan import Plan
from lskd_study.results.results import PerSample, Result

RATIO = 10  # largest to smallest class, as in the mildest long-tailed benchmarks (CIFAR-LT)
MANY, FEW = 100, 20  # training images: Liu et al. (2019), "Large-scale long-tailed recognition"
SHOTS = ("top1_many_shot", "top1_few_shot")


def is_long_tailed(plan: Plan) -> bool:
    """Whether the training data are there and some class has 10 times the images of another."""
    counts = _counts(plan)
    return bool(counts) and max(counts.values()) >= RATIO * min(counts.values())


def classes_of_shot(plan: Plan, quantity: str) -> frozenset[str]:
    """Return the names of the classes that a quantity of ``SHOTS`` is about."""
    many = quantity == SHOTS[0]
    return frozenset(name for name, count in _counts(plan).items() if (count > MANY if many else count < FEW))


def shot_measure(plan: Plan, quantity: str) -> Measure:
    """Return top-1 accuracy on the images of many-shot or few-shot classes alone."""
    chosen = classes_of_shot(plan, quantity)

    def per_sample(result: Result) -> PerSample | None:
        found = result.per_sample("top1")
        if found is None:
            return None
        member = np.array([class_of_key(key) in chosen for key in result.keys])
        problem = "" if member.any() else "no validation image of these classes"
        values = found.values[member] if member.any() else found.values
        return PerSample(values, bounded=True, scale=found.scale, problem=problem)

    return Measure(per_sample, lambda result: result.value(quantity))


def class_of_key(key: str) -> str:
    """Return the class in a validation image's key, e.g. ``val/pike/0001.png``."""
    return key.rsplit("/", 2)[-2] if "/" in key else ""


def _counts(plan: Plan) -> dict[str, int]:
    if plan.num_classes == 0:  # translation
        return {}
    return _count_files(plan.data_dir / "train")


@lru_cache(maxsize=16)
def _count_files(folder: Path) -> dict[str, int]:
    try:
        counts = {name: len(class_images(folder / name)[0]) for name in class_folders(folder)}
    except (OSError, LskdError):
        return {}  # the page may be made where the data are not
    return {name: count for name, count in counts.items() if count}
