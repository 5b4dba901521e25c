"""The teacher of every trainer: frozen, outside the student, answering to the student's batches."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lskd.errors import LskdError
from lskd.targets import Convention
from lskd.teachers.fast import FAST_BOUND, FastMode, FastTeacher, TeacherForm, choose_fast
from lskd.teachers.outputs import Autocast, logits_of

FAST_SAMPLES = 256
"""Images, all in memory, on which the error of a fast teacher is measured at most."""


@dataclass(frozen=True)
class Normalisation:
    """What is done to pixels before a network gets them.

    Two of them are compared in the same units: of pixels in [0, 1], as timm has it, or 0 to 255, as mmcls.

    Attributes:
        mean: of each channel, taken off.
        std: of each channel, divided by.
        rgb: whether three channels are red, green and blue in this order, and not the other way round.
        source: where the numbers come from, for messages; it does not count when two are compared.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: bool = True
    source: str = field(default="", compare=False)

    @classmethod
    def of(
        cls,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        source: str = "",
        *,
        scale: float = 1.0,
    ) -> "Normalisation":
        """Return one for ``channels`` channels; other counts are averaged, as timm's loader does.

        Args:
            scale: multiplies all numbers; 255 makes mmcls' units of timm's.

        >>> Normalisation.of([0.25, 0.5, 0.75], [0.5, 0.5, 0.5], 1)
        Normalisation(mean=(0.5,), std=(0.5,), rgb=True, source='')
        """
        fitted = []
        for values in (mean, std):
            if len(values) != channels:
                values = (sum(values) / len(values),) * channels
            fitted.append(tuple(scale * float(value) for value in values))
        return cls(fitted[0], fitted[1], source=source)

    def __str__(self) -> str:
        """Return mean and deviation to three digits."""
        numbers = [", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std)]
        return f"mean ({numbers[0]}) std ({numbers[1]})"


class FrozenTeacher:
    """A frozen network that answers to the student's batches in its own normalisation and size.

    No `nn.Module` on purpose: a task or a classifier with one as an attribute does not own its parameters, so
    they are in no checkpoint, moving average, optimiser or DistributedDataParallel bucket, nobody initialises
    them, and `train()` does not reach batch norm or dropout. A copy of the student has the same teacher.

    A plugin builds the network and names its normalisation; what is done with it is the same everywhere:

        teacher = FrozenTeacher(network, Normalisation(...), batches, name="resnet50").to(device)
        check_teacher(teacher, validation_batches, num_classes, ...)  # lskd.teachers.preflight
        teacher.speed_up(training_batches, "auto")
        logits = teacher(images)

    Args:
        model: a classifier; it is put in eval mode and frozen. Of several outputs the first counts.
        own: the normalisation that it was trained with.
        student: the normalisation of the batches it will get, of as many channels.
        image_size: height and width that batches are resized to; None: they stay as they are.
        dtype: precision of weights and forward pass; None: the model's, under the caller's autocast.
        smoothing: alpha and convention that it was trained with, where known, for messages.

    Attributes:
        model: the exact network, or the copy that answers in its place.
        fast: how it answers faster; None: exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Normalisation,
        student: Normalisation,
        image_size: tuple[int, int] | None = None,
        *,
        name: str = "",
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        smoothing: tuple[float, Convention] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            model.to(dtype=dtype)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.own, self.student, self.image_size = own, student, image_size
        self.name, self.dtype, self.channels_last, self.smoothing = name, dtype, channels_last, smoothing
        self.fast: FastTeacher | None = None
        self.device = next((each.device for each in model.parameters()), torch.device("cpu"))
        self._forward: Any = model
        self._flip = own.rgb != student.rgb and len(own.mean) == 3
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64)
            for values in (student.mean, student.std, own.mean, own.std)
        )
        if self._flip:
            mean, std = mean.flip(0), std.flip(0)
        if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
            # (x s_s + m_s - m_t) / s_t as one multiplication and one addition.
            self._scale = (std / own_std).float().view(1, -1, 1, 1)
            self._shift = ((mean - own_mean) / own_std).float().view(1, -1, 1, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        """Return itself: it never changes, so a student's copy (an averaged model, say) needs no other."""
        return self

    @property
    def converts(self) -> bool:
        """Whether batches are put into another normalisation or order of channels."""
        return self._flip or self._scale is not None

    @property
    def form(self) -> TeacherForm:
        """In which form it answers."""
        return TeacherForm() if self.fast is None else self.fast.form

    def to(self, device: torch.device | None) -> "FrozenTeacher":
        """Move weights and constants to ``device``, None: nowhere; the precision stays the teacher's own."""
        if device is None:
            return self
        self.device = device
        self.model.to(device=device)
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile(**kwargs)`; a fast teacher is compiled on its own."""
        if self.fast is None:
            self._forward = torch.compile(self.model, **kwargs)

    def prepare(self, batch: Tensor) -> Tensor:
        """Return a batch of the student's as the network gets it, in float32."""
        if self._flip:
            batch = batch.flip(1)
        if self._scale is not None and self._shift is not None:
            # In float32: half a batch's precision must not be lost before the teacher sees it.
            batch = torch.addcmul(self._shift, batch.float(), self._scale)
        if self.image_size is not None and tuple(batch.shape[-2:]) != self.image_size:
            batch = functional.interpolate(
                batch.float(), size=self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        return batch.float()

    def answer(self, images: Tensor) -> Any:
        """Return what the network returns for prepared images."""
        if self.fast is not None:
            return self.fast(images)
        if self.dtype is None:
            return self._forward(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images.to(self.dtype))

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits ``(B, K)``, which carry no graph, for a batch ``(B, C, H, W)`` of the student's.

        Raises:
            LskdError: the network returns something else than logits.
        """
        if self.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits = logits_of(self.answer(self.prepare(batch)))
        # Autograd refuses to save an inference tensor for the student's backward pass: return a normal copy
        # (B x K numbers), made outside the inference mode.
        return logits.clone()

    def speed_up(
        self,
        batches: Iterable[Tensor],
        mode: FastMode,
        bound: float = FAST_BOUND,
        *,
        option: str,
        autocast: Autocast = nullcontext,
        compiled: bool = False,
        batch_size: int | None = None,
    ) -> str:
        """Answer with a fast copy from now on, let go of the exact network, and return a line about it.

        Every process gives the same images, so that all get the same teacher. They are augmented ones of
        training, because that is what the teacher is asked about: they lie further out than validation
        images, and 8 bits cost more there.

        Args:
            batches: images as the student gets them, :data:`FAST_SAMPLES` together or fewer.
            mode, bound, compiled, batch_size: see :func:`lskd.teachers.fast.choose_fast`.
            autocast: context of the exact teacher in training.

        Raises:
            LskdError: no images, a network for which the mode cannot be had, or an error above the bound.
        """
        with torch.inference_mode():
            prepared = [self.prepare(batch) for batch in batches]

        def exact(images: Tensor) -> Any:
            with autocast():
                return self.answer(images)

        try:
            self.fast, line = choose_fast(
                self.model,
                torch.cat(prepared) if prepared else torch.empty(0),
                mode,
                bound,
                exact=exact,
                compiled=compiled,
                batch_size=batch_size,
            )
        except LskdError as error:
            raise LskdError(f"teacher '{self.name}', {option}: {error}") from None
        self.model, self._forward = self.fast.model, None
        return f"teacher '{self.name}', fast: {line}"
