"""Work on many large arrays by several threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import TypeVar

import torch

from lskd_study.base.provenance import usable_cores

_MOST = 4  # threads: each has some runs' logits in memory

Item = TypeVar("Item")
Found = TypeVar("Found")


def over_cores(
    work: Callable[[Item], Found], items: Iterable[Item], ended: Event | None = None
) -> Iterator[Found]:
    """Yield ``work(item)`` of each, in their order, at work in as many threads as there are cores, up to 4.

    For work of PyTorch and NumPy on large arrays, which let other threads run meanwhile. No more than one
    item for each thread and one besides is begun before what the first of them gave is taken.

    Args:
        ended: set once nothing more is taken (an error, Ctrl-C), so that long work can stop halfway.
    """
    own, one = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    threads = min(usable_cores(), _MOST)
    # Of PyTorch's own threads each would start as many as there are cores.
    pool = ThreadPoolExecutor(threads, initializer=one)
    ahead: deque[Future[Found]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        if ended is not None:
            ended.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own)
