"""``lskd study --check-results``: what is published of studies, computed anew from the files beside it.

A published study is a folder with the ``verdicts.json``, ``runs.csv``, ``table.csv`` and page that
``lskd study`` wrote, without the runs themselves. From its study file and ``runs.csv`` every difference
between arms is computed again, with the part of its variance that seeds have; the other part, that of single
samples, is taken as recorded. From these intervals, p-values, their correction and the verdicts follow again.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np

from lskd import LskdError
from lskd.base.files import CSV_LIMIT, read_bytes, read_csv
from lskd_study.claims import Finding, judge
from lskd_study.claims.contrasts import SHOTS
from lskd_study.claims.findings import decide
from lskd_study.claims.measures import LOWEST, correlate
from lskd_study.claims.recommendation import recommend
from lskd_study.claims.statements import CLAIMS, OVER_STUDIES, Setting, claims_of, settings_of, task_of
from lskd_study.pages.page import PAGE, counted, interval_text
from lskd_study.pages.tables import COLUMNS, table_csv, table_rows
from lskd_study.pages.verdicts import VERDICTS_FILE, FindingRecord, SettingRecord, StudyRecord, read_record
from lskd_study.plan.plan import Plan
from lskd_study.results.results import Failure, PerSample, Result, Results
from lskd_study.stats.intervals import (
    RULE_OF_THREE,
    Interval,
    Part,
    no_interval,
    parts_interval,
    rule_of_three,
)
from lskd_study.stats.ranks import pick
from lskd_study.stats.trends import FEWEST
from lskd_study.study.engine import make_plan
from lskd_study.study.planning import DECLARED

# Of the largest value: each of a weighted sum has eight digits, and the weights' sizes come to 6 at most.
_ROUNDED = 3e-7
_EXACT = 1e-9
_LARGEST = 1e12  # of a part's variance and degrees of freedom, too
_LONG_TAIL = "long-tail"
# Per sample and not by run alone: of one sample, which is the run's value.
_OF_SAMPLES = {"top1": "top1", "last_top1": "top1", "instability": "one_minus_s", "bleu": "bleu"}


@dataclass(frozen=True)
class Kept(Result):
    """A run as its line in ``runs.csv`` has it; of single samples nothing is known."""

    values: Mapping[str, float]

    def _value(self, quantity: str) -> float:
        return self.values.get(quantity, math.nan)

    def _per_sample(self, quantity: str) -> PerSample | None:
        name = _OF_SAMPLES.get(quantity)
        return PerSample(np.array([self.values.get(name, math.nan)])) if name else None


def check_results(folder: Path) -> str:
    """Check every published study below a folder; return in words what was checked.

    Raises:
        LskdError: for a number that differs from what its files give, with study and claim, or for files that
            are missing or damaged.
    """
    studies = sorted(path.parent for path in folder.rglob(VERDICTS_FILE))
    if not studies:
        raise LskdError(f"{folder} contains no study ({VERDICTS_FILE}); name a folder of published results")
    findings = computed = 0
    for study in studies:
        record = read_record(study)
        computed += _check_study(study, record)
        findings += len(record.findings)
    return (
        f"{counted(len(studies), 'study', 'studies')}: {counted(findings, 'finding')} as published, "
        f"{computed:,} of them from their runs' values"
    )


def _check_study(folder: Path, record: StudyRecord) -> int:
    if record.kind == "teachers":
        raise LskdError(f"{folder} is of teachers alone, which have no runs.csv; name studies with students")
    if record.looks and len(record.seeds) not in record.looks:
        raise LskdError(f"{folder}: {len(record.seeds)} seeds are of no look")
    added = (record.looks[-1], len(record.seeds)) if record.looks else ()  # by the rule, to those of the file
    # Not the folder itself: that has a page and no plan, as if a rule came after it.
    plan = make_plan(record.study_file, str(folder / "output"), *added)
    for name in (*DECLARED, "seeds", "smoothing", "convention", "controls", "looks"):
        said, planned = getattr(record, name), getattr(plan, name)
        if said != planned:
            raise LskdError(f"{folder}: {name} is {said}, in {record.study_file} it is {planned}")
    results = _kept(plan, folder)
    table = folder / "table.csv"
    given = list(csv.DictReader(table_csv(table_rows(results)).splitlines()))
    nothing: dict[str, str] = {}
    if not all(_same_row(table, a, b) for a, b in zip_longest(read_csv(table), given, fillvalue=nothing)):
        raise LskdError(f"{table} is not what runs.csv gives")
    page = read_bytes(folder / PAGE, CSV_LIMIT, "a page").decode(errors="replace")
    anew = {(one.claim.id, one.setting): one for one in _judged(results)}
    again = decide(_recorded(folder, plan, record, anew))
    count = 0
    for said, found in zip(record.findings, again, strict=True):
        where = f"{folder}: {said.claim}, {said.setting.words}"
        _compare(where, said, found)
        if found.interval is not None and interval_text(found.interval, found.claim.unit) not in page:
            raise LskdError(f"{where}: the interval is not on the page")
        own = anew.get((said.claim, found.setting))
        # Of classes of fewer than three images 1-S has no difference, though runs.csv has it.
        if own is None or (said.estimate is None and found.claim.quantity == "instability"):
            continue
        largest = _largest(results, found.claim.quantity)
        pooled = plan.pool_seed_variance and "pooled" in said.method
        _compare_runs(where, said, own.interval, largest, pooled)
        count += own.interval is not None
    _check_ranks(folder, record)
    advice = recommend(results, again)
    if not (record.at_chance or record.data_changed):  # which change it, and follow from the runs alone
        for part in ("sentence", "reason"):
            if getattr(record.recommendation, part) != (given := getattr(advice, part)):
                raise LskdError(f"{folder}: the verdicts give another {part}: {given}")
            if escape(given, quote=False) not in page:
                raise LskdError(f"{folder}: the recommendation's {part} is not on the page")
    first = record.findings[0]
    if (record.headline.claim, record.headline.verdict) != (first.claim, first.verdict):
        raise LskdError(f"{folder}: the headline is not the first finding")
    return count


def _check_ranks(folder: Path, record: StudyRecord) -> None:
    """Compare how measures rank the teachers with what the teachers' values give, where they are published.

    Raises:
        LskdError: they differ.
    """
    orders = {one.measure: one for one in record.measures if one.kind == "rank correlation"}
    for regret in (one for one in record.measures if one.kind == "regret" and one.values):
        measure, students = np.transpose(regret.values)
        said = orders.get(regret.measure)
        if said is None or regret.measure not in LOWEST or len(measure) % max(len(record.teachers), 1):
            raise LskdError(f"{folder}: {VERDICTS_FILE} is damaged: {regret.measure[:40]!r}")
        measure = -measure if LOWEST[regret.measure] else measure
        found, picked = correlate(measure, students, len(record.teachers)), pick(measure, students)
        pairs = [(regret.estimate, picked.regret), (said.estimate, found.estimate)]
        if said.low is not None:  # of teachers that differ by little there is no interval, which seeds say
            pairs += [(said.low, found.low), (said.high, found.high), (said.p, found.p_value)]
        agree = all(_same(_number(one), other, _EXACT * 100) for one, other in pairs)
        if not agree or [regret.picked] != regret.teachers[picked.teacher : picked.teacher + 1]:
            raise LskdError(f"{folder}: {regret.measure} does not rank the teachers as recorded")


def _kept(plan: Plan, folder: Path) -> Results[Kept]:
    finished, failed = {}, {}
    measured = [name for name in COLUMNS[plan.kind].of_run if not name.endswith("signature")]
    path = folder / "runs.csv"
    for row in read_csv(path, ["run", "failed", "wall_time_s", "resumed", *measured]):
        run = plan.run(row["run"])
        job = {name: _cell(path, row[name]) for name in ("wall_time_s", "resumed")}
        if row["failed"]:
            failed[run.id] = Failure(run, {**job, "failed": row["failed"]})
            continue
        values = {name: _cell(path, row[name]) for name in measured if row[name]}
        finished[run.id] = Kept(run, job, {}, ["of the mean"], values=values)
    missing = [run.id for run in plan.runs if run.id not in finished and run.id not in failed]
    return Results(plan, finished, missing, failed)


def _cell(path: Path, text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        raise LskdError(f"{path}: {text[:40]!r} is no number") from None


def _largest(results: Results[Kept], quantity: str) -> float:
    name = _OF_SAMPLES.get(quantity, quantity)
    values = (abs(one.values.get(name, math.nan)) for one in results.finished.values())
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _judged(results: Results[Kept]) -> list[Finding]:
    """Return the findings that the runs' values give."""
    plain = [
        claim
        for claim in claims_of(results.plan)
        if claim.contrast not in ("networks", "direction") and claim.quantity not in (*SHOTS, "separation")
    ]
    return judge(results, plain)


