"""Measures of a study's classifiers, from the logits that its runs stored: what they are, and what they tell.

They are no claims of the paper: none gets a verdict, and none counts in the correction for several tests.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from lskd import LskdError, measure_teacher
from lskd.analysis.by_sample import Softmax, by_sample
from lskd.analysis.calibration import calibration_contributions
from lskd.analysis.dark_knowledge import among_wrong, log_ratio_contributions
from lskd.analysis.selective import aurc_pseudo_values, largest_normalised
from lskd_study.base.cores import over_cores
from lskd_study.claims.contrasts import stored_of
from lskd_study.claims.judging import by_network
from lskd_study.claims.statements import Setting, losses_of, models_of
from lskd_study.paper.sources import SOURCES
from lskd_study.plan.kinds import IMAGES
from lskd_study.plan.plan import exact
from lskd_study.results.images import ImageResult, Stored
from lskd_study.results.results import Results, common_seeds, failure_words, failures_of
from lskd_study.stats.intervals import Array, Interval, crossed_interval
from lskd_study.stats.ranks import FEWEST, Pick, RankCorrelation, pick, rank_correlation

Role = Literal["teacher", "student"]
Kind = Literal["value", "difference", "ratio", "rank correlation", "regret"]
Fields = Mapping[str, Mapping[str, Array]]  # by run and measure: a value each sample, or one


@dataclass(frozen=True)
class Quantity:
    """What is measured of a classifier.

    Attributes:
        id: its name in files.
        text: its name on pages.
        short: its name within a sentence.
        unit: of its values.
        lowest: whether less of it is better.
        roles: whose.
        ratio: whether arms are compared by their ratio and not by their difference.
    """

    id: str
    text: str
    short: str
    unit: str = ""
    lowest: bool = True
    roles: tuple[Role, ...] = ("teacher", "student")
    ratio: bool = False

    @property
    def source(self) -> str:
        """Who proposed it, or used it so."""
        return SOURCES[self.id]


_LARGEST = "Selective risk (AURC) by the largest"
_DARK = "Dark knowledge: variance of the wrong classes’ probabilities"
MEASURES = (
    Quantity("nll", "Cross-entropy with the labels (NLL)", "NLL", "nats"),
    Quantity("ece", "Expected calibration error, 15 bins", "calibration error"),
    Quantity("aurc", f"{_LARGEST} probability", "AURC", "percent"),
    Quantity("aurc_normalised", f"{_LARGEST} normalised logit", "AURC after normalisation", "percent"),
    Quantity("dark_knowledge", _DARK, "dark knowledge", "", False, ("teacher",), True),
    Quantity(
        "agreement", "Fidelity: same answer as its teacher", "agreement", "percent", False, ("student",)
    ),
    Quantity("divergence", "Fidelity: KL(teacher ‖ student)", "divergence", "nats", True, ("student",)),
)
# What teachers are ranked by beside these. An order needs no interval of its own, so one value a run will do.
ACCURACY = Quantity("top1", "Accuracy, top-1", "accuracy", "percent", lowest=False)
STABILITIES = tuple(
    Quantity(name, text, text)
    for name, text in (
        ("target_std", "1−S (Algorithm 1)"),
        ("vector_l2", "1−S (Eq. 2)"),
        ("between_vector_l2", "1−S between classes (Eq. 5)"),
        ("between_target_std", "1−S between classes (Table 10)"),
    )
)

LOWEST = {one.id: one.lowest for one in (ACCURACY, *STABILITIES, *MEASURES)}


@dataclass(frozen=True)
class Estimate:
    """A measure in one arm, or of one arm against the baseline.

    Attributes:
        quantity: what was measured.
        role: whose.
        kind: of number.
        setting: where; of a value ``smoothing`` is the arm, and ``baseline`` too.
        interval: None where runs are missing or failed; of a ratio its ends are exponentials.
        note: why there is none.
    """

    quantity: Quantity
    role: Role
    kind: Kind
    setting: Setting
    interval: Interval | None = None
    note: str = ""


@dataclass(frozen=True)
class Rank:
    """How the order of the teachers by a measure goes with that of their students by accuracy.

    Attributes:
        quantity: the measure.
        correlation: 1 where the network that is better by the measure always has the better students.
        picked: the teacher that it would have picked, and what that costs in points.
        values: the measure of each teacher and its students' accuracy, percent.
    """

    quantity: Quantity
    correlation: RankCorrelation
    picked: Pick
    values: list[list[float]]


@dataclass(frozen=True)
class Ranking:
    """Every measure's order of the teachers.

    Attributes:
        setting: of the students.
        teachers: in words, network by network.
        networks: what correlations are over: the networks, or of fewer than three the teachers.
        best: the one with the most accurate students; its ``high``: how much better another's may be.
        ranks: one for each measure.
    """

    setting: Setting
    teachers: list[str]
    networks: list[str]
    best: Pick
    ranks: list[Rank]


@dataclass(frozen=True)
class Measures:
    """All that is measured of a study's classifiers; ``ranking`` is None below three teachers."""

    estimates: list[Estimate]
    ranking: Ranking | None = None


