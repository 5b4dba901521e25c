"""The index page's section on claims that take several studies, from the studies' output folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lskd_study.claims import Finding, judge_several
from lskd_study.plan.plan import PLAN, Plan
from lskd_study.results.read import read_results


def findings_over(folders: Sequence[Path]) -> list[Finding]:
    """Return the verdicts on the claims that these studies, which may have been moved, test together.

    Folders of other things, such as lists of teachers, are passed over.

    Raises:
        LskdError: for runs that are damaged.
    """
    plans = []
    for folder in folders:
        if (folder / PLAN).is_file():
            # Only the results may have been moved: the training data are where they were.
            plans.append(replace(Plan.read(folder / PLAN), output=str(folder.resolve())))
    kinds = [(plan.convention, tuple(plan.smoothing)) for plan in plans]
    # Studies of other smoothing values are compared with none, so they need not be read.
    wanted = [plan for plan, kind in zip(plans, kinds, strict=True) if kinds.count(kind) > 1]
    return judge_several([results for results in map(read_results, wanted) if results.finished])
