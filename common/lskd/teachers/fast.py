"""A faster teacher, and how far its answers are from the exact one's."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lskd.base.devices import widened
from lskd.errors import LskdError, one_line
from lskd.teachers.eight_bit import has_eight_bit, quantise_convolutions
from lskd.teachers.folding import Remainder, fold_batch_norm
from lskd.teachers.outputs import logits_of
from lskd.terms import distillation_terms

FastMode = Literal["none", "auto", "float32", "bfloat16", "int8"]
FAST_MODES: tuple[FastMode, ...] = get_args(FastMode)
FAST_BOUND = 0.01
"""Mean KL divergence in nats above which a fast teacher is refused, unless asked otherwise."""

_TIMED = 16  # images by which candidates are timed
_GAIN = 0.95  # of the time: an approximation must be worth something
_BATCH = 32


class Deviation(NamedTuple):
    """How far a fast teacher's answers are from the exact one's.

    Attributes:
        mean_kl: KL(exact || fast) in nats, mean over samples; NaN for an answer that is no number.
        max_kl: the largest of a sample.
        agreement: share of samples whose largest class is the same.
        samples: how many there were.
    """

    mean_kl: float
    max_kl: float
    agreement: float
    samples: int

    @classmethod
    def between(cls, exact: Tensor, fast: Tensor) -> "Deviation":
        """Compare logits ``(N, K)``, in :func:`lskd.accumulator_dtype`.

        >>> Deviation.between(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])).mean_kl
        0.0
        """
        # Not below 0: what rounding makes of equal answers.
        kl = distillation_terms(widened(fast), widened(exact)).kl.clamp_min(0)
        agreement = (exact.argmax(-1) == fast.argmax(-1)).float().mean()
        return cls(float(kl.mean()), float(kl.max()), float(agreement), len(exact))

    def __str__(self) -> str:
        """Say it."""
        return (
            f"KL(exact || fast) {self.mean_kl:.2g} nats on the mean of {self.samples} images, "
            f"{self.max_kl:.2g} at most, same class for {100 * self.agreement:.1f} %"
        )


@dataclass
class FastTeacher:
    """A copy of a frozen model that answers faster.

    Attributes:
        model: the copy.
        mode: "float32", "bfloat16" or "int8".
        description: what was done to it.
        dtype: of the images it is given.
        can_compile: whether `torch.compile` knows what it is made of.
        deviation: how far it is from the exact one, once that is measured.
    """

    model: nn.Module
    mode: FastMode
    description: str
    dtype: torch.dtype
    can_compile: bool = True
    deviation: Deviation | None = None

    def __post_init__(self) -> None:
        """Answer with the model as it is."""
        self._forward: Callable[[Tensor], Any] = self.model

    def __call__(self, images: Tensor) -> Any:
        """Return what the model does for images ``(B, C, H, W)``, whatever autocast says."""
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images.to(dtype=self.dtype, memory_format=torch.channels_last))

    def compile(self, **kwargs: Any) -> None:
        """Compile the model with `torch.compile(**kwargs)`, where it can be."""
        if self.can_compile:
            self._forward = torch.compile(self.model, **kwargs)


def supported_modes(device: torch.device) -> list[FastMode]:
    """Return the modes that device and torch have arithmetic for."""
    modes: list[FastMode] = ["float32"]
    if device.type == "cuda":
        modes += ["bfloat16"] if torch.cuda.is_bf16_supported() else []
    elif device.type == "cpu":
        modes += ["bfloat16"] if torch.cpu._is_avx512_bf16_supported() else []
        modes += ["int8"] if has_eight_bit() else []
    return modes


def make_fast(
    model: nn.Module,
    mode: FastMode,
    images: Tensor,
    convolutions: tuple[type[nn.Module], ...] = (),
    norms: Mapping[type[nn.Module], Remainder] | None = None,
) -> FastTeacher:
    """Return a fast copy of ``model``: batch norm folded, channels-last, and in the precision of ``mode``.

    Args:
        model: frozen, in eval mode; it is not changed.
        mode: "float32", "bfloat16" or "int8".
        images: ``(N, C, H, W)`` as the model gets them; "int8" takes its ranges from them.
        convolutions: see :func:`lskd.fold_batch_norm`.
        norms: see :func:`lskd.fold_batch_norm`.

    Raises:
        LskdError: "int8" for a model that has nothing for it.
    """
    fast = copy.deepcopy(model)
    folding = fold_batch_norm(fast, convolutions, norms)
    done = f"{mode}, {folding}, channels-last"
    fast.to(memory_format=torch.channels_last)
    if mode == "int8":
        done = done.replace("int8", "convolutions in int8", 1)
        return FastTeacher(quantise_convolutions(fast, images), mode, done, torch.float32, can_compile=False)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    return FastTeacher(fast.to(dtype=dtype), mode, done, dtype)


class FastChoice(NamedTuple):
    """What :func:`choose_fast` came to: the teacher, its error, and a line about it."""

    teacher: FastTeacher
    deviation: Deviation
    line: str


def choose_fast(
    model: nn.Module,
    images: Tensor,
    mode: FastMode,
    bound: float = FAST_BOUND,
    *,
    exact: Callable[[Tensor], Any] | None = None,
    convolutions: tuple[type[nn.Module], ...] = (),
    norms: Mapping[type[nn.Module], Remainder] | None = None,
    compiled: bool = False,
    batch_size: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda values: values,
) -> FastChoice:
    """Make a fast teacher and measure its error on real images.

    "auto" takes the fastest of the supported modes whose error is within ``bound``, as timed here. A mode
    that the device has no arithmetic for becomes "float32", and the line says so. Ranges of 8-bit numbers are
    taken from every fourth image, and the error is measured on the others.

    Args:
        model: the exact teacher, frozen, in eval mode; it is not changed.
        images: ``(N, C, H, W)`` as the model gets them, on its device; the same on every process.
        mode: any but "none".
        bound: largest mean KL(exact || fast) in nats.
        exact: what the exact teacher answers with; None: the model.
        convolutions: see :func:`lskd.fold_batch_norm`.
        norms: see :func:`lskd.fold_batch_norm`.
        compiled: compile the fast teacher, which needs a C++ compiler on the CPU.
        batch_size: of training, which is what is compiled for.
        agree: adds up a tensor over all processes, so that they choose the same.

    Raises:
        LskdError: an error above the bound, a model that the mode cannot be had for, no images, no compiler.
    """
    if len(images) == 0:
        raise LskdError("a fast teacher needs images to measure its error on; give some, or switch it off.")
    supported = supported_modes(images.device)
    notes = []
    wanted: list[FastMode] = [mode] if mode in supported else ["float32"]
    if mode == "auto":
        wanted = supported
    elif mode not in supported:
        notes.append(f"no {mode} on this {'processor' if images.device.type == 'cpu' else 'device'}")
    calibration, rest = images[::4], images
    if len(images) >= 8:
        rest = images[torch.arange(len(images), device=images.device) % 4 != 0]
    exact = exact or model
    answers = _logits(exact, rest)
    timed = images[:_TIMED]
    exact_time = _time(exact, timed)
    candidates = []
    for name in wanted:
        try:
            fast = make_fast(model, name, calibration, convolutions, norms)
            deviation = Deviation.between(answers, _logits(fast, rest))
            candidates.append((fast, deviation, _time(fast, timed)))
        except LskdError as error:
            if mode != "auto":
                raise LskdError(f"no fast teacher in {name}: {error}; take auto, float32 or none.") from None
            notes.append(f"no {name}: {error}")
        except RuntimeError as error:  # an operation that this precision does not have
            if mode != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            notes.append(f"no {name}: {one_line(error, 80)}")
    times = agree(torch.tensor([exact_time, *(seconds for *_, seconds in candidates)], dtype=torch.float64))
    ratios = (times[1:] / times[0]).tolist()
    best: int | None = None
    for index, (fast, deviation, _) in enumerate(candidates):
        if deviation.mean_kl <= bound and (best is None or ratios[index] < _GAIN * ratios[best]):
            best = index
        if mode == "auto" and len(candidates) > 1:
            notes.append(f"{fast.mode} {1 / ratios[index]:.2g}x, KL {deviation.mean_kl:.2g}")
    if best is None:
        raise LskdError(
            f"the fast teacher ({candidates[0][0].mode}) is too far from the exact one: {candidates[0][1]}, "
            f"the bound is {bound:g}; take another mode, or none."
        )
    fast, deviation, _ = candidates[best]
    gain = 1 / ratios[best]
    if compiled and not fast.can_compile:
        notes.append(f"{fast.mode} is not compiled")
    elif compiled:
        size = batch_size or len(timed)
        _compile(fast, timed, size)
        deviation = Deviation.between(answers, _logits(fast, rest, size))
        gain = exact_time / len(timed) * size / _time(fast, _repeated(timed, size))
        if not deviation.mean_kl <= bound:
            raise LskdError(
                f"the compiled teacher is too far from the exact one: {deviation}; do not compile it."
            )
    fast.deviation = deviation
    line = f"{fast.description}: {gain:.2g} times as fast as the exact one; {deviation}"
    return FastChoice(fast, deviation, line + (f" ({'; '.join(notes)})" if notes else ""))


def _compile(fast: FastTeacher, images: Tensor, batch_size: int) -> None:
    # Frozen weights are laid out once, and activations join the convolutions before them.
    options = {"freezing": True} if images.device.type == "cpu" else None
    fast.compile(dynamic=False, options=options)
    try:
        with torch.inference_mode():
            fast(_repeated(images, batch_size))
        fast.description += ", compiled"
    except Exception as error:  # of torch's compiler, or of the C++ compiler that it calls
        raise LskdError(
            f"the fast teacher cannot be compiled here ({one_line(error, 120)}); do not compile it."
        ) from None


def _repeated(images: Tensor, batch_size: int) -> Tensor:
    return images[torch.arange(batch_size, device=images.device) % len(images)]


def _logits(teacher: Callable[[Tensor], Any], images: Tensor, batch_size: int | None = None) -> Tensor:
    rows = []
    with torch.inference_mode():
        size = batch_size or _BATCH
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            # A compiled teacher is asked with the size it was compiled for.
            answer = teacher(batch if batch_size is None else _repeated(batch, batch_size))
            rows.append(logits_of(answer)[: len(batch)].float())
    return torch.cat(rows)


def _time(teacher: Callable[[Tensor], Any], images: Tensor) -> float:
    """Return the seconds of a batch, the better of two after one to warm up."""
    best = float("inf")
    with torch.inference_mode():
        for number in range(3):
            start = time.perf_counter()
            teacher(images)
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            if number > 0:
                best = min(best, time.perf_counter() - start)
    return best
