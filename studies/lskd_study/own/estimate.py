"""How long a study will take on this machine, measured before anything is trained."""

import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lskd import LskdError
from lskd_study.plan import Plan, Run

if TYPE_CHECKING:
    from lskd_study.own.measure import Times

SECONDS = 2.0  # of steps that are measured for each kind of run
_BETWEEN_RUNS = 1.0  # what the scheduler takes from a run's end to the next one's start
_AROUND_RUNS = 25.0  # the scheduler's start, and the page with its figures
_MOST_AT_ONCE = 8


@dataclass(frozen=True)
class Estimate:
    """Times of a plan's unfinished runs.

    Attributes:
        rows: for each kind of run: what it is, how many there are, and its times.
        at_once: how many run at a time.
        total: seconds until the page is there.
    """

    rows: list[tuple[str, int, "Times"]]
    at_once: int
    total: float

    def lines(self) -> list[str]:
        """Return it in lines, one for each kind of run and one for all."""
        found = []
        for name, count, times in self.rows:
            found.append(
                f"{count:4d} x {name}: {duration(times.run)} each, {times.epochs} epochs of {times.steps} "
                f"steps ({1000 * times.step:.3g} ms) and an evaluation ({times.evaluation:.2g} s)"
            )
        runs = sum(count for _, count, _ in self.rows)
        together = f"{self.at_once} at a time" if self.at_once > 1 else "one after the other"
        return [*found, f"in all {duration(self.total)}: {runs} runs, {together}, and the page"]


def estimate(plan: Plan, cores: int, seconds: float = SECONDS) -> Estimate | None:
    """Measure a few steps of each kind of a plan's unfinished runs; None where they need too much memory.

    As many processes measure at once as will train at once: they stand in each other's way as the runs will.

    Raises:
        LskdError: for what the trainer refuses.
    """
    from lskd_study.own.measure import kind_of, kinds

    todo = plan.unfinished()
    if not todo:
        return Estimate([], 1, 0.0)
    # Teachers of students still to do are needed by their model alone.
    needed = {run.teacher for run in todo} | {run.id for run in todo}
    part = replace(plan, runs=[run for run in plan.runs if run.id in needed])
    at_once = max(1, min(cores // plan.threads, len(todo)))
    found = _measure(part, min(at_once, _MOST_AT_ONCE), seconds)
    if found is None:
        return None
    by_kind = dict(zip(kinds(part), found, strict=True))
    times = {run.id: by_kind[kind_of(plan, run)] for run in todo}
    rows = []
    for kind, one in by_kind.items():
        count = sum(kind_of(plan, run) == kind for run in todo)
        if count:
            role = "student" if kind[2] else "teacher"
            name = f"{role} {kind[0]}" + f" of {kind[2]}" * bool(kind[2])
            rows.append((name, count, one))
    wall = makespan(todo, {name: one.run + _BETWEEN_RUNS for name, one in times.items()}, at_once)
    return Estimate(rows, at_once, wall + _AROUND_RUNS)


def makespan(runs: Sequence[Run], seconds: Mapping[str, float], at_once: int) -> float:
    """Return when the last run ends, if each starts as soon as its teacher is there and a place is free.

    Args:
        runs: in the order in which they are started.
        seconds: of each run, by its name.
        at_once: number of places.

    >>> teacher = Run("t", "teacher", "m", "c", 0.0, 0)
    >>> students = [Run(name, "student", "m", "c", 0.0, 0, teacher="t") for name in "ab"]
    >>> makespan([teacher, *students], {"t": 10.0, "a": 5.0, "b": 5.0}, 2)
    15.0
    """
    ends: dict[str, float] = {}
    places = [0.0] * at_once
    waiting = list(runs)
    listed = {run.id for run in runs}
    while waiting:
        free = heapq.heappop(places)
        ready = [
            run for run in waiting if run.teacher not in listed or ends.get(run.teacher, free + 1) <= free
        ]
        if not ready:  # until the next run ends
            heapq.heappush(places, min(end for end in ends.values() if end > free))
            continue
        run = ready[0]
        waiting.remove(run)
        ends[run.id] = free + seconds[run.id]
        heapq.heappush(places, ends[run.id])
    return max(ends.values(), default=0.0)


def _measure(plan: Plan, copies: int, seconds: float) -> "list[Times] | None":
    from lskd_study.own.measure import OUT_OF_MEMORY, Times

    with tempfile.TemporaryDirectory(prefix="lskd-time-") as folder:
        processes = []
        for number in range(copies):
            place = Path(folder, str(number))
            trial = replace(plan, output=str(place))
            trial.write()
            command = [sys.executable, "-m", "lskd_study.own.measure", str(place / "plan.json"), str(seconds)]
            processes.append(
                subprocess.Popen(
                    [*command, repr(time.time())],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": str(plan.threads)},
                )
            )
        try:
            answers = [(process, *process.communicate()) for process in processes]
        finally:
            for process in processes:
                process.kill()
    found: list[list[Times]] = []
    for process, out, problem in answers:
        if process.returncode:
            last = (problem.strip().splitlines() or ["no message"])[-1]
            raise LskdError(
                f"the time cannot be measured ({last}); run the study without an estimate, by its file"
            )
        answer = json.loads(out)
        if answer.get("error") == OUT_OF_MEMORY:
            return None
        if "error" in answer:
            raise LskdError(answer["error"])
        found.append([Times(**one) for one in answer["times"]])
    return [_mean(copies) for copies in zip(*found, strict=True)]


def _mean(copies: "Sequence[Times]") -> "Times":
    return replace(
        copies[0],
        start=fmean(one.start for one in copies),
        step=fmean(one.step for one in copies),
        evaluation=fmean(one.evaluation for one in copies),
        checkpoint=fmean(one.checkpoint for one in copies),
    )


def duration(seconds: float) -> str:
    """Return a time in words, to the precision of an estimate.

    >>> [duration(value) for value in (42, 250, 5_000, 30_000, 400_000)]
    ['42 s', '4 min', '1.4 hours', '8.3 hours', '4.6 days']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"
