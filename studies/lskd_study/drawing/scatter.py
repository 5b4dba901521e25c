"""A point per teacher: its students' accuracy (Fig. 8, left) or its 1-S (Sec. 5) against its own accuracy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy import stats

from lskd import LskdError
from lskd_study.base.text import cell, csv_text
from lskd_study.drawing.style import ARMS, INK, MARKERS, SOFT, Drawing, styled_axes
from lskd_study.drawing.tables import read_table, table_flag, table_number
from lskd_study.paper.printed import load_tables
from lskd_study.plan.matching import TABLE_8_WITHOUT

_LABELS = 16  # more points than this are not named in the figure


@dataclass(frozen=True)
class Point:
    """A named point; ``group`` shares a marker, ``smoothed`` is None where it is unknown.

    Accuracies are in percent. Of Fig. 8 the name and x are the teacher's, the group and y its student's.
    """

    name: str
    x: float
    y: float
    group: str
    smoothed: bool | None = None


@dataclass(frozen=True)
class Correlation:
    """How the ``n`` points of one group lie; NaN where that cannot be said."""

    group: str
    n: int
    pearson: float
    spearman: float

    @property
    def text(self) -> str:
        """Both coefficients and n, or why there are none."""
        if np.isnan(self.pearson):
            why = "too few for a correlation" if self.n < 3 else "no correlation: values do not vary"
            return f"{self.group}: n = {self.n}, {why}"
        return f"{self.group}: n = {self.n}, Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"


def teacher_point(name: str, accuracy: float, instability: float, smoothed: bool) -> Point:
    """Return a teacher's point: accuracy in percent, 1-S by Algorithm 1."""
    return Point(name, accuracy, instability, "with smoothing" if smoothed else "without smoothing", smoothed)


def paper_points() -> list[Point]:
    """Return the teachers of the paper's Table 1 that have both numbers."""
    points = []
    for smoothed, side in ((False, "without"), (True, "with")):
        for row in load_tables()["Table 1"].rows:
            accuracy, instability = row.number(f"top1_{side}"), row.number(f"instability_{side}")
            if accuracy is not None and instability is not None:
                points.append(teacher_point(row.name, accuracy, instability, smoothed))
    return points


def paper_pairs() -> list[Point]:
    """Return the paper's Table 8."""
    return [
        Point(
            row.name,
            row.number("teacher_top1") or math.nan,
            row.number("student_top1") or math.nan,
            str(row["student"]),
            row.name not in TABLE_8_WITHOUT,
        )
        for row in load_tables()["Table 8"].rows
    ]


def table_pairs(
    path: Path,
    teacher_column: str = "teacher_top1_mean",
    student_column: str = "student_top1_mean",
    name_column: str = "teacher",
    group_column: str = "student",
    smoothing_column: str = "smoothing",
) -> list[Point]:
    """Read teachers and students from a CSV table, by default with the columns of a study's ``table.csv``.

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
            pairs.append(Point(name, teacher, student, row[group_column], smoothed))
    if not pairs:
        raise LskdError(
            f"{path} has no row with both {teacher_column} and {student_column}; name other columns"
        )
    return pairs


def correlations(points: Sequence[Point]) -> list[Correlation]:
    """Return one correlation per group (different students have different levels), in the points' order."""
    found = []
    for group in dict.fromkeys(point.group for point in points):
        own = [point for point in points if point.group == group]
        x, y = [p.x for p in own], [p.y for p in own]
        r = rho = np.nan
        if len(own) >= 3 and len(set(x)) > 1 and len(set(y)) > 1:
            r, rho = float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0])
        found.append(Correlation(group, len(own), r, rho))
    return found


def teacher_student_figure(
    pairs: Sequence[Point], paper: Sequence[Point] = (), width: float = 5.6
) -> Drawing:
    """Draw Fig. 8: filled with smoothing, open without; a marker per student.

    Args:
        pairs: to draw.
        paper: drawn in grey behind them.
        width: in inches.
    """
    header = ["teacher", "teacher_accuracy", "student", "student_accuracy", "smoothed"]
    label = "student's top-1 accuracy (%)"
    return _scatter(
        pairs, paper, width, "student", label, header, lambda p: [p.name, cell(p.x), p.group, cell(p.y)]
    )