def _recorded(
    folder: Path, plan: Plan, record: StudyRecord, anew: Mapping[tuple[str, Setting], Finding]
) -> list[Finding]:
    """Return the recorded findings before their verdicts: from estimates and the parts of their variances.

    Raises:
        LskdError: they are not those that the study's file asks for, in this order.
    """
    asked = {
        _key(claim.id, setting.describe(claim.role), setting): Finding(claim, setting)
        for claim in CLAIMS
        if task_of(plan) in claim.tasks and claim.contrast not in OVER_STUDIES
        for setting in settings_of(claim, plan)
    }
    found = []
    for said in record.findings:
        words = said.setting.words
        if (one := asked.get(_key(said.claim, words, said.setting))) is None:
            raise LskdError(f"{folder}: {said.claim}, {words} is not in {record.study_file}")
        numbers = [abs(_number(said.estimate)), *(number for part in said.parts for number in part)]
        if any(number < 0 or number > _LARGEST for number in numbers):
            raise LskdError(f"{folder}: {said.claim}, {words}: {VERDICTS_FILE} is damaged")
        null = -plan.margin if one.claim.non_inferior else 0.0
        own = anew.get((said.claim, one.setting))
        failed = own.failed if own else said.verdict == "no verdict" and one.claim.contrast != "direction"
        one = replace(one, null=null, failed=failed, note=said.note if failed else "")
        if said.estimate is not None and one.claim.contrast != "direction":
            one = one.tested(_interval(said, one.claim.contrast == "networks"), plan.margin)
            one = one.at_look(plan.looks, plan.look) if plan.looks else one
        found.append(one)
    # Those of long tails depend on data that need not be here.
    there = [(one.claim.id, one.setting) for one in found if not one.claim.id.startswith(_LONG_TAIL)]
    planned = [(one.id, own) for one in claims_of(plan) for own in settings_of(one, plan)]
    if there != [one for one in planned if not one[0].startswith(_LONG_TAIL)]:
        lost = next(
            (f": {name}, {own.describe()} is missing" for name, own in planned if (name, own) not in there),
            "",
        )
        raise LskdError(f"{folder}: the findings are not those of {record.study_file}{lost}")
    return found


