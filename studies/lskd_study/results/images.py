"""What a classifier left: accuracy and 1-S, from its stored logits on the validation images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lskd import LskdError
from lskd.base.tensors import require_finite
from lskd.stability import class_deviations, class_moments, over_classes, warn_of_left_out
from lskd.targets import check_labels
from lskd.teachers.preflight import compare_with_chance
from lskd_study.plan.plan import CURVES, JOB, LOGITS, Run
from lskd_study.plan.records import Job, read_record
from lskd_study.results.results import PerSample, Result, read_curves
from lskd_study.stats.intervals import Array, target_std_pseudo_values

_DTYPES = {
    "U8": torch.uint8,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_BLOCK = 1 << 17  # numbers of a block of logits, so that it stays in a CPU's cache


@dataclass(frozen=True)
class ImageResult(Result):
    """A classifier's result; the arrays have one value per validation image, sorted by key.

    ``judged``: the share that is right, the mean over the last epochs; None where the last alone counts.
    """

    labels: NDArray[np.int64]
    rank: NDArray[np.int64]  # classes that are scored at least as high as the right one
    correct: Array
    target_probability: Array
    instability: float
    judged: float | None = field(default=None, kw_only=True)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * (float(self.correct.mean()) if self.judged is None else self.judged)

    def mean_of(self, parts: Sequence[Any]) -> Self:
        """Return the mean of several runs; of single images it has the share of them that is right."""
        correct = np.mean([one.correct for one in parts], axis=0)
        judged = None if self.judged is None else float(np.mean([one.judged for one in parts]))
        return replace(super().mean_of(parts), rank=self.rank[:0], correct=correct, judged=judged)

    def _value(self, quantity: str) -> float:
        """Return accuracy or 1-S over all images, or what a curve has in the last epoch."""
        if quantity == "top1":
            return self.top1
        if quantity == "one_minus_s":
            return self.instability
        if quantity[:3] == "top":
            return 100 * float((self.rank < int(quantity[3:])).mean())
        return super()._value(quantity)

    def _per_sample(self, quantity: str) -> PerSample | None:
        """Return accuracy (``last_top1``: of the last epoch) or 1-S image by image.

        Of a mean over epochs single images are known for the last one: their values are moved to that mean,
        which leaves the variance between seeds that of the means, and that between images the last epoch's.
        The mean over epochs has no larger one.
        """
        if quantity == "top1" and self.judged is not None:
            return PerSample(self.correct - self.correct.mean() + self.judged, bounded=True, scale=100)
        if quantity in ("top1", "last_top1"):
            return PerSample(self.correct, bounded=True, scale=100)
        if quantity == "instability":
            values = target_std_pseudo_values(self.target_probability, self.labels)
            return PerSample(values, strata=self.labels)
        return None

    def at_chance(self) -> str:
        """Return its accuracy where that is no better than always naming the most frequent class.

        A one-sided binomial test at 1 %, as a teacher passes before it teaches.
        """
        total, chance = len(self.labels), float(np.bincount(self.labels).max() / len(self.labels))
        if compare_with_chance(int(self.correct.sum()), total, chance) != "at":
            return ""
        own = 100 * float(self.correct.mean())
        return f"right on {own:.1f} % of {total:,} validation images, chance is {100 * chance:.1f} %"

    def same_samples(self, other: Result) -> bool:
        """Whether both were measured on the same images with the same labels."""
        return (
            isinstance(other, ImageResult)
            and self.keys == other.keys
            and np.array_equal(self.labels, other.labels)
        )


def read_image_result(folder: Path, run: Run, num_classes: int, last_epochs: int = 1) -> ImageResult:
    """Read one run's folder; its accuracy is the mean over its last epochs.

    Raises:
        LskdError: it has not the accuracy of each of these.
        DivergedError: its logits are not finite.
        Exception: of many classes, when a file is missing or damaged; `results.read_results` makes it one.
    """
    job = read_record(folder / JOB, Job)
    curves = read_curves(folder / CURVES)
    stored = read_stored(folder, num_classes)
    count = len(stored.labels)
    rank, probability = np.empty(count, np.int64), np.empty(count)
    step = max(_BLOCK // num_classes, 1)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        scores, own = stored.logits[rows].float(), stored.labels[rows, None]
        require_finite("the logits of the validation images", scores, int(curves["epoch"][-1]))
        # Into floats, because booleans are slow to add; ties count against the model.
        rank[rows] = torch.ge(scores, scores.gather(1, own), out=torch.empty_like(scores)).sum(1) - 1
        z = scores.double()
        z -= z.amax(1, keepdim=True)
        # NumPy's exp takes half the time of PyTorch's in float64.
        sums = np.exp(z.numpy()).sum(1)
        probability[rows] = np.exp(z.gather(1, own).squeeze(1).numpy()) / sums
    rank, probability, labels = (stored.sorted(each) for each in (rank, probability, stored.labels.numpy()))
    moments = class_moments(torch.from_numpy(probability), torch.from_numpy(labels), num_classes)
    deviations = class_deviations(moments)
    warn_of_left_out(deviations, moments[0])
    return ImageResult(
        run=run,
        job=job,
        curves=curves,
        keys=stored.keys,
        labels=labels,
        rank=rank,
        correct=(rank < 1).astype(np.float64),
        target_probability=probability,
        instability=float(over_classes(deviations, "target_std")),
        judged=_mean_of_last(curves, last_epochs, run) if last_epochs > 1 else None,
    )


def _mean_of_last(curves: dict[str, Array], count: int, run: Run) -> float:
    epochs, values = curves["epoch"][-count:], curves["val_top1"][-count:]
    if len(epochs) < count or np.ptp(epochs) != count - 1 or not np.isfinite(values).all():
        raise LskdError(f"{run.id}: {CURVES} has not the accuracy of each of the last {count} epochs")
    return float(values.mean()) / 100


@dataclass(frozen=True)
class Stored:
    """What a run has stored of the validation images, in the order of its file.

    Attributes:
        logits: ``(N, K)``, in the file's precision.
        labels: ``(N,)`` int64.
        keys: the images' names, sorted.
        order: ``(N,)``, where in the file each of these lies.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    order: NDArray[np.int64]

    def sorted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values of images by the images' names; to sort these takes less than to sort the logits."""
        return values[self.order]


