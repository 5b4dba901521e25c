"""The result table in the layout of the paper's Table 2, with 1-S beside it, and one line per run.

Of images; that of a translation study is in `translation_tables`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from lskd_study.base.text import Measured, cell, csv_text, escaped
from lskd_study.plan.plan import Run, exact
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Kind, Results


@dataclass(frozen=True)
class StudentRow:
    """A kind of student of one teacher."""

    model: str
    temperature: float
    hard_weight: float
    top1: Measured
    top5: Measured


@dataclass(frozen=True)
class TeacherRow:
    """A kind of teacher with its students."""

    model: str
    smoothing: float
    top1: Measured
    top5: Measured
    instability: Measured
    students: list[StudentRow]


def table_rows(results: Results[ImageResult]) -> list[TeacherRow]:
    """Return the table of a study, in the order of its file."""
    rows = []
    for arm in arms_of(results):
        students = [
            StudentRow(s.model, s.temperature, s.hard_weight, *_accuracy(s.results, s.failed))
            for s in arm.students
        ]
        instability = Measured.of([result.instability for result in arm.teachers], arm.failed)
        accuracy = _accuracy(arm.teachers, arm.failed)
        rows.append(TeacherRow(arm.model, arm.smoothing, *accuracy, instability, students))
    return rows


@dataclass(frozen=True)
class Students(Generic[Kind]):
    """The students of one kind, one result per seed, and how many more failed."""

    model: str
    temperature: float
    hard_weight: float
    results: list[Kind]
    failed: int = 0


@dataclass(frozen=True)
class Arm(Generic[Kind]):
    """The teachers of one kind, one result per seed, with their students, and how many more failed."""

    model: str
    smoothing: float
    teachers: list[Kind]
    students: list[Students[Kind]]
    failed: int = 0


def arms_of(results: Results[Kind]) -> Iterator[Arm[Kind]]:
    """Yield what a table has a row for, in the order of the study's file."""
    runs = results.plan.runs
    kinds = dict.fromkeys(
        (run.model, run.temperature, run.hard_weight) for run in runs if run.role == "student"
    )
    for teacher in dict.fromkeys(run.model for run in runs if run.role == "teacher"):
        for smoothing in results.plan.smoothing:
            students = []
            for model, t, hard in kinds:
                own = results.students(model, teacher, smoothing, t, hard)
                students.append(Students(model, t, hard, list(own.values()), len(own.failed)))
            teachers = results.teachers(teacher, smoothing)
            yield Arm(teacher, smoothing, list(teachers.values()), students, len(teachers.failed))


def _accuracy(results: Sequence[ImageResult], failed: int) -> tuple[Measured, Measured]:
    return Measured.of([r.top1 for r in results], failed), Measured.of([r.top5 for r in results], failed)


def markdown(rows: Sequence[TeacherRow]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| Teacher | α | Teacher top-1/5, % | 1−S | Student | T | λ | Student top-1/5, % | Seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = f"| {escaped(row.model)} | {exact(row.smoothing)} | {row.top1.text(2)} / {row.top5.text(2)} "
        first += f"| {row.instability.text(4)} "
        for student in row.students:
            accuracy = f"{student.top1.text(2)} / {student.top5.text(2)}"
            setting = f"{exact(student.temperature)} | {exact(student.hard_weight)}"
            lines.append(
                f"{first}| {escaped(student.model)} | {setting} | {accuracy} | {student.top1.seeds} |"
            )
            first = "| | | | "
    lines.append("\nMean ± standard deviation over seeds, last epoch.")
    return "\n".join(lines) + "\n"


def table_csv(rows: Sequence[TeacherRow]) -> str:
    """Return the table as CSV, full precision, one line per teacher and student."""
    names = ["teacher_top1", "teacher_top5", "one_minus_s", "student_top1", "student_top5"]
    header = ["teacher", "smoothing", "student", "temperature", "hard_weight", "seeds", "failed"]
    header += [f"{name}_{part}" for name in names for part in ("mean", "std")]
    lines: list[list[object]] = []
    for row in rows:
        for s in row.students:
            measured = [row.top1, row.top5, row.instability, s.top1, s.top5]
            numbers = [value for item in measured for value in (item.mean, item.std)]
            kind = [
                row.model,
                row.smoothing,
                s.model,
                s.temperature,
                s.hard_weight,
                s.top1.seeds,
                s.top1.failed,
            ]
            lines.append([*kind, *(cell(number) for number in numbers)])
    return csv_text(header, lines)


TRAINING = ("train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement")
RUN_HEADER = ("run", "role", "model", "smoothing", "seed", "temperature", "hard_weight")


def runs_csv(results: Results[ImageResult]) -> str:
    """Return one line per run that ended: what it measured at its last epoch, or why it failed."""
    columns = (*TRAINING, "val_loss")
    header = [*RUN_HEADER, "top1", "top5", "one_minus_s", *columns, "wall_time_s", "resumed", "failed"]
    lines: list[list[object]] = []
    for result in results.finished.values():
        numbers = [result.top1, result.top5, result.instability, *(result.last(name) for name in columns)]
        job = result.job
        cells = [cell(number) for number in numbers]
        lines.append([*run_cells(result.run), *cells, job["wall_time_s"], job["resumed"], ""])
    return csv_text(header, lines + failed_lines(results, header))


def failed_lines(results: Results[Kind], header: Sequence[str]) -> list[list[object]]:
    """Return a line for each failed run, which has a reason and no number."""
    empty = [""] * (len(header) - len(RUN_HEADER) - 1)
    return [[*run_cells(one.run), *empty, one.reason] for one in results.failed.values()]


def run_cells(run: Run) -> list[object]:
    """Return what goes below ``RUN_HEADER``."""
    return [run.id, run.role, run.model, run.smoothing, run.seed, run.temperature, run.hard_weight]
