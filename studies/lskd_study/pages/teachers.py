"""Teachers side by side: the page of a list of teachers, and that of a study without students.

Both have the paper's Tables 1 and 10 with measured teachers beside its own figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lskd import LskdError
from lskd_study.base import provenance
from lskd_study.base.text import cell, csv_text
from lskd_study.claims import judge
from lskd_study.claims.measures import measure_study
from lskd_study.claims.recommendation import Recommendation
from lskd_study.drawing.scatter import Correlation, Point, correlations
from lskd_study.pages.notices import Notice, print_notices
from lskd_study.pages.page import (
    PAGE,
    Page,
    advice_of,
    barred,
    claims_shown,
    ends_text,
    machine_text,
    number,
    results_shown,
)
from lskd_study.pages.paper_figures import study_figures
from lskd_study.pages.paper_tables import papers_tables
from lskd_study.pages.verdicts import VERDICTS_FILE, DataRecord, study_record, teachers_record
from lskd_study.paper.printed import Row, load_tables
from lskd_study.plan.matching import names_table, teacher_name
from lskd_study.plan.plan import LOGITS, Plan, exact
from lskd_study.plan.teacher_list import TeacherEntry, TeacherList
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Results, failure_words
from lskd_study.stats.bootstrap import Estimate
from lskd_study.teachers import report as render
from lskd_study.teachers.compare import Comparison
from lskd_study.teachers.evaluate import TeacherSpec
from lskd_study.teachers.run import WRITERS, ComparisonSettings, run_teachers

# The networks of Tables 1 and 10 have seen ImageNet-1K.
_PAPERS_DATA = "imagenet"
DEFINITIONS = {"Table 1": "target_std", "Table 10": "between_target_std"}


# The paper's tables


class Figures(NamedTuple):
    """Accuracies in percent, and 1-S; NaN where there is none."""

    top1: float
    top5: float
    instability: float

    def accuracy(self) -> str:
        """Return top-1/top-5 as the paper prints them."""
        return "–" if math.isnan(self.top1) else f"{self.top1:.3f}/{self.top5:.3f}"


@dataclass(frozen=True)
class TeacherLine:
    """One teacher, measured and as the paper prints it.

    ``reproduced``: whether accuracy and 1-S are within the entry's tolerance; None where it gives none.
    """

    entry: TeacherEntry
    measured: Figures
    paper: Figures
    reproduced: bool | None


@dataclass(frozen=True)
class Change:
    """What smoothing did to one network's 1-S: measured, with its interval, and as printed."""

    network: str
    without: str
    with_: str
    measured: Estimate
    paper: float


@dataclass(frozen=True)
class StabilityTable:
    """A table of the paper, with any list of teachers; ``correlation``: of their accuracy and 1-S.

    It is negative where the accurate ones are stable; NaN below three teachers.
    """

    name: str
    definition: str
    lines: list[TeacherLine]
    changes: list[Change]
    correlation: Correlation

    @property
    def rows(self) -> list[list[str]]:
        """The cells of each teacher."""
        marks = {None: "–", True: "✓ yes", False: "✗ no"}
        return [
            [
                line.entry.name,
                line.entry.network or "–",
                "–" if line.entry.smoothing is None else exact(line.entry.smoothing),
                *(line.measured.accuracy(), line.paper.accuracy()),
                *(number(figures.instability, 4) for figures in (line.measured, line.paper)),
                marks[line.reproduced],
            ]
            for line in self.lines
        ]

    @property
    def change_rows(self) -> list[list[str]]:
        """The cells of each change."""
        return [
            [
                f"{change.network}: {change.with_} less {change.without}",
                number(change.measured.value, 4, sign=True),
                "–"
                if math.isnan(change.measured.low)
                else ends_text(change.measured.low, change.measured.high, ""),
                number(change.paper, 4, sign=True),
            ]
            for change in self.changes
        ]

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return self.name.lower().replace(" ", "")


