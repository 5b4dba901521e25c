"""What a number of seeds can tell, before a study runs, and after: what would decide an open claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lskd_study.base.gpus import gpus_of_a_run
from lskd_study.base.text import duration
from lskd_study.claims.findings import Finding
from lskd_study.claims.statements import Claim, claims_of, settings_of
from lskd_study.plan.kinds import IMAGES
from lskd_study.plan.plan import Plan, exact, more_seeds
from lskd_study.results.results import Results, RunKind, kind_of_run
from lskd_study.stats.intervals import LEVEL
from lskd_study.stats.power import Variances

PAPERS = 0.4  # points: the smallest gain of a student on ImageNet in the paper (Table 2)
POWER = 0.8
LITTLE = "less than an even chance"
MORE_SEEDS = 5  # and twice, four times ... as many: numbers of seeds that are named
ENOUGH = 0.7  # of the width: what more seeds must be able to make of it to be worth naming
# Where nothing was measured. Accuracies on ImageNet vary by 0.10 to 0.25 points between seeds.
ASSUMED_SD, ASSUMED_DIFFERENT = 0.15, 0.05


@dataclass(frozen=True)
class Outlook:
    """What a claim's differences vary by, and how that is known.

    Attributes:
        claim: whose.
        variances: in points squared.
        source: where they come from, in words.
        level: of its interval, so that all tests of the page together keep the error rate.
        seconds: what one seed takes, all of its runs one after the other; NaN where that is unknown.
    """

    claim: Claim
    variances: Variances
    source: str
    level: float = LEVEL
    seconds: float = math.nan


def claims_planned(plan: Plan) -> list[Claim]:
    """Return the claims that a plan's power is about: the headline, teachers' accuracy, the hard control."""
    claims = claims_of(plan)
    others = [claim for claim in claims if claim.id in ("better-teacher", "distillation-helps")]
    return list(dict.fromkeys([claims[0], *reversed(others)]))


def level_of(claim: Claim, plan: Plan) -> float:
    """Return the level at which a claim is tested first: half of the error rate is the headline's alone."""
    claims = [one for one in claims_of(plan) if one.direction and one.contrast != "direction"]
    tests = {Finding(one, setting).parameter for one in claims for setting in settings_of(one, plan)}
    share = 2 if claim == claims[0] else 2 * (len(tests) - 1)
    return 1 - (1 - LEVEL) / share


def assumed(plan: Plan, samples: int) -> list[Outlook]:
    """Return what to expect where nothing was measured; ``samples`` validation images.

    Nothing for translation, where BLEU varies with the data by more than can be assumed.
    """
    if plan.kind is not IMAGES or not samples:
        return []
    found = Variances(2 * ASSUMED_SD**2, 100**2 * ASSUMED_DIFFERENT / samples, samples - 1)
    source = (
        f"assumed: accuracy varies by {ASSUMED_SD} points between seeds, and the arms differ on "
        f"{100 * ASSUMED_DIFFERENT:.0f} % of {samples:,} images"
    )
    return [Outlook(claim, found, source, level_of(claim, plan)) for claim in claims_planned(plan)]


def measured(
    plan: Plan, known: Mapping[str, Variances | None], source: str, seconds: float = math.nan
) -> list[Outlook]:
    """Return what to expect after what was measured, by claim."""
    found = []
    for claim in claims_planned(plan):
        if (variances := known.get(claim.id)) is not None:
            variances = variances.with_students(plan.student_seeds)
            if not plan.pool_seed_variance:  # as another study may
                variances = replace(variances, pooled_df=0.0)
            found.append(Outlook(claim, variances, source, level_of(claim, plan), seconds))
    return found


def before(plan: Plan, outlooks: Sequence[Outlook]) -> list[str]:
    """Return what a plan can tell, in lines; the first warns where its chance is less than even."""
    if not outlooks:
        return [f"how much {plan.kind.measure} varies is not assumed for these data; two seeds will tell"]
    seeds = plan.looks[-1] if plan.looks else len(plan.seeds)
    lines = []
    for one in outlooks:
        whose = "students' and their controls'" if one.claim.control else f"{one.claim.role}s'"
        if seeds < 2:
            lines.append(f"{whose} difference: one seed can tell nothing; list at least two")
            continue
        found = f"{one.variances.detectable(seeds, POWER, one.level):.2f} points with {seeds} seeds"
        found += _time(plan, seeds * one.seconds)
        papers = one.claim == claims_of(plan)[0] and plan.kind is IMAGES
        what = f"the paper's {PAPERS}" if papers else f"{PAPERS} points"
        needed = one.variances.seeds_for(PAPERS, POWER, one.level)
        if needed is None:
            then = f"{what} take more samples, whatever the seeds"
        else:
            then = f"{what} take {needed} seeds{_time(plan, needed * one.seconds)}"
        lines.append(f"{whose} difference: {100 * POWER:.0f} % power for {found}; {then}")
    power = outlooks[0].variances.power(seeds, PAPERS, outlooks[0].level) if seeds > 1 else 0.0
    lines.append(outlooks[0].source)
    if math.isnan(outlooks[0].seconds):
        lines.append(
            "what a seed takes is known once a run of each kind has ended; docs/recipes.md estimates the "
            "GPU-hours of recipes"
        )
    half = outlooks[0].variances.half_width(seeds, outlooks[0].level) if seeds > 1 else 0.0
    if outlooks[0].claim.has_margin and half > plan.margin:
        lines.append(
            f"the margin of {exact(plan.margin)} points is less than the ±{two_digits(half)} of an interval "
            f'over {seeds} seeds: "as good" and "too small to matter" can hardly be told'
        )
    if power < 0.5:
        chance = f"{100 * power:.0f} %"
        lines.insert(0, f"{LITTLE} ({chance}) to see the paper's {PAPERS} points if they are there")
    return lines


