"""The result table in the layout of the paper's Table 2, with 1-S beside it, and one line per run."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lskd_study.results import Result, Results


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation (unbiased, over seeds; NaN for one seed)."""

    mean: float
    std: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Measured":
        """Summarise one value per seed."""
        if not values:
            return cls(float("nan"), float("nan"), 0)
        std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        return cls(float(np.mean(values)), std, len(values))

    def text(self, digits: int) -> str:
        """Return ``mean ± std``; a dash where there is nothing."""
        if not self.seeds:
            return "–"
        spread = f" ± {self.std:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


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


def table_rows(results: Results) -> list[TeacherRow]:
    """Return the table of a study, in the order of its file."""
    runs = results.plan.runs
    kinds = dict.fromkeys(
        (run.model, run.temperature, run.hard_weight) for run in runs if run.role == "student"
    )
    rows = []
    for teacher in dict.fromkeys(run.model for run in runs if run.role == "teacher"):
        for smoothing in results.plan.smoothing:
            own = results.teachers(teacher, smoothing).values()
            students = []
            for model, t, hard in kinds:
                group = results.students(model, teacher, smoothing, t, hard).values()
                students.append(StudentRow(model, t, hard, *_accuracy(group)))
            instability = Measured.of([result.instability for result in own])
            rows.append(TeacherRow(teacher, smoothing, *_accuracy(own), instability, students))
    return rows


def _accuracy(group: Iterable[Result]) -> tuple[Measured, Measured]:
    results = list(group)
    return Measured.of([r.top1 for r in results]), Measured.of([r.top5 for r in results])


def markdown(rows: Sequence[TeacherRow]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| Teacher | α | Teacher top-1/5, % | 1−S | Student | T | λ | Student top-1/5, % | Seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = f"| {row.model} | {row.smoothing:g} | {row.top1.text(2)} / {row.top5.text(2)} "
        first += f"| {row.instability.text(4)} "
        for student in row.students:
            accuracy = f"{student.top1.text(2)} / {student.top5.text(2)}"
            setting = f"{student.temperature:g} | {student.hard_weight:g}"
            lines.append(f"{first}| {student.model} | {setting} | {accuracy} | {student.top1.seeds} |")
            first = "| | | | "
    lines.append("\nMean ± standard deviation over seeds, last epoch.")
    return "\n".join(lines) + "\n"


def table_csv(rows: Sequence[TeacherRow]) -> str:
    """Return the table as CSV, full precision, one line per teacher and student."""
    names = ["teacher_top1", "teacher_top5", "one_minus_s", "student_top1", "student_top5"]
    header = ["teacher", "smoothing", "student", "temperature", "hard_weight", "seeds"]
    header += [f"{name}_{part}" for name in names for part in ("mean", "std")]
    lines: list[list[object]] = []
    for row in rows:
        for s in row.students:
            measured = [row.top1, row.top5, row.instability, s.top1, s.top5]
            numbers = [value for item in measured for value in (item.mean, item.std)]
            kind = [row.model, row.smoothing, s.model, s.temperature, s.hard_weight, s.top1.seeds]
            lines.append([*kind, *(_cell(number) for number in numbers)])
    return csv_text(header, lines)


def runs_csv(results: Results) -> str:
    """Return one line per finished run: what it measured at its last epoch."""
    columns = [
        "train_ce",
        "train_kl",
        "train_teacher_entropy",
        "train_hard_ce",
        "train_agreement",
        "val_loss",
    ]
    header = ["run", "role", "model", "smoothing", "seed", "temperature", "hard_weight", "top1", "top5"]
    header += ["one_minus_s", *columns, "wall_time_s", "resumed"]
    lines: list[list[object]] = []
    for result in results.finished.values():
        run = result.run
        kind = [run.id, run.role, run.model, run.smoothing, run.seed, run.temperature, run.hard_weight]
        numbers = [result.top1, result.top5, result.instability, *(result.last(name) for name in columns)]
        job = result.job
        lines.append([*kind, *(_cell(number) for number in numbers), job["wall_time_s"], job["resumed"]])
    return csv_text(header, lines)


def csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return lines as CSV text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def _cell(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.8g}"