def _key(claim: str, words: str, setting: Setting | SettingRecord) -> tuple[object, ...]:
    return claim, words, setting.baseline, setting.smoothing


def _interval(said: FindingRecord, trend: bool) -> Interval:
    """Return what a record's estimate and variance give; without one the rule of three, or nothing."""
    shape, estimate = (said.seeds, said.samples), _number(said.estimate)
    networks = FEWEST if trend else 0  # how many, nothing here goes by
    if said.parts:
        parts = [Part(*one) for one in said.parts]
        return parts_interval(estimate, parts, shape, said.method, networks=networks)
    if said.method == RULE_OF_THREE and abs(estimate) in (0, 100) and 0 < said.samples < 2**31:
        return rule_of_three(estimate / 100, *shape).scaled(100)
    return no_interval(estimate, *shape, said.method, said.note, networks)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _compare(where: str, said: FindingRecord, found: Finding) -> None:
    """Compare a recorded finding with what follows from its parts.

    Raises:
        LskdError: they differ.
    """
    own = found.interval
    pairs = {"p": (said.p, found.p_value), "p_holm": (said.p_holm, found.adjusted_p)}
    pairs["null"] = said.null, found.null
    for name in ("estimate", "low", "high"):
        pairs[name] = getattr(said, name), getattr(own, name, math.nan)
    for name, (recorded, computed) in pairs.items():
        recorded = _number(recorded)
        if not _same(recorded, computed, _EXACT * max(abs(recorded), 1)):
            raise LskdError(f"{where}: {name} is {recorded}, its parts give {computed}")
    if said.verdict != found.verdict:
        raise LskdError(f"{where}: the verdict is {said.verdict!r}, its parts give {found.verdict!r}")


def _compare_runs(
    where: str, said: FindingRecord, own: Interval | None, largest: float, pooled: bool
) -> None:
    """Compare a recorded finding with what its runs' values give: the estimate, and what seeds vary.

    Raises:
        LskdError: they differ.
    """
    estimate, near = math.nan if own is None else own.estimate, _ROUNDED * largest
    if not _same(_number(said.estimate), estimate, near):
        raise LskdError(f"{where}: the estimate is {said.estimate}, runs.csv gives {estimate}")
    if own is None:
        return
    if said.seeds != own.seeds:
        raise LskdError(f"{where}: seeds are {said.seeds}, in runs.csv {own.seeds}")
    spread = math.sqrt(own.parts[0].variance) if own.parts else 0.0
    if spread <= near or pooled:  # of seeds that agree the samples say how much they vary
        return
    if said.method == RULE_OF_THREE or (said.parts and said.parts[0][1] != own.parts[0].df):
        raise LskdError(f"{where}: seeds do not vary as in runs.csv")
    if said.parts and not _same(math.sqrt(said.parts[0][0]), spread, near):
        recorded = math.sqrt(said.parts[0][0])
        raise LskdError(f"{where}: the standard error over seeds is {recorded}, runs.csv gives {spread}")


def _same_row(path: Path, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    if one.keys() != other.keys():
        return False
    for name in one:
        quantity, _, part = name.rpartition("_")
        if part not in ("mean", "std"):
            if one[name] != other[name]:
                return False
            continue
        said, own = _cell(path, one[name]), _cell(path, other[name])
        size = abs(_cell(path, other[f"{quantity}_mean"])) + (abs(own) if part == "std" else 0)
        if not _same(said, own, _ROUNDED * size):
            return False
    return True


def _same(one: float, other: float, tolerance: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or abs(one - other) <= tolerance