def stability_table(name: str, comparison: Comparison, entries: Sequence[TeacherEntry]) -> StabilityTable:
    """Return Table 1 or 10 for measured teachers; entries and teachers are in the same order."""
    definition = DEFINITIONS[name]
    rows = {row.name: row for row in load_tables()[name].rows}
    lines = []
    for entry, teacher in zip(entries, comparison.teachers, strict=True):
        row = rows.get(entry.network or "")
        side = "with" if entry.smoothing else "without"
        paper = Figures(*(_printed(row, f"{column}_{side}") for column in ("top1", "top5", "instability")))
        measured = Figures(*(teacher.value(quantity) for quantity in ("top1", "top5", definition)))
        reproduced = None
        if entry.tolerance is not None and all(math.isfinite(x) for x in paper):
            allowed = Figures(entry.tolerance.accuracy, entry.tolerance.accuracy, entry.tolerance.one_minus_s)
            reproduced = all(abs(a - b) <= t for a, b, t in zip(measured, paper, allowed, strict=True))
        lines.append(TeacherLine(entry, measured, paper, reproduced))
    changes = _changes(definition, rows, comparison, entries)
    points = [Point(line.entry.name, line.measured.top1, line.measured.instability, "") for line in lines]
    return StabilityTable(name, definition, lines, changes, correlations(points)[0])


def _changes(
    definition: str, rows: dict[str, Row], comparison: Comparison, entries: Sequence[TeacherEntry]
) -> list[Change]:
    changes = []
    for (i, j), estimates in comparison.differences.items():
        one, two = entries[i], entries[j]
        if one.network is None or one.network != two.network or definition not in estimates:
            continue
        if bool(one.smoothing) == bool(two.smoothing):
            continue
        estimate, names = estimates[definition], (one.name, two.name)
        if one.smoothing:  # the teacher without smoothing is the one to start from
            e = estimate.scaled(-1)
            estimate, names = Estimate(e.value, e.high, e.low, e.p_value, e.note), names[::-1]
        changes.append(Change(one.network, *names, estimate, _printed(rows.get(one.network), "delta")))
    return changes


def _printed(row: Row | None, column: str) -> float:
    value = row.number(column) if row is not None else None
    return math.nan if value is None else value


def stability_csv(table: StabilityTable) -> str:
    """Return the lines in full precision."""
    header = ["teacher", "network", "smoothing", "top1", "top5", "one_minus_s"]
    header += ["paper_top1", "paper_top5", "paper_one_minus_s", "reproduced"]
    lines: list[list[object]] = []
    for line in table.lines:
        reproduced = "" if line.reproduced is None else str(line.reproduced).lower()
        alpha = "" if line.entry.smoothing is None else line.entry.smoothing
        numbers = map(cell, (*line.measured, *line.paper))
        lines.append([line.entry.name, line.entry.network or "", alpha, *numbers, reproduced])
    return csv_text(header, lines)


# A list of teachers


def run_teacher_list(
    study: TeacherList, settings: ComparisonSettings, of_study: Results[ImageResult] | None = None
) -> None:
    """Measure the teachers of a list and write its output folder, on the first process of torchrun.

    It gets ``stability.json`` and ``.csv`` with everything, ``table1.csv`` and ``table10.csv`` in the paper's
    layout, with its own figures beside the measured ones, a page, ``index.html``, and ``verdicts.json`` for
    `lskd index`.
    ``of_study``: the study that the teachers belong to, whose tables, claims and runs the page shows too.

    Raises:
        LskdError: for whatever the user can fix.
    """
    settings = _with_data(study, settings)
    output = Path(study.output)
    own = {suffix: output / f"stability{suffix}" for suffix in WRITERS}
    specs = []
    for entry in study.teachers:
        given = ((name, getattr(entry, name)) for name in ("config", "checkpoint", "logits"))
        paths = {name: Path(value) for name, value in given if value is not None}
        specs.append(TeacherSpec(name=entry.name, model=entry.model, **paths))
    comparison = run_teachers(specs, settings, own)
    if comparison is not None:
        teachers_page(study, comparison, of_study).write(output)
        print(output / PAGE)


def _with_data(study: TeacherList, settings: ComparisonSettings) -> ComparisonSettings:
    settings = replace(settings, temperatures=study.temperatures)
    if study.data is None:
        return settings
    # What the command line names wins.
    given = {key: value for key, value in settings.evaluation.items() if value is not None}
    data = {"data_dir": Path(study.data.path), "split": study.data.split}
    return replace(settings, evaluation={**settings.evaluation, **data, **given})


# A study without students


