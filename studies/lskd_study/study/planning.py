"""What a plan can tell before it runs, and the seeds that are added until it is decided."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lskd import LskdError
from lskd_study.base.files import read_object
from lskd_study.base.text import listed
from lskd_study.claims import DECIDED, judge
from lskd_study.claims.outlook import Outlook, assumed, measured, seconds_a_seed
from lskd_study.claims.statements import CLAIMS, settings_of, task_of
from lskd_study.pages.verdicts import VERDICTS_FILE, read_record
from lskd_study.plan.kinds import kind_of
from lskd_study.plan.plan import PLAN, Plan, more_seeds
from lskd_study.results.read import read_results
from lskd_study.stats.power import MANY, Variances
from lskd_study.stats.sequential import looks
from lskd_study.stores.decide import image_count

# How much differences vary


def outlooks_of(plan: Plan, variance_from: str | None = None) -> list[Outlook]:
    """Return what a plan's claims vary by: in another study, in its own finished runs, or as is assumed.

    Raises:
        LskdError: for a folder that contains no study of this kind, or one of a single seed.
    """
    if variance_from is not None:
        return _of_study(plan, variance_from)
    return _of_own_runs(plan) or assumed(plan, image_count(plan, "val"))


def _of_own_runs(plan: Plan) -> list[Outlook]:
    # Controls may have been asked for after all others were trained.
    unfinished = {run.study_seed for run in plan.unfinished() if run.role != "control"}
    done = [seed for seed in plan.seeds if seed not in unfinished]
    if len(done) < 2:
        return []
    with contextlib.suppress(LskdError):  # of damaged runs the page tells
        results = read_results(plan)
        known = {
            finding.claim.id: Variances.of(own.seeds, own.parts, own.students, own.by_student)
            for finding in reversed(judge(results))
            if (own := finding.interval) is not None
        }
        source = f"measured over the {len(done)} seeds at hand"
        return measured(plan, known, source, seconds_a_seed(results))
    return []


def _of_study(plan: Plan, folder: str) -> list[Outlook]:
    record = read_record(Path(folder))
    if kind_of(record.ecosystem) is not plan.kind:
        raise LskdError(f"{folder} is a study of {record.kind}, this one of {plan.kind.name}")
    known = {
        finding.claim: Variances.of(finding.seeds, finding.parts, finding.students, finding.by_student)
        for finding in reversed(record.findings)
        # A file of somebody else's: no difference of percentages varies by more than they can.
        if finding.seeds <= MANY and all(0 <= of <= 100**2 and 0 < df < 10**9 for of, df in finding.parts)
    }
    # Of a run there: a seed may have another number of them here.
    ended = record.runs.finished + len(record.runs.failed)
    taken = record.runs.seconds / ended * len(plan.runs) / len(plan.seeds) if ended > 0 else math.nan
    seconds = taken if 0 < taken < 10**9 else math.nan
    found = measured(plan, known, f"as in {folder}, over {len(record.seeds)} seeds", seconds)
    if not found:
        raise LskdError(
            f"{folder} does not say how much seeds vary in what this study compares; name the results of one "
            "with two seeds or more, and run `lskd study` there again if an older version wrote them"
        )
    return found


# What is decided before the first run


DECLARED = ("student_seeds", "last_epochs", "pool_seed_variance")  # that a page's record has, too


def check_declared(plan: Plan) -> None:
    """Refuse another analysis than that of the page at hand, by which it could have been chosen.

    Settings can be added, and are corrected for; none can go, and the headline stays.

    Raises:
        LskdError: it is another.
    """
    before = read_object(plan.root / PLAN)
    if not before or not (plan.root / VERDICTS_FILE).is_file():
        return
    for name in (*DECLARED, "margin"):
        was, now = before.get(name, Plan.__dataclass_fields__[name].default), getattr(plan, name)
        if was != now:
            raise LskdError(
                f"{plan.output} has a page that was made with {name}: {json.dumps(was)}, which may not "
                f"change afterwards (now {json.dumps(now)}); set that back, or choose another --output"
            )
    try:
        record = read_record(plan.root)
    except LskdError:  # of another version, or damaged: it is made anew
        return
    named = (one for one in CLAIMS if one.id == record.headline.claim and task_of(plan) in one.tasks)
    if (claim := next(named, None)) is None:  # of teachers alone, none of whom is compared
        return
    had = [one.setting.words for one in record.findings if one.claim == claim.id]
    has = [one.describe(claim.role) for one in settings_of(claim, plan)]
    lost = [one for one in (*had, *record.controls) if one not in (*has, *plan.controls)]
    if lost or had[:1] != has[:1]:
        what = f"tests {listed(lost)}" if lost else f"asks first about {had[0]}"
        raise LskdError(
            f"{plan.output} has a page that {what}, which may not change afterwards; set that back, or "
            "choose another --output"
        )


# Seeds until it is decided


def looks_of(root: Path, seeds: Sequence[int], most: int | None) -> tuple[list[int], list[int]]:
    """Return the numbers of seeds to look at, none without the rule, and the seeds of the look it is at.

    ``root``: the output folder, whose plan says what was decided before its first run; ``seeds``: the study
    file's. Seeds beyond those are the next numbers.

    Raises:
        LskdError: for one seed, no more seeds than there are, or another rule than the study began with.
    """
    before = read_object(root / PLAN)
    begun, had = (_numbers(before.get(name)) for name in ("looks", "seeds"))
    if most is None and not begun:
        return [], list(seeds)
    if not begun and (root / VERDICTS_FILE).is_file():
        raise LskdError(
            f"{root} has a page that was made without the rule, so no rule can keep the 5 % now; "
            "choose another --output"
        )
    numbers = list(looks(len(seeds), most)) if most is not None else begun
    if begun and begun != numbers:
        raise LskdError(
            f"{root} was begun with looks after {listed(begun)} seeds, which may not change afterwards; "
            "leave --max-seeds out, or choose another --output"
        )
    if len(seeds) != numbers[0]:
        raise LskdError(f"{root} was begun with {numbers[0]} seeds; list those, or choose another --output")
    at = len(had) if begun and len(had) in numbers else numbers[0]
    return numbers, [*seeds, *more_seeds(seeds, at - len(seeds))]


def next_look(plan: Plan) -> int | None:
    """Return how many seeds are to be looked at next; None where it is decided or there may be no more."""
    if not plan.looks or plan.look + 1 == len(plan.looks):
        return None
    record = read_record(plan.root)
    if not record.findings or record.findings[0].verdict in (*DECIDED, "no verdict"):
        return None
    return plan.looks[plan.look + 1]


def looked_at(plan: Plan) -> Plan:
    """Return a plan that knows after how many seeds its page was made before, without a rule."""
    if not (plan.root / VERDICTS_FILE).is_file() or plan.looks:
        return plan
    try:
        record = read_record(plan.root)
    except LskdError:  # of another version, or damaged: it is made anew
        return plan
    return replace(plan, looked_at=[number for number in record.looked_at if number != len(plan.seeds)])


def _numbers(found: object) -> list[int]:
    return found if isinstance(found, list) and all(isinstance(one, int) for one in found) else []
