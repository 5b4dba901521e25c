"""Estimate every claim that a study tests, and judge them. Those of a page are one family."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd_study.claims.contrasts import (
    Cells,
    Measure,
    difference,
    estimate_contrast,
    fitted_change,
    measure_of,
)
from lskd_study.claims.findings import Draft, Finding, decide
from lskd_study.claims.long_tail import SHOTS, shot_measure
from lskd_study.claims.scope import claims_of
from lskd_study.claims.settings import (
    Setting,
    hard_weights_of,
    models_of,
    settings_of,
    temperatures_of,
)
from lskd_study.claims.similar_classes import separation_measure
from lskd_study.claims.statements import Claim
from lskd_study.results.results import Kind, Result, Results, common_seeds, failure_words, failures_of
from lskd_study.stats.intervals import Array, Interval
from lskd_study.stats.trends import network_trend

# (without, with smoothing), one pair per network
Groups = Sequence[tuple[Mapping[int, Result], Mapping[int, Result]]]


def judge(results: Results[Kind]) -> list[Finding]:
    """Test every claim in every setting; verdicts are corrected for their number."""
    plan = results.plan
    return decide(
        [_draft(results, claim, setting) for claim in claims_of(plan) for setting in settings_of(claim, plan)]
    )


def groups(
    results: Results[Kind], claim: Claim, setting: Setting
) -> dict[str, tuple[dict[int, Kind], dict[int, Kind]]]:
    """Return (without, with smoothing) results by seed for each teacher, or each student of each teacher."""
    arms = (setting.baseline, setting.smoothing)
    by_arm = _by_network(results, claim.measured_on, arms, [(setting.temperature, setting.hard_weight)])
    return {name: (kinds[0], kinds[1]) for name, kinds in by_arm.items()}


def estimate(quantity: str, pairs: Groups, seeds: Sequence[int]) -> Interval:
    """Return the paired difference (smoothed minus baseline), averaged over networks, with its interval.

    Accuracy is in percentage points, BLEU in points, losses in nats, 1-S and perplexity as they are.

    Raises:
        LskdError: when the quantity is missing or not finite in some run.
    """
    return estimate_contrast(measure_of(quantity), [difference(pair) for pair in pairs], seeds)[0]


def _by_network(
    results: Results[Kind],
    role: Literal["teacher", "student"],
    arms: Sequence[float],
    losses: Sequence[tuple[float, float]],
) -> dict[str, list[dict[int, Kind]]]:
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


def _draft(results: Results[Kind], claim: Claim, setting: Setting) -> Draft:
    null = -results.plan.margin if claim.non_inferior else 0.0
    draft = Draft(claim, setting, null=null)
    if claim.contrast == "networks":
        return _over_networks(results, draft)
    networks = _networks(results, claim, setting)
    needed = [runs for cells in networks for _, runs in cells]
    seeds, note = _seeds(results, needed)
    if not seeds:
        return replace(draft, note=note, failed=bool(failures_of(needed)))
    used = {runs[seed].run.id for cells in networks for _, runs in cells for seed in seeds}
    draft = replace(draft, note=note, runs=len(used))
    try:
        measure = _measure(results, claim, networks, seeds)
        interval, p_value = estimate_contrast(measure, networks, seeds, null)
    except LskdError as error:
        return replace(draft, note="; ".join(filter(None, [str(error), note])))
    return replace(draft, interval=interval, p_value=p_value)


def _measure(
    results: Results[Kind], claim: Claim, networks: Sequence[Cells], seeds: Sequence[int]
) -> Measure:
    if claim.quantity == "separation":
        compared = [[runs[seed] for _, runs in cells for seed in seeds] for cells in networks]
        return separation_measure(results.plan, compared)
    return (
        shot_measure(results.plan, claim.quantity) if claim.quantity in SHOTS else measure_of(claim.quantity)
    )


def _networks(results: Results[Kind], claim: Claim, setting: Setting) -> list[Cells]:
    """Return the weights and runs of a contrast, for each network."""
    plan, arms = results.plan, (setting.baseline, setting.smoothing)
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
        kinds = _by_network(results, claim.measured_on, [setting.smoothing], losses)
        return [list(zip(weights, cells, strict=True)) for cells in kinds.values()]
    signs = [w * sign for w in weights for sign in (-1.0, 1.0)]
    kinds = _by_network(results, claim.measured_on, arms, losses)
    return [list(zip(signs, cells, strict=True)) for cells in kinds.values()]


def _over_networks(results: Results[Kind], draft: Draft) -> Draft:
    """Estimate a trend over teacher networks, each the mean of its arms (and of its students)."""
    claim, setting, plan = draft.claim, draft.setting, results.plan
    of_teachers = _by_network(results, "teacher", plan.smoothing, [])
    explained = {name: list(kinds) for name, kinds in of_teachers.items()}
    if claim.measured_on == "student":
        t, hard = setting.temperature, setting.hard_weight
        explained = {
            teacher: [
                results.students(student, teacher, alpha, t, hard)
                for student in models_of(plan, "student")
                for alpha in plan.smoothing
            ]
            for teacher in of_teachers
        }
    used = [runs for kinds in (*of_teachers.values(), *explained.values()) for runs in kinds]
    seeds, note = _seeds(results, used)
    if not seeds:
        return replace(draft, note=note, failed=bool(failures_of(used)))
    return estimate_trend(
        replace(draft, note=note), list(of_teachers.values()), list(explained.values()), seeds
    )


def estimate_trend(
    draft: Draft,
    teachers: Sequence[Sequence[Mapping[int, Result]]],
    explained: Sequence[Sequence[Mapping[int, Result]]],
    seeds: Sequence[int],
) -> Draft:
    """Return the draft with a trend over networks; each is the mean of its kinds of run."""
    claim, note = draft.claim, draft.note
    # By identity: runs of several studies may have one name.
    used = {id(runs[seed]) for kinds in (*teachers, *explained) for runs in kinds for seed in seeds}
    draft = replace(draft, runs=len(used))
    try:
        x, _, problem = _table(teachers, claim.explained_by, seeds)
        y, strata, other = _table(explained, claim.quantity, seeds)
        interval = network_trend(x, y, strata)
    except LskdError as error:
        return replace(draft, note="; ".join(filter(None, [str(error), note])))
    if problem or other:
        return replace(draft, note="; ".join(filter(None, [problem or other, note])))
    return replace(draft, interval=interval, p_value=interval.p_value)


def _table(
    networks: Iterable[Sequence[Mapping[int, Result]]], quantity: str, seeds: Sequence[int]
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
        raise LskdError("paired differences hold NaN or infinity; leave out the run that diverged")
    return table, strata, problem


def _seeds(results: Results[Kind], used: Sequence[Mapping[int, Result]]) -> tuple[list[int], str]:
    """Return the seeds that have all of these runs, and what is to be said of the others.

    None where one of them failed: those that did not are a choice by the result.
    """
    if failed := failures_of(used):
        return [], failure_words(failed)
    seeds = common_seeds(used)
    lost = [seed for seed in results.plan.seeds if seed not in seeds]
    if not seeds:
        return [], "no seed has all of its runs"
    return seeds, f"without seed {', '.join(map(str, lost))}: runs are missing" if lost else ""
