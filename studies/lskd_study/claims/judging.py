"""Estimate every claim that a study tests, and judge them. Those of a page are one family."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd_study.claims.contrasts import (
    SHOTS,
    Cells,
    Measure,
    difference,
    estimate_contrast,
    fitted_change,
    measure_of,
    separation_measure,
    shot_measure,
)
from lskd_study.claims.findings import Finding, decide
from lskd_study.claims.statements import (
    Claim,
    Setting,
    claims_of,
    hard_weights_of,
    models_of,
    settings_of,
    temperatures_of,
)
from lskd_study.plan.plan import real_name
from lskd_study.results.results import AnyResult, Result, Results
from lskd_study.stats.intervals import Array, Interval
from lskd_study.stats.moderated import FEWEST, moderated
from lskd_study.stats.trends import network_trend

# (without, with smoothing), one pair per network
Groups = Sequence[tuple[Mapping[int, Result], Mapping[int, Result]]]
BySeeds = Sequence[Mapping[int, Result]]  # results by seed, one for each smoothing value (and student)


def judge(results: Results[AnyResult], claims: Sequence[Claim] | None = None) -> list[Finding]:
    """Test every claim of a study, or these, in every setting; verdicts are corrected for their number."""
    plan = results.plan
    found = [
        _estimated(results, claim, setting)
        for claim in (claims_of(plan) if claims is None else claims)
        for setting in settings_of(claim, plan)
    ]
    if plan.pool_seed_variance:
        found = _pooled(found, len(plan.seeds), plan.margin)
    if plan.looks:
        found = [finding.at_look(plan.looks, plan.look) for finding in found]
    return decide(found)


def _pooled(findings: Sequence[Finding], seeds: int, margin: float) -> list[Finding]:
    """Return findings with the variance between seeds pooled over the settings that a claim is tested in.

    Of those that have all of the plan's ``seeds``: with other seeds their differences are not side by side.
    """
    alike: dict[Claim, list[tuple[int, Interval]]] = defaultdict(list)
    for place, one in enumerate(findings):
        whole = (own := one.interval) is not None and own.known and own.seeds == seeds >= FEWEST
        if own is not None and whole and len(set(own.by_seed)) > 1:
            alike[one.claim].append((place, own))
    found = list(findings)
    for places in alike.values():
        if len(places) >= FEWEST:
            parts = moderated([own.by_seed for _, own in places])
            for (place, own), part in zip(places, parts, strict=True):
                found[place] = findings[place].tested(own.pooled(part, len(places)), margin)
    return found


def groups(
    results: Results[AnyResult], claim: Claim, setting: Setting
) -> dict[str, tuple[dict[int, AnyResult], dict[int, AnyResult]]]:
    """Return (without, with smoothing) results by seed for each teacher, or each student of each teacher."""
    arms = (setting.baseline, setting.smoothing)
    by_arm = by_network(results, claim.measured_on, arms, [(setting.temperature, setting.hard_weight)])
    return {name: (kinds[0], kinds[1]) for name, kinds in by_arm.items()}


def estimate(quantity: str, pairs: Groups, seeds: Sequence[int]) -> Interval:
    """Return the paired difference (smoothed minus baseline), averaged over networks, with its interval.

    Accuracy is in percentage points, BLEU in points, losses in nats, 1-S and perplexity as they are.

    Raises:
        LskdError: when the quantity is missing or not finite in some run.
    """
    return estimate_contrast(measure_of(quantity), [difference(pair) for pair in pairs], seeds)


def by_network(
    results: Results[AnyResult],
    role: Literal["teacher", "student"],
    arms: Sequence[float],
    losses: Sequence[tuple[float, float]],
) -> dict[str, list[dict[int, AnyResult]]]:
    """Return, by name of the network, the results by seed of each arm (and for students of each loss)."""
    teachers = models_of(results.plan, "teacher")
    if role == "teacher":
        return {name: [results.teachers(name, alpha) for alpha in arms] for name in teachers}
    return {
        (f"{student} of {teacher}" if len(teachers) > 1 else student): [
            results.students(student, teacher, alpha, t, hard) for t, hard in losses for alpha in arms
        ]
        for teacher in teachers
        for student in models_of(results.plan, "student")
    }


def _estimated(results: Results[AnyResult], claim: Claim, setting: Setting) -> Finding:
    null = -results.plan.margin if claim.non_inferior else 0.0
    finding = Finding(claim, setting, null=null)
    if claim.contrast == "networks":
        names, students = models_of(results.plan, "teacher"), models_of(results.plan, "student")
        kinds = [network_kinds(results, claim, setting, name, students) for name in names]
        return estimate_trend(finding, kinds, results.plan.seeds)
    networks = _networks(results, claim, setting)
    finding, seeds = finding.on_seeds((runs for cells in networks for _, runs in cells), results.plan.seeds)
    if not seeds:
        return finding
    try:
        measure = _measure(results, claim, networks, seeds)
        interval = estimate_contrast(measure, networks, seeds)
    except LskdError as error:
        return finding.noting(str(error))
    return finding.tested(interval, results.plan.margin)


def _measure(
    results: Results[AnyResult], claim: Claim, networks: Sequence[Cells], seeds: Sequence[int]
) -> Measure:
    if claim.quantity == "separation":
        compared = [[runs[seed] for _, runs in cells for seed in seeds] for cells in networks]
        return separation_measure(results.plan, compared)
    return (
        shot_measure(results.plan, claim.quantity) if claim.quantity in SHOTS else measure_of(claim.quantity)
    )


def _networks(results: Results[AnyResult], claim: Claim, setting: Setting) -> list[Cells]:
    """Return the weights and runs of a contrast, for each network."""
    if claim.control is not None:
        named = real_name if claim.control == "real" else str
        loss = setting.temperature, setting.hard_weight
        return [
            [
                (-1.0, results.controls(named(student), setting.baseline)),
                (1.0, results.students(student, teacher, setting.smoothing, *loss)),
            ]
            for teacher in models_of(results.plan, "teacher")
            for student in models_of(results.plan, "student")
        ]
    plan, arms, signs = results.plan, [setting.baseline, setting.smoothing], [-1.0, 1.0]
    losses, weights = [(setting.temperature, setting.hard_weight)], [1.0]
    if claim.contrast == "gain-temperature":
        low, *higher = temperatures_of(plan)
        losses = [(t, setting.hard_weight) for t in (low, *higher)]
        weights = [-1.0, *(1 / len(higher) for _ in higher)]
    elif claim.contrast in ("hard-weight", "gain-hard-weight"):
        points = hard_weights_of(plan)
        losses = [(setting.temperature, hard) for hard in points]
        weights = fitted_change(points)
    if claim.contrast == "hard-weight":
        arms, signs = [setting.smoothing], [1.0]
    signed = [w * sign for w in weights for sign in signs]
    kinds = by_network(results, claim.measured_on, arms, losses)
    return [list(zip(signed, cells, strict=True)) for cells in kinds.values()]


def network_kinds(
    results: Results[AnyResult], claim: Claim, setting: Setting, teacher: str, students: Sequence[str]
) -> tuple[BySeeds, BySeeds]:
    """Return the kinds of run of a network in a trend: the teacher's, and those of what is explained."""
    smoothing = results.plan.smoothing
    teachers = [results.teachers(teacher, alpha) for alpha in smoothing]
    if claim.measured_on == "teacher":
        return teachers, teachers
    loss = setting.temperature, setting.hard_weight
    return teachers, [results.students(s, teacher, alpha, *loss) for s in students for alpha in smoothing]


