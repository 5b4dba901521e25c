"""One accuracy against another measure: a point per teacher, filled with smoothing, open without."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lskd_study.base.extras import needs_study_extra
from lskd_study.drawing.style import ARMS, INK, SOFT, STYLE

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
class Point:
    """A named point; ``group`` shares a marker, ``smoothed`` is None where it is unknown."""

    name: str
    x: float
    y: float
    group: str
    smoothed: bool | None = None


@dataclass(frozen=True)
class Correlation:
    """How the ``n`` points of one group lie; NaN where that cannot be said."""

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


def correlations_of(points: Sequence[Point]) -> list[Correlation]:
    """Return one correlation per group, in the order of the points."""
    found = []
    for group in dict.fromkeys(point.group for point in points):
        own = [point for point in points if point.group == group]
        x, y = [p.x for p in own], [p.y for p in own]
        r = rho = np.nan
        if len(own) >= 3 and len(set(x)) > 1 and len(set(y)) > 1:
            r, rho = float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0])
        found.append(Correlation(group, len(own), r, rho))
    return found


def scatter_figure(
    points: Sequence[Point],
    axes_labels: tuple[str, str],
    legend_title: str,
    paper: Sequence[Point] = (),
    width: float = 5.6,
) -> Figure:
    """Draw the points, those of the paper in grey behind them; correlations stand in the legend.

    Args:
        points: measured.
        axes_labels: of x and y.
        legend_title: what a group is.
        paper: to compare with; their groups' names are put after "paper".
        width: in inches.
    """
    found = correlations_of(points)
    behind = correlations_of(paper)
    rows = len(found) + len(behind)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.71 * width + 0.2 * rows), layout="constrained")
        axes = figure.add_subplot()
        for index, correlation in enumerate(behind):
            own = [point for point in paper if point.group == correlation.student]
            _draw(axes, own, SOFT, MARKERS[index % len(MARKERS)], 5, f"paper, {correlation.text}")
        for index, correlation in enumerate(found):
            own = [point for point in points if point.group == correlation.student]
            _draw(axes, own, ARMS[index % len(ARMS)], MARKERS[index % len(MARKERS)], 7, correlation.text)
        axes.margins(0.12)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        if any(point.smoothed is False for point in (*points, *paper)):
            axes.set_title("open markers: teacher trained without smoothing")
        legend = figure.legend(loc="outside lower left", frameon=False, title=legend_title, alignment="left")
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set(markerfacecolor=handle.get_color())  # type: ignore[attr-defined]
        if len(points) <= _LABELS:
            shown = [*((p, INK) for p in points), *((p, SOFT) for p in paper if len(paper) <= _LABELS)]
            _name_points(figure, axes, shown, [*points, *paper])
    return figure


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