def measure_study(results: Results[Any]) -> Measures:
    """Measure every finished run and estimate each measure in each arm; nothing for translation.

    Raises:
        LskdError: for logits that cannot be read.
    """
    plan = results.plan
    if plan.kind is not IMAGES or results.samples < 2:
        return Measures([])
    losses = losses_of(plan)
    ranked = len(plan.smoothing) * len(models_of(plan, "teacher")) >= FEWEST and not plan.teachers_alone
    fields = _of_runs(results, losses[0][0], ranked)
    estimates = _estimates(results, fields, "teacher", losses[0])
    for loss in () if plan.teachers_alone else losses:
        estimates += _estimates(results, fields, "student", loss)
    return Measures(estimates, _ranking(results, fields, losses[0]) if ranked else None)


def _of_runs(results: Results[ImageResult], temperature: float, ranked: bool) -> Fields:
    """Return every finished run's measures, and of teachers that are ranked those with one value a run."""
    groups: dict[str, list[ImageResult]] = defaultdict(list)  # a teacher, which comes first, and its students
    for result in results.finished.values():
        if result.run.role != "control":
            groups[result.run.teacher or result.run.id].append(result)

    ended = Event()

    def measure(group: Sequence[ImageResult]) -> dict[str, dict[str, Array]]:
        found, said = {}, None
        for result in group:
            if ended.is_set():
                break
            stored, taught = stored_of(results.plan, result), result.run.role == "student"
            own = _of_classifier(stored, result.correct, said, None if taught else temperature)
            if not taught:
                said = stored
                if ranked:
                    own |= _stabilities(stored, result.instability)
            found[result.run.id] = own
        return found

    fields: dict[str, dict[str, Array]] = {}
    for found in over_cores(measure, groups.values(), ended):
        fields |= found
    return fields


def _of_classifier(
    stored: Stored, correct: Array, teacher: Stored | None, temperature: float | None
) -> dict[str, Array]:
    """Return a run's measures from one look at its logits and at its teacher's; of a teacher temperature."""
    several = stored.logits.shape[1] > 2  # of two normalised logits every sample has the same
    names = ["nll", "log_largest"]
    names += ["aurc_normalised"] * several
    names += ["agreement", "divergence"] * (teacher is not None)
    names += ["dark_knowledge"] * (several and temperature is not None)

    def measure(z: Array, *others: Any) -> Array:
        *theirs, labels = others
        own = Softmax(z)
        rows: list[ArrayLike] = [-own.of(labels), own.log_largest]
        if several:
            rows.append(largest_normalised(own.logits))
        for other in map(Softmax, theirs):
            rows += [(other.answer == own.answer).squeeze(1), other.divergence(own)]
        if several and temperature is not None:
            rows.append(among_wrong(own if temperature == 1 else Softmax(z / temperature), labels))
        return np.stack(rows)

    theirs = [] if teacher is None else [teacher.logits]
    if teacher is not None and not np.array_equal(teacher.order, stored.order):
        theirs = [teacher.logits[teacher.order[np.argsort(stored.order)]]]
    values = by_sample(measure, stored.logits, *theirs, labels=stored.labels)
    found = {name: stored.sorted(one) for name, one in zip(names, values, strict=True)}
    sure = found.pop("log_largest")
    gaps = calibration_contributions(torch.from_numpy(np.exp(sure)), torch.from_numpy(correct))
    found |= {"top1": correct, "ece": gaps.numpy(), "aurc": aurc_pseudo_values(sure, correct)}
    if several:
        found["aurc_normalised"] = aurc_pseudo_values(found["aurc_normalised"], correct)
    return found


def _stabilities(stored: Stored, instability: float) -> dict[str, Array]:
    measures = measure_teacher(stored.logits, stored.labels, fitted=False)
    found = {one.id: measures.one_minus_stability(one.id) for one in STABILITIES[1:]}  # type: ignore[arg-type]
    return {name: np.array([value]) for name, value in {STABILITIES[0].id: instability, **found}.items()}


def _estimates(
    results: Results[ImageResult], fields: Fields, role: Role, loss: tuple[float, float]
) -> list[Estimate]:
    """Return each measure's value in every arm, then every arm against the baseline."""
    arms = results.plan.smoothing
    networks = list(by_network(results, role, arms, [loss]).values())
    runs = [kinds for network in networks for kinds in network]
    seeds = common_seeds(runs)
    note = failure_words(failures_of(runs)) or ("" if seeds else "no seed has all of its runs")
    found = []
    for one in (one for one in MEASURES if role in one.roles):
        # (arms, networks, seeds) of (samples,), None where a measure does not exist
        tables = [
            [[_mean(fields, network[arm][seed], one.id) for seed in seeds] for network in networks]
            for arm in range(len(arms))
        ]
        missing = [values is None for table in tables for network in table for values in network]
        if missing and all(missing):
            continue
        why = note or ("the run of a teacher is missing" if any(missing) else "")
        asked: list[tuple[Kind, int, int]] = [("value", arm, arm) for arm in range(len(arms))]
        asked += [("ratio" if one.ratio else "difference", 0, arm) for arm in range(1, len(arms))]
        for kind, first, arm in asked:
            estimate = Estimate(one, role, kind, Setting(arms[first], arms[arm], *loss), note=why)
            try:
                found.append(estimate if why else _estimated(estimate, tables[first], tables[arm]))
            except (LskdError, ValueError) as error:
                found.append(replace(estimate, note=str(error)))
    return found


