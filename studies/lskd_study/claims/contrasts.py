"""Weighted sums of paired runs, with their interval: what all claims within one study are estimated as.

And the quantities that no result has by itself: accuracy on many-shot or few-shot classes of long-tailed
data, and how far similar classes lie apart.

A contrast gives every kind of run a weight fixed in advance. At each seed and sample the weighted sum of the
runs' values is one number, so whatever the weights are (a difference, a difference of differences, a slope),
the table of these numbers goes through one analysis, seeds and samples both random.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from lskd import LskdError
from lskd.analysis.classes import (
    check_separable,
    class_confusion,
    class_mean_probabilities,
    class_separation,
    nearest_classes,
)
from lskd.base.images import class_folders, class_images
from lskd_study.base.cores import over_cores
from lskd_study.plan.plan import Plan
from lskd_study.results.images import Stored, read_stored
from lskd_study.results.results import PerSample, Result
from lskd_study.stats.intervals import CROSSED, Interval, crossed_interval, no_interval, seed_interval

RATIO = 10  # largest to smallest class, as in the mildest long-tailed benchmarks (CIFAR-LT)
MANY, FEW = 100, 20  # training images: Liu et al. (2019), "Large-scale long-tailed recognition"
SHOTS = ("top1_many_shot", "top1_few_shot")
# The kinds of run of one network: a weight, and its results by seed. The weights sum to 0.
Cells = Sequence[tuple[float, Mapping[int, Result]]]


@dataclass(frozen=True)
class Measure:
    """How a run's quantity is read: one value per sample, or (where that is None) one per run."""

    per_sample: Callable[[Result], PerSample | None]
    value: Callable[[Result], float]


def measure_of(quantity: str) -> Measure:
    """Return how a quantity that a `Result` knows by name is read."""
    return Measure(lambda result: result.per_sample(quantity), lambda result: result.value(quantity))


def estimate_contrast(measure: Measure, networks: Sequence[Cells], seeds: Sequence[int]) -> Interval:
    """Return a contrast averaged over networks with its interval.

    Of several students for one seed of their teacher their mean counts, as one value of that seed.

    Raises:
        LskdError: when the quantity is missing or not finite in some run.
    """
    found = _interval(measure, networks, seeds)
    repeats = {len(runs[seed].each) for cells in networks for _, runs in cells for seed in seeds}
    if len(seeds) < 2 or not found.known or len(repeats) > 1 or repeats == {1}:
        return found
    of_students = [
        [[(w, {seed: runs[seed].each[k] for seed in seeds}) for w, runs in cells] for cells in networks]
        for k in range(*repeats)
    ]
    means = [[_interval(measure, one, [seed]).estimate for one in of_students] for seed in seeds]
    return found.of_students(means)


def _interval(measure: Measure, networks: Sequence[Cells], seeds: Sequence[int]) -> Interval:
    if measure.per_sample(networks[0][0][1][seeds[0]]) is None:
        by_seed = np.array(
            [
                np.mean([sum(w * measure.value(runs[seed]) for w, runs in cells) for cells in networks])
                for seed in seeds
            ]
        )
        if np.isnan(by_seed).all():  # a run that diverged has no result at all
            raise LskdError("no run has measured it; of drawn classes the cross-entropy alone is known")
        return seed_interval(by_seed)
    samples = [
        [[_per_sample(measure, runs[seed]) for seed in seeds] for _, runs in cells] for cells in networks
    ]
    weights = [[w for w, _ in cells] for cells in networks]
    one = samples[0][0][0]
    # (networks, kinds of run, seeds, samples), summed over kinds, averaged over networks
    values = np.array([[[sample.values for sample in runs] for runs in cells] for cells in samples])
    table = np.einsum("nk,nksi->si", np.array(weights), values) / len(networks)
    problems = [sample.problem for cells in samples for runs in cells for sample in runs if sample.problem]
    if problems:
        nothing = no_interval(float(table.mean()), len(seeds), table.shape[1], CROSSED, problems[0])
        return nothing.scaled(one.scale)
    # The rule of three is about differences of two values that are 0 or 1.
    bounded = one.bounded and all(of_network == [-1, 1] for of_network in weights)
    return crossed_interval(table, one.strata, bounded=bounded).scaled(one.scale)


