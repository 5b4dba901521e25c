"""The fused loss of a dense teacher on the CPU, by compiled code where the installation could make it.

`hatch_build.py` compiles `rows.c` when the package is built. Without it (there was no C compiler, or this is
another kind of machine) the passes of `chunks` do the same in about three times the time.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lskd.kernel.chunks import Samples, Settings

LIBRARY = "rows.so"
_TERMS = 5
# Below as many numbers a second thread costs more than it saves.
_SMALLEST_SHARE = 1 << 18


def why_not_compiled(library: Path) -> str:
    """Return why a library is not there, as the build noted it, or cannot be used."""
    note = library.with_suffix(".txt")
    if note.is_file():
        return note.read_text(encoding="utf-8")
    return "it was compiled for another kind of machine" if library.is_file() else "it was never built"


@cache
def function() -> Any:
    """Return the compiled function, or None where there is none."""
    return load(Path(__file__).with_name(LIBRARY))


def load(path: Path) -> Any:
    """Return the function of a library, or None where it is not there or not for this machine."""
    try:
        found = ctypes.CDLL(str(path)).lskd_rows
    except (OSError, AttributeError):  # there was no compiler, or it is for another kind of machine
        return None
    pointers, sizes, numbers = [ctypes.c_void_p] * 7, [ctypes.c_int64] * 3, [ctypes.c_double] * 5
    found.argtypes = [*pointers, *sizes, *numbers]
    found.restype = None
    return found


def has_compiled_loss() -> bool:
    """Return whether this installation computes the loss of float32 logits on the CPU by compiled code."""
    return function() is not None


def takes(logits: Tensor, teacher: Tensor, labels: Tensor | None) -> bool:
    """Return whether compiled code computes this loss: float32 on the CPU, one row after the other."""
    return (
        function() is not None
        and logits.dtype == teacher.dtype == torch.float32
        and logits.device.type == teacher.device.type == "cpu"
        and logits.is_contiguous()
        and teacher.is_contiguous()
        and 0 < logits.shape[-1] < 2**31
        and (labels is None or not labels.is_floating_point())
    )


def compute(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    samples: Samples,
    settings: Settings,
    gradient: Tensor | None,
) -> Tensor:
    """Return the seven terms, reduced, and write the gradient.

    Args:
        logits: ``(..., K)``, float32.
        teacher: the same.
        labels: ``(count,)``, int64 and checked, of the samples that count; or None.
        samples: which those are.
        gradient: what to write it to: like ``logits``, 0 where a sample does not count; or None.
    """
    classes, rows = logits.shape[-1], samples.rows
    count = logits.numel() // classes if rows is None else len(rows)
    weight = samples.weight
    assert not isinstance(weight, Tensor)  # on the CPU
    threads = max(1, min(torch.get_num_threads(), count * classes // _SMALLEST_SHARE))
    totals, scratch = np.empty((threads, _TERMS)), np.empty((threads, 3 * classes), np.float32)
    labels = None if labels is None else labels.contiguous()
    inputs = [_address(tensor) for tensor in (logits, teacher, gradient, labels, rows)]
    numbers = (
        classes,
        settings.temperature,
        weight * settings.soft_weight / settings.temperature,
        weight * settings.hard_weight,
        settings.on,
        settings.off,
    )

    def share(thread: int) -> None:
        first, last = count * thread // threads, count * (thread + 1) // threads
        own = scratch[thread].ctypes.data, totals[thread].ctypes.data
        function()(*inputs, *own, first, last, *numbers)

    in_threads(share, threads)
    kl, entropy, hard, nll, agreement = (weight * totals.sum(0)).tolist()
    if labels is None:
        hard = nll = float("nan")
    loss = settings.loss(kl + entropy, hard)
    terms = np.array([loss, kl + entropy, kl, entropy, hard, nll, agreement], np.float32)
    return torch.from_numpy(terms)


def in_threads(share: Callable[[int], None], threads: int) -> None:
    """Call ``share`` with 0 to ``threads - 1``, each in a thread, for compiled code.

    All of them have ended when it returns or raises what one has raised: they write to the caller's memory.
    """
    if threads == 1:
        share(0)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(share, thread) for thread in range(1, threads)]
        share(0)
    for other in others:
        other.result()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
