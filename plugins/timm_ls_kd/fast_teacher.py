"""Replacing the teacher by a faster one, its error measured on validation images before training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from lskd import LskdError, choose_fast
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.preflight import spread_batches, spread_indices
from timm_ls_kd.teacher import Teacher

MOST_SAMPLES = 256  # they are held in memory
# Layers of timm that may be folded, see lskd.fold_batch_norm.
CONVOLUTIONS = (Conv2dSame,)
NORMS: dict[type[nn.Module], Any] = {BatchNormAct2d: lambda norm: nn.Sequential(norm.drop, norm.act)}


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

    Every process takes the same images, so that all get the same teacher.

    Args:
        kd: the distillation arguments.
        teacher: the exact teacher; it is changed.
        dataset: validation images; None where there are none.
        student_norm: normalisation of the batches.
        device: of the teacher.
        prefetch: whether the transform leaves normalising to timm's prefetcher.
        batch_size: of training.
        autocast: context of the exact teacher in training.

    Raises:
        LskdError: no images, a model for which the mode cannot be had, or an error above the bound.
    """
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset) or len(dataset) == 0:
        raise LskdError(
            "--kd-teacher-fast measures its error on validation images, and there are none to choose from; "
            "drop it, or give an image folder with them."
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
            agree=_sum_over_processes,
        )
    except LskdError as error:
        raise LskdError(f"teacher '{kd.teacher}', --kd-teacher-fast {kd.teacher_fast}: {error}") from None
    teacher.use(choice.teacher)
    return f"teacher '{kd.teacher}', fast: {choice.line}"


def _sum_over_processes(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        torch.distributed.all_reduce(values)
    return values.cpu()
