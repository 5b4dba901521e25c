"""What smoothing does to a teacher: its loss (Fig. 3), class-mean probabilities, the minor ones (Fig. 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from lskd import Convention, LskdError
from lskd.analysis.classes import minor_probabilities
from lskd.analysis.logistic import smoothed_logistic_loss, smoothed_logistic_minimum
from lskd_study.base.text import cell, csv_text, first_of
from lskd_study.drawing.inputs import class_means, class_names
from lskd_study.drawing.style import ARMS, INK, STYLES, Drawing, short, styled_axes
from lskd_study.plan.plan import exact
from lskd_study.teachers.outputs import Outputs

# Dark and light in turn, so that the bars differ in grey too.
COLORS = (ARMS[0], ARMS[4], ARMS[2], ARMS[5], ARMS[1], ARMS[3])
_RASTER = 5000  # more marks than this make an SVG that no viewer opens
_POINTS = 401  # of a loss curve


@dataclass(frozen=True)
class ClassMeans:
    """The mean predictions of a teacher for examples of each of some classes.

    Attributes:
        teacher: its name.
        classes: ids of the ``C`` classes.
        names: names of all ``K`` classes.
        counts: examples of each of the ``C`` classes.
        major: ``(C,)``, mean probability of the examples' own class.
        minor: ``(C, K - 1)``, of the other classes, in the order of their ids.
    """

    teacher: str
    classes: list[int]
    names: list[str]
    counts: list[int]
    major: NDArray[np.float64]
    minor: NDArray[np.float64]


def measure_class_means(outputs: Outputs, classes: Sequence[int]) -> ClassMeans:
    """Average a teacher's predictions within classes.

    Raises:
        LskdError: for a teacher without logits, or a class without examples.
    """
    means = class_means(outputs, classes)
    names = class_names(outputs)
    counts = [int((outputs.labels == c).sum()) for c in classes]
    empty = [names[c] for c, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise LskdError(f"{outputs.name} has no sample of class {first_of(empty)}; leave out what has none")
    major = means[range(len(classes)), list(classes)].numpy()
    return ClassMeans(
        outputs.name, list(classes), names, counts, major, minor_probabilities(means, classes).numpy()
    )


def major_figure(teachers: Sequence[ClassMeans]) -> Drawing:
    """Draw the mean probability that each class's examples give to their own class, a bar per teacher.

    The teachers' bars overlay each other as in the paper's Fig. 4 (1); the wider is the earlier teacher's.
    """
    first = teachers[0]
    places = np.arange(len(first.classes))
    with styled_axes(_width(first), 3.0) as (figure, axes):
        widths = np.linspace(0.88, 0.4, len(teachers)) if len(teachers) > 1 else [0.8]
        for teacher, color, width in zip(teachers, cycle(COLORS), widths, strict=False):
            label = f"{teacher.teacher} (mean {teacher.major.mean():.3f})"
            axes.bar(places, teacher.major, width=width, color=color, label=label)
        axes.set_ylim(0, 1)
        axes.set_ylabel("mean probability of the own class")
        _finish(axes, first, figure)
    header = ["class_id", "class", "samples", *(f"probability_{teacher.teacher}" for teacher in teachers)]
    lines = [
        [c, first.names[c], first.counts[i], *(cell(float(teacher.major[i])) for teacher in teachers)]
        for i, c in enumerate(first.classes)
    ]
    return Drawing(figure, {"": csv_text(header, lines)})


def minor_figure(teachers: Sequence[ClassMeans], logarithmic: bool = False) -> Drawing:
    """Draw what each class's examples give to the other classes on average: Fig. 4 (2), enlarged.

    A dash stands at each minor probability, a pale bar reaches to the largest (on a logarithmic axis from the
    smallest).

    Args:
        teachers: with the same classes.
        logarithmic: draw the axis of probabilities so, to see also how small the small ones are.
    """
    first = teachers[0]
    places = np.arange(len(first.classes))
    width = 0.84 / len(teachers)
    smallest = min(float(teacher.minor[teacher.minor > 0].min(initial=1)) for teacher in teachers)
    with styled_axes(_width(first), 3.4) as (figure, axes):
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # the default ones set formulas
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
            axes.set_ylim(smallest / 2, max(float(teacher.minor.max()) for teacher in teachers) * 2)
        for index, (teacher, color) in enumerate(zip(teachers, cycle(COLORS), strict=False)):
            left = places - 0.42 + index * width
            largest = teacher.minor.max(1)
            base = np.maximum(teacher.minor.min(1), smallest) if logarithmic else np.zeros_like(largest)
            axes.bar(left, largest - base, width * 0.94, base, align="edge", color=color, alpha=0.25)
            total = teacher.minor.sum(1).mean()
            sides = np.repeat(left, teacher.minor.shape[1])
            axes.hlines(
                teacher.minor.ravel(),
                sides,
                sides + width * 0.94,
                colors=color,
                linewidth=1.0,
                label=f"{teacher.teacher} (sum {total:.3f}, median {np.median(teacher.minor):.2g})",
                rasterized=teacher.minor.size > _RASTER,
            )
        axes.set_ylabel("mean probability of each other class")
        _finish(axes, first, figure)
    lines = []
    for i, c in enumerate(first.classes):
        others = [k for k in range(len(first.names)) if k != c]
        for j, k in enumerate(others):
            values = [cell(float(teacher.minor[i, j])) for teacher in teachers]
            lines.append([c, first.names[c], k, first.names[k], *values])
    header = ["class_id", "class", "other_id", "other", *(f"probability_{t.teacher}" for t in teachers)]
    return Drawing(figure, {"": csv_text(header, lines)})


def _width(means: ClassMeans) -> float:
    return float(np.clip(1.2 + 0.42 * len(means.classes), 4.5, 12))


def _finish(axes: Axes, means: ClassMeans, figure: Figure) -> None:
    """Name the classes where there is room, else every tenth by its id."""
    names = [short(means.names[c]) for c in means.classes]
    places = np.arange(len(names))
    if len(names) <= 30:
        turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, names, **(turned if max(map(len, names)) > 3 else {}))
        axes.set_xlabel("class of the samples")
    else:
        axes.set_xticks(places[::10], [str(c) for c in means.classes[::10]])
        axes.set_xlabel("class of the samples (id)")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.tick_params(colors=INK)
    figure.legend(loc="outside upper left", ncols=1 if len(names) < 20 else 3, frameon=False)


def smoothing_loss(alphas: Sequence[float], convention: Convention = "paper", reach: float = 8.0) -> Drawing:
    """Draw the loss by the margin for each alpha, and mark where it is least.

    Args:
        alphas: smoothing, each ``0 <= alpha < 1``; 0 is the logistic loss, black and dotted.
        convention: see :data:`lskd.Convention`.
        reach: largest margin to either side.
    """
    margins = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    losses = [smoothed_logistic_loss(margins, alpha, convention) for alpha in alphas]
    minima = [smoothed_logistic_minimum(alpha, convention) for alpha in alphas]
    header = ["margin", *(f"loss_alpha_{exact(alpha)}" for alpha in alphas)]
    curves = [
        [cell(float(m)), *(cell(float(x)) for x in row)] for m, *row in zip(margins, *losses, strict=True)
    ]
    least = [[exact(alpha), cell(m), cell(x)] for alpha, (m, x) in zip(alphas, minima, strict=True)]
    tables = {"": csv_text(header, curves), "minima": csv_text(["alpha", "margin", "loss"], least)}
    with styled_axes(5.2, 3.6) as (figure, axes):
        styles = [style for style in STYLES if style != ":"]  # dotted is the logistic loss
        for index, (alpha, loss, (margin, minimum)) in enumerate(zip(alphas, losses, minima, strict=True)):
            color, style = ARMS[index % len(ARMS)], styles[index % len(styles)]
            label = f"α = {exact(alpha)}"
            if alpha == 0:
                color, style, label = INK, ":", "α = 0 (logistic loss)"
            elif math.isfinite(margin):
                label += f", least {minimum:.3f} at {margin:.2f}"
            axes.plot(margins, loss, color=color, linestyle=style, linewidth=1.8, label=label)
            if abs(margin) <= reach:
                axes.plot([margin], [minimum], "o", color=color, markersize=5.5)
        axes.set_xlabel("margin: the label's logit less the other's")
        axes.set_ylabel("loss (nats)")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(bottom=0)
        off = "α" if convention == "paper" else "α/2"
        axes.set_title(f"Binary cross-entropy with targets 1 − {off} and {off}")
        axes.legend(frameon=False, loc="upper right")
    return Drawing(figure, tables)