def estimate_trend(
    finding: Finding, networks: Sequence[tuple[BySeeds, BySeeds]], planned: Sequence[int] = ()
) -> Finding:
    """Return the finding with a trend over networks, each the mean of its arms (and of its students)."""
    teachers, explained = [own for own, _ in networks], [others for _, others in networks]
    finding, seeds = finding.on_seeds((runs for kinds in (*teachers, *explained) for runs in kinds), planned)
    if not seeds:
        return finding
    try:
        x, _, problem = _table(teachers, finding.claim.explained_by, seeds)
        y, strata, other = _table(explained, finding.claim.quantity, seeds)
        interval = network_trend(x, y, strata)
    except LskdError as error:
        return finding.noting(str(error))
    if problem or other:
        return finding.noting(problem or other)
    return replace(finding, interval=interval, p_value=interval.p_value)


def _table(
    networks: Iterable[BySeeds], quantity: str, seeds: Sequence[int]
) -> tuple[Array, NDArray[np.int64] | None, str]:
    """Return a quantity in its unit, ``(networks, seeds, samples)``, its strata and what is wrong with it."""
    rows, strata, problem = [], None, ""
    for kinds in networks:
        samples = [[runs[seed].per_sample(quantity) for seed in seeds] for runs in kinds]
        found = [[sample for sample in by_seed if sample is not None] for by_seed in samples]
        rows.append(np.mean([[s.values * s.scale for s in by_seed] for by_seed in found], axis=0))
        strata = found[0][0].strata
        problem = problem or next((s.problem for by_seed in found for s in by_seed if s.problem), "")
    table = np.asarray(rows)
    if not np.isfinite(table).all():
        raise LskdError("paired differences contain NaN or infinity; leave out the run that diverged")
    return table, strata, problem
