"""The section "Measures" of a study's page, and the probabilities beside its headline's interval."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lskd_study.base.text import listed
from lskd_study.claims import Finding
from lskd_study.claims.measures import Estimate, Measures, Quantity, Rank, Ranking
from lskd_study.pages.page import number, p_text, sentence
from lskd_study.pages.verdicts import chances_of
from lskd_study.plan.plan import Plan, exact
from lskd_study.stats.ranks import Pick

Cell = tuple[str, str, str]
"""Number, interval and note, of an arm or of a comparison."""


def measures_shown(measures: Measures, plan: Plan) -> dict[str, Any]:
    """Return what ``measures.html.j2`` takes."""
    baseline, *others = plan.smoothing
    ranking = measures.ranking
    return {
        "measured_rows": _rows(measures.estimates, plan),
        "measured_arms": [f"α = {exact(alpha)}" for alpha in plan.smoothing],
        "measured_against": [f"α {exact(alpha)} against {exact(baseline)}" for alpha in others],
        "ranking": ranking,
        "ranking_rows": [_rank_cells(rank, ranking) for rank in ranking.ranks] if ranking else [],
        "picks": picks_sentence(ranking) if ranking else "",
    }


def _rows(estimates: Sequence[Estimate], plan: Plan) -> list[tuple[str, str, str, list[Cell]]]:
    """Return each measure, its source, whose it is, and the cells of the arms, then of the comparisons."""
    groups: dict[tuple[Quantity, str], list[Estimate]] = {}
    for one in estimates:
        setting, whose = one.setting, f"{one.role}s"
        if one.role == "student" and not plan.papers_loss:
            whose += f", T = {exact(setting.temperature)}, λ = {exact(setting.hard_weight)}"
        groups.setdefault((one.quantity, whose), []).append(one)
    return [
        (measure_text(own[0]), quantity.source, whose, [_cell(one) for one in own])
        for (quantity, whose), own in groups.items()
    ]


def measure_text(estimate: Estimate) -> str:
    """Return a measure's name, with the temperature where that is not 1."""
    quantity, t = estimate.quantity, estimate.setting.temperature
    return f"{quantity.text} at T = {exact(t)}" if quantity.ratio and t != 1 else quantity.text


def _cell(estimate: Estimate) -> Cell:
    interval = estimate.interval
    if interval is None:
        return "–", "", estimate.note
    sign = estimate.kind == "difference"
    value, *ends = (_number(estimate, x, sign) for x in (interval.estimate, interval.low, interval.high))
    return (
        f"{'× ' if estimate.kind == 'ratio' else ''}{value}",
        (" to ".join(ends) if interval.known else ""),
        interval.note,
    )


def _number(estimate: Estimate, value: float, sign: bool) -> str:
    if estimate.quantity.ratio:  # a variance of probabilities: 1e-2 of ten classes, 1e-6 of a thousand
        return "–" if math.isnan(value) else f"{value:.3g}"
    return number(value, 2 if estimate.quantity.unit == "percent" else 4, sign=sign)


def _rank_cells(rank: Rank, ranking: Ranking) -> list[str]:
    """Return measure, the teacher that is picked, correlation, interval, p-value, regret and its interval."""
    found, picked = rank.correlation, rank.picked
    ends = f"{number(found.low, 2, sign=True)} to {number(found.high, 2, sign=True)}" if found.known else "–"
    return [
        rank.quantity.text,
        ranking.teachers[picked.teacher],
        number(found.estimate, 2, sign=True),
        ends,
        p_text(found.p_value),
        number(picked.regret, 2),
        _regret_ends(picked) or "–",
    ]


def _regret_ends(picked: Pick) -> str:
    return "" if math.isnan(picked.low) else f"{number(picked.low, 2)} to {number(picked.high, 2)}"


def picks_sentence(ranking: Ranking) -> str:
    """Return which measure would have picked the teacher with the best students, and what the others cost."""
    best, count = ranking.best, len(ranking.teachers)
    text = f"Of {count} teachers {ranking.teachers[best.teacher]} had the most accurate students"
    if not math.isnan(best.high):
        possible = f"though another’s may be up to {number(best.high, 2)} points better"
        text += f", {possible if best.high else 'and every other’s are worse'} (95 %)"
    by_teacher: dict[int, list[Rank]] = {}
    for rank in ranking.ranks:
        by_teacher.setdefault(rank.picked.teacher, []).append(rank)
    right = by_teacher.get(best.teacher, [])
    text += f". It would have been picked by {_measures(right) if right else 'no measure'}"
    for teacher, ranks in by_teacher.items():
        picked, ends = ranks[0].picked, _regret_ends(ranks[0].picked)
        if teacher == best.teacher:
            continue
        worse = "as good" if picked.regret == 0 else f"{number(picked.regret, 2)} points worse"
        text += (
            f"; {_measures(ranks)} would have picked {ranking.teachers[teacher]}, whose students are {worse}"
        )
        text += f" (95 % interval {ends})" if ends else ""
    noted: dict[str, list[Rank]] = {}
    for rank in ranking.ranks:
        noted.setdefault(rank.correlation.note, []).append(rank)
    notes = [
        f"by {_measures(ranks)} {note}" if note.startswith("the teachers") and len(noted) > 1 else note
        for note, ranks in noted.items()
    ]
    return " ".join(f"{sentence(words)}." for words in (text, best.note, *notes) if words)


def _measures(ranks: Iterable[Rank]) -> str:
    return listed(rank.quantity.short for rank in ranks)


def chances_sentence(finding: Finding, margin: float) -> str:
    """Return where the true difference of the headline probably lies; empty where that is not known."""
    if (found := chances_of(finding, margin)) is None:
        return ""
    better, within, worse = map(_percent, (found.better, found.within, found.worse))
    # The interval of a look is wider.
    what = "not corrected for looks, " if finding.of_looks else "the same interval as "
    return (
        f"P(better) {better}, P(within ±{exact(margin)} points) {within}, P(worse) {worse}: {what}a "
        "posterior with a flat prior, for this claim alone (Bouthillier et al., MLSys 2021; Benavoli et al., "
        "JMLR 2017)."
    )


def _percent(probability: float) -> str:
    if probability < 0.01:
        return "< 1\u00a0%"
    return "> 99\u00a0%" if probability > 0.99 else f"{100 * probability:.0f}\u00a0%"
