"""A faster copy of a teacher (batch norm folded, fewer bits), and how far it is from the exact one."""

import copy
import importlib.util
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lskd.base.tensors import summed_over_processes, widened
from lskd.errors import LskdError, one_line
from lskd.teachers.outputs import logits_of, whole_batch
from lskd.terms import distillation_terms

FastMode = Literal["none", "auto", "float32", "bfloat16", "int8"]
FAST_MODES: tuple[FastMode, ...] = get_args(FastMode)
FAST_BOUND = 0.01
"""Mean KL divergence in nats above which a fast teacher is refused, unless asked otherwise."""

_TIMED = 16  # images by which candidates are timed
_GAIN = 0.95  # of the time: an approximation must be worth something
_BATCH = 32
# Layers that may be folded, of torch and of timm, which is not imported here. Subclasses do not count: one
# that standardises its weights would come out wrong.
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d", "Conv2dSame"})
_NORMS = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d"})
# How far two answers to one image may be apart, in units of `lskd.soft_labels.forms.stored_difference`.
_TOLERANCES = {"float32": 0.01, "bfloat16": 0.1, "int8": 0.1}


@dataclass(frozen=True)
class TeacherForm:
    """In which form a teacher answers, and how far its answers are from the exact one's.

    Attributes:
        mode: "none" for the exact teacher, or "float32", "bfloat16" or "int8".
        made: what was done to a fast one.
        mean_kl: KL(exact || fast) in nats, mean over images; NaN for an answer that is no number.
        max_kl: the largest of an image.
        agreement: share of images whose largest class is the same.
        images: how many there were.
    """

    mode: FastMode = "none"
    made: str = ""
    mean_kl: float = 0.0
    max_kl: float = 0.0
    agreement: float = 1.0
    images: int = 0

    @classmethod
    def measured(cls, mode: FastMode, made: str, exact: Tensor, fast: Tensor) -> "TeacherForm":
        """Return the form of a teacher by its logits ``(N, K)`` and those of the exact one.

        >>> TeacherForm.measured("int8", "", torch.zeros(1, 2), torch.zeros(1, 2)).mean_kl
        0.0
        """
        # Not below 0: what rounding makes of equal answers.
        kl = distillation_terms(widened(fast), widened(exact)).kl.clamp_min(0)
        agreement = (exact.argmax(-1) == fast.argmax(-1)).float().mean()
        return cls(mode, made, float(kl.mean()), float(kl.max()), float(agreement), len(exact))

    @classmethod
    def of_json(cls, content: Any) -> "TeacherForm":
        """Return what :meth:`as_json` described.

        Raises:
            KeyError: a form that this release does not know.
            TypeError: another structure; OverflowError a number that is none.
        """
        if content["mode"] == "exact":
            return cls()
        if content["mode"] not in _TOLERANCES:
            raise KeyError(content["mode"])
        measured = [content[name] for name in ("mean_kl", "max_kl", "agreement", "images")]
        if not isinstance(content["made"], str) or any(isinstance(number, str) for number in measured):
            raise TypeError("no text, or no numbers")
        mean_kl, max_kl, agreement, images = (float(number) for number in measured)
        return cls(content["mode"], content["made"], mean_kl, max_kl, agreement, int(images))

    @property
    def name(self) -> str:
        """The name in messages and manifests."""
        return "exact" if self.mode == "none" else self.mode

    @property
    def tolerance(self) -> float | None:
        """How far two answers may be apart, see :func:`stored_difference`; None: as the caller knows."""
        return _TOLERANCES.get(self.mode)

    @property
    def error(self) -> str:
        """How far it is from the exact one, in words."""
        return (
            f"KL(exact || fast) {self.mean_kl:.2g} nats on the mean of {self.images} images, "
            f"{self.max_kl:.2g} at most, same class for {100 * self.agreement:.1f} %"
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as it lies in a manifest."""
        return {"mode": "exact"} if self.mode == "none" else asdict(self)

    def __str__(self) -> str:
        """Return whose answers these are."""
        if self.mode == "none":
            return "of the exact teacher"
        return f"of a fast teacher ({self.mode}): {self.error}"


@dataclass
class FastTeacher:
    """A copy of a frozen model that answers faster.

    Attributes:
        model: the copy.
        form: in which form it answers.
        dtype: of the images it is given.
    """

    model: nn.Module
    form: TeacherForm
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Answer with the model as it is."""
        self._forward: Callable[[Tensor], Any] = self.model

    def __call__(self, images: Tensor) -> Any:
        """Return what the model does for images ``(B, C, H, W)``, whatever autocast says."""
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images.to(dtype=self.dtype, memory_format=torch.channels_last))

    def compile(self, **kwargs: Any) -> None:
        """Compile the model with `torch.compile(**kwargs)`."""
        self._forward = torch.compile(self.model, **kwargs)


def _may_fold(module: nn.Module, names: frozenset[str]) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith(("torch.nn.", "timm.layers."))


