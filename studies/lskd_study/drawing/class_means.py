"""Fig. 4: class-mean probabilities, and the minor ones enlarged, of teachers with and without smoothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd.analysis.classes import minor_probabilities
from lskd_study.base.extras import needs_study_extra
from lskd_study.base.text import csv_text
from lskd_study.drawing.drawing import Drawing, listed, number, short
from lskd_study.drawing.style import ARMS, INK, STYLE
from lskd_study.drawing.teachers import class_means, class_names
from lskd_study.teachers.outputs import Outputs

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

# Dark and light in turn, so that the bars differ in grey too.
COLORS = (ARMS[0], ARMS[4], ARMS[2], ARMS[5], ARMS[1], ARMS[3])
_RASTER = 5000  # more marks than this make an SVG that no viewer opens


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
        raise LskdError(f"{outputs.name} has no sample of class {listed(empty)}; leave out what has none")
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
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_width(first), 3.0), layout="constrained")
        axes = figure.add_subplot()
        widths = np.linspace(0.88, 0.4, len(teachers)) if len(teachers) > 1 else [0.8]
        for teacher, color, width in zip(teachers, _colors(teachers), widths, strict=True):
            label = f"{teacher.teacher} (mean {teacher.major.mean():.3f})"
            axes.bar(places, teacher.major, width=width, color=color, label=label)
        axes.set_ylim(0, 1)
        axes.set_ylabel("mean probability of the own class")
        _finish(axes, first, figure)
    header = ["class_id", "class", "samples", *(f"probability_{teacher.teacher}" for teacher in teachers)]
    lines = [
        [c, first.names[c], first.counts[i], *(number(float(teacher.major[i])) for teacher in teachers)]
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
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_width(first), 3.4), layout="constrained")
        axes = figure.add_subplot()
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # the default ones set formulas
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
            axes.set_ylim(smallest / 2, max(float(teacher.minor.max()) for teacher in teachers) * 2)
        for index, (teacher, color) in enumerate(zip(teachers, _colors(teachers), strict=True)):
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
    return Drawing(figure, {"": _minor_csv(teachers)})


def _minor_csv(teachers: Sequence[ClassMeans]) -> str:
    first = teachers[0]
    lines = []
    for i, c in enumerate(first.classes):
        others = [k for k in range(len(first.names)) if k != c]
        for j, k in enumerate(others):
            values = [number(float(teacher.minor[i, j])) for teacher in teachers]
            lines.append([c, first.names[c], k, first.names[k], *values])
    header = ["class_id", "class", "other_id", "other", *(f"probability_{t.teacher}" for t in teachers)]
    return csv_text(header, lines)


def _colors(teachers: Sequence[ClassMeans]) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(len(teachers))]


def _width(means: ClassMeans) -> float:
    return float(np.clip(1.2 + 0.42 * len(means.classes), 4.5, 12))


def _finish(axes: Axes, means: ClassMeans, figure: Figure) -> None:
    """Name the classes where there is room, else every tenth by its id."""
    names = [short(means.names[c]) for c in means.classes]
    places = np.arange(len(names))
    if len(names) <= 30:
        longest = max(len(name) for name in names)
        turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if longest <= 3:
            turned = {}
        axes.set_xticks(places, names, **turned)
        axes.set_xlabel("class of the samples")
    else:
        axes.set_xticks(places[::10], [str(c) for c in means.classes[::10]])
        axes.set_xlabel("class of the samples (id)")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.tick_params(colors=INK)
    figure.legend(loc="outside upper left", ncols=1 if len(names) < 20 else 3, frameon=False)
