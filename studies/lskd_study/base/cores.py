"""Work on many large arrays by several threads."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

_MOST = 4  # threads: each has some runs' logits in memory

Item = TypeVar("Item")
Found = TypeVar("Found")


def over_cores(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """Yield ``work(item)`` of each, in their order, at work in as many threads as there are cores, up to 4.

    For work of PyTorch and NumPy on large arrays, which let other threads run meanwhile.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = torch.get_num_threads()
    try:
        # Of PyTorch's own threads each would start as many as there are cores.
        with ThreadPoolExecutor(min(cores, _MOST), initializer=partial(torch.set_num_threads, 1)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(own)