def read_stored(folder: Path, num_classes: int) -> Stored:
    """Read a run's file.

    Raises:
        Exception: of many classes, when it is missing or damaged.
    """
    tensors = _tensors(folder / LOGITS)
    logits, labels = tensors["logits"], tensors["labels"].to(torch.int64)
    if labels.ndim != 1 or logits.shape != (len(labels), num_classes):
        raise ValueError("sizes do not match")
    check_labels(labels, num_classes)
    keys, order = _sorted(tensors["keys"].numpy().tobytes())
    if len(keys) != len(labels):
        raise ValueError("sizes do not match")
    return Stored(logits, labels, keys, order)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return what is in a safetensors file, in memory.

    Not mapped: of a file that is cut later, or on a disk that fails, a read would end the process. Not by the
    library's `load` either, which has all of it in memory twice and in small pages: five times the time.
    """
    content = np.fromfile(path, np.uint8)
    start = 8 + int(content[:8].view("<u8")[0])
    parts = json.loads(content[8:start].tobytes())
    parts.pop("__metadata__", None)
    tensors, end = {}, 0
    # One after another, without gaps and not twice, as the library has it.
    for name, part in sorted(parts.items(), key=lambda one: one[1]["data_offsets"]):
        first, stop = part["data_offsets"]
        if first != end:
            raise ValueError("sizes do not match")
        data = torch.from_numpy(content[start + first : start + stop])
        tensors[name] = data.view(_DTYPES[part["dtype"]]).reshape(part["shape"])
        end = stop
    if start + end != len(content):
        raise ValueError("sizes do not match")
    return tensors


@lru_cache(maxsize=1)
def _sorted(keys: bytes) -> tuple[list[str], NDArray[np.int64]]:
    """Return keys as sorted, and the order; all runs of a study share what is returned."""
    names = keys.decode().split("\n")
    if len(set(names)) < len(names):
        raise ValueError("a key stands there twice")
    order = np.argsort(np.array(names), kind="stable")
    return [names[i] for i in order], order