def accuracy_stability_figure(points: Sequence[Point], paper: Sequence[Point], width: float) -> Drawing:
    """Draw teachers' 1-S against accuracy, those of the paper in grey; correlations by smoothing apart."""
    header = ["teacher", "accuracy", "one_minus_s", "smoothed"]
    label = "teacher's 1−S (lower: more stable)"
    return _scatter(points, paper, width, "teachers", label, header, lambda p: [p.name, cell(p.x), cell(p.y)])


def _scatter(
    points: Sequence[Point],
    paper: Sequence[Point],
    width: float,
    group: str,
    label: str,
    header: Sequence[str],
    cells: Callable[[Point], list[str]],
) -> Drawing:
    """Draw the points, those of the paper in grey behind them; correlations stand in the legend.

    ``group``: what a group of points is; ``label``: of the y axis; ``cells``: all but a point's last.
    """
    found, behind = correlations(points), correlations(paper)
    with styled_axes(width, 0.71 * width + 0.2 * len(found + behind)) as (figure, axes):
        for index, one in enumerate(behind):
            own = [point for point in paper if point.group == one.group]
            _draw(axes, own, SOFT, MARKERS[index % len(MARKERS)], 5, f"paper, {one.text}")
        for index, one in enumerate(found):
            own = [point for point in points if point.group == one.group]
            _draw(axes, own, ARMS[index % len(ARMS)], MARKERS[index % len(MARKERS)], 7, one.text)
        axes.margins(0.12)
        axes.set_xlabel("teacher's top-1 accuracy (%)")
        axes.set_ylabel(label)
        if any(point.smoothed is False for point in (*points, *paper)):
            axes.set_title("open markers: teacher trained without smoothing")
        legend = figure.legend(loc="outside lower left", frameon=False, title=group, alignment="left")
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set(markerfacecolor=handle.get_color())  # type: ignore[attr-defined]
        if len(points) <= _LABELS:
            shown = [*((p, INK) for p in points), *((p, SOFT) for p in paper if len(paper) <= _LABELS)]
            _name_points(figure, axes, shown, [*points, *paper])

    def table(shown: Sequence[Point]) -> str:
        smoothed = ("" if p.smoothed is None else str(p.smoothed).lower() for p in shown)
        return csv_text(header, [[*cells(p), flag] for p, flag in zip(shown, smoothed, strict=True)])

    summary = [[c.group, c.n, cell(c.pearson), cell(c.spearman)] for c in found]
    correlated = csv_text([group, "n", "pearson", "spearman"], summary)
    tables = {"": table(points), "correlations": correlated}
    return Drawing(figure, tables | ({"paper": table(paper)} if paper else {}))


def _draw(axes: Axes, points: Sequence[Point], color: str, marker: str, size: float, label: str) -> None:
    text: str | None = label
    for open_marker in (False, True):
        own = [point for point in points if (point.smoothed is False) == open_marker]
        if own:
            axes.plot(
                [p.x for p in own],
                [p.y for p in own],
                marker,
                color=color,
                markerfacecolor="white" if open_marker else color,
                markersize=size,
                markeredgewidth=1.5 if size > 5 else 1.0,
                label=text,
            )
            text = None


def _name_points(
    figure: Figure, axes: Axes, named: Sequence[tuple[Point, str]], points: Sequence[Point]
) -> None:
    """Write each name beside its point, where it covers no point and no other name."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays the figure out, so that positions are known
    renderer = canvas.get_renderer()
    spots = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    places = [(8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom")]
    places += [(0, -8, "center", "top"), (7, 7, "left", "bottom"), (7, -7, "left", "top")]
    places += [(-7, 7, "right", "bottom"), (-7, -7, "right", "top")]
    frame = axes.get_window_extent(renderer)
    for point, color in named:
        for x, y, horizontal, vertical in places:
            text = axes.annotate(
                point.name,
                (point.x, point.y),
                (x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=7.5,
                color=color,
            )
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