def fold_batch_norm(model: nn.Module) -> str:
    """Fold every batch norm of ``model`` that follows a convolution, in place; return a few words about it.

    The model is traced to see what follows what; its modules are changed and its own `forward` stays in use.
    A pair is folded where nothing else sees what is between the two and neither is used a second time. A
    model that cannot be traced is left as it is.

    Raises:
        ValueError: for a model in training mode.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fold_batch_norm(net), type(net[1]).__name__
    ('1 of 1 batch norms folded', 'Identity')
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    total = sum(_may_fold(module, _NORMS) for module in model.modules())
    if total == 0:
        return "no batch norm to fold"
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # a model's own code runs on stand-ins for tensors: anything may come
        return f"batch norm not folded (it cannot be traced: {one_line(error, 80)})"
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # Parameters that are read by name, too: a tied weight must not be changed for its other reader.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    folded = 0
    for node in graph.nodes:
        if node.op != "call_module" or not _may_fold(modules[str(node.target)], _NORMS):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        names = (str(source.target), str(node.target))
        layer, norm = (modules[name] for name in names)
        if not (_may_fold(layer, _CONVOLUTIONS) and _foldable(layer, norm)):
            continue
        if calls[id(layer)] > 1 or calls[id(norm)] > 1 or read & set(names):
            continue
        fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        model.set_submodule(names[0], fused.requires_grad_(False))
        timms = type(norm).__name__ == "BatchNormAct2d"  # of which dropout and activation are left
        left = nn.Sequential(norm.drop, norm.act) if timms else nn.Identity()
        model.set_submodule(names[1], left.eval())
        folded += 1
    return f"{folded} of {total} batch norms folded"


class _Tracer(torch.fx.Tracer):
    """Sees the layers that may be folded as one step each, whichever package they are from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _may_fold(m, _CONVOLUTIONS | _NORMS) or super().is_leaf_module(m, module_qualified_name)


def _foldable(layer: Any, norm: Any) -> bool:
    if norm.running_mean is None or norm.running_var is None:  # normalises by the batch, even in eval mode
        return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm))
    parametrised = hasattr(layer, "parametrizations")
    return not hooked and not parametrised and bool(layer.out_channels == norm.num_features)


# To what oneDNN can be told to keep, on a CPU that could do more.
_NO_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})
_NO_BF16 = _NO_VNNI | {"AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE_VNNI"}


def _is_limited_to(instructions: frozenset[str]) -> bool:
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    return next(filter(None, limits), "").upper() in instructions


def supported_modes(device: torch.device) -> list[FastMode]:
    """Return the modes that device and torch have arithmetic for."""
    modes: list[FastMode] = ["float32"]
    if device.type == "cuda":
        modes += ["bfloat16"] if torch.cuda.is_bf16_supported() else []
    elif device.type == "cpu":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() and not _is_limited_to(_NO_BF16)
        modes += ["bfloat16"] if has_bfloat16 else []
        modes += ["int8"] if _has_eight_bit() else []
    return modes


def _has_eight_bit() -> bool:
    """Return whether CPU and torch have fast 8-bit convolutions, whose sums do not overflow."""
    if not torch.cpu._is_vnni_supported() or _is_limited_to(_NO_VNNI):
        return False
    if "onednn" not in torch.backends.quantized.supported_engines:
        return False
    try:
        # torch has announced its end without a successor of its own: without it, it is as a CPU without it.
        return importlib.util.find_spec("torch.ao.quantization.quantize_fx") is not None
    except ImportError:
        return False


