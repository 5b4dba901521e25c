"""Curves of what was measured beside what is expected: as rows of a table, and drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter
from PIL import Image


@dataclass(frozen=True)
class Curve:
    """A curve of a panel: what was measured, by size, and what is expected at any size."""

    panel: str
    name: str
    measured: dict[int, float]
    expected: Callable[[Any], Any]

    def rows(self) -> list[list[str]]:
        """Return the rows of a table: panel, curve, size, measured, expected."""
        return [
            [self.panel, self.name, str(x), f"{y:.6g}", f"{self.expected(x):.6g}"]
            for x, y in self.measured.items()
        ]


def linear(panel: str, name: str, measured: dict[int, float], last: int | None = None) -> Curve:
    """Expected is a fixed part and one in proportion, as the smallest and the ``last`` measurement say.

    That is the largest where it is not said.
    """
    first, last = min(measured), last or max(measured)
    slope = max((measured[last] - measured[first]) / (last - first), 0)
    return Curve(panel, name, measured, lambda x: measured[first] + slope * (x - first))


def draw(curves: Sequence[Curve], panels: Mapping[str, tuple[str, str, str]], title: str, path: Path) -> None:
    """Draw panels of two logarithmic axes: dots are measured, lines expected.

    ``panels``: by name what lies along the axes, and their titles.
    """
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3.5 * rows), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (panel, (x_name, y_name, name)) in zip(axes.flat, panels.items(), strict=False):
        for number, curve in enumerate(curve for curve in curves if curve.panel == panel):
            colour, sizes = f"C{number}", list(curve.measured)
            axis.plot(sizes, list(curve.measured.values()), "o", color=colour, label=curve.name)
            # A straight line with a fixed part is a curve on logarithmic axes.
            x = np.geomspace(sizes[0], sizes[-1], 100)
            axis.plot(x, curve.expected(x), "-", color=colour, linewidth=1, alpha=0.7)
        axis.set(xscale="log", yscale="log", xlabel=x_name, ylabel=y_name, title=name)
        low, high = axis.get_ylim()
        middle = (low * high) ** 0.5
        axis.set_ylim(min(low, middle / 4), max(high, middle * 4))  # or scatter looks like growth
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, fontsize="small")
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    with Image.open(path) as drawn:  # in a third of the bytes: the documentation keeps it
        drawn.convert("RGB").quantize(256).save(path, optimize=True)
