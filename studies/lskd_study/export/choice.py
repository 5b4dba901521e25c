"""Which run is exported: a run by its folder, or the best student of a study."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lskd import LskdError
from lskd_study.plan.plan import PLAN, Plan, Run
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Result, Results, kind_of_run


@dataclass(frozen=True)
class Chosen:
    """A run to export, and the runs that it is one of.

    Attributes:
        result: what the run left.
        seeds: the results of its kind, by the study's seed.
        because: in words which run it is and why.
        best_of: of how many kinds of student it is the best; 0: it was named.
    """

    result: ImageResult
    seeds: Mapping[int, ImageResult]
    because: str
    best_of: int = 0

    @property
    def run(self) -> Run:
        """The run."""
        return self.result.run


def place(folder: Path) -> tuple[Plan, Run | None]:
    """Return the plan of a study's folder, or of a run's and which run it is.

    Raises:
        LskdError: it is neither.
    """
    folder = Path(os.path.abspath(folder))
    for root in (folder, folder.parent.parent):
        if (root / PLAN).is_file():
            # Its results are in this folder, wherever they were made.
            plan = replace(Plan.read(root / PLAN), output=str(root))
            run = next((run for run in plan.runs if plan.folder(run) == folder), None)
            if run or root == folder:
                return plan, run
    raise LskdError(f"{folder} is no study's folder of results and none of its runs' folders; check the path")


def read_last_epochs(plan: Plan) -> Results[Any]:
    """Read a study's results by the last epoch alone, whose weights are exported, whatever is judged."""
    return replace(read_results(replace(plan, last_epochs=1)), plan=plan)


def named(plan: Plan, run: Run) -> Chosen:
    """Return a run that was named.

    Raises:
        LskdError: it has no result.
    """
    results = read_last_epochs(plan)
    if failure := results.failed.get(run.id):
        raise LskdError(f"run {run.id} failed ({failure.reason}); name another")
    if run.id not in results.finished:
        raise LskdError(f"run {run.id} is not finished; `lskd study` goes on with it")
    found = results.finished[run.id]
    seeds = results.by_kind[kind_of_run(plan, run)] or {run.study_seed: found}
    return Chosen(found, seeds, _scored(plan, found))


def best_student(results: Results[Any], seed: int | None = None) -> Chosen:
    """Return the run to take away: of the kind of student with the highest mean score the median run.

    The median, the lower of two in the middle, so that it is not the luckiest. Only kinds that have a result
    with every seed count: a mean over the seeds that did not fail is a choice by the result.

    Raises:
        LskdError: there is none, or the seed is none of the study's.
    """
    plan = results.plan
    kinds = [
        runs
        for runs in results.by_kind.values()
        if len(runs) == len(plan.seeds) and next(iter(runs.values())).run.role == "student"
    ]
    if not kinds:
        why = "has no students" if plan.teachers_alone else "has no student that is finished with every seed"
        raise LskdError(f"the study in {plan.root} {why}; name one of its runs, the folder below {plan.root}")
    best = max(kinds, key=lambda runs: np.mean([one.value("top1") for one in runs.values()]))
    if seed is not None and seed not in best:
        seeds = ", ".join(map(str, plan.seeds))
        raise LskdError(f"the study in {plan.root} has no seed {seed}; its seeds are {seeds}")
    every = [one for mean in best.values() for one in mean.each]
    ranked = sorted(every, key=lambda one: (one.value("top1"), one.run.seed))
    chosen = ranked[(len(ranked) - 1) // 2] if seed is None else best[seed].each[0]
    of = f"{len(kinds)} kinds of student" if len(kinds) > 1 else "the one kind of student"
    why = f"{_scored(plan, chosen)}; of {of} the best"
    if len(best) == 1:
        why = f"{why}, by one seed"
    else:
        which = "the run with the median score, not the best" if seed is None else f"seed {seed}, as asked"
        why = f"{why} by its mean over {len(best)} seeds, of that {which}"
    return Chosen(chosen, best, why, len(kinds))


def _scored(plan: Plan, result: Result) -> str:
    score = f"{result.run.id}, {result.value('top1'):.2f} % {plan.kind.score}"
    # The page's number is another.
    return f"{score} in the last epoch, which is the one exported" if plan.last_epochs > 1 else score
