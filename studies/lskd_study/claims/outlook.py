"""What a number of seeds can tell, before a study runs, and after: what would decide an open claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lskd_study.base.gpus import gpus_of_a_run
from lskd_study.base.text import duration
from lskd_study.claims.findings import Finding
from lskd_study.claims.statements import Claim, claims_of, settings_of
from lskd_study.plan.kinds import IMAGES
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.results import Results
from lskd_study.stats.intervals import LEVEL, Part
from lskd_study.stats.power import Variances

PAPERS = 0.4  # points: the smallest gain of a student on ImageNet in the paper (Table 2)
POWER = 0.8
LITTLE = "less than an even chance"
MORE_SEEDS = (5, 10, 20, 40)
ENOUGH = 0.7  # of the width: what more seeds must make of it to be worth naming
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


class Known(NamedTuple):
    """What an interval was made of: so many seeds, and the parts of the variance."""

    seeds: int
    parts: Sequence[Part]


def claims_planned(plan: Plan) -> list[Claim]:
    """Return the claims that a plan's power is about: the headline and the teachers' accuracy."""
    claims = claims_of(plan)
    teachers = [claim for claim in claims if claim.id == "better-teacher"]
    return list(dict.fromkeys([claims[0], *teachers]))


def level_of(claim: Claim, plan: Plan) -> float:
    """Return the level at which a claim is tested first: half of the error rate is the headline's alone."""
    claims = [one for one in claims_of(plan) if one.direction and one.contrast != "direction"]
    tests = {Finding(one, setting).parameter for one in claims for setting in settings_of(one, plan)}
    if len(tests) < 2:
        return LEVEL
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


def measured(plan: Plan, known: Mapping[str, Known], source: str, seconds: float = math.nan) -> list[Outlook]:
    """Return what to expect after what was measured, by claim."""
    found = []
    for claim in claims_planned(plan):
        variances = Variances.of(*known[claim.id]) if claim.id in known else None
        if variances is not None:
            found.append(Outlook(claim, variances, source, level_of(claim, plan), seconds))
    return found


def before(plan: Plan, outlooks: Sequence[Outlook]) -> list[str]:
    """Return what a plan can tell, in lines; the first warns where its chance is less than even."""
    seeds = plan.looks[-1] if plan.looks else len(plan.seeds)
    lines = []
    for one in outlooks:
        whose = f"{one.claim.role}s'"
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
    if not outlooks:
        return []
    power = outlooks[0].variances.power(seeds, PAPERS, outlooks[0].level) if seeds > 1 else 0.0
    lines.append(outlooks[0].source)
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


def _two_digits(value: float) -> str:
    return exact(float(f"{value:.2g}"))


def seconds_a_seed(results: Results[Any]) -> float:
    """Return what the runs of one seed took, one after the other; NaN before there are any."""
    seeds = {job["seed"] for job in results.jobs}
    return sum(job["wall_time_s"] for job in results.jobs) / len(seeds) if seeds else math.nan


def after(finding: Finding, seconds: float = math.nan) -> str:
    """Return what would decide an open claim; empty where it is decided or nothing is known of its seeds.

    ``seconds``: what one seed takes, all of its runs one after the other.
    """
    variances, interval = _open(finding), finding.interval
    if variances is None or interval is None:
        return ""
    now = f"±{_two_digits(variances.half_width(interval.seeds))} with {interval.seeds} seeds"
    if not (more := next_seeds(finding)):
        least = f"not below ±{_two_digits(variances.half_width(10**6))} with any number"
        return f"{now}, and {least}: the {interval.samples} samples are the limit"
    text = f"{now}; about " + ", ".join(f"±{_two_digits(variances.half_width(n))} with {n}" for n in more)
    if not math.isnan(seconds):
        text += f": {' and '.join(duration((n - interval.seeds) * seconds) for n in more)} more of runs"
    return text


def next_seeds(finding: Finding) -> list[int]:
    """Return numbers of seeds, two at most, that would make an open claim's interval worth it narrower."""
    variances, interval = _open(finding), finding.interval
    if variances is None or interval is None:
        return []
    more = [number for number in MORE_SEEDS if number > interval.seeds][:2]
    enough = ENOUGH * variances.half_width(interval.seeds)
    return more if more and variances.half_width(more[-1]) <= enough else []


def _open(finding: Finding) -> Variances | None:
    """Return what the differences of an undecided claim vary by; None where that is not known."""
    interval = finding.interval
    # The rule that added seeds by looks has said beforehand how many there may be.
    if finding.verdict != "cannot tell" or interval is None or interval.networks or finding.of_looks:
        return None
    return Variances.of(interval.seeds, interval.parts)
