"""Claims that take several studies, because each of them holds fixed what the claim is about.

Studies are measured on different samples and trained apart, so their differences are independent: the parts
of their variances add up, weighted by the square of the contrast's weight, each with its own degrees of
freedom. Networks are those that every study has, fixed, and averaged, as in the paper's Table 4. Trends over
the teachers of several studies are in `pooled`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lskd import LskdError
from lskd_study.claims.contrasts import difference, estimate_contrast, fitted_change, measure_of
from lskd_study.claims.findings import Draft, Finding, decide
from lskd_study.claims.long_tail import class_of_key, is_long_tailed
from lskd_study.claims.pooled import content, pooled_trends
from lskd_study.claims.settings import Setting, models_of
from lskd_study.claims.statements import CLAIMS, Claim
from lskd_study.plan.plan import exact
from lskd_study.results.results import Results, common_seeds, failure_words, failures_of, is_translation
from lskd_study.stats.intervals import Interval, Part, no_interval, parts_interval

METHOD = "independent studies, each with seeds and samples crossed"
Shared = TypeVar("Shared")


def judge_several(studies: Sequence[Results[Any]]) -> list[Finding]:
    """Test the claims that these studies can test together; none where they cannot.

    All of them: equal smoothing values and convention. More classes: image studies without a long tail, with
    different numbers of classes, some of which are the same (by name), whose teachers have a network in
    common, trained by the same file; of studies of one number of classes the one that shares most networks.
    Long tails: two studies of the same classes with a network in common, one of them long-tailed. Trends: see
    `pooled`.
    """
    groups: dict[object, list[Results[Any]]] = {}
    for study in studies:
        if study.finished:
            groups.setdefault((study.plan.convention, tuple(study.plan.smoothing)), []).append(study)
    drafts: list[Draft] = []
    for group in groups.values():
        drafts += _gains([study for study in group if not is_translation(study.plan)])
        drafts += pooled_trends(group)
    return decide(drafts, headline=False)


def _gains(group: Sequence[Results[Any]]) -> list[Draft]:
    tails = [is_long_tailed(study.plan) for study in group]
    even = [study for study, tail in zip(group, tails, strict=True) if not tail]
    drafts: list[Draft] = []
    for related in _related(even):
        chosen = _one_of_each_number(related)
        if len(chosen) < 2:
            continue
        points = [math.log10(study.plan.num_classes) for study in chosen]
        scale = max(points) - min(points)
        weights = [weight / scale for weight in fitted_change(points)]
        common = _shared(map(_protocols, chosen))
        classes = ", ".join(f"{study.plan.num_classes:,}" for study in chosen)
        drafts += _gain_drafts("gain-classes", chosen, weights, [m for m, _ in common], f"{classes} classes")
    for study in (study for study, tail in zip(group, tails, strict=True) if tail):
        for other in even:
            common_models = _shared([models_of(one.plan, "teacher") for one in (study, other)])
            if _classes(study) == _classes(other) and common_models:
                words = f"“{study.plan.title}” against “{other.plan.title}”"
                drafts += _gain_drafts("gain-long-tail", [other, study], [-1.0, 1.0], common_models, words)
                break
    return drafts


def _related(studies: Sequence[Results[Any]]) -> list[list[Results[Any]]]:
    """Return the studies in groups whose classes are in part the same, directly or by way of another."""
    groups: list[tuple[set[str], list[Results[Any]]]] = []
    for study in studies:
        names, members = set(_classes(study)), [study]
        apart = []
        for other_names, others in groups:
            if names & other_names:
                names, members = names | other_names, others + members
            else:
                apart.append((other_names, others))
        groups = [*apart, (names, members)]
    return [members for _, members in groups]


def _one_of_each_number(studies: Sequence[Results[Any]]) -> list[Results[Any]]:
    """Return one study for each number of classes, in rising order, as long as they share a network."""
    by_number: dict[int, list[Results[Any]]] = {}
    for study in studies:
        by_number.setdefault(study.plan.num_classes, []).append(study)
    found: list[Results[Any]] = []
    for number, members in sorted(by_number.items()):
        elsewhere = {
            p for n, others in by_number.items() if n != number for o in others for p in _protocols(o)
        }
        best = max(members, key=lambda study: len(elsewhere & set(_protocols(study))))
        if _shared(map(_protocols, [*found, best])):
            found.append(best)
    return found


def _protocols(study: Results[Any]) -> list[tuple[str, str]]:
    """Return the teachers' networks, each with what its trainer's file says."""
    plan = study.plan
    runs = [run for run in plan.runs if run.role == "teacher"]
    return list(dict.fromkeys((run.model, content(plan, run)) for run in runs))


def _classes(study: Results[Any]) -> frozenset[str]:
    """Return the names of the classes of the validation images."""
    first = next(iter(study.finished.values()))
    return frozenset(class_of_key(key) for key in first.keys)


def _shared(lists: Iterable[Sequence[Shared]]) -> list[Shared]:
    """Return what is in all of the lists, in the order of the first."""
    first, *others = lists
    return [item for item in first if all(item in other for other in others)]


def _gain_drafts(
    contrast: str,
    studies: Sequence[Results[Any]],
    weights: Sequence[float],
    networks: Sequence[str],
    words: str,
) -> list[Draft]:
    claim = next(claim for claim in CLAIMS if claim.contrast == contrast)
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
    where = f"α {exact(arms[1])} against {exact(arms[0])}; {', '.join(networks)}; {words}"
    setting = Setting(*arms, 1.0, 0.0, where)
    found: list[Interval] = []
    runs = 0
    for study in studies:
        pairs = [(study.teachers(name, arms[0]), study.teachers(name, arms[1])) for name in networks]
        groups = [group for pair in pairs for group in pair]
        if failed := failures_of(groups):
            return Draft(claim, setting, note=f"“{study.plan.title}”: {failure_words(failed)}", failed=True)
        seeds = common_seeds(groups)
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
