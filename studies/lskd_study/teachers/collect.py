"""Bring what every process computes into one file, in the order of the data set."""

import atexit
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from lskd import LskdError
from lskd.teachers.outputs import AnswerBatch

# Other processes wait while the first measures; one that has ended is noticed at once, not by this.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone it is number 0 of 1."""

    rank: int
    world_size: int
    device: torch.device


def join_processes(device: str | None = None) -> Process:
    """Join the other processes of torchrun, by NCCL on GPUs and by Gloo elsewhere.

    Args:
        device: where to compute, such as ``"cpu"`` or ``"cuda"``; None: a GPU where there is one. Under
            torchrun each process takes the GPU of its own local rank.

    Raises:
        LskdError: a device that does not exist, or more processes than GPUs.
    """
    where = _device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size > 1:
        if where.type == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= gpus:
                raise LskdError(
                    f"more processes than GPUs ({gpus}) on this machine; start {gpus}, or pass --device cpu"
                )
            where = torch.device("cuda", local)
            torch.cuda.set_device(where)
        if not distributed.is_initialized():
            backend = "nccl" if where.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(distributed.destroy_process_group)
    return Process(rank, world_size, where)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError):  # the name, no such GPU, torch built without
        raise LskdError(
            f"device {name!r} does not exist here; use cpu, or cuda where there is a GPU"
        ) from None
    if device.type == "meta":
        raise LskdError("device 'meta' computes nothing; use cpu, or cuda where there is a GPU")
    return device


def collect(
    batches: Iterable[AnswerBatch], samples: int, num_classes: int, process: Process, name: str
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Put the rows of all processes at their positions in the data set.

    The first process receives batch by batch and keeps none in memory.

    Args:
        batches: this process's share.
        samples: N, of all processes together.
        num_classes: K.
        process: from :func:`join_processes`.
        name: the teacher's, for the progress bar and messages.

    Returns:
        All rows in the order of the data set: logits ``(N, K)`` float32, labels ``(N,)`` int64 and, where
        there are some, features ``(N, D)`` float32, the matrices mapped from unnamed temporary files. None on
        the processes other than the first.

    Raises:
        LskdError: no room for the file, or a model that does not give ``K`` logits.
    """
    if process.rank:
        for batch in chain(batches, [None]):
            # Copies: what was computed in inference mode, or is part of more, is not sent as it is.
            copies = batch and tuple(part if part is None else part.cpu().clone() for part in batch)
            _exchange(distributed.send_object_list, [copies], 0)
        return None
    logits = _scratch(samples, num_classes)
    labels = torch.empty(samples, dtype=torch.int64)
    features: Tensor | None = None
    seen = torch.zeros(samples, dtype=torch.bool)
    with _progress(name, samples) as bar:
        for numbers, some_logits, some_labels, some_features in _all(batches, process):
            if some_logits.shape[1] != num_classes:
                raise LskdError(
                    f"{name} gives {some_logits.shape[1]} logits, not {num_classes}; "
                    "give the class count that it was made with"
                )
            numbers = numbers.cpu()
            logits[numbers] = some_logits.float().cpu()
            labels[numbers] = some_labels.cpu()
            if some_features is not None:
                if features is None:
                    features = _scratch(samples, some_features.shape[1])
                features[numbers] = some_features.float().cpu()
            seen[numbers] = True
            bar.update(len(numbers))
    if not bool(seen.all()):
        missing = int((~seen).nonzero()[0])
        raise LskdError(f"{name}: sample {missing} of {samples} never came; check how the data are read")
    return logits, labels, features


def _scratch(rows: int, columns: int) -> Tensor:
    """Return ``(rows, columns)`` float32 in an unnamed temporary file, which goes with the tensor."""
    size = 4 * rows * columns
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                # A disk that fills up while a mapping is written kills the process; this says it at once.
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(rows, columns)))
    except OSError as error:
        raise LskdError(
            f"no room for {size / 1e9:.1f} GB of temporary files in {tempfile.gettempdir()} "
            f"({error.strerror}); name a folder on a larger disk in the environment variable TMPDIR"
        ) from None


def _all(batches: Iterable[AnswerBatch], process: Process) -> Iterator[AnswerBatch]:
    """Yield the own batches, and after each one of every other process, until all have ended."""
    own = iter(batches)
    left = list(range(process.world_size))
    while left:
        for rank in list(left):
            box: list[AnswerBatch | None] = [None]
            if rank:
                _exchange(distributed.recv_object_list, box, rank)
            else:
                box = [next(own, None)]
            if (batch := box[0]) is None:
                left.remove(rank)
            else:
                yield batch


def _exchange(do: Callable[[list[Any], int], object], box: list[Any], rank: int) -> None:
    """Send to a rank, or receive from it."""
    try:
        do(box, rank)
    except RuntimeError:
        raise LskdError(f"rank {rank} of this run has ended early; what it said itself tells why") from None


@contextmanager
def _progress(name: str, samples: int) -> Iterator["tqdm[Any]"]:
    """Show a bar on a terminal; elsewhere one line at the end."""
    begun = time.monotonic()
    with tqdm(total=samples, desc=name, unit=" images", leave=False, disable=None) as bar:
        yield bar
        hidden = bar.disable
    if hidden:
        print(f"{name}: {samples:,} images in {time.monotonic() - begun:.0f} s", file=sys.stderr)
