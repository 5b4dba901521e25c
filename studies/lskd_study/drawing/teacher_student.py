"""Fig. 8 (left): accuracy of students against that of their teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lskd import LskdError
from lskd_study.base.text import csv_text
from lskd_study.drawing.drawing import Drawing, number
from lskd_study.drawing.scatter import Correlation, Point, correlations_of, scatter_figure
from lskd_study.drawing.tables import read_table, table_flag, table_number
from lskd_study.paper.printed import load_tables
from lskd_study.plan.matching import TABLE_8_WITHOUT


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of it; accuracies in percent, ``smoothed`` None where it is unknown."""

    teacher: str
    teacher_accuracy: float
    student: str
    student_accuracy: float
    smoothed: bool | None = None


def paper_pairs() -> list[Pair]:
    """Return the paper's Table 8."""
    pairs = []
    for row in load_tables()["Table 8"].rows:
        teacher, student = row.number("teacher_top1"), row.number("student_top1")
        assert teacher is not None
        assert student is not None
        pairs.append(Pair(row.name, teacher, str(row["student"]), student, row.name not in TABLE_8_WITHOUT))
    return pairs


def table_pairs(
    path: Path,
    teacher_column: str = "teacher_top1_mean",
    student_column: str = "student_top1_mean",
    name_column: str = "teacher",
    group_column: str = "student",
    smoothing_column: str = "smoothing",
) -> list[Pair]:
    """Read pairs from a CSV table; the columns are by default those of a study's ``table.csv``.

    A row without one of the accuracies is left out. The smoothing column may be missing under its default
    name.

    Raises:
        LskdError: for a table that cannot be read, has not the columns, or no row with both accuracies.
    """
    rows = read_table(path, [teacher_column, student_column, name_column, group_column])
    known = smoothing_column in rows[0]
    if not known and smoothing_column != "smoothing":
        read_table(path, [smoothing_column])
    pairs = []
    for row in rows:
        teacher = table_number(row, teacher_column, path)
        student = table_number(row, student_column, path)
        if teacher is not None and student is not None:
            smoothed = table_flag(row, smoothing_column, path) if known else None
            name = row[name_column]
            if known and row[smoothing_column].strip() not in ("", "true", "false"):
                name += f", {row[smoothing_column].strip()}"
            pairs.append(Pair(name, teacher, row[group_column], student, smoothed))
    if not pairs:
        raise LskdError(
            f"{path} has no row with both {teacher_column} and {student_column}; name other columns"
        )
    return pairs


def correlations(pairs: Sequence[Pair]) -> list[Correlation]:
    """Return one correlation per kind of student: different students have different levels."""
    return correlations_of(_points(pairs))


def teacher_student_figure(pairs: Sequence[Pair], paper: Sequence[Pair] = (), width: float = 5.6) -> Drawing:
    """Draw a point per teacher and student: filled with smoothing, open without; a marker per student.

    Args:
        pairs: to draw.
        paper: drawn in grey behind them.
        width: in inches.
    """
    labels = ("teacher's top-1 accuracy (%)", "student's top-1 accuracy (%)")
    figure = scatter_figure(_points(pairs), labels, "student", _points(paper), width)
    summary = [[c.student, c.n, number(c.pearson), number(c.spearman)] for c in correlations(pairs)]
    tables = {
        "": _csv(pairs),
        "correlations": csv_text(["student", "n", "pearson", "spearman"], summary),
    }
    return Drawing(figure, {**tables, "paper": _csv(paper)} if paper else tables)


def _points(pairs: Sequence[Pair]) -> list[Point]:
    return [Point(p.teacher, p.teacher_accuracy, p.student_accuracy, p.student, p.smoothed) for p in pairs]


def _csv(pairs: Sequence[Pair]) -> str:
    flags = {None: "", True: "true", False: "false"}
    lines = [
        [p.teacher, number(p.teacher_accuracy), p.student, number(p.student_accuracy), flags[p.smoothed]]
        for p in pairs
    ]
    return csv_text(["teacher", "teacher_accuracy", "student", "student_accuracy", "smoothed"], lines)
