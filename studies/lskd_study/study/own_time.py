"""How long a study will take on this machine, measured before anything is trained."""

import heapq
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lskd import LskdError
from lskd.base.files import parse_json
from lskd_study.base import gpus
from lskd_study.plan.plan import JOB, Plan

if TYPE_CHECKING:
    from lskd_study.study.own_measure import Times

SECONDS = 2.0  # of steps that are measured for each kind of run
_BETWEEN_RUNS = 1.0  # what the scheduler takes from a run's end to the next one's start
_AROUND_RUNS = 25.0  # the scheduler's start, and the page with its figures
_MOST_AT_ONCE = 8


@dataclass(frozen=True)
class Task:
    """Something that the scheduler starts.

    Attributes:
        name: of a run or a store of soft labels.
        needs: the task before it, where there is one.
        seconds: that it takes.
    """

    name: str
    needs: str
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Times of a plan's unfinished runs.

    Attributes:
        rows: for each kind of task: what it is, in words, and how many seconds each takes.
        runs: how many runs there are to do.
        at_once: how many run at a time.
        total: seconds until the page is there.
        measured: the times of each kind of run.
    """

    rows: list[tuple[str, float]]
    runs: int
    at_once: int
    total: float
    measured: "list[Times]" = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return it in lines, one for each kind of task and one for all."""
        together = f"{self.at_once} at a time" if self.at_once > 1 else "one after the other"
        found = [f"{name}: {duration(seconds)} each" for name, seconds in self.rows]
        return [*found, f"in all {duration(self.total)}: {self.runs} runs, {together}, and the page"]


def estimate(
    plan: Plan, cores: int, seconds: float = SECONDS, measured: "Sequence[Times]" = ()
) -> Estimate | None:
    """Measure a few steps of each kind of a plan's unfinished runs; None where they need too much memory.

    As many processes measure at once as will train at once: they stand in each other's way as the runs will.
    ``measured``: times of the same plan with other numbers of epochs, to be used instead.

    Raises:
        LskdError: for what the trainer refuses.
    """
    from lskd_study.stores.decide import with_stores
    from lskd_study.study.own_measure import kind_of, kinds

    plan = with_stores(plan)
    todo = plan.unfinished()
    if not todo:
        return Estimate([], 0, 1, 0.0)
    devices = gpus.visible_gpus() if gpus.gpus_of_a_run(plan.resources) else []
    at_once = max(1, min(cores // plan.threads, len(todo), len(devices) or len(todo)))
    # Teachers of students still to do are needed by their model alone.
    needed = {run.teacher for run in todo} | {run.id for run in todo}
    part = replace(plan, runs=[run for run in plan.runs if run.id in needed], stores=[])
    found: list[Times] | None
    if measured:
        epochs = [plan.configs[run.config]["epochs"] for run in kinds(part).values()]
        found = [replace(one, epochs=count) for one, count in zip(measured, epochs, strict=True)]
    else:
        found = _measure(part, min(at_once, _MOST_AT_ONCE), seconds, devices)
    if found is None:
        return None
    by_kind = dict(zip(kinds(part), found, strict=True))

    # What is alike is one row; the tasks are in the order in which they are started.
    tasks: list[Task] = []
    rows: dict[str, tuple[int, float]] = {}

    def add(task: Task, text: str) -> None:
        tasks.append(task)
        rows[text] = (rows.get(text, (0, 0.0))[0] + 1, task.seconds)

    for run in todo:
        times = by_kind[kind_of(plan, run)]
        store = plan.store_of(run)
        if store is not None and not any(task.name == store.id for task in tasks):
            stored = replace(times, epochs=store.epochs)
            if not Path(plan.root, store.folder, JOB).exists():
                text = f"soft labels of {plan.run(run.teacher).model} for {store.epochs} epochs"
                add(Task(store.id, store.teacher, stored.storing), text)
        role = (
            f"student {run.model} of {plan.run(run.teacher).model}" if run.teacher else f"teacher {run.model}"
        )
        own = times.without_teacher() if store is not None else times
        add(Task(run.id, store.id if store else run.teacher, own.run), f"{role}, {own.describe()}")
    wall = makespan([replace(task, seconds=task.seconds + _BETWEEN_RUNS) for task in tasks], at_once)
    shown = [(f"{count:4d} x {text}", each) for text, (count, each) in rows.items()]
    return Estimate(shown, len(todo), at_once, wall + _AROUND_RUNS, found)


def makespan(tasks: Sequence[Task], at_once: int) -> float:
    """Return when the last task ends, if each starts as soon as what it needs is there and a place is free.

    Args:
        tasks: in the order in which they are started.
        at_once: number of places.

    >>> makespan([Task("t", "", 10.0), Task("a", "t", 5.0), Task("b", "t", 5.0)], 2)
    15.0
    """
    ends: dict[str, float] = {}
    places = [0.0] * at_once
    waiting = list(tasks)
    listed = {task.name for task in tasks}
    while waiting:
        free = heapq.heappop(places)
        ready = [
            task for task in waiting if task.needs not in listed or ends.get(task.needs, free + 1) <= free
        ]
        if not ready:  # until the next task ends
            heapq.heappush(places, min(end for end in ends.values() if end > free))
            continue
        task = ready[0]
        waiting.remove(task)
        ends[task.name] = free + task.seconds
        heapq.heappush(places, ends[task.name])
    return max(ends.values(), default=0.0)


def _measure(plan: Plan, copies: int, seconds: float, devices: Sequence[str]) -> "list[Times] | None":
    """Return the times of each kind of run, the mean of as many processes as ``copies``."""
    from lskd_study.study.own_measure import OUT_OF_MEMORY, Times

    with tempfile.TemporaryDirectory(prefix="lskd-time-") as folder:
        processes = []
        for number in range(copies):
            place = Path(folder, str(number))
            replace(plan, output=str(place)).write()
            command = [
                sys.executable,
                "-m",
                "lskd_study.study.own_measure",
                str(place / "plan.json"),
                str(seconds),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads)}
            if devices:
                environment[gpus.VISIBLE] = devices[number]
            processes.append(
                subprocess.Popen(
                    [*command, repr(time.time())],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
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
        answer = parse_json(out)
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
        plain=fmean(one.plain for one in copies),
        loading=fmean(one.loading for one in copies),
        evaluation=fmean(one.evaluation for one in copies),
        checkpoint=fmean(one.checkpoint for one in copies),
    )


def duration(seconds: float) -> str:
    """Return a time in words, to the precision of an estimate.

    >>> [duration(value) for value in (42, 250, 1_500, 5_000, 30_000, 400_000)]
    ['42 s', '4.2 min', '25 min', '1.4 hours', '8.3 hours', '4.6 days']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min" if seconds < 570 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"
