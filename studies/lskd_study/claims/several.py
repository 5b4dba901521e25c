"""Claims that take several studies, because each of them keeps fixed what the claim is about.

Studies are measured on different samples and trained apart, so their differences are independent: the parts
of their variances add up, weighted by the square of the contrast's weight, each with its own degrees of
freedom. Networks are those that every study has, fixed, and averaged, as in the paper's Table 4.

A trend over teachers (Table 8, Fig. 8) is another thing: a study trains its teachers by one protocol, and the
paper's "Long" and "CutMix" are studies of their own. Those that are measured on the same samples put their
teachers together: each network of each study is one, and one that two studies trained alike counts once.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lskd import LskdError
from lskd_study.claims.contrasts import class_of_key, fitted_change, is_long_tailed
from lskd_study.claims.findings import Finding, decide
from lskd_study.claims.judging import BySeeds, estimate, estimate_trend, network_kinds
from lskd_study.claims.statements import CLAIMS, Claim, Setting, every_arm, models_of, task_of
from lskd_study.plan.kinds import IMAGES
from lskd_study.plan.plan import Plan, Run, exact
from lskd_study.results.results import Result, Results
from lskd_study.stats.intervals import Interval, Part, no_interval, parts_interval
from lskd_study.stats.trends import FEWEST

METHOD = "independent studies, each with seeds and samples crossed"
Shared = TypeVar("Shared")
# A student and its loss: model, file, temperature, hard weight, T^2.
Student = tuple[str, str, float, float, bool]


def judge_several(studies: Sequence[Results[Any]]) -> list[Finding]:
    """Test the claims that these studies can test together; none where they cannot.

    All of them: equal smoothing values, convention and number of last epochs. More classes: image studies
    without a long tail, with different numbers of classes, some of which are the same (by name), whose
    teachers have a network in common, trained by the same file; of studies of one number of classes the one
    that shares most networks. Long tails: two studies of the same classes with a network in common, one of
    them long-tailed. Trends: studies measured on the same samples.
    """
    groups: dict[object, list[Results[Any]]] = {}
    for study in studies:
        if study.finished:
            plan = study.plan
            alike = plan.convention, tuple(plan.smoothing), plan.last_epochs
            groups.setdefault(alike, []).append(study)
    found: list[Finding] = []
    for group in groups.values():
        found += _gains([study for study in group if study.plan.kind is IMAGES])
        found += _pooled_trends(group)
    return decide(found, headline=False)


def _protocol(plan: Plan, run: Run) -> tuple[str, str]:
    """Return a run's network and what its trainer's file says: files of one content are one protocol."""
    return run.model, json.dumps(plan.configs.get(run.config, {}), sort_keys=True)


def _first(study: Results[Any]) -> Result:
    found: Result = next(iter(study.finished.values()))
    return found


# Gains


def _gains(group: Sequence[Results[Any]]) -> list[Finding]:
    even: list[Results[Any]] = []
    tailed: list[Results[Any]] = []
    for study in group:
        (tailed if is_long_tailed(study.plan) else even).append(study)
    found: list[Finding] = []
    for related in _related(even):
        chosen = _one_of_each_number(related)
        if len(chosen) < 2:
            continue
        points = [math.log10(study.plan.num_classes) for study in chosen]
        scale = max(points) - min(points)
        weights = [weight / scale for weight in fitted_change(points)]
        common = [model for model, _ in _shared(map(_protocols, chosen))]
        classes = ", ".join(f"{study.plan.num_classes:,}" for study in chosen)
        found += _of_gains("gain-classes", chosen, weights, common, f"{classes} classes")
    for study in tailed:
        for other in even:
            common = _shared([models_of(one.plan, "teacher") for one in (study, other)])
            if _classes(study) == _classes(other) and common:
                words = f"“{study.plan.title}” against “{other.plan.title}”"
                found += _of_gains("gain-long-tail", [other, study], [-1.0, 1.0], common, words)
                break
    return found


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
    return list(dict.fromkeys(_protocol(plan, run) for run in plan.runs if run.role == "teacher"))


def _classes(study: Results[Any]) -> frozenset[str]:
    """Return the names of the classes of the validation images."""
    return frozenset(class_of_key(key) for key in _first(study).keys)


def _shared(lists: Iterable[Sequence[Shared]]) -> list[Shared]:
    """Return what is in all of the lists, in the order of the first."""
    first, *others = lists
    return [item for item in first if all(item in other for other in others)]


def _of_gains(
    contrast: str,
    studies: Sequence[Results[Any]],
    weights: Sequence[float],
    networks: Sequence[str],
    words: str,
) -> list[Finding]:
    """Return the weighted sum of the studies' differences, for each smoothing value."""
    claim = next(claim for claim in CLAIMS if claim.contrast == contrast)
    baseline, *others = studies[0].plan.smoothing
    findings = []
    for alpha in others:
        where = f"α {exact(alpha)} against {exact(baseline)}; {', '.join(networks)}; {words}"
        finding = Finding(claim, Setting(baseline, alpha, 1.0, 0.0, where))
        findings.append(_of_gain(finding, studies, weights, networks))
    return findings


