"""Binary convolutions on the CPU by xor and popcount, compiled of `xnor.c` when the package was built."""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd import LskdError
from lskd.kernel.native import in_threads, why_not_compiled

BUILDS = ("plain", "avx2", "avx512")
"""What `xnor.c` is compiled for, the fastest last; avx512 has VPOPCNTDQ."""
_WORD = _BLOCK = 32  # channels in a word, output channels in a block: xnor.c
_BAND = 1024  # pixels that are done together, so that their words stay in the first-level cache
# Below as many products a second thread costs more than it saves.
_SMALLEST_SHARE = 1 << 25
_FORCED: list[str | None] = []


class Weights(NamedTuple):
    """Binary weights as the compiled code reads them.

    Attributes:
        words: `(blocks, k * k * words, 32)`, int32: bit c of a word is channel c, set for +1.
        missing: `(k * k, blocks * 32)`, int32: what a tap adds that lies outside the image, to be taken out.
        shape: `(out, in, k, k)`.
    """

    words: Tensor
    missing: Tensor
    shape: tuple[int, int, int, int]


class Following(NamedTuple):
    """What follows a convolution and is done with it: sum, then RPReLU.

    Attributes:
        shift: `(out,)`, added to the scaled integers.
        slope: `(out,)`, of sums below 0.
        after: `(out,)`, added last.
    """

    shift: Tensor
    slope: Tensor
    after: Tensor


class _Layer(ctypes.Structure):
    """`struct layer` of xnor.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "threshold", "weights", "missing", "scale", "shift")),
        *((name, ctypes.c_void_p) for name in ("residual", "slope", "after", "out")),
        *((name, ctypes.c_int64) for name in ("height", "width", "channels", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("out_channels", "residual_channels")),
        *((name, ctypes.c_int64) for name in ("size", "stride", "padding")),
    ]


@cache
def library() -> Any:
    """Return the compiled library, or None, and then say so: once in a process."""
    path = Path(__file__).with_name("xnor.so")
    found = load(path)
    if found is None:
        reason = why_not_compiled(path)
        warnings.warn(f"binary layers run by torch, several times slower: {reason}.", stacklevel=2)
    return found


def load(path: Path) -> Any:
    """Return a library compiled of `xnor.c`, or None where it is not there or not for this machine."""
    try:
        found = ctypes.CDLL(str(path))
        usable = BUILDS[: found.lskd_xnor_builds()]
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in usable:
        convolve = getattr(found, f"lskd_xnor_{name}")
        convolve.argtypes, convolve.restype = [pointer, *[number] * 3, *[pointer] * 3], None
        rate = getattr(found, f"lskd_xnor_rate_{name}")
        rate.argtypes, rate.restype = [number, pointer, pointer, number], number
    return found


def builds() -> tuple[str, ...]:
    """Return those of `BUILDS` that are compiled and that this processor can run, the fastest last."""
    found = library()
    return () if found is None else BUILDS[: found.lskd_xnor_builds()]


def build() -> str | None:
    """Return which build runs: the fastest, unless one is `forced`; None: torch's operations."""
    return _FORCED[-1] if _FORCED else (builds() or (None,))[-1]


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run binary layers by one of `builds()` within the block, or by torch's operations (None)."""
    if name is not None and name not in builds():
        raise LskdError(f"there is no build {name!r} here; this processor can run {', '.join(builds())}.")
    _FORCED.append(name)
    try:
        yield
    finally:
        _FORCED.pop()


