"""Work on many large arrays by several threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from lskd_study.base.provenance import usable_cores

_MOST = 4  # threads: each has some runs' logits in memory

Item = TypeVar("Item")
Found = TypeVar("Found")


def over_cores(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """Yield ``work(item)`` of each, in their order, at work in as many threads as there are cores, up to 4.

    For work of PyTorch and NumPy on large arrays, which let other threads run meanwhile.
    """
    own, one = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    try:
        # Of PyTorch's own threads each would start as many as there are cores.
        with ThreadPoolExecutor(min(usable_cores(), _MOST), initializer=one) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(own)