def _time(plan: Plan, seconds: float) -> str:
    """Return how long runs take one after the other, and the GPU-hours of those that ask for GPUs."""
    if math.isnan(seconds):
        return ""
    gpus = gpus_of_a_run(plan.resources)
    return f" ({duration(seconds)} of runs{f', {gpus * seconds / 3600:.3g} GPU-hours' if gpus else ''})"


def two_digits(value: float) -> str:
    """Return a number in two significant digits, without an exponent.

    >>> [two_digits(value) for value in (142.0, 2.66, 0.83)]
    ['140', '2.7', '0.83']
    """
    return exact(float(f"{value:.2g}"))


def seconds_a_seed(results: Results[Any]) -> float:
    """Return what the runs of one seed take, one after the other; NaN where one of a kind has yet to end.

    Failed runs broke off, so they count only where no run of their kind finished.
    """
    taken: dict[RunKind, list[float]] = {}
    ended: tuple[Mapping[str, Any], ...] = (results.finished, results.failed)
    for runs in ended:
        known = set(taken)
        for one in runs.values():
            if (kind := kind_of_run(results.plan, one.run)) not in known:
                taken.setdefault(kind, []).append(one.job["wall_time_s"])
    first = [run for run in results.plan.runs if run.study_seed == results.plan.seeds[0]]
    return sum(float(np.mean(taken.get(kind_of_run(results.plan, run), math.nan))) for run in first)


class Prospect(NamedTuple):
    """What more seeds make of an open claim's interval: its half width now, and by their number.

    No ``widths`` where the samples are the limit; ``least`` is what no number of seeds goes below.
    ``students``: what twice the students of each teacher would make of it, where most of the variance between
    seeds is theirs; else nothing.
    """

    seeds: int
    samples: int
    now: float
    widths: dict[int, float]
    least: float
    students: dict[int, float]


def prospect(finding: Finding) -> Prospect | None:
    """Return what more seeds would do for an open claim; None where it is decided or that is unknown."""
    interval = finding.interval
    # The rule that added seeds by looks has said beforehand how many there may be.
    if finding.verdict != "cannot tell" or interval is None or interval.networks or finding.of_looks:
        return None
    variances = Variances.of(interval.seeds, interval.parts, interval.students, interval.by_student)
    if variances is None:
        return None
    now = variances.half_width(interval.seeds)
    least = variances.half_width(10**6)
    more = MORE_SEEDS
    while more <= interval.seeds:
        more *= 2
    limit = least > ENOUGH * now
    widths = {} if limit else {number: variances.half_width(number) for number in (more, 2 * more)}
    students = {}
    if widths and variances.student > variances.seed / 2:
        twice = variances.with_students(2 * variances.students)
        students = {twice.students: twice.half_width(interval.seeds)}
    return Prospect(interval.seeds, interval.samples, now, widths, least, students)


def line_to_change(plan: Plan, finding: Finding) -> str:
    """Return the study file's line for more seeds; empty where they decide little or the file has them."""
    found = prospect(finding)
    if found is None or not found.widths:
        return ""
    more = min(found.widths) - len(plan.seeds)
    return f"seeds: {[*plan.seeds, *more_seeds(plan.seeds, more)]}" if more > 0 else ""


def after(finding: Finding, seconds: float = math.nan) -> str:
    """Return what would decide an open claim; empty where it is decided or nothing is known of its seeds.

    ``seconds``: what one seed takes, all of its runs one after the other.
    """
    found = prospect(finding)
    if found is None:
        return _without_seeds(finding)
    now = f"±{two_digits(found.now)} with {found.seeds} seeds"
    if finding.changed_by_holm:  # or the width would seem to be too small for this
        now = f"uncorrected {now}"
    if not found.widths:
        limit = f"not below ±{two_digits(found.least)} with any number"
        return f"{now}, and {limit}: the {found.samples} samples are the limit"
    text = f"{now}; about " + ", ".join(f"±{two_digits(half)} with {n}" for n, half in found.widths.items())
    if not math.isnan(seconds):
        more = (duration((number - found.seeds) * seconds) for number in found.widths)
        text += f": {' and '.join(more)} more of runs"
    for students, half in found.students.items():
        text += (
            f"; most of the variance between seeds is the students': a new study with student_seeds: "
            f"{students} would have about ±{two_digits(half)} with {found.seeds} seeds"
        )
    return text


def _without_seeds(finding: Finding) -> str:
    """Return what would decide a claim of which the variance between seeds says nothing."""
    interval = finding.interval
    if finding.verdict != "cannot tell" or interval is None or finding.of_looks:
        return ""
    if interval.networks:
        return f"more teacher networks than these {interval.networks}; more seeds of them would do little"
    if not interval.includes_seeds:
        return "a second seed: one does not show how much seeds vary"
    return ""
