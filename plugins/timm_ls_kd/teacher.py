"""The teacher: a frozen timm model that reads the student's batches in its own normalisation and size."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from lskd import Convention, LskdError, target_mass
from lskd.teachers.fast import FastTeacher, TeacherForm
from lskd.teachers.outputs import logits_of
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.inputs import input_channels
from timm_ls_kd.models import check_model_name, create, first_channels, input_arguments, load_weights
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.run_settings import settings_beside


class Teacher:
    """A frozen teacher that answers to the student's batches.

    No `nn.Module` on purpose: a task that holds one as an attribute does not own its parameters, so they are
    in no checkpoint, moving average, optimiser or DistributedDataParallel bucket.

    Args:
        model: a classifier; it is put in eval mode and frozen.
        teacher_norm: the normalisation the model was trained with.
        student_norm: the normalisation of the batches it will get.
        image_size: resize batches to this height and width, None: leave them as they are.
        dtype: precision of weights and forward pass; None: float32 weights, and the caller's autocast.
        channels_last: memory layout of the weights.
        smoothing: alpha and convention that the model was trained with, where known.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher_norm: Normalisation,
        student_norm: Normalisation,
        image_size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        smoothing: tuple[float, Convention] | None = None,
    ) -> None:
        """Freeze the model."""
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            model.to(dtype=dtype)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.teacher_norm = teacher_norm
        self.image_size = image_size
        self.smoothing = smoothing
        self.dtype = dtype
        self._forward: Any = model
        self._fast: FastTeacher | None = None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        if not teacher_norm.same_as(student_norm):
            # (x s_s + m_s - m_t) / s_t as one multiplication and one addition.
            mean, std = (torch.tensor(v, dtype=torch.float64) for v in (student_norm.mean, student_norm.std))
            own_mean, own_std = (
                torch.tensor(v, dtype=torch.float64) for v in (teacher_norm.mean, teacher_norm.std)
            )
            self._scale = (std / own_std).float().view(1, -1, 1, 1)
            self._shift = ((mean - own_mean) / own_std).float().view(1, -1, 1, 1)

    def to(self, device: torch.device | None) -> "Teacher":
        """Move weights and constants to `device`; precision stays the teacher's own."""
        self.model.to(device=device)
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile(**kwargs)`; a fast teacher is compiled on its own."""
        if self._fast is None:
            self._forward = torch.compile(self.model, **kwargs)

    def use(self, fast: FastTeacher) -> None:
        """Answer with a fast teacher from now on, and let go of the exact model."""
        self._fast = fast
        self.model, self._forward = fast.model, None

    @property
    def form(self) -> TeacherForm:
        """In which form it answers."""
        return TeacherForm() if self._fast is None else self._fast.form

    def prepare(self, batch: Tensor) -> Tensor:
        """Turn a batch in the student's normalisation into what the model gets, in float32."""
        if self._scale is not None and self._shift is not None:
            # In float32: half a batch's precision must not be lost before the teacher sees it.
            batch = torch.addcmul(self._shift, batch.float(), self._scale)
        if self.image_size is not None and tuple(batch.shape[-2:]) != self.image_size:
            batch = functional.interpolate(
                batch.float(), size=self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        return batch.float()

    def answer(self, images: Tensor) -> Any:
        """Return what the model returns for prepared images."""
        if self._fast is not None:
            return self._fast(images)
        if self.dtype is None:
            return self._forward(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images.to(self.dtype))

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits `(B, K)` for a batch `(B, C, H, W)` in the student's normalisation."""
        with torch.inference_mode():
            logits = logits_of(self.answer(self.prepare(batch)))
        # Autograd refuses to save an inference tensor for the student's backward pass: hand out a normal copy
        # (B x K numbers), made outside the inference mode.
        return logits.clone()


def create_teacher(
    config: KdConfig,
    num_classes: int,
    in_chans: int,
    student_norm: Normalisation,
    channels_last: bool = False,
) -> Teacher:
    """Create the teacher that `config` names, with its weights loaded, on the CPU.

    Args:
        config: the distillation arguments.
        num_classes: the student's class count.
        in_chans: the student's input channels.
        student_norm: normalisation of the batches, as the loader really applies it.
        channels_last: whether the student uses that memory layout.

    Raises:
        LskdError: unknown model, weights that cannot be had or do not fit, another class or channel count.
    """
    check_model_name(config.teacher, "teacher")
    if config.checkpoint is None:
        model, settings, source = _pretrained(config, num_classes, in_chans)
    else:
        model, settings, source = _from_checkpoint(config, num_classes, in_chans)
    try:
        data_config = timm.data.resolve_data_config(settings, model=model)
    except (AssertionError, TypeError, ValueError):
        raise LskdError(
            f"args.yaml beside {config.checkpoint} names an image size, mean or std that timm cannot use; "
            "repair it or move the checkpoint elsewhere."
        ) from None
    channels = first_channels(model)
    return Teacher(
        model,
        Normalisation.of(data_config["mean"], data_config["std"], channels, source),
        student_norm,
        image_size=_image_size(config, model, settings, data_config["input_size"]),
        dtype=None if config.teacher_dtype is None else getattr(torch, config.teacher_dtype),
        channels_last=channels_last,
        smoothing=_smoothing(settings),
    )


def announce_teacher(kd: KdConfig) -> str:
    """Say which weights are about to be loaded; a download, or a hub that does not answer, takes its time."""
    return f"teacher '{kd.teacher}': loading {kd.checkpoint or 'the pretrained weights of timm'}"


def describe_teacher(
    kd: KdConfig, teacher: Teacher, student_norm: Normalisation, num_classes: int
) -> Iterator[str]:
    """Say how the teacher's input is made from the student's, and warn of a temperature that spoils it."""
    own = teacher.teacher_norm
    line = f"teacher '{kd.teacher}': normalisation {own}, {own.source}; the student's is "
    line += "the same" if own.same_as(student_norm) else f"{student_norm}, converted"
    if teacher.image_size is not None:
        line += f"; images resized to {teacher.image_size[0]} x {teacher.image_size[1]} where they differ"
    yield line
    if teacher.smoothing is not None and kd.temperature > 1:
        alpha, convention = teacher.smoothing
        cold, hot = (target_mass(num_classes, alpha, t, convention) for t in (1.0, kd.temperature))
        yield (
            f"teacher '{kd.teacher}' was trained with smoothing {alpha:g}: what it gives its own class falls "
            f"from about {cold:.3f} to {hot:.3f} at --kd-temperature {kd.temperature:g}, which often harms; "
            "1 is the paper's"
        )


def _pretrained(config: KdConfig, num_classes: int, in_chans: int) -> tuple[nn.Module, dict[str, Any], str]:
    name = config.teacher
    known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    mend = "give your own with --kd-teacher-checkpoint FILE"
    if ":" not in name and (known is None or not known.has_weights):
        raise LskdError(f"timm has no pretrained weights for teacher '{name}'; {mend}.")
    if known is not None:
        _check_counts(name, known.num_classes, num_classes, known.input_size[0], in_chans, mend)
    model = create(
        name,
        "teacher",
        mend="give the weights with --kd-teacher-checkpoint FILE",
        pretrained=True,
        extra=_arguments(config, {}),
    )
    # num_classes was not passed: this head is the one that came with the weights.
    _check_counts(
        name, int(getattr(model, "num_classes", 0)), num_classes, first_channels(model), in_chans, mend
    )
    return model, {}, "of its pretrained weights"


def _check_counts(
    name: str, classes: int, wanted_classes: int, channels: int, wanted_channels: int, mend: str
) -> None:
    if classes != wanted_classes:
        raise LskdError(
            f"teacher '{name}' has {classes} classes in its pretrained weights, "
            f"the student {wanted_classes}; {mend}, trained on the student's classes."
        )
    if channels != wanted_channels:
        raise LskdError(
            f"teacher '{name}' takes {channels} input channels, the student {wanted_channels}; "
            f"{mend}, trained with --in-chans {wanted_channels}."
        )


def _from_checkpoint(
    config: KdConfig, num_classes: int, in_chans: int
) -> tuple[nn.Module, dict[str, Any], str]:
    checkpoint = str(config.checkpoint)
    settings = settings_beside(Path(checkpoint), config.teacher)
    trained_channels = input_channels(settings)
    if settings and trained_channels != in_chans:
        raise LskdError(
            f"teacher checkpoint {checkpoint} takes {trained_channels} input channels, "
            f"the student {in_chans}; give a teacher that was trained with --in-chans {in_chans}."
        )
    model = create(
        config.teacher,
        "teacher",
        pretrained=False,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=settings.get("gp"),
        extra=_arguments(config, settings),
    )
    load_weights(model, f"teacher '{config.teacher}'", checkpoint)
    if settings:
        return model, settings, "of the run beside its checkpoint (args.yaml)"
    return model, {}, "timm's default for this model"


def _smoothing(settings: dict[str, Any]) -> tuple[float, Convention] | None:
    alpha = settings.get("smoothing")
    if settings.get("kd_teacher") or not isinstance(alpha, float) or not 0 < alpha < 1:
        return None
    return alpha, "paper" if settings.get("smoothing_convention") == "paper" else "uniform"


def _arguments(config: KdConfig, settings: dict[str, Any]) -> dict[str, Any]:
    if config.teacher_img_size is not None:
        settings = {**settings, "img_size": config.teacher_img_size}
    return {**input_arguments(config.teacher, settings), **config.teacher_kwargs}


def _image_size(
    config: KdConfig, model: nn.Module, settings: dict[str, Any], trained_at: Sequence[int]
) -> tuple[int, int] | None:
    """Return the height and width to resize batches to; None: unknown, the teacher gets the student's."""
    if config.teacher_img_size is not None:
        return config.teacher_img_size, config.teacher_img_size
    pretrained_cfg = getattr(model, "pretrained_cfg", {})
    size: Sequence[int]
    if pretrained_cfg.get("fixed_input_size"):
        size = (
            getattr(getattr(model, "patch_embed", None), "img_size", None)
            or pretrained_cfg["input_size"][-2:]
        )
    elif config.checkpoint is None or "img_size" in settings or "input_size" in settings:
        # Both null in a run's args.yaml: it was trained at the model's default, which timm has resolved.
        size = trained_at[-2:]
    else:
        return None
    return int(size[0]), int(size[1])