def write_teachers_report(plan: Plan) -> None:
    """Compare the finished teachers, as ``lskd stability`` does, into the study's output folder.

    Tables 1 and 10 show the paper's own figures beside them where the data are ImageNet's and there is one
    run of each kind.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    papers = plan.data_dir.name == _PAPERS_DATA or names_table(plan, ("Table 1", "Table 10"))
    papers = papers and plan.num_classes == 1000 and len(plan.seeds) == 1
    rows = {row.name for row in load_tables()["Table 1"].rows} if papers else set()
    results = read_results(plan)
    entries = []
    for run in (result.run for result in results.finished.values()):
        name = teacher_name(run.model, plan.configs.get(run.config, {}), plan.num_classes)
        entries.append(
            TeacherEntry(
                name=run.id.removeprefix("teacher-"),
                logits=str(plan.folder(run) / LOGITS),
                network=name if name in rows else None,
                smoothing=run.smoothing,
            )
        )
    if not entries:
        raise LskdError(f"there is nothing to compare: {failure_words(list(results.failed.values()))}")
    study = TeacherList(
        kind="stability", title=plan.title, output=str(plan.root), temperatures=[1.0], teachers=entries
    )
    print_notices(results)
    run_teacher_list(study, ComparisonSettings(), of_study=results)


# The page


def teachers_page(study: TeacherList, comparison: Comparison, of_study: Results[ImageResult] | None) -> Page:
    """Return everything that the folder of compared teachers shows."""
    tables = [stability_table(name, comparison, study.teachers) for name in DEFINITIONS]
    answer = answer_of(comparison)
    texts = {f"{table.stem}.csv": stability_csv(table) for table in tables}
    recommendation = Recommendation(*render.advice(comparison))
    shown: dict[str, Any] = {
        "study": study,
        "comparison": comparison,
        "answer": answer,
        "tables": tables,
        "measures": [[label, *cells] for label, cells in render.measure_rows(comparison)],
        "differences": list(render.difference_rows(comparison)),
        "method": render.method_line(comparison),
    }
    drawn, papers, notices = [], [], []
    if of_study is None:
        first = comparison.teachers[0].measures
        data = DataRecord(
            path=study.data.path if study.data else "", classes=first.num_classes, samples=first.samples
        )
        names = [teacher.name for teacher in comparison.teachers]
        record = teachers_record(study.title, names, answer, data, recommendation)
        shown |= claims_shown([])
        shown |= {"provenance": measured_with(comparison), "commands": {}}
    else:
        findings, drawn, papers = judge(of_study), study_figures(of_study), papers_tables([of_study])
        if len(of_study.plan.seeds) > 1 or barred(of_study):  # of one seed only the samples can tell
            recommendation = advice_of(of_study, findings)
        record = study_record(of_study, findings, answer, recommendation, measure_study(of_study))
        shown |= results_shown(of_study, findings)
        notices = shown["notices"]
        for table in papers:
            texts |= table.files()
    if warnings := tuple(render.warning_lines(comparison)):
        many = len(warnings) > 1
        title = f"{len(warnings)} warnings about these teachers" if many else warnings[0]
        notices.append(Notice(title, warnings if many else ()))
    shown |= {"notices": notices, "drawn": drawn, "paper_tables": papers, "recommendation": recommendation}
    texts[VERDICTS_FILE] = record.text()
    return Page("teachers.html.j2", shown, texts, {figure.stem: figure.drawing for figure in drawn})


def measured_with(comparison: Comparison) -> list[tuple[str, str]]:
    """Return where each teacher's answers come from, and what they were measured with, as (name, value)."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return [
        *((teacher.name, teacher.source) for teacher in comparison.teachers),
        ("Draws of the bootstrap", f"{comparison.replicates}, seed {comparison.seed}"),
        ("Hardware", machine_text(provenance.hardware())),
        ("Versions", versions),
    ]


def answer_of(comparison: Comparison) -> str:
    """Return which teacher is the most accurate, with the interval."""
    reading = [f"{line[0].upper()}{line[1:]}." for line in render.reading(comparison)]
    alone = "One teacher, so there is nothing to compare." if len(comparison.teachers) == 1 else ""
    return " ".join(reading) or alone or "These teachers saw different samples and are not compared."
