"""Replacing the teacher by a faster one, its error measured on augmented training images before training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lskd import LskdError
from lskd.teachers.fast import choose_fast
from lskd.teachers.replay import augmentation_seed, replayed
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.preflight import spread_batches, spread_indices
from timm_ls_kd.teacher import Teacher

MOST_SAMPLES = 256  # they are held in memory
# Layers of timm that may be folded, see lskd.fold_batch_norm.
CONVOLUTIONS = (Conv2dSame,)
NORMS: dict[type[nn.Module], Any] = {BatchNormAct2d: lambda norm: nn.Sequential(norm.drop, norm.act)}


class Augmented(Dataset[Any]):
    """A script's training images as their transform makes them of a seed; its own draws stay as they are."""

    def __init__(self, dataset: Any, seed: int) -> None:
        """Wrap `dataset`."""
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return an image and its label, the same each time."""
        allow = getattr(getattr(self.dataset, "reader", None), "allow", None)
        if allow is not None:  # a reader that gives each image once, see timm_ls_kd.data
            allow(index)
        with replayed(augmentation_seed(self.seed, 0, index)):
            return self.dataset[index]


def speed_up(
    kd: KdConfig,
    teacher: Teacher,
    dataset: Any,
    student_norm: Normalisation,
    device: torch.device,
    *,
    prefetch: bool,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Make the teacher a fast one, as asked, and return a line about it.

    Every process takes the same images, so that all get the same teacher. They are augmented, because that is
    what the teacher is asked about: it lies further out than validation images, and 8 bits cost more there.

    Args:
        kd: the distillation arguments.
        teacher: the exact teacher; it is changed.
        dataset: training images, each augmented the same way whenever it is asked for.
        student_norm: normalisation of the batches.
        device: of the teacher.
        prefetch: whether the transform leaves normalising to timm's prefetcher.
        batch_size: of training.
        autocast: context of the exact teacher in training.

    Raises:
        LskdError: no images, a model for which the mode cannot be had, or an error above the bound.
    """
    if isinstance(getattr(dataset, "dataset", dataset), IterableDataset):
        raise LskdError(
            "--kd-teacher-fast measures its error on training images of its choice, and this data set can "
            "only be streamed; drop it, or give a folder of images or a tar file."
        )
    indices = spread_indices(len(dataset), min(kd.preflight_samples, MOST_SAMPLES))
    with torch.inference_mode():
        images = torch.cat(
            [
                teacher.prepare(images)
                for images, _ in spread_batches(dataset, indices, student_norm, device, prefetch=prefetch)
            ]
        )

    def exact(batch: Tensor) -> Any:
        with autocast():
            return teacher.answer(batch)

    try:
        choice = choose_fast(
            teacher.model,
            images,
            kd.teacher_fast,
            kd.teacher_fast_bound,
            exact=exact,
            convolutions=CONVOLUTIONS,
            norms=NORMS,
            compiled=kd.teacher_compile,
            batch_size=batch_size,
        )
    except LskdError as error:
        raise LskdError(f"teacher '{kd.teacher}', --kd-teacher-fast {kd.teacher_fast}: {error}") from None
    teacher.use(choice.teacher)
    return f"teacher '{kd.teacher}', fast: {choice.line}"
