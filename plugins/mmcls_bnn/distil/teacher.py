"""The teacher: a frozen model, outside the student's module tree, that answers to the student's batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lskd import Convention, LskdError, target_entropy, target_values
from lskd.teachers.fast import FastTeacher, TeacherForm
from lskd.teachers.outputs import logits_of


@dataclass(frozen=True)
class TeacherSettings:
    """Which teacher, as a recipe's `model.teacher` says it.

    Attributes:
        checkpoint: the weights; nothing is ever downloaded.
        model: name of a timm or torchvision model.
        config: an mmcls config instead, whose `model` is the teacher.
        source: "timm", "torchvision" or "mmcls"; None: mmcls where there is a config, otherwise timm, whose
            ResNets also read torchvision's files.
        mean: of the teacher's images by channel, in mmcls' units (0 to 255); None: as it was trained, from
            the args.yaml beside a checkpoint of timm's trainers, its config, or the default of its library.
        std: the deviation likewise.
        image_size: resize batches to this side; None: from args.yaml, otherwise the student's size.
        kwargs: more arguments of the model.
        smoothing: alpha that it was trained with, where known; for the log.
        convention: of that alpha.
    """

    checkpoint: str
    model: str | None = None
    config: str | None = None
    source: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    kwargs: Mapping[str, Any] | None = None
    smoothing: float | None = None
    convention: Convention = "paper"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TeacherSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown or missing, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise LskdError(f"model.teacher has an unknown key {key!r}; there are {', '.join(known)}.")
        if not values.get("checkpoint"):
            raise LskdError("model.teacher names no checkpoint; give checkpoint='FILE' there.")
        settings = cls(**values)
        if settings.library not in ("timm", "torchvision", "mmcls"):
            raise LskdError(f"model.teacher has source {settings.source!r}; give timm, torchvision or mmcls.")
        wanted = "config" if settings.library == "mmcls" else "model"
        if not getattr(settings, wanted):
            raise LskdError(
                f"model.teacher of source '{settings.library}' needs {wanted}; add it to the recipe."
            )
        if (settings.mean is None) != (settings.std is None):
            raise LskdError("model.teacher has mean or std alone; give both, or none for the teacher's own.")
        if settings.smoothing is not None:
            try:
                target_values(2, settings.smoothing, settings.convention)
            except (TypeError, ValueError) as error:
                raise LskdError(f"model.teacher: {error}.") from None
        return settings

    @property
    def library(self) -> str:
        """Where the model comes from."""
        return self.source or ("mmcls" if self.config else "timm")

    @property
    def name(self) -> str:
        """What to call the teacher in messages."""
        return str(self.config if self.library == "mmcls" else self.model)


@dataclass(frozen=True)
class InputFormat:
    """What a model's images look like: normalisation in mmcls' units (0 to 255) and order of channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: bool

    @classmethod
    def of_preprocessor(cls, preprocessor: Any, channels: int) -> "InputFormat":
        """Read it from mmcls' data preprocessor."""
        if not getattr(preprocessor, "_enable_normalize", False):
            return cls((0.0,) * channels, (1.0,) * channels, bool(preprocessor.to_rgb))
        return cls(
            tuple(preprocessor.mean.flatten().tolist()),
            tuple(preprocessor.std.flatten().tolist()),
            bool(preprocessor.to_rgb),
        )


class Teacher:
    """A frozen teacher.

    No `nn.Module` on purpose: a classifier that holds one as an attribute does not own its parameters, so
    they are in no checkpoint, optimiser or DistributedDataParallel bucket, the runner does not initialise
    them, and `train()` does not reach BatchNorm or dropout.

    Args:
        model: a classifier that returns logits; it is put in eval mode and frozen.
        own: the format of the images that the model was trained with.
        student: the format of the batches it will get.
        image_size: resize batches to this side; None: leave them as they are.
    """

    def __init__(
        self, model: nn.Module, own: InputFormat, student: InputFormat, image_size: int | None = None
    ) -> None:
        """Freeze the model."""
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.flip = own.rgb != student.rgb and len(own.mean) == 3
        self._fast: FastTeacher | None = None
        self._constants: tuple[Tensor, Tensor] | None = None
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (student.mean, student.std))
        if self.flip:
            mean, std = mean.flip(0), std.flip(0)
        own_mean, own_std = (torch.tensor(values, dtype=torch.float64) for values in (own.mean, own.std))
        if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
            # (x s_s + m_s - m_t) / s_t as one multiplication and one addition.
            scale, shift = std / own_std, (mean - own_mean) / own_std
            self._constants = (scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1))

    @property
    def converts(self) -> bool:
        """Whether it gets the student's batches in another normalisation or order of channels."""
        return self._constants is not None or self.flip

    def to(self, device: torch.device) -> "Teacher":
        """Move weights and constants to `device`."""
        self.model.to(device=device)
        if self._constants is not None:
            scale, shift = self._constants
            self._constants = (scale.to(device), shift.to(device))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Be the teacher of a student's copy (an averaged model, say) too: it never changes."""
        return self

    @property
    def form(self) -> TeacherForm:
        """In which form it answers."""
        return TeacherForm() if self._fast is None else self._fast.form

    def use(self, fast: FastTeacher) -> None:
        """Answer with a fast teacher from now on, and let go of the exact model."""
        self._fast, self.model = fast, fast.model

    def prepare(self, batch: Tensor) -> Tensor:
        """Turn a batch as the student gets it into what the model gets, in float32."""
        if self.flip:
            batch = batch.flip(1)
        if self._constants is not None:
            scale, shift = self._constants
            batch = torch.addcmul(shift, batch.float(), scale)
        if self.image_size is not None and tuple(batch.shape[-2:]) != (self.image_size, self.image_size):
            batch = functional.interpolate(
                batch.float(), size=self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        return batch.float()

    def answer(self, images: Tensor) -> Any:
        """Return what the model returns for prepared images."""
        return self.model(images) if self._fast is None else self._fast(images)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits `(B, K)` for a batch `(B, C, H, W)` as the student gets it."""
        with torch.inference_mode():
            logits = logits_of(self.answer(self.prepare(batch)))
        # Autograd refuses to save an inference tensor for the student's backward pass: return a normal copy.
        return logits.clone()


def describe_teacher(settings: TeacherSettings, teacher: Teacher, num_classes: int) -> str:
    """Say in one line which teacher was loaded, and what its smoothing makes of the loss."""
    line = f"teacher '{settings.name}' of {settings.library}: {settings.checkpoint}, "
    line += "images converted to its own normalisation" if teacher.converts else "normalisation the student's"
    if teacher.image_size is not None:
        line += f", resized to {teacher.image_size}"
    if settings.smoothing is not None:
        entropy = target_entropy(num_classes, settings.smoothing, 1.0, settings.convention)
        line += f"; trained with smoothing {settings.smoothing:g} ({settings.convention}): the entropy of an "
        line += f"ideal one is {entropy:.3f} nats, the least that its student's loss can be"
    return line
