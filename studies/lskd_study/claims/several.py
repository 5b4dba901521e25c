"""Claims that take several studies, because each of them holds fixed what the claim is about.

Studies are measured on different samples and trained apart, so their differences are independent: the parts
of their variances add up, weighted by the square of the contrast's weight, each with its own degrees of
freedom. Networks are those that every study has, fixed, and averaged, as in the paper's Table 4. Trends over
the teachers of several studies are in `pooled`.
"""

import math
from collections.abc import Sequence
from typing import Any

from lskd import LskdError
from lskd_study.claims.contrasts import difference, estimate_contrast, fitted_change, measure_of
from lskd_study.claims.judging import Draft, Finding, decide
from lskd_study.claims.long_tail import is_long_tailed
from lskd_study.claims.pooled import pooled_trends
from lskd_study.claims.settings import Setting, models_of
from lskd_study.claims.statements import CLAIMS, Claim
from lskd_study.plan import Plan
from lskd_study.results import Results, common_seeds, is_translation
from lskd_study.statistics import Interval, Part, no_interval, parts_interval

METHOD = "independent studies, each with seeds and samples crossed"


def judge_several(studies: Sequence[Results[Any]]) -> list[Finding]:
    """Test the claims that these studies can test together; none where they cannot.

    More classes: image studies without a long tail, of equal smoothing values and convention, whose teachers
    have a network in common, and with at least two different numbers of classes. Long tails: two such studies
    of as many classes, one of them long-tailed. Of studies that are alike in this the first is taken. Better
    teachers: studies of equal smoothing on the same samples that teach one student with one loss, and have at
    least three different teachers in all.
    """
    groups = _comparable(studies)
    drafts = [draft for group in groups for draft in _gains([s for s in group if not is_translation(s.plan)])]
    drafts += [draft for group in groups for draft in pooled_trends(group)]
    return decide(drafts, headline=False)


def _comparable(studies: Sequence[Results[Any]]) -> list[list[Results[Any]]]:
    """Return the studies in groups of equal smoothing."""
    groups: dict[object, list[Results[Any]]] = {}
    for study in studies:
        plan = study.plan
        groups.setdefault((plan.convention, tuple(plan.smoothing)), []).append(study)
    return [group for group in groups.values() if len(group) > 1]


def _gains(group: Sequence[Results[Any]]) -> list[Draft]:
    drafts: list[Draft] = []
    even = _first_of_each([study for study in group if not is_long_tailed(study.plan)])
    if len(even) > 1:
        points = [math.log10(study.plan.num_classes) for study in even]
        scale = max(points) - min(points)
        weights = [weight / scale for weight in fitted_change(points)]
        classes = ", ".join(f"{study.plan.num_classes:,}" for study in even)
        drafts += _gain_drafts("gain-classes", even, weights, f"{classes} classes")
    by_classes = {study.plan.num_classes: study for study in even}
    for study in _first_of_each([study for study in group if is_long_tailed(study.plan)]):
        other = by_classes.get(study.plan.num_classes)
        if other is not None:
            words = f"“{study.plan.title}” against “{other.plan.title}”"
            drafts += _gain_drafts("gain-long-tail", [other, study], [-1.0, 1.0], words)
    return drafts


def _first_of_each(studies: Sequence[Results[Any]]) -> list[Results[Any]]:
    """Return one study for each number of classes, in rising order, as long as they share a network.

    The first study of a number of classes stands; one that would leave no common network is left out.
    """
    found: dict[int, Results[Any]] = {}
    for study in studies:
        others = [other.plan for other in found.values()]
        if study.plan.num_classes not in found and _common_networks([*others, study.plan]):
            found[study.plan.num_classes] = study
    return [found[classes] for classes in sorted(found)]


def _common_networks(plans: Sequence[Plan]) -> list[str]:
    first, *others = (models_of(plan, "teacher") for plan in plans)
    return [name for name in first if all(name in models for models in others)]


def _gain_drafts(
    contrast: str, studies: Sequence[Results[Any]], weights: Sequence[float], words: str
) -> list[Draft]:
    claim = next(claim for claim in CLAIMS if claim.contrast == contrast)
    networks = _common_networks([study.plan for study in studies])
    if not networks:
        return []
    baseline, *others = studies[0].plan.smoothing
    return [_gain(claim, studies, weights, networks, (baseline, alpha), words) for alpha in others]


def _gain(
    claim: Claim,
    studies: Sequence[Results[Any]],
    weights: Sequence[float],
    networks: Sequence[str],
    arms: tuple[float, float],
    words: str,
) -> Draft:
    where = f"α {arms[1]:g} against {arms[0]:g}; {', '.join(networks)}; {words}"
    setting = Setting(*arms, 1.0, 0.0, where)
    found: list[Interval] = []
    runs = 0
    for study in studies:
        pairs = [(study.teachers(name, arms[0]), study.teachers(name, arms[1])) for name in networks]
        seeds = common_seeds([group for pair in pairs for group in pair])
        if not seeds:
            return Draft(claim, setting, note=f"“{study.plan.title}”: no seed has all of its runs")
        runs += len(networks) * len(arms) * len(seeds)
        try:
            interval, _ = estimate_contrast(
                measure_of(claim.quantity), [difference(pair) for pair in pairs], seeds
            )
        except LskdError as error:
            return Draft(claim, setting, note=f"“{study.plan.title}”: {error}")
        found.append(interval)
    combined = combine(found, weights)
    return Draft(claim, setting, combined, combined.p_value, runs=runs)


def combine(intervals: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Return the weighted sum of independent estimates with its interval.

    It counts as many seeds as the study with the fewest.
    """
    estimate = sum(w * interval.estimate for w, interval in zip(weights, intervals, strict=True))
    seeds = min(interval.seeds for interval in intervals)
    samples = sum(interval.samples for interval in intervals)
    unknown = next((interval for interval in intervals if not interval.parts), None)
    if unknown is not None:
        note = unknown.note or "one of the differences has no variance"
        return no_interval(estimate, seeds, samples, METHOD, note)
    parts = [
        Part(part.variance * w**2, part.df)
        for w, interval in zip(weights, intervals, strict=True)
        for part in interval.parts
    ]
    note = next((interval.note for interval in intervals if interval.note), "")
    return parts_interval(estimate, parts, (seeds, samples), METHOD, note)