def weights_of(signs: NDArray[np.bool_]) -> Weights:
    """Return signs `(out, in, k, k)`, true for +1, in the order in which the compiled code reads them."""
    out, channels, size, _ = signs.shape
    words, blocks = -(-channels // _WORD), -(-out // _BLOCK)
    ordered = np.zeros((blocks, size * size * words, _BLOCK), np.int32)
    missing = np.empty((size * size, blocks * _BLOCK), np.int32)
    for block in range(blocks):  # one after the other: a bit takes a byte here
        lanes = slice(block * _BLOCK, (block + 1) * _BLOCK)
        some = signs[lanes].transpose(0, 2, 3, 1).reshape(-1, size * size, channels)
        taps = np.zeros((_BLOCK, size * size, words * _WORD), np.bool_)
        taps[: len(some), :, :channels] = some
        ordered[block] = np.packbits(taps, axis=2, bitorder="little").view("<i4").reshape(_BLOCK, -1).T
        # The words of a tap outside the image are 0, so each of its weights of +1 counts as a difference.
        missing[:, lanes] = 2 * taps.sum(2, dtype=np.int32).T - channels
    shape = (out, channels, size, size)
    return Weights(torch.from_numpy(ordered), torch.from_numpy(missing), shape)


def takes(x: Tensor, *others: Tensor) -> bool:
    """Return whether compiled code can run here: float32 on the CPU, no gradient, nobody tracing."""
    return not (torch.is_grad_enabled() and x.requires_grad) and computes(x, *others)


def computes(*tensors: Tensor) -> bool:
    """Return whether compiled code can compute with tensors, whose gradients are the caller's affair."""
    return (
        build() is not None
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
        and not torch.compiler.is_compiling()
    )


def convolve(
    x: Tensor,
    threshold: Tensor,
    weights: Weights,
    scale: Tensor,
    stride: int,
    padding: int,
    following: Following | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the convolution of sign(x + threshold) with binary weights, padded with 0, by compiled code.

    The integers are exact, and every rounding after them is that of torch's operations one after the other,
    `prelu(integers * scale + shift + residual, slope) + after`: the result equals theirs to the bit.

    Args:
        x: `(B, in, H, W)`, float32 on the CPU; channels-last is fastest.
        threshold: `(in,)`.
        scale: `(out,)`, of the integers.
        following: what is done with the result, or nothing.
        residual: with `following`: `(B, R, H', W')`, repeated over channels, as torch.cat would.

    Returns:
        `(B, out, H', W')`, channels-last.

    Raises:
        RuntimeError: for images that are smaller than the kernel, as torch does, or too large.
        ValueError: for tensors that do not fit each other.
    """
    out, channels, size, _ = weights.shape
    batch, own, height, width = x.shape
    if own != channels:
        raise ValueError(f"the images have {own} channels, the weights {channels}")
    # What xnor.c counts by: 16 bits for taps, 32 for the words of the padded image.
    words = -(-channels // _WORD)
    if max(size, padding) >= 1 << 15 or (height + 2 * padding) * (width + 2 * padding) * words >= 1 << 31:
        raise RuntimeError(f"padding of {padding} or images of {height} x {width} are too large")
    rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    if min(rows, columns) < 1:
        raise RuntimeError(f"images of {height} x {width} are smaller than the kernel")
    vectors = [each.to(torch.float32).contiguous() for each in (threshold, scale, *(following or ()))]
    if [each.numel() for each in vectors] != [channels, *[out] * (len(vectors) - 1)]:
        raise ValueError(f"a threshold or scale does not fit {channels} and {out} channels")
    result = torch.empty(batch, out, rows, columns, memory_format=torch.channels_last)
    x = _channels_last(x)
    repeated, rest = out, cast(list[Tensor | None], [None] * 4)
    if following is not None:
        assert residual is not None
        repeated = residual.shape[1]
        if (residual.shape[0], *residual.shape[2:]) != (batch, rows, columns) or out % repeated:
            raise ValueError(f"a residual of {tuple(residual.shape)} does not fit {tuple(result.shape)}")
        shift, slope, after = vectors[2:]
        rest = [shift, _channels_last(residual), slope, after]
    tensors = (x, vectors[0], weights.words, weights.missing, vectors[1], *rest, result)
    sizes = (height, width, channels, rows, columns, out, repeated, size, stride, padding)
    layer = _Layer(*(None if each is None else each.data_ptr() for each in tensors), *sizes)

    band = max(1, min(rows, _BAND // columns))
    work = result.numel() * channels * size * size
    threads = max(1, min(torch.get_num_threads(), work // _SMALLEST_SHARE, batch * rows))
    padded = ((band - 1) * stride + size) * (width + 2 * padding)
    lengths = (padded * words, size * size * words, 3 * band * columns)
    function: Callable[..., None] = getattr(library(), f"lskd_xnor_{build()}")

    def share(thread: int) -> None:
        first, end = (batch * rows * each // threads for each in (thread, thread + 1))
        scratch = [np.empty(length, np.int32) for length in lengths]
        function(ctypes.addressof(layer), first, end, band, *(each.ctypes.data for each in scratch))

    in_threads(share, threads)
    return result


def _channels_last(x: Tensor) -> Tensor:
    """Return a tensor whose memory is that of (B, H, W, C), whatever strides torch gives sides of 1."""
    return x.permute(0, 2, 3, 1).contiguous()


def rate() -> int:
    """Compare bits that lie in the first-level cache, and return how many pairs: the bound of any layer."""
    words, places = np.ones(64 * _BLOCK, np.int32), np.arange(48, dtype=np.int32)
    function = getattr(library(), f"lskd_xnor_rate_{build()}")
    count: int = function(1000, words.ctypes.data, places.ctypes.data, len(places))
    return count
