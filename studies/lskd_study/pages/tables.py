"""The table of results, in the layout of the paper's Table 2, and one line per run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lskd_study.base.text import Measured, cell, csv_text, escaped
from lskd_study.plan.kinds import IMAGES, TRANSLATION, Kind
from lskd_study.plan.plan import Run, exact
from lskd_study.results.results import AnyResult, BySeed, Result, Results

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
class StudentRow:
    """A kind of student of one teacher: what was measured by quantity, and the text of each cell."""

    model: str
    temperature: float
    hard_weight: float
    measured: Mapping[str, Measured]
    texts: list[str]

    @property
    def runs(self) -> Measured:
        """Any of the quantities, for the numbers of seeds and of failures."""
        return next(iter(self.measured.values()))


@dataclass(frozen=True)
class TeacherRow:
    """A kind of teacher with its students; with ``model`` empty, controls by their labels' smoothing."""

    model: str
    smoothing: float
    measured: Mapping[str, Measured]
    texts: list[str]
    students: list[StudentRow]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.model or "none: the labels"


def table_rows(results: Results[AnyResult]) -> list[TeacherRow]:
    """Return the table of a study, in the order of its file."""
    plan, scores = results.plan, COLUMNS[results.plan.kind].scores
    kinds = dict.fromkeys((r.model, r.temperature, r.hard_weight) for r in plan.runs if r.role == "student")

    def summary(role: str, runs: BySeed[AnyResult]) -> tuple[dict[str, Measured], list[str]]:
        measured = {
            name: Measured.of([result.value(quantity) for result in runs.values()], runs.failed_seeds)
            for score in scores[role]
            for name, quantity in score.quantities.items()
        }
        return measured, [score.text(measured) for score in scores[role]]

    rows = [
        TeacherRow(
            teacher,
            smoothing,
            *summary("teacher", results.teachers(teacher, smoothing)),
            [
                StudentRow(
                    *kind, *summary("student", results.students(kind[0], teacher, smoothing, *kind[1:]))
                )
                for kind in kinds
            ],
        )
        for teacher in dict.fromkeys(run.model for run in plan.runs if run.role == "teacher")
        for smoothing in plan.smoothing
    ]
    controls = dict.fromkeys((run.smoothing, run.model) for run in plan.runs if run.role == "control")
    return rows + [
        TeacherRow(
            "",
            alpha,
            *summary("teacher", BySeed({})),
            [
                StudentRow(model, 1.0, 1.0, *summary("student", results.controls(model, alpha)))
                for own, model in controls
                if own == alpha
            ],
        )
        for alpha in plan.control_labels
    ]


def markdown(kind: Kind, rows: Sequence[TeacherRow], notes: Sequence[str]) -> str:
    """Return the table as Markdown, the notes below it."""
    teacher, student = ([score.column for score in scores] for scores in COLUMNS[kind].scores.values())
    header = ["Teacher", "α", *teacher, "Student", "T", "λ", *student, "Seeds"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        first = f"| {' | '.join([escaped(row.name), exact(row.smoothing), *row.texts])} |"
        for s in row.students:
            own = [escaped(s.model), exact(s.temperature), exact(s.hard_weight), *s.texts, str(s.runs.seeds)]
            lines.append(f"{first} {' | '.join(own)} |")
            # Files stay as they are: of images a blank has one space.
            first = "|" + (" |" if kind is IMAGES else "  |") * (len(teacher) + 2)
    return "\n".join([*lines, "", *notes]) + "\n"


def table_csv(rows: Sequence[TeacherRow]) -> str:
    """Return the table as CSV, full precision, one line per teacher and student."""
    header = ["teacher", "smoothing", "student", "temperature", "hard_weight", "seeds", "failed"]
    names: list[str] = []
    lines: list[list[object]] = []
    for row in rows:
        for s in row.students:
            student = [s.model, s.temperature, s.hard_weight, s.runs.seeds, s.runs.failed]
            measured = {**row.measured, **s.measured}
            names = [f"{name}_{part}" for name in measured for part in ("mean", "std")]
            numbers = (number for item in measured.values() for number in (item.mean, item.std))
            lines.append([row.model, row.smoothing, *student, *map(cell, numbers)])
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
