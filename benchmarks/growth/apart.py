"""What work costs in a process of its own: CPU time, time, and memory beyond what was imported before."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU (of ended children too) and of the clock; MB at the peak, less those at the start."""

    cpu: float
    wall: float
    memory: float


def cost(work: Callable[[], object], times: int = 1) -> Cost:
    """Do it in a fork of this process, which has imported everything, and return what it cost.

    The clock says little on a machine where others work, CPU time more; of a virtual machine it includes
    memory that the host has to find first. Of several times it is the one of the median.
    """
    return sorted((_once(work) for _ in range(times)), key=lambda one: one.cpu)[times // 2]


def _once(work: Callable[[], object]) -> Cost:
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def measure() -> None:
        before, begin = _peak(), time.perf_counter()
        work()
        wall, cpu = time.perf_counter() - begin, 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            used = resource.getrusage(who)
            cpu += used.ru_utime + used.ru_stime
        found.put(Cost(cpu, wall, (_peak() - before) / 1e6))

    sys.stdout.flush()
    process = context.Process(target=measure)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"what was to be measured ended with {process.exitcode}")
    return found.get()


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
