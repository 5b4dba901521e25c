"""The table of results, in the layout of the paper's Table 2, and one line per run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from markupsafe import Markup

from lskd_study.base.text import Measured, cell, csv_text, escaped
from lskd_study.plan.kinds import IMAGES, TRANSLATION, Kind
from lskd_study.plan.plan import Run, exact
from lskd_study.results.results import AnyResult, Result, Results

TRAINING = ("train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement")
RUN_HEADER = ("run", "role", "model", "smoothing", "seed", "study_seed", "temperature", "hard_weight")


@dataclass(frozen=True)
class Score:
    """What one cell of the table shows.

    Attributes:
        heading: on the page.
        column: the same in Markdown.
        quantities: as `Result.value` knows them, by what they are called in the CSV.
        digits: behind the point.
    """

    heading: str | Markup
    column: str
    quantities: Mapping[str, str]
    digits: int = 2

    def text(self, measured: Mapping[str, Measured]) -> str:
        """Return ``mean ± std`` of each quantity; one dash where none was measured."""
        texts = [measured[name].text(self.digits) for name in self.quantities]
        return "–" if set(texts) == {"–"} else " / ".join(texts)


@dataclass(frozen=True)
class Columns:
    """The columns of a kind of study: of its tables by role, and of each run's line beside ``RUN_HEADER``."""

    scores: Mapping[str, Sequence[Score]]
    of_run: Mapping[str, Callable[[Any], object]]


def _value(quantity: str) -> Callable[[Result], str]:
    return lambda result: cell(result.value(quantity))


def _accuracy(role: str) -> Score:
    heading = Markup(f"{role.capitalize()} top‑1&nbsp;/&nbsp;top‑5 (%)")
    quantities = {f"{role}_top1": "top1", f"{role}_top5": "top5"}
    return Score(heading, f"{role.capitalize()} top-1/5, %", quantities)


def _translation(role: str) -> list[Score]:
    who = role.capitalize()
    return [
        Score(f"{who}’s BLEU", f"{who} BLEU", {f"{role}_bleu": "bleu"}),
        Score("tokenised BLEU", f"{who} tokenised BLEU", {f"{role}_tokenised_bleu": "tokenised_bleu"}),
        Score("perplexity", f"{who} perplexity", {f"{role}_perplexity": "val_ppl"}),
        Score("ECE (%)", f"{who} ECE, %", {f"{role}_calibration_error": "calibration_error"}),
    ]