def _mean(fields: Fields, result: ImageResult, name: str) -> Array | None:
    """Return a measure's samples, of several students of one teacher's seed their mean; None without one."""
    values = [fields[one.run.id][name] for one in result.each if name in fields[one.run.id]]
    return np.mean(values, axis=0) if len(values) == len(result.each) else None


def _estimated(estimate: Estimate, baseline: Sequence[Any], arm: Sequence[Any]) -> Estimate:
    """Return it with its interval, the mean over networks of ``(networks, seeds, samples)``."""
    first, second = np.array(baseline), np.array(arm)
    if estimate.kind == "ratio":
        logs = [log_ratio_contributions(*pair) for pair in zip(first, second, strict=True)]
        found = crossed_interval(np.mean(logs, axis=0))
        middle, low, high = (float(np.exp(end)) for end in (found.estimate, found.low, found.high))
        found = replace(found, estimate=middle, low=low, high=high, parts=())
        return replace(estimate, interval=found)
    differs = estimate.kind == "difference"
    table = (second - first if differs else second).mean(0)
    found = crossed_interval(table, bounded=differs and estimate.quantity.id == "agreement")
    found = found.scaled(100 if estimate.quantity.unit == "percent" else 1)
    if not differs:  # none of them can be negative
        found = replace(found, low=float(np.maximum(found.low, 0)))
    return replace(estimate, interval=found)


def _ranking(results: Results[ImageResult], fields: Fields, loss: tuple[float, float]) -> Ranking | None:
    """Return how well each measure ranks the teachers; None where runs of some are missing or failed."""
    plan = results.plan
    models, students = models_of(plan, "teacher"), models_of(plan, "student")
    kinds = [(model, alpha) for model in models for alpha in plan.smoothing]
    own = [results.teachers(*kind) for kind in kinds]
    taught = [[results.students(s, model, alpha, *loss) for s in students] for model, alpha in kinds]
    everyone = [*own, *(runs for of_teacher in taught for runs in of_teacher)]
    seeds = [] if failures_of(everyone) else common_seeds(everyone)
    if not seeds:
        return None
    accuracy = 100 * np.array(
        [np.mean([[runs[s].correct for s in seeds] for runs in of_teacher], axis=0) for of_teacher in taught]
    )
    ranks = []
    for one in (ACCURACY, *STABILITIES, *MEASURES):
        if one.id not in fields[own[0][seeds[0]].run.id]:
            continue
        table = np.array([[fields[runs[seed].run.id][one.id] for seed in seeds] for runs in own])
        if np.isfinite(table).all():  # 1-S is not known of classes of one image
            oriented = -table if one.lowest else table
            found = correlate(oriented, accuracy, len(models))
            scale = 100 if one.unit == "percent" else 1
            means = [scale * table.reshape(len(kinds), -1).mean(1), accuracy.mean((1, 2))]
            ranks.append(Rank(one, found, pick(oriented, accuracy), np.transpose(means).tolist()))
    names = [
        f"α = {exact(alpha)}" if len(models) == 1 else f"{model}, α = {exact(alpha)}"
        for model, alpha in kinds
    ]
    setting = Setting(plan.smoothing[0], plan.smoothing[-1], *loss)
    networks = models if len(models) >= FEWEST else names
    return Ranking(setting, names, networks, pick(accuracy, accuracy), ranks)


def correlate(measure: ArrayLike, accuracy: ArrayLike, networks: int) -> RankCorrelation:
    """Return how a measure goes with students' accuracy from network to network.

    A network's teachers are alike, however their labels are smoothed (in simulation 6 networks with two each
    had p < 0.05 in 17 of 100 cases where nothing was true, taken as 12), so a network counts once, with the
    mean of its teachers. Of fewer than three networks the teachers' own order has no interval.

    Args:
        measure: of the teachers, network by network: ``(M,)``, ``(M, S)`` or ``(M, S, N)``.
        accuracy: of their students, likewise.
        networks: how many; each has as many teachers.
    """
    both = [np.asarray(values) for values in (measure, accuracy)]
    if networks >= FEWEST:
        return rank_correlation(*(np.mean(np.split(x, networks), axis=1) for x in both))
    note = f"fewer than {FEWEST} networks: no interval"
    return replace(rank_correlation(*both), low=np.nan, high=np.nan, p_value=np.nan, note=note)
