"""``verdicts.json``: what a study found, for programs and for the index page over several studies.

Every number is finite or null: JSON has no NaN.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lskd import LskdError
from lskd.base.files import read_json
from lskd_study.base import provenance
from lskd_study.base.text import first_problem
from lskd_study.claims import Finding
from lskd_study.claims.findings import Verdict
from lskd_study.claims.measures import Kind, Measures, Quantity
from lskd_study.claims.outlook import after, seconds_a_seed
from lskd_study.claims.recommendation import Recommendation
from lskd_study.pages.notices import at_ceiling, at_chance, data_versions, notices_of, still_falling
from lskd_study.plan.kinds import Control
from lskd_study.plan.plan import Plan
from lskd_study.results.results import AnyResult, Results
from lskd_study.stats.chances import Chances, chances
from lskd_study.stats.ranks import METHOD

VERDICTS_FILE = "verdicts.json"
FORMAT = 1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Record(BaseModel):
    """A part of the file. What a later version adds is passed over when it is read."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class SettingRecord(Record):
    """What was compared; temperature and hard weight are null for a claim about teachers."""

    baseline: float
    smoothing: float
    temperature: Number
    hard_weight: Number
    words: str


class FindingRecord(Record):
    """One claim tested in one setting.

    ``direction`` is the side of zero that the claim names; 0 marks a part that is reported and is no claim,
    so its ``verdict`` is null. ``no verdict``: a run that it needs failed, and ``note`` says which.
    ``p`` is against ``null`` (0, or the negative margin) and its own, ``p_holm``
    corrected for the page's claims. ``runs``: how many trainings the estimate rests on. ``parts``: of the
    variance of ``estimate``, each with its degrees of freedom; ``students``: of each kind for one seed, and
    ``by_student`` their part of the first. ``outlook``: what would decide an open claim.
    """

    claim: str
    text: str
    tested: str
    source: str
    role: str
    quantity: str
    unit: str
    direction: Literal[1, 0, -1]
    setting: SettingRecord
    estimate: Number
    low: Number
    high: Number
    p: Number
    p_holm: Number
    verdict: Verdict | None
    seeds: int
    samples: int
    method: str
    note: str
    null: Number = 0.0
    runs: int = 0
    parts: list[tuple[float, int | float]] = []
    students: int = 1
    by_student: tuple[float, int] | None = None
    outlook: str = ""


class HeadlineRecord(Record):
    """The study's own question: its claim, the verdict, and the sentence below the page's recommendation.

    ``chances``: of the difference, with a flat prior; null where seeds or variance are unknown.
    """

    claim: str | None
    verdict: Verdict | None
    answer: str
    chances: Chances | None = None


class MeasureRecord(Record):
    """What was measured beside the claims, without a verdict.

    ``kind``: ``value`` of the arm ``smoothing``; its ``difference`` from, or ``ratio`` to, the ``baseline``;
    ``rank correlation`` with the students' accuracy over ``teachers``, the means of their networks where
    there are three; ``regret`` of the teacher ``picked``, with each teacher's measure and students' accuracy
    as ``values``. Null for what a kind has not.
    """

    measure: str
    text: str
    source: str
    unit: str
    role: str
    kind: Kind
    baseline: Number = None
    smoothing: Number = None
    temperature: Number = None
    hard_weight: Number = None
    estimate: Number = None
    low: Number = None
    high: Number = None
    p: Number = None
    seeds: int = 0
    samples: int = 0
    method: str = ""
    note: str = ""
    teachers: list[str] = []
    picked: str = ""
    values: list[tuple[float, float]] = []


class FailedRecord(Record):
    """A run that failed: in which epoch, as its trainer counts (null: its teacher failed), and why."""

    run: str
    epoch: int | None
    reason: str


class RunsRecord(Record):
    """How many trainings the study asks for, how many have a result, which failed and which are missing."""

    planned: int
    finished: int
    missing: list[str]
    failed: list[FailedRecord] = []
    seconds: float = 0.0


class DataRecord(Record):
    """What the study was measured on; ``classes`` is 0 where nothing is classified."""

    path: str
    classes: int
    samples: int


