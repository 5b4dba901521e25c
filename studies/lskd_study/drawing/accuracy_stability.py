"""Stability against accuracy: what Sec. 5 says of the paper's Table 1, as a figure."""

from collections.abc import Sequence

from lskd_study.base.text import csv_text
from lskd_study.drawing.drawing import Drawing, number
from lskd_study.drawing.scatter import Point, correlations_of, scatter_figure
from lskd_study.paper.printed import load_tables

_HEADER = ["teacher", "accuracy", "one_minus_s", "smoothed"]
_SIDES = {False: "without smoothing", True: "with smoothing"}


def teacher_point(name: str, accuracy: float, instability: float, smoothed: bool) -> Point:
    """Return a teacher's point: accuracy in percent, 1-S by Algorithm 1."""
    return Point(name, accuracy, instability, _SIDES[smoothed], smoothed)


def paper_points() -> list[Point]:
    """Return the teachers of the paper's Table 1 that have both numbers."""
    points = []
    for smoothed, side in ((False, "without"), (True, "with")):
        for row in load_tables()["Table 1"].rows:
            accuracy, instability = row.number(f"top1_{side}"), row.number(f"instability_{side}")
            if accuracy is not None and instability is not None:
                points.append(teacher_point(row.name, accuracy, instability, smoothed))
    return points


def accuracy_stability_figure(
    points: Sequence[Point], paper: Sequence[Point] = (), width: float = 5.6
) -> Drawing:
    """Draw a point per teacher, those of the paper in grey; correlations with and without smoothing apart."""
    labels = ("teacher's top-1 accuracy (%)", "teacher's 1−S (lower: more stable)")
    figure = scatter_figure(points, labels, "teachers", paper, width)
    summary = [[c.student, c.n, number(c.pearson), number(c.spearman)] for c in correlations_of(points)]
    tables = {
        "": csv_text(_HEADER, _lines(points)),
        "correlations": csv_text(["teachers", "n", "pearson", "spearman"], summary),
    }
    if paper:
        tables["paper"] = csv_text(_HEADER, _lines(paper))
    return Drawing(figure, tables)


def _lines(points: Sequence[Point]) -> list[list[object]]:
    return [[p.name, number(p.x), number(p.y), "true" if p.smoothed else "false"] for p in points]
