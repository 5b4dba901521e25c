"""Fig. 8 (left): accuracy of students against that of their teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lskd import LskdError
from lskd_study.extras import needs_study_extra
from lskd_study.figure_style import ARMS, INK, STYLE
from lskd_study.paper import load_tables
from lskd_study.paper.matching import TABLE_8_WITHOUT
from lskd_study.paper_figures.drawing import Drawing, number, plain
from lskd_study.paper_figures.result_tables import read_table, table_flag, table_number
from lskd_study.tables import csv_text

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from scipy import stats

MARKERS = ("o", "^", "s", "D", "v", "P")
_LABELS = 16  # more points than this are not named in the figure


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of it; accuracies in percent, ``smoothed`` None where it is unknown."""

    teacher: str
    teacher_accuracy: float
    student: str
    student_accuracy: float
    smoothed: bool | None = None


@dataclass(frozen=True)
class Correlation:
    """How one kind of student follows its ``n`` teachers; NaN where that cannot be said."""

    student: str
    n: int
    pearson: float
    spearman: float

    @property
    def text(self) -> str:
        """Both coefficients and n, or why there are none."""
        if np.isnan(self.pearson):
            why = "too few for a correlation" if self.n < 3 else "no correlation: values do not vary"
            return f"{self.student}: n = {self.n}, {why}"
        return f"{self.student}: n = {self.n}, Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"


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
    found = []
    for student in dict.fromkeys(pair.student for pair in pairs):
        own = [pair for pair in pairs if pair.student == student]
        x, y = [p.teacher_accuracy for p in own], [p.student_accuracy for p in own]
        r = rho = np.nan
        if len(own) >= 3 and len(set(x)) > 1 and len(set(y)) > 1:
            r, rho = float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0])
        found.append(Correlation(student, len(own), r, rho))
    return found


def teacher_student_figure(pairs: Sequence[Pair]) -> Drawing:
    """Draw a point per teacher and student: filled with smoothing, open without; a marker per student."""
    found = correlations(pairs)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.0 + 0.2 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        for index, correlation in enumerate(found):
            color, marker = ARMS[index % len(ARMS)], MARKERS[index % len(MARKERS)]
            label: str | None = plain(correlation.text)
            for open_marker in (False, True):
                own = [
                    p
                    for p in pairs
                    if p.student == correlation.student and (p.smoothed is False) == open_marker
                ]
                x, y = [p.teacher_accuracy for p in own], [p.student_accuracy for p in own]
                face = "white" if open_marker else color
                if own:
                    axes.plot(
                        x,
                        y,
                        marker,
                        color=color,
                        markerfacecolor=face,
                        markersize=7,
                        markeredgewidth=1.5,
                        label=label,
                    )
                    label = None
        axes.margins(0.12)
        axes.set_xlabel("teacher's top-1 accuracy (%)")
        axes.set_ylabel("student's top-1 accuracy (%)")
        if any(pair.smoothed is False for pair in pairs):
            axes.set_title("open markers: teacher trained without smoothing")
        legend = figure.legend(loc="outside lower left", frameon=False, title="student", alignment="left")
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set(markerfacecolor=handle.get_color())  # type: ignore[attr-defined]
        if len(pairs) <= _LABELS:
            _name_points(figure, axes, pairs)
    header = ["teacher", "teacher_accuracy", "student", "student_accuracy", "smoothed"]
    flags = {None: "", True: "true", False: "false"}
    lines = [
        [p.teacher, number(p.teacher_accuracy), p.student, number(p.student_accuracy), flags[p.smoothed]]
        for p in pairs
    ]
    summary = [[c.student, c.n, number(c.pearson), number(c.spearman)] for c in found]
    tables = {
        "": csv_text(header, lines),
        "correlations": csv_text(["student", "n", "pearson", "spearman"], summary),
    }
    return Drawing(figure, tables)


def _name_points(figure: Figure, axes: Axes, pairs: Sequence[Pair]) -> None:
    """Write each teacher's name beside its point, where it covers no point and no other name."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays the figure out, so that positions are known
    renderer = canvas.get_renderer()
    spots = [axes.transData.transform((p.teacher_accuracy, p.student_accuracy)) for p in pairs]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    places = [(8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom")]
    places += [(0, -8, "center", "top"), (7, 7, "left", "bottom"), (7, -7, "left", "top")]
    places += [(-7, 7, "right", "bottom"), (-7, -7, "right", "top")]
    frame = axes.get_window_extent(renderer)
    for pair in pairs:
        for x, y, horizontal, vertical in places:
            text = axes.annotate(
                plain(pair.teacher),
                (pair.teacher_accuracy, pair.student_accuracy),
                (x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=7.5,
                color=INK,
            )
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
