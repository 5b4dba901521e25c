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
from itertools import zip_longest
from pathlib import Path

import numpy as np

from lskd import LskdError
from lskd.base.files import read_csv
from lskd_study.claims import Finding, judge
from lskd_study.claims.contrasts import SHOTS
from lskd_study.claims.findings import decide
from lskd_study.claims.statements import CLAIMS, OVER_STUDIES, claims_of, settings_of, task_of
from lskd_study.pages.page import PAGE, counted, interval_text
from lskd_study.pages.tables import COLUMNS, table_csv, table_rows
from lskd_study.pages.verdicts import VERDICTS_FILE, FindingRecord, StudyRecord, read_record
from lskd_study.plan.plan import Plan
from lskd_study.results.results import Failure, PerSample, Result, Results
from lskd_study.stats.intervals import Interval, Part, parts_interval
from lskd_study.stats.trends import FEWEST
from lskd_study.stats.trends import METHOD as TREND
from lskd_study.study.engine import make_plan

_ROUNDED = 1e-6  # runs.csv has eight digits
_EXACT = 1e-9
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
    added = (record.looks[-1], len(record.seeds)) if record.looks else ()  # by the rule, to those of the file
    plan = make_plan(record.study_file, str(folder), *added)
    for name in ("seeds", "smoothing", "convention", "student_seeds", "last_epochs", "controls", "looks"):
        said, planned = getattr(record, name), getattr(plan, name)
        if said != planned:
            raise LskdError(f"{folder}: {name} is {said}, in {record.study_file} it is {planned}")
    results = _kept(plan, folder)
    table = folder / "table.csv"
    given = list(csv.DictReader(table_csv(table_rows(results)).splitlines()))
    nothing: dict[str, str] = {}
    if not all(_same_row(a, b) for a, b in zip_longest(read_csv(table), given, fillvalue=nothing)):
        raise LskdError(f"{table} is not what runs.csv gives")
    page = (folder / PAGE).read_text(encoding="utf-8")
    anew = {(one.claim.id, one.setting): one for one in _judged(results)}
    again = decide(_recorded(plan, record))
    count = 0
    for said, found in zip(record.findings, again, strict=True):
        where = f"{folder}: {said.claim}, {said.setting.words}"
        _compare(where, said, found)
        if found.interval is not None and interval_text(found.interval, said.unit) not in page:
            raise LskdError(f"{where}: the interval is not on the page")
        if (own := anew.get((said.claim, found.setting))) is not None and own.interval is not None:
            count += _compare_runs(where, said, own.interval)
    return count


def _kept(plan: Plan, folder: Path) -> Results[Kept]:
    finished, failed = {}, {}
    measured = [name for name in COLUMNS[plan.kind].of_run if not name.endswith("signature")]
    for row in read_csv(folder / "runs.csv"):
        run = plan.run(row["run"])
        if row["failed"]:
            failed[run.id] = Failure(run, {"failed": row["failed"]})
            continue
        values = {name: float(row[name]) for name in measured if row[name]}
        finished[run.id] = Kept(run, {}, {}, ["of the mean"], values=values)
    missing = [run.id for run in plan.runs if run.id not in finished and run.id not in failed]
    return Results(plan, finished, missing, failed)


def _judged(results: Results[Kept]) -> list[Finding]:
    """Return the findings that the runs' values give."""
    plain = [
        claim
        for claim in claims_of(results.plan)
        if claim.contrast != "networks" and claim.quantity not in (*SHOTS, "separation")
    ]
    return judge(results, plain)


def _recorded(plan: Plan, record: StudyRecord) -> list[Finding]:
    """Return the recorded findings before their verdicts: from estimates and the parts of their variances.

    Raises:
        LskdError: for one that the study's file does not ask for.
    """
    asked = {
        (claim.id, setting.describe(claim.role)): Finding(claim, setting)
        for claim in CLAIMS
        if task_of(plan) in claim.tasks and claim.contrast not in OVER_STUDIES
        for setting in settings_of(claim, plan)
    }
    found = []
    for said in record.findings:
        if (one := asked.get((said.claim, said.setting.words))) is None:
            raise LskdError(
                f"{plan.output}: {said.claim}, {said.setting.words} is not in {record.study_file}"
            )
        null = -plan.margin if one.claim.non_inferior else 0.0
        one = replace(one, null=null, failed=said.verdict == "no verdict")
        if said.estimate is not None and one.claim.contrast != "direction":
            one = one.tested(_interval(said), plan.margin)
            one = one.at_look(plan.looks, plan.look) if plan.looks else one
        found.append(one)
    return found


def _interval(said: FindingRecord) -> Interval:
    """Return what a record's estimate and variance give; of the rule of three, without any, what it says."""
    shape, ends = (said.seeds, said.samples), (_number(said.low), _number(said.high))
    networks = FEWEST if said.method == TREND else 0  # how many, nothing here goes by
    if said.parts:
        parts = [Part(*one) for one in said.parts]
        return parts_interval(_number(said.estimate), parts, shape, said.method, networks=networks)
    return Interval(_number(said.estimate), *ends, _number(said.p), *shape, said.method, networks=networks)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _compare(where: str, said: FindingRecord, found: Finding) -> None:
    """Compare a recorded finding with what follows from its parts.

    Raises:
        LskdError: they differ.
    """
    own = found.interval
    pairs = {"p": (said.p, found.p_value), "p_holm": (said.p_holm, found.adjusted_p)}
    if own is not None:
        pairs |= {name: (getattr(said, name), getattr(own, name)) for name in ("estimate", "low", "high")}
    for name, (recorded, computed) in pairs.items():
        if not _same(_number(recorded), computed, _EXACT):
            raise LskdError(f"{where}: {name} is {recorded}, its parts give {computed}")
    if said.verdict != found.verdict:
        raise LskdError(f"{where}: the verdict is {said.verdict!r}, its parts give {found.verdict!r}")


def _compare_runs(where: str, said: FindingRecord, own: Interval) -> bool:
    """Compare a recorded finding with what its runs' values give: the estimate, and what seeds vary."""
    if not _same(_number(said.estimate), own.estimate, _ROUNDED):
        raise LskdError(f"{where}: the estimate is {said.estimate}, runs.csv gives {own.estimate}")
    if own.parts and len(said.parts) > 0 and "pooled" not in said.method:
        spread, recorded = math.sqrt(own.parts[0].variance), math.sqrt(said.parts[0][0])
        if not _same(recorded, spread, _ROUNDED):
            raise LskdError(f"{where}: the standard error over seeds is {recorded}, runs.csv gives {spread}")
    return True


def _same_row(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    measured = [name for name in one if name.endswith(("_mean", "_std"))]
    return one.keys() == other.keys() and all(
        _same(float(one[name] or "nan"), float(other[name] or "nan"), _ROUNDED)
        if name in measured
        else one[name] == other[name]
        for name in one
    )


def _same(one: float, other: float, tolerance: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or math.isclose(
        one, other, rel_tol=tolerance, abs_tol=tolerance
    )
