"""Fig. 9: what smoothing gains in accuracy, by the number of classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from lskd import LskdError
from lskd_study.base.text import cell, csv_text
from lskd_study.drawing.style import ARMS, INK, MARKERS, SOFT, STYLES, Drawing, styled_axes
from lskd_study.drawing.tables import read_table, table_flag, table_number
from lskd_study.paper.printed import load_tables


@dataclass(frozen=True)
class Accuracy:
    """A network trained on a number of classes, with or without smoothing; accuracy in percent."""

    network: str
    classes: int
    smoothed: bool
    accuracy: float


@dataclass(frozen=True)
class Gain:
    """What smoothing gains for a network on a number of classes, in points."""

    network: str
    classes: int
    points: float


def paper_accuracies() -> list[Accuracy]:
    """Return the top-1 accuracies of the paper's Table 4."""
    return [
        Accuracy(
            str(row["network"]),
            int(row.number("classes") or 0),
            bool(row["smoothed"]),
            row.number("top1") or math.nan,
        )
        for row in load_tables()["Table 4"].rows
    ]


def table_accuracies(
    path: Path,
    classes_column: str = "classes",
    network_column: str = "teacher",
    smoothing_column: str = "smoothing",
    accuracy_column: str = "teacher_top1_mean",
) -> list[Accuracy]:
    """Read accuracies from a CSV table: a study's ``table.csv`` with a column ``classes``, or any other.

    Raises:
        LskdError: for a table that cannot be read, has not the columns, or cells that make no sense.
    """
    found = []
    for row in read_table(path, [classes_column, network_column, smoothing_column, accuracy_column]):
        accuracy, smoothed = table_number(row, accuracy_column, path), table_flag(row, smoothing_column, path)
        classes = table_number(row, classes_column, path)
        if classes is None or classes < 1 or classes != int(classes):
            raise LskdError(
                f"{path}: {row[classes_column]!r} in column {classes_column!r} is no number of classes"
            )
        if accuracy is not None and smoothed is not None:
            found.append(Accuracy(row[network_column], int(classes), smoothed, accuracy))
    return found


def gains(accuracies: Sequence[Accuracy]) -> list[Gain]:
    """Return each network's gain on each number of classes, runs of a kind averaged; none without both."""
    sides: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for a in accuracies:
        sides.setdefault((a.network, a.classes), ([], []))[a.smoothed].append(a.accuracy)
    networks = list(dict.fromkeys(a.network for a in accuracies))
    return [
        Gain(network, classes, float(np.mean(with_) - np.mean(without)))
        for (network, classes), (without, with_) in sorted(
            sides.items(), key=lambda side: (networks.index(side[0][0]), side[0][1])
        )
        if without and with_
    ]


def average_gains(found: Sequence[Gain]) -> list[Gain]:
    """Return the mean gain on each number of classes that every network has."""
    networks = {gain.network for gain in found}
    averages = []
    for classes in sorted({gain.classes for gain in found}):
        own = [gain.points for gain in found if gain.classes == classes]
        if len(own) == len(networks):
            averages.append(Gain("average", classes, float(np.mean(own))))
    return averages


def class_count_figure(
    accuracies: Sequence[Accuracy], paper: Sequence[Accuracy] = (), width: float = 4.6
) -> Drawing:
    """Draw each network's gain and their average against the number of classes (logarithmic).

    Args:
        accuracies: to draw.
        paper: whose average is drawn in grey behind them.
        width: in inches.

    Raises:
        LskdError: where nothing has both an accuracy with and one without smoothing.
    """
    found = gains(accuracies)
    if not found:
        raise LskdError("no network has an accuracy with and one without smoothing on the same classes")
    networks = list(dict.fromkeys(gain.network for gain in found))
    averages = average_gains(found) if len(networks) > 1 else []
    behind = average_gains(gains(paper))
    with styled_axes(width, 0.74 * width) as (figure, axes):
        axes.axhline(0, color=INK, linewidth=0.9)
        if behind:
            _line(axes, behind, color=SOFT, linewidth=1.8, marker="D", markersize=5, label="paper, average")
        for index, network in enumerate(networks):
            own = [gain for gain in found if gain.network == network]
            style, marker = STYLES[(index + 1) % len(STYLES)], MARKERS[index % len(MARKERS)]
            look = {"linestyle": style, "marker": marker, "linewidth": 1.4}
            _line(axes, own, color=ARMS[index % len(ARMS)], label=network, **look)
        if averages:
            _line(axes, averages, color=INK, linewidth=2.6, marker="D", markersize=7, label="average")
        for gain in averages:
            place = (gain.classes, gain.points)
            text = axes.annotate(f"{gain.points:+.3f}", place, (7, 5), textcoords="offset points")
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
        counts = sorted({gain.classes for gain in (*found, *behind)})
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("number of classes")
        axes.set_ylabel("gain in accuracy by smoothing (points)")
        axes.legend(frameon=False)
    tables = {"": _csv([*found, *averages])}
    return Drawing(figure, {**tables, "paper": _csv(behind)} if behind else tables)


def _line(axes: Axes, shown: Sequence[Gain], **look: Any) -> None:
    axes.plot([gain.classes for gain in shown], [gain.points for gain in shown], **look)


def _csv(shown: Sequence[Gain]) -> str:
    lines = [[gain.network, gain.classes, cell(gain.points)] for gain in shown]
    return csv_text(["network", "classes", "gain_points"], lines)