_JOB: dict[str, Callable[[Result], object]] = {
    "wall_time_s": lambda result: result.job["wall_time_s"],
    "resumed": lambda result: result.job["resumed"],
}
COLUMNS = {
    IMAGES: Columns(
        {
            "teacher": [_accuracy("teacher"), Score("1−S", "1−S", {"one_minus_s": "one_minus_s"}, 4)],
            "student": [_accuracy("student")],
        },
        {name: _value(name) for name in ("top1", "top5", "one_minus_s", *TRAINING, "val_loss")} | _JOB,
    ),
    TRANSLATION: Columns(
        {role: _translation(role) for role in ("teacher", "student")},
        {
            "bleu": _value("bleu"),
            "tokenised_bleu": _value("tokenised_bleu"),
            "chosen_epoch": lambda result: int(result.curves["epoch"][result.chosen]),
            **{name: _value(name) for name in ("val_bleu", "val_loss", "val_ppl", *TRAINING)},
            "calibration_error": _value("calibration_error"),
            **_JOB,
            "bleu_signature": lambda result: result.detokenised.signature,
            "tokenised_bleu_signature": lambda result: result.tokenised.signature,
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """A kind of student of a kind of teacher; with ``teacher`` empty, of controls by their labels' smoothing.

    Attributes:
        teacher: its model.
        smoothing: its own, of a control the labels'.
        student: the student's model.
        temperature: of its loss.
        hard_weight: of its loss.
        seeds: of how many the student was measured.
        failed: of how many more it failed.
        measured: both, by quantity as the CSV calls it.
        texts: of each cell, by role.
        first: whether it is the first of its teacher.
    """

    teacher: str
    smoothing: float
    student: str
    temperature: float
    hard_weight: float
    seeds: int
    failed: int
    measured: Mapping[str, Measured]
    texts: Mapping[str, Sequence[str]]
    first: bool

    @property
    def name(self) -> str:
        """What the table calls the teacher."""
        return self.teacher or "none: the labels"


def table_rows(results: Results[AnyResult]) -> list[Row]:
    """Return the table of a study, in the order of its file."""
    plan, scores = results.plan, COLUMNS[results.plan.kind].scores
    teachers = dict.fromkeys(run.model for run in plan.runs if run.role == "teacher")
    kinds = dict.fromkeys((r.model, r.temperature, r.hard_weight) for r in plan.runs if r.role == "student")
    shown = [(model, alpha, *kind) for model in teachers for alpha in plan.smoothing for kind in kinds]
    controls = dict.fromkeys((run.smoothing, run.model) for run in plan.runs if run.role == "control")
    shown += [("", alpha, model, 1.0, 1.0) for alpha, model in sorted(controls, key=itemgetter(0))]
    rows: list[Row] = []
    for teacher, alpha, student, temperature, hard_weight in shown:
        taught = results.students(student, teacher, alpha, temperature, hard_weight)
        measured = {
            name: Measured.of([result.value(quantity) for result in runs.values()], runs.failed_seeds)
            for role, runs in (("teacher", results.teachers(teacher, alpha)), ("student", taught))
            for score in scores[role]
            for name, quantity in score.quantities.items()
        }
        texts = {role: [score.text(measured) for score in own] for role, own in scores.items()}
        first = not rows or (rows[-1].teacher, rows[-1].smoothing) != (teacher, alpha)
        counts = (len(taught), taught.failed_seeds)
        rows.append(Row(teacher, alpha, student, temperature, hard_weight, *counts, measured, texts, first))
    return rows


def markdown(kind: Kind, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Return the table as Markdown, the notes below it."""
    teacher, student = ([score.column for score in scores] for scores in COLUMNS[kind].scores.values())
    header = ["Teacher", "α", *teacher, "Student", "T", "λ", *student, "Seeds"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    # Files stay as they are: of images a blank has one space.
    blank = "|" + (" |" if kind is IMAGES else "  |") * (len(teacher) + 2)
    for row in rows:
        first = f"| {' | '.join([escaped(row.name), exact(row.smoothing), *row.texts['teacher']])} |"
        own = [escaped(row.student), exact(row.temperature), exact(row.hard_weight), *row.texts["student"]]
        lines.append(f"{first if row.first else blank} {' | '.join([*own, str(row.seeds)])} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def table_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV, full precision, one line per teacher and student."""
    header = ["teacher", "smoothing", "student", "temperature", "hard_weight", "seeds", "failed"]
    names = [f"{name}_{part}" for row in rows[:1] for name in row.measured for part in ("mean", "std")]
    lines = [
        [getattr(row, name) for name in header]
        + [cell(number) for one in row.measured.values() for number in (one.mean, one.std)]
        for row in rows
    ]
    return csv_text([*header, *names], lines)


def runs_csv(results: Results[AnyResult]) -> str:
    """Return one line per run that ended: what it measured, or why it failed."""
    columns = COLUMNS[results.plan.kind].of_run
    lines = [
        [*_run_cells(result.run), *(read(result) for read in columns.values()), ""]
        for result in results.finished.values()
    ]
    lines += [[*_run_cells(one.run), *("" for _ in columns), one.reason] for one in results.failed.values()]
    return csv_text([*RUN_HEADER, *columns, "failed"], lines)


def _run_cells(run: Run) -> list[object]:
    return [getattr(run, "id" if name == "run" else name) for name in RUN_HEADER]