def quantise_convolutions(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose convolutions, and the sums between them, work on 8-bit numbers.

    Weights have a scale for each channel, activations one for each layer, from the range that they have on
    ``images``. Linear layers stay as they are: 8 bits of a logit are too few for a teacher.

    Raises:
        LskdError: the model cannot be traced or has nothing that can be quantised.
    """
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.backend_config import get_onednn_backend_config
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping: Any = get_default_qconfig_mapping("onednn").set_object_type(nn.Linear, None)
    backend = get_onednn_backend_config()
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "onednn"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that it will go some day, see _has_eight_bit
            observed = prepare_fx(model, mapping, (images[:1],), backend_config=backend)
            for start in range(0, len(images), 16):
                observed(images[start : start + 16])
            quantised: nn.Module = convert_fx(observed, backend_config=backend)
            quantised(images[:1])
    except Exception as error:  # a model's own code runs on stand-ins for tensors: anything may come
        raise LskdError(f"it cannot be traced or computed in 8 bits: {one_line(error, 80)}") from None
    finally:
        torch.backends.quantized.engine = before
    if not any("quantized" in type(module).__module__ for module in quantised.modules()):
        raise LskdError("it has no convolution that can be computed in 8 bits")
    return quantised


def _copy_of(model: nn.Module, mode: FastMode, images: Tensor) -> FastTeacher:
    """Return a copy with batch norm folded, channels-last, and in the precision of ``mode``."""
    fast = copy.deepcopy(model)
    done = f"{fold_batch_norm(fast)}, channels-last"
    fast.to(memory_format=torch.channels_last)
    if mode == "int8":
        form = TeacherForm(mode, f"convolutions in int8, {done}")
        return FastTeacher(quantise_convolutions(fast, images), form, torch.float32)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    return FastTeacher(fast.to(dtype=dtype), TeacherForm(mode, f"{mode}, {done}"), dtype)


def choose_fast(
    model: nn.Module,
    images: Tensor,
    mode: FastMode,
    bound: float = FAST_BOUND,
    *,
    exact: Callable[[Tensor], Any] | None = None,
    compiled: bool = False,
    batch_size: int | None = None,
) -> tuple[FastTeacher, str]:
    """Return a fast teacher, whose error is measured on real images, and a line about it.

    "auto" takes the fastest of the supported modes whose error is within ``bound``, as timed here. A mode
    that the device has no arithmetic for becomes "float32", and the line says so. Ranges of 8-bit numbers are
    taken from every fourth image, and the error is measured on the others.

    Args:
        model: the exact teacher, frozen, in eval mode; it is not changed.
        images: ``(N, C, H, W)`` as the model gets them, on its device; the same on every process.
        mode: any but "none".
        bound: largest mean KL(exact || fast) in nats.
        exact: what the exact teacher answers with; None: the model.
        compiled: compile the fast teacher, which needs a C++ compiler on the CPU.
        batch_size: of training, which is what is compiled for.

    Raises:
        LskdError: an error above the bound, a model that the mode cannot be had for, no images, no compiler.
    """
    if len(images) == 0:
        raise LskdError(
            "a fast teacher needs images to measure its error on: give some, or use the exact one."
        )
    notes, wanted = [], supported_modes(images.device)
    if mode in wanted:
        wanted = [mode]
    elif mode != "auto":
        wanted = ["float32"]
        notes.append(f"no {mode} on this {'CPU' if images.device.type == 'cpu' else 'device'}")
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
            fast = _copy_of(model, name, calibration)
            fast.form = TeacherForm.measured(name, fast.form.made, answers, _logits(fast, rest))
            candidates.append((fast, _time(fast, timed)))
        except LskdError as error:
            if mode != "auto":
                raise LskdError(f"no fast teacher in {name}: {error}; take auto, float32 or none.") from None
            notes.append(f"no {name}: {error}")
        except RuntimeError as error:  # an operation that this precision does not have
            if mode != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            notes.append(f"no {name}: {one_line(error, 80)}")
    # Over all processes, so that they choose the same.
    times = summed_over_processes(
        torch.tensor([exact_time, *(seconds for _, seconds in candidates)], dtype=torch.float64)
    )
    ratios = (times[1:] / times[0]).tolist()
    best: int | None = None
    for index, (fast, _) in enumerate(candidates):
        if fast.form.mean_kl <= bound and (best is None or ratios[index] < _GAIN * ratios[best]):
            best = index
        if mode == "auto" and len(candidates) > 1:
            notes.append(f"{fast.form.mode} {1 / ratios[index]:.2g}x, KL {fast.form.mean_kl:.2g}")
    if best is None:
        form = candidates[0][0].form
        raise LskdError(
            f"the fast teacher ({form.mode}) is too far from the exact one: {form.error}, "
            f"the bound is {bound:g}; take another mode, or none."
        )
    fast, gain = candidates[best][0], 1 / ratios[best]
    if compiled and fast.form.mode == "int8":  # of whose convolutions torch.compile knows nothing
        notes.append(f"{fast.form.mode} is not compiled")
    elif compiled:
        size = batch_size or len(timed)
        _compile(fast, timed, size)
        made = f"{fast.form.made}, compiled"
        fast.form = TeacherForm.measured(fast.form.mode, made, answers, _logits(fast, rest, size))
        gain = exact_time / len(timed) * size / _time(fast, whole_batch(timed, size))
        if not fast.form.mean_kl <= bound:
            raise LskdError(
                f"the compiled teacher is too far from the exact one: {fast.form.error}; do not compile it."
            )
    line = f"{fast.form.made}: {gain:.2g} times as fast as the exact one; {fast.form.error}"
    return fast, line + (f" ({'; '.join(notes)})" if notes else "")


def _compile(fast: FastTeacher, images: Tensor, batch_size: int) -> None:
    # Frozen weights are laid out once, and activations join the convolutions before them.
    options = {"freezing": True} if images.device.type == "cpu" else None
    fast.compile(dynamic=False, options=options)
    try:
        with torch.inference_mode():
            fast(whole_batch(images, batch_size))
    except Exception as error:  # of torch's compiler, or of the C++ compiler that it calls
        raise LskdError(
            f"the fast teacher cannot be compiled here ({one_line(error, 120)}); do not compile it."
        ) from None


def _logits(teacher: Callable[[Tensor], Any], images: Tensor, batch_size: int | None = None) -> Tensor:
    rows = []
    with torch.inference_mode():
        size = batch_size or _BATCH
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            # A compiled teacher is asked with the size it was compiled for.
            answer = teacher(batch if batch_size is None else whole_batch(batch, batch_size))
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