def difference(pair: tuple[Mapping[int, Result], Mapping[int, Result]]) -> Cells:
    """Return the contrast of two arms, (without, with smoothing)."""
    return [(-1.0, pair[0]), (1.0, pair[1])]


def fitted_change(points: Sequence[float]) -> list[float]:
    """Return weights whose sum with the values at ``points`` is the change from the smallest to the largest.

    The change is that of the straight line fitted by least squares.
    """
    centred = np.asarray(points) - np.mean(points)
    return [float(weight) for weight in centred / np.square(centred).sum() * np.ptp(points)]


def _per_sample(measure: Measure, result: Result) -> PerSample:
    found = measure.per_sample(result)
    assert found is not None  # the same for every run of a study
    return found


# Long-tailed training data


def is_long_tailed(plan: Plan) -> bool:
    """Whether the training data are there and some class has 10 times the images of another."""
    counts = _class_sizes(plan.data_dir / "train")
    return bool(counts) and max(counts.values()) >= RATIO * min(counts.values())


def classes_of_shot(plan: Plan, quantity: str) -> frozenset[str]:
    """Return the names of the classes that a quantity of ``SHOTS`` is about."""
    many = quantity == SHOTS[0]
    sizes = _class_sizes(plan.data_dir / "train")
    return frozenset(name for name, count in sizes.items() if (count > MANY if many else count < FEW))


def shot_measure(plan: Plan, quantity: str) -> Measure:
    """Return top-1 accuracy on the images of many-shot or few-shot classes alone."""
    chosen = classes_of_shot(plan, quantity)

    def per_sample(result: Result) -> PerSample | None:
        found = result.per_sample("last_top1")
        if found is None:
            return None
        member = np.array([class_of_key(key) in chosen for key in result.keys])
        if not member.any():
            raise LskdError("no validation image of these classes")
        return PerSample(found.values[member], bounded=True, scale=found.scale)

    return Measure(per_sample, lambda result: result.value(quantity))


def class_of_key(key: str) -> str:
    """Return the class in a validation image's key, e.g. ``val/pike/0001.png``."""
    return key.rsplit("/", 2)[-2] if "/" in key else ""


@lru_cache(maxsize=16)
def _class_sizes(folder: Path) -> dict[str, int]:
    """Return the number of images by class; nothing where the page is made without the data, or of text."""
    try:
        sizes = {name: len(class_images(folder / name)[0]) for name in class_folders(folder)}
    except (OSError, LskdError):
        return {}
    return {name: size for name, size in sizes.items() if size}


# Similar classes


def separation_measure(plan: Plan, compared: Sequence[Sequence[Result]]) -> Measure:
    """Return the separation of each class from the one it is taken for most.

    ``compared``: for each network the runs of both arms. They choose the pairs together, each run with
    the same weight: a choice by one arm alone would favour the other.

    Raises:
        LskdError: for classes of fewer than 3 images, or logits that are not finite.
    """
    labels = stored_of(plan, compared[0][0]).labels
    present = labels.unique()  # each of which is in a pair
    if len(present) < 2:
        raise LskdError("all validation images are of one class; a separation is that of two")
    check_separable(labels, present.tolist())

    def means_of(result: Result) -> torch.Tensor:
        stored = stored_of(plan, result)
        try:
            means = class_mean_probabilities(stored.logits, stored.labels, plan.num_classes, present.tolist())
        except ValueError as error:
            raise LskdError(f"{result.run.id}: {error}") from None
        return means if len(present) == plan.num_classes else means[:, present]

    def separation(result: Result, pairs: Sequence[tuple[int, int]]) -> PerSample:
        stored = stored_of(plan, result)
        values = class_separation(stored.logits, stored.labels, pairs).numpy()
        return PerSample(stored.sorted(values), strata=stored.sorted(stored.labels.numpy()))

    found: dict[str, PerSample] = {}
    for runs in compared:
        nearest = nearest_classes(class_confusion(over_cores(means_of, runs)))
        pairs = [(int(present[a]), int(present[b])) for a, b in nearest]
        values = over_cores(partial(separation, pairs=pairs), runs)
        found |= {result.run.id: one for result, one in zip(runs, values, strict=True)}
    return Measure(
        lambda result: found[result.run.id], lambda result: float(found[result.run.id].values.mean())
    )


def stored_of(plan: Plan, result: Result) -> Stored:
    """Return a run's stored logits."""
    return read_stored(plan.folder(result.run), plan.num_classes)
