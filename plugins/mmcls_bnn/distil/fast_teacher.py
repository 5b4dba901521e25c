"""Replacing the teacher by a faster one, its error measured on training batches before training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmengine.dataset import default_collate
from torch import Tensor, nn

from lskd import LskdError
from lskd.teachers.fast import FAST_BOUND, FAST_MODES, FastMode, choose_fast
from lskd.teachers.replay import replayed

MOST_SAMPLES = 256  # they are held in memory
_BATCH = 64


@dataclass(frozen=True)
class FastTeacherSettings:
    """`model.distillation.teacher_fast` of a recipe.

    Attributes:
        mode: "none", "auto", "float32", "bfloat16" or "int8", see :func:`lskd.choose_fast`.
        bound: largest mean KL(exact || fast) in nats.
    """

    mode: FastMode = "auto"
    bound: float = FAST_BOUND

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "FastTeacherSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown, or a value out of range.
        """
        where = "model.distillation.teacher_fast"
        if not isinstance(values, Mapping):
            raise LskdError(f"{where} is {values!r}; give dict(mode='auto').")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise LskdError(f"{where} has an unknown key {key!r}; there are {', '.join(known)}.")
        settings = cls(**values)
        if settings.mode not in FAST_MODES:
            raise LskdError(f"{where}.mode is {settings.mode!r}; it must be one of {', '.join(FAST_MODES)}.")
        number = isinstance(settings.bound, int | float) and math.isfinite(settings.bound)
        if not (number and settings.bound > 0):
            raise LskdError(
                f"{where}.bound is {settings.bound!r}; it must be a KL divergence in nats above 0, "
                f"{FAST_BOUND:g} by default."
            )
        return settings


def speed_up(model: Any, dataset: Any, amp: bool) -> str:
    """Make the teacher a fast one, as asked, and return a line about it.

    Every process takes the same images, so that all get the same teacher.

    Args:
        model: an LsKdClassifier, whose exact teacher is replaced.
        dataset: the training images, with their transforms.
        amp: whether the exact teacher runs in mixed precision.

    Raises:
        LskdError: a model for which the mode cannot be had, or an error above the bound.
    """
    teacher, name = model.load_teacher(), model.teacher_settings.name
    count = min(MOST_SAMPLES, len(dataset))
    indices = [(2 * i + 1) * len(dataset) // (2 * count) for i in range(count)]
    batches = []
    # The run's own generators must not notice.
    with replayed(0), torch.inference_mode():
        for start in range(0, count, _BATCH):
            batch = default_collate([dataset[index] for index in indices[start : start + _BATCH]])
            batches.append(teacher.prepare(model.data_preprocessor(batch, True)["inputs"]))
    images = torch.cat(batches)

    def exact(batch: Tensor) -> Any:
        with torch.autocast(batch.device.type, enabled=amp):
            return teacher.answer(batch)

    convolutions, norms = _layers_of_timm() if model.teacher_settings.library == "timm" else ((), {})
    try:
        choice = choose_fast(
            teacher.model,
            images,
            model.teacher_mode,
            model.fast_settings.bound,
            exact=exact,
            convolutions=convolutions,
            norms=norms,
        )
    except LskdError as error:
        raise LskdError(f"teacher '{name}', model.distillation.teacher_fast: {error}") from None
    teacher.use(choice.teacher)
    return f"teacher '{name}', fast: {choice.line}"


def _layers_of_timm() -> tuple[tuple[type[nn.Module], ...], dict[type[nn.Module], Any]]:
    """Return the layers of timm that may be folded, see :func:`lskd.fold_batch_norm`."""
    from timm.layers import BatchNormAct2d
    from timm.layers.conv2d_same import Conv2dSame

    return (Conv2dSame,), {BatchNormAct2d: lambda norm: nn.Sequential(norm.drop, norm.act)}
