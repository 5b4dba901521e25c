"""Checks of the teacher on real validation images, before the first training step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lskd import LskdError
from lskd.errors import one_line
from lskd.teachers.preflight import compare_with_chance
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.teacher import Teacher

SIGNIFICANCE = 0.01
_BATCH = 64


def spread_indices(total: int, count: int) -> list[int]:
    """Choose `count` of `total` indices at even distances: a folder is sorted by class."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def spread_batches(
    dataset: Any, indices: Sequence[int], student_norm: Normalisation, device: torch.device, prefetch: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of chosen samples as the training loop sees them: in the student's normalisation.

    Args:
        dataset: map-style data set whose transform is set already.
        indices: samples to take.
        student_norm: what is applied on the device when `prefetch`, otherwise the transform has done it.
        device: where batches go.
        prefetch: whether the transform leaves normalising to timm's prefetcher.
    """
    loader: Any = DataLoader(
        Subset(dataset, list(indices)), batch_size=_BATCH, collate_fn=fast_collate if prefetch else None
    )
    if prefetch:
        mean, std = student_norm.mean, student_norm.std
        loader = PrefetchLoader(loader, mean=mean, std=std, channels=len(mean), device=device)
    for images, targets in loader:
        yield images.to(device), targets.to(device)


def check_teacher_accuracy(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    name: str,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
) -> str:
    """Measure the teacher's accuracy over all processes and return a line about it.

    Args:
        teacher: the teacher to check.
        batches: this process's share of the images.
        num_classes: class count.
        name: the teacher's name, for messages.
        device: where counts are kept.
        autocast: context of the forward pass in training.
        channels_last: memory layout of batches in training.

    Raises:
        LskdError: the teacher is not better than chance (one-sided binomial test at 1 %), chance being the
            larger of 1/K and the share of the most frequent class.
    """
    counts = torch.zeros(num_classes + 1, dtype=torch.float32, device=device)
    for images, targets in batches:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = answer(teacher, images, name)
        counts[0] += (logits.argmax(-1) == targets).sum()
        counts[1:] += torch.bincount(targets, minlength=num_classes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)  # every process then comes to the same verdict
    right, *per_class = (int(value) for value in counts.tolist())
    total = sum(per_class)
    return verdict(right, total, max(1 / num_classes, max(per_class) / max(total, 1)), name)


def answer(teacher: Teacher, images: Tensor, name: str) -> Tensor:
    """Return the teacher's logits.

    Raises:
        LskdError: the teacher cannot process images of this shape.
    """
    try:
        return teacher(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shape = " x ".join(str(size) for size in images.shape[1:])
        raise LskdError(
            f"teacher '{name}' cannot process {shape} images ({one_line(error)}); "
            "set --kd-teacher-img-size to the size it was trained on."
        ) from None


def accuracy_text(right: int, total: int, chance: float) -> str:
    """Say how many images a model is right on, and how many a guess."""
    return f"{100 * right / total:.1f} % of {total} validation images (chance {100 * chance:.1f} %)"


def verdict(right: int, total: int, chance: float, name: str) -> str:
    """Return the line for `right` of `total` against `chance`, or refuse the teacher."""
    if total == 0:
        return f"teacher '{name}': no validation images, its accuracy is not checked"
    accuracy = accuracy_text(right, total, chance)
    compared = compare_with_chance(right, total, chance, SIGNIFICANCE)
    if compared == "too few":
        return f"teacher '{name}': {accuracy}; too few images to tell it from chance"
    if compared == "at":
        raise LskdError(
            f"teacher '{name}' is at chance: right on {accuracy}; "
            "check its checkpoint, normalisation, image size (--kd-teacher-img-size) and class order; "
            "--kd-preflight-samples 0, in YAML kd_preflight_samples: 0, trains on it nevertheless."
        )
    return f"teacher '{name}': right on {accuracy}"