class StudyRecord(Record):
    """The whole file.

    ``looks``: after how many seeds the study is judged, by a rule that keeps the error rate; ``looked_at``:
    after how many it was, without one. ``notices``: what weakens the verdict, a line each.
    ``data_changed``: the runs by the checksum of the data that they saw, empty where all saw the same.
    ``at_chance``: runs, ``still_falling``: kinds of run, ``at_ceiling``: kinds of student.
    """

    format: int = FORMAT
    kind: Literal["images", "translation", "teachers"]
    title: str
    study_file: str
    ecosystem: str
    recommendation: Recommendation = Recommendation("")
    headline: HeadlineRecord
    findings: list[FindingRecord]
    measures: list[MeasureRecord] = []
    data: DataRecord
    teachers: list[str]
    students: list[str]
    smoothing: list[float]
    convention: str
    temperatures: list[float]
    hard_weights: list[float]
    seeds: list[int]
    student_seeds: int = 1
    last_epochs: int = 1
    pool_seed_variance: bool = False
    controls: list[Control] = []
    looks: list[int] = []
    looked_at: list[int] = []
    runs: RunsRecord
    versions: dict[str, list[str]]
    last_run_finished: str
    notices: list[str] = []
    data_changed: dict[str, list[str]] = {}
    at_chance: list[str] = []
    still_falling: list[str] = []
    at_ceiling: list[str] = []

    def text(self) -> str:
        """Return the file's content."""
        return self.model_dump_json(indent=1) + "\n"


def study_record(
    results: Results[AnyResult],
    findings: Sequence[Finding],
    answer: str,
    recommendation: Recommendation | None = None,
    measures: Measures | None = None,
) -> StudyRecord:
    """Return what a study found; ``answer`` is its page's sentence on the headline.

    With students ``findings[0]`` is the headline; without, there is none.
    """
    plan = results.plan
    students = [run for run in plan.runs if run.role == "student"]
    headline = findings[0] if students else None
    seconds = seconds_a_seed(results)
    return StudyRecord(
        kind=plan.kind.name if students else "teachers",
        title=plan.title,
        study_file=plan.study_file,
        ecosystem=plan.ecosystem,
        recommendation=recommendation or Recommendation(""),
        headline=HeadlineRecord(
            claim=headline.claim.id if headline else None,
            verdict=headline.verdict if headline else None,
            answer=answer,
            chances=chances_of(headline, plan.margin),
        ),
        findings=[_finding(finding, seconds) for finding in findings],
        measures=_measures(measures) if measures else [],
        data=DataRecord(path=plan.data, classes=plan.num_classes, samples=results.samples),
        teachers=list(dict.fromkeys(run.model for run in plan.runs if run.role == "teacher")),
        students=list(dict.fromkeys(run.model for run in students)),
        smoothing=plan.smoothing,
        convention=plan.convention,
        temperatures=list(dict.fromkeys(run.temperature for run in students)),
        hard_weights=list(dict.fromkeys(run.hard_weight for run in students)),
        seeds=plan.seeds,
        student_seeds=plan.student_seeds,
        last_epochs=plan.last_epochs,
        pool_seed_variance=plan.pool_seed_variance,
        controls=plan.controls,
        looks=plan.looks,
        looked_at=looks_made(plan),
        runs=RunsRecord(
            planned=len(plan.runs),
            finished=len(results.finished),
            missing=results.missing,
            seconds=sum(job["wall_time_s"] for job in results.jobs),
            failed=[
                FailedRecord(run=one.run.id, epoch=one.epoch, reason=one.reason)
                for one in results.failed.values()
            ],
        ),
        versions=_versions([job["versions"] for job in results.jobs]),
        last_run_finished=max(str(job["finished"]) for job in results.jobs),
        notices=[notice.title for notice in notices_of(results)],
        data_changed=data_versions(results),
        at_chance=list(at_chance(results)),
        still_falling=still_falling(results),
        at_ceiling=list(at_ceiling(results)),
    )


def looks_made(plan: Plan) -> list[int]:
    """Return after how many seeds the page was made, without a rule; one seed allows no verdict."""
    return [] if plan.looks else [*plan.looked_at, *([len(plan.seeds)] if len(plan.seeds) > 1 else [])]


