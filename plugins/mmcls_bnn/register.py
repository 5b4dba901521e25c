"""What a recipe imports (`custom_imports`): everything registered, one-line errors, and gloo on the CPU."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from numpy._core import multiarray

from lskd import LskdError
from lskd.base.files import full_disk, say_full_logs_once
from lskd.errors import from_outside, report
from mmcls_bnn import data, losses  # noqa: F401 - importing them is what registers them
from mmcls_bnn.binary import reactnet  # noqa: F401
from mmcls_bnn.distil import classifier, curves, hooks  # noqa: F401


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that the user can fix as one line; leave every other to Python."""
    ours = error if isinstance(error, LskdError) else from_outside(error) or full_disk(error)
    if ours is None:
        sys.__excepthook__(kind, error, trace)
        return
    with contextlib.suppress(OSError):  # a full disk, which may be the error itself
        sys.stdout.flush()
    # In a run of several processes torch keeps what a hook writes until it returns; this one never does.
    with contextlib.redirect_stderr(sys.__stderr__):
        status = report("mmcls_bnn", ours)
    _stop_mim()
    raise SystemExit(status)


def _stop_mim() -> None:
    """Ask `mim`, where it has started this process, to stop as at Ctrl-C, or to end where it ignores that.

    It would otherwise bury the one line under a traceback of its own: a training script that ends with a
    status other than 0 is an exception to it. In a shell's background both ignore Ctrl-C.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    if any(Path(part).name == "mim" for part in command[:2]):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(parent, signal.SIGTERM if ignored else signal.SIGINT)


def _statistic(owner: Any, name: str) -> Any:
    """Stand for `getattr` in a checkpoint, for mmengine's log and the methods that it stores with it."""
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    raise TypeError(f"a checkpoint asks for {name} of {owner}, which is not allowed")


def _allow_log() -> None:
    """Allow torch's safe loading to read mmengine's log, stored where there is no SafeCheckpointHook."""
    arrays: list[Any] = [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar]
    arrays += [type(np.dtype(name)) for name in ("f8", "i8")]
    torch.serialization.add_safe_globals([HistoryBuffer, *arrays, (_statistic, "builtins.getattr")])


def _join_processes() -> None:
    """Join the processes of `torch.distributed.run` with gloo where there is no GPU.

    mmengine's own way asks for a CUDA device in any case.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.cuda.is_available():
        return
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


_allow_log()
say_full_logs_once()
sys.excepthook = _report
_join_processes()