def _of_gain(
    finding: Finding, studies: Sequence[Results[Any]], weights: Sequence[float], networks: Sequence[str]
) -> Finding:
    found: list[Interval] = []
    runs = 0
    for study in studies:
        arms = finding.setting.baseline, finding.setting.smoothing
        pairs = [(study.teachers(name, arms[0]), study.teachers(name, arms[1])) for name in networks]
        one, seeds = finding.on_seeds(group for pair in pairs for group in pair)
        try:
            if not seeds:
                raise LskdError(one.note)
            found.append(estimate(finding.claim.quantity, pairs, seeds))
        except LskdError as error:
            return replace(finding, note=f"“{study.plan.title}”: {error}", failed=one.failed)
        runs += one.runs
    combined = combine(found, weights)
    return replace(finding, interval=combined, p_value=combined.p_value, runs=runs)


def combine(intervals: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Return the weighted sum of independent estimates with its interval.

    It counts as many seeds as the study with the fewest.
    """
    mean = sum(w * interval.estimate for w, interval in zip(weights, intervals, strict=True))
    seeds = min(interval.seeds for interval in intervals)
    samples = sum(interval.samples for interval in intervals)
    unknown = next((interval for interval in intervals if not interval.parts), None)
    if unknown is not None:
        note = unknown.note or "one of the differences has no variance"
        return no_interval(mean, seeds, samples, METHOD, note)
    parts = [
        Part(part.variance * w**2, part.df)
        for w, interval in zip(weights, intervals, strict=True)
        for part in interval.parts
    ]
    note = next((interval.note for interval in intervals if interval.note), "")
    return parts_interval(mean, parts, (seeds, samples), METHOD, note)


# Trends over teachers


def _pooled_trends(studies: Sequence[Results[Any]]) -> list[Finding]:
    """Return the trends over teachers of studies of equal smoothing, where several share samples."""
    found: list[Finding] = []
    for group in _same_samples(studies):
        for claim in CLAIMS:
            if claim.contrast != "networks" or task_of(group[0].plan) not in claim.tasks:
                continue
            if claim.measured_on == "teacher":
                found += _trend(claim, group, None)
                continue
            for student in dict.fromkeys(kind for study in group for kind in _students(study.plan)):
                sharing = [study for study in group if student in _students(study.plan)]
                found += _trend(claim, sharing, student)
    return found


def _same_samples(studies: Sequence[Results[Any]]) -> list[list[Results[Any]]]:
    groups: list[list[Results[Any]]] = []
    for study in studies:
        for group in groups:
            same_task = group[0].plan.num_classes == study.plan.num_classes
            if same_task and _first(group[0]).same_samples(_first(study)):
                group.append(study)
                break
        else:
            groups.append([study])
    return groups


def _students(plan: Plan) -> list[Student]:
    return list(
        dict.fromkeys(
            (
                *_protocol(plan, run),
                run.temperature,
                run.hard_weight,
                plan.temperature_squared and run.temperature != 1,
            )
            for run in plan.runs
            if run.role == "student"
        )
    )


def _trend(claim: Claim, studies: Sequence[Results[Any]], student: Student | None) -> list[Finding]:
    """Return the finding, or nothing where one study has all the teachers or there are too few."""
    baseline, *others = studies[0].plan.smoothing
    t, hard = student[2:4] if student else (1.0, 0.0)
    setting = Setting(baseline, others[-1], t, hard)
    networks: dict[tuple[str, str], tuple[BySeeds, BySeeds]] = {}
    contributing = []
    for study in studies:
        before = len(networks)
        for protocol in _protocols(study):
            if protocol not in networks:
                names = [student[0]] if student else []
                networks[protocol] = network_kinds(study, claim, setting, protocol[0], names)
        if len(networks) > before:
            contributing.append(study.plan)
    if len(networks) < FEWEST or len(contributing) < 2:
        return []
    words = every_arm(contributing[0])
    if student:
        words += f"; student {student[0]}, T = {exact(t)}, λ = {exact(hard)}"
    titles = ", ".join(f"“{plan.title}”" for plan in contributing)
    setting = replace(setting, words=f"{words}; teachers of {titles}")
    return [estimate_trend(Finding(claim, setting), list(networks.values()))]