def teachers_record(
    title: str, names: list[str], answer: str, data: DataRecord, recommendation: Recommendation
) -> StudyRecord:
    """Return the record of a list of teachers, which are measured and compared but teach nobody."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("study_file", "ecosystem", "convention", "last_run_finished"), ""
    )
    for name in ("findings", "students", "smoothing", "temperatures", "hard_weights", "seeds"):
        nothing[name] = []
    return StudyRecord(
        kind="teachers",
        title=title,
        recommendation=recommendation,
        headline=HeadlineRecord(claim=None, verdict=None, answer=answer),
        data=data,
        teachers=names,
        runs=RunsRecord(planned=len(names), finished=len(names), missing=[]),
        versions=_versions([provenance.versions()]),
        **nothing,
    )


def _versions(of_runs: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for versions in of_runs for name in versions)
    return {name: list(dict.fromkeys(v[name] for v in of_runs if name in v)) for name in names}


def _finding(finding: Finding, seconds: float) -> FindingRecord:
    """Return a finding as the file has it: names that they share mean the same."""
    claim, setting = finding.claim, finding.setting
    loss = {"temperature": None, "hard_weight": None} if claim.role == "teacher" else {}
    unknown = {"estimate": None, "low": None, "high": None, "seeds": 0, "samples": 0, "method": ""}
    interval: dict[str, Any] = vars(finding.interval) if finding.interval else {**unknown, "note": ""}
    own = {
        "claim": claim.id,
        "setting": vars(setting) | loss | {"words": setting.describe(claim.role)},
        "p": finding.p_value,
        "p_holm": finding.adjusted_p,
        "outlook": after(finding, seconds),
        "note": "; ".join(filter(None, [interval["note"], finding.note])),
    }
    return FindingRecord.model_validate(vars(claim) | interval | vars(finding) | own)


def chances_of(headline: Finding | None, margin: float) -> Chances | None:
    """Return where the headline's true difference probably lies; None where that is not known."""
    if headline is None or headline.interval is None or not headline.claim.has_margin:
        return None
    return chances(headline.interval, margin)


def _measures(measures: Measures) -> list[MeasureRecord]:
    records = []
    for one in measures.estimates:
        setting, taught = one.setting, one.role == "student"
        interval: dict[str, Any] = vars(one.interval) if one.interval else {}
        own = {
            "role": one.role,
            "kind": one.kind,
            "baseline": None if one.kind == "value" else setting.baseline,
            "smoothing": setting.smoothing,
            "temperature": setting.temperature if taught or one.quantity.ratio else None,
            "hard_weight": setting.hard_weight if taught else None,
            "p": interval["p_value"] if one.interval and one.kind != "value" else None,
            "note": one.note or interval.get("note", ""),
        }
        records.append(MeasureRecord.model_validate(_named(one.quantity) | interval | own))
    if (ranking := measures.ranking) is None:
        return records
    for rank in ranking.ranks:
        loss = {"temperature": ranking.setting.temperature, "hard_weight": ranking.setting.hard_weight}
        common = {"role": "teacher", **loss}
        found, picked = rank.correlation, rank.picked
        order = {"kind": "rank correlation", "method": METHOD, "p": found.p_value} | vars(found)
        order |= {"unit": "", "teachers": ranking.networks}
        regret = {"kind": "regret", "unit": "points", "estimate": picked.regret} | vars(picked)
        regret |= {"picked": ranking.teachers[picked.teacher], "teachers": ranking.teachers}
        regret["values"] = rank.values
        for own in (order, regret):
            records.append(MeasureRecord.model_validate(_named(rank.quantity) | own | common))
    return records


def _named(quantity: Quantity) -> dict[str, Any]:
    return vars(quantity) | {"measure": quantity.id, "source": quantity.source}


def read_record(folder: Path) -> StudyRecord:
    """Read a study's verdicts from its output folder.

    Raises:
        LskdError: for a folder without a study, or one written by another version.
    """
    path = folder / VERDICTS_FILE
    if not path.is_file():
        raise LskdError(
            f"{folder} contains no study ({VERDICTS_FILE} is not there); name an output folder of "
            "`lskd study`, and run the study again if an older version wrote it"
        )
    try:
        record = StudyRecord.model_validate(read_json(path, "what `lskd study` writes"))
    except ValidationError as error:
        raise LskdError(f"{path} is damaged ({first_problem(error)}); run `lskd study` again") from error
    if record.format != FORMAT:
        raise LskdError(f"{path} was written by another version; run `lskd study` again")
    return record
