"""The paper's Tables 1 and 10 with measured teachers beside its own figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from lskd_study.base.text import csv_text
from lskd_study.paper.printed import Row, load_tables
from lskd_study.plan.teacher_list import TeacherEntry
from lskd_study.stats.bootstrap import Estimate
from lskd_study.teachers.compare import Comparison

TableName = Literal["Table 1", "Table 10"]
DEFINITION: dict[TableName, str] = {"Table 1": "target_std", "Table 10": "between_target_std"}


class Figures(NamedTuple):
    """Accuracies in percent, and 1-S; NaN where there is none."""

    top1: float
    top5: float
    instability: float

    def accuracy(self) -> str:
        """Return top-1/top-5 as the paper prints them."""
        return "–" if math.isnan(self.top1) else f"{self.top1:.3f}/{self.top5:.3f}"


@dataclass(frozen=True)
class Line:
    """One teacher, measured and as the paper prints it.

    ``reproduced``: whether accuracy and 1-S are within the entry's tolerance; None where it gives none.
    """

    name: str
    network: str | None
    smoothing: float | None
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


class Correlation(NamedTuple):
    """How accuracy and 1-S go together over teachers: negative where the accurate ones are stable."""

    teachers: int
    pearson: float
    spearman: float


@dataclass(frozen=True)
class StabilityTable:
    """A table of the paper, with any list of teachers; no correlation below three of them."""

    name: TableName
    title: str
    definition: str
    lines: list[Line]
    changes: list[Change]
    correlation: Correlation | None


def paper_table(name: TableName, comparison: Comparison, entries: Sequence[TeacherEntry]) -> StabilityTable:
    """Return a table of the paper for measured teachers; entries and teachers are in the same order."""
    definition, table = DEFINITION[name], load_tables()[name]
    rows = {row.name: row for row in table.rows}
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
        lines.append(Line(entry.name, entry.network, entry.smoothing, measured, paper, reproduced))
    changes = _changes(definition, rows, comparison, entries)
    return StabilityTable(name, table.title, definition, lines, changes, _correlation(lines))


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


def _correlation(lines: Sequence[Line]) -> Correlation | None:
    accuracy = [line.measured.top1 for line in lines]
    instability = [line.measured.instability for line in lines]
    if len(lines) < 3 or not np.ptp(accuracy) > 0 or not np.ptp(instability) > 0:
        return None
    pearson, spearman = stats.pearsonr(accuracy, instability), stats.spearmanr(accuracy, instability)
    return Correlation(len(lines), float(pearson.statistic), float(spearman.statistic))


def _printed(row: Row | None, column: str) -> float:
    value = row.number(column) if row is not None else None
    return math.nan if value is None else value


def table_csv(table: StabilityTable) -> str:
    """Return the lines in full precision."""
    header = ["teacher", "network", "smoothing", "top1", "top5", "one_minus_s"]
    header += ["paper_top1", "paper_top5", "paper_one_minus_s", "reproduced"]
    lines: list[list[object]] = []
    for line in table.lines:
        cells = [f"{x:.8g}" if math.isfinite(x) else "" for x in (*line.measured, *line.paper)]
        reproduced = "" if line.reproduced is None else str(line.reproduced).lower()
        alpha = "" if line.smoothing is None else line.smoothing
        lines.append([line.name, line.network or "", alpha, *cells, reproduced])
    return csv_text(header, lines)
