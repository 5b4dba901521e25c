"""Fig. 1: activations of three classes in the plane through their templates, and D1, D2 and Dc measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lskd import LskdError
from lskd.analysis.projection import cluster_distances, project
from lskd_study.base.text import cell, csv_text
from lskd_study.drawing.inputs import class_names
from lskd_study.drawing.style import ARMS, INK, STYLE, Drawing, short
from lskd_study.stats.bootstrap import Estimate, percentiles
from lskd_study.teachers.outputs import Outputs

COLORS, MARKERS = (ARMS[0], ARMS[4], ARMS[3]), ("o", "^", "s")
ROLES = ("similar pair", "similar pair", "dissimilar")
QUANTITIES = {
    "centre_distance": "Dc",
    "nearest": "D1",
    "farthest": "D2",
    "relative_spread": "(D2−D1)/mean",
    "separation": "Dc/radius",
}
# A distance between centres is biased, and the more so in resamples: its error is what resamples tell.
_BY_ERROR = ("centre_distance", "separation")


@dataclass(frozen=True)
class Projection:
    """One panel: a teacher on a split.

    Attributes:
        teacher: its name.
        split: of which samples.
        classes: ids of the two similar classes and the dissimilar one.
        names: their names.
        points: ``(N, 2)``, coordinates in the plane.
        position: ``(N,)`` int64, which of the three classes (0, 1, 2) a point belongs to.
        samples: ``(N,)`` int64, row of the point in the teacher's outputs.
        width: width ``D`` of the features.
        in_plane: the quantities measured in the plane, by name; none has a p-value.
        in_full_space: measured between the features.
    """

    teacher: str
    split: str
    classes: Sequence[int]
    names: Sequence[str]
    points: Tensor
    position: Tensor
    samples: Tensor
    width: int
    in_plane: dict[str, Estimate]
    in_full_space: dict[str, Estimate]


def _checked(outputs: Outputs, split: str) -> tuple[Tensor, Tensor]:
    """Return the features ``(N, D)`` and templates ``(K, D)`` of a teacher that can be projected."""
    if outputs.features is None or outputs.templates is None:
        what = "features" if outputs.features is None else "classifier's weight"
        raise LskdError(
            f"{outputs.name} ({split}) has no {what}, which the projection needs; save it beside the logits"
        )
    return outputs.features, outputs.templates


def check_splits(splits: Mapping[Any, Sequence[Outputs]]) -> None:
    """Check that teachers can be projected, and that each is one network on all splits.

    Raises:
        LskdError: for features or templates that are missing, of different widths or of another network.
    """
    of_splits = {name: [_checked(one, name)[1] for one in own] for name, own in splits.items()}
    (first, of_first), *others = of_splits.items()
    for split, of_split in others:
        for teacher, a, b in zip(splits[first], of_first, of_split, strict=True):
            if a.shape[1] != b.shape[1]:
                raise LskdError(
                    f"{teacher.name}: features are {a.shape[1]} wide on {first} and {b.shape[1]} on {split}; "
                    "take both from one teacher"
                )
            if a.shape != b.shape or not torch.equal(a, b):
                raise LskdError(
                    f"{teacher.name}: the classifier's weight differs between {first} and {split}; "
                    "take both from one teacher"
                )


def measure_projection(
    outputs: Outputs, split: str, classes: Sequence[int], resamples: int, seed: int
) -> Projection:
    """Project three classes and measure the distances between them.

    Args:
        outputs: with features and templates.
        split: name of the samples, for the panel.
        classes: ids of the two similar classes, then the dissimilar one.
        resamples: of the bootstrap; examples are drawn within their class.
        seed: of the bootstrap.

    Raises:
        LskdError: for missing or unfit features, or a class of fewer than two examples.
    """
    features, templates = _checked(outputs, split)
    every = class_names(outputs)
    names = tuple(every[c] for c in classes)
    members = [(outputs.labels == c).nonzero().flatten() for c in classes]
    for name, rows in zip(names, members, strict=True):
        if len(rows) < 2:
            raise LskdError(
                f"{outputs.name} ({split}) has {len(rows)} samples of class {name}; "
                "the projection needs at least 2 of each"
            )
    samples = torch.cat(members)
    features = features[samples].double()
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        raise LskdError(
            f"{outputs.name} ({split}): features of sample {int(samples[~finite][0])} are not all finite; "
            "leave the sample out or fix the teacher"
        )
    points = project(features, templates[list(classes)])
    sizes = [len(rows) for rows in members]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(size, (resamples, size), generator=generator) for size in sizes]
    return Projection(
        outputs.name,
        split,
        classes,
        names,
        points,
        torch.arange(3).repeat_interleave(torch.tensor(sizes)),
        samples,
        features.shape[1],
        _estimates(points, sizes, drawn),
        _estimates(features, sizes, drawn),
    )


def _estimates(values: Tensor, sizes: list[int], drawn: list[Tensor]) -> dict[str, Estimate]:
    a, b, c = values.split(sizes)
    measured, whole = cluster_distances(a, b, c), cluster_distances(a, b, c, population=True)
    resampled = cluster_distances(a, b, c, drawn)
    found = {}
    for name in QUANTITIES:
        value, draws = float(getattr(measured, name)), getattr(resampled, name).numpy()
        low, high = percentiles(draws)
        if name in _BY_ERROR:
            truth = float(getattr(whole, name))
            low, high = max(value - (high - truth), 0.0), value - (low - truth)
        found[name] = Estimate(value, low, high, np.nan)
    return found


def projection_figure(panels: Sequence[Projection]) -> Drawing:
    """Draw one row per teacher, all splits in the same square of the plane, and one column per split."""
    teachers = list(dict.fromkeys(panel.teacher for panel in panels))
    splits = len({panel.split for panel in panels})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.3 + 4.1 * splits, 0.4 + 5.0 * len(teachers)), layout="constrained")
        grid = figure.subplots(len(teachers), splits, squeeze=False)
        for row, teacher in zip(grid, teachers, strict=True):
            own = [panel for panel in panels if panel.teacher == teacher]
            every = torch.cat([panel.points for panel in own]).numpy()
            centre = (every.max(0) + every.min(0)) / 2
            half = 0.55 * float((every.max(0) - every.min(0)).max())
            for axes, panel in zip(row, own, strict=True):
                _draw(axes, panel)
                axes.set_xlim(centre[0] - half, centre[0] + half)
                axes.set_ylim(centre[1] - half, centre[1] + half)
        handles = [
            Line2D(
                [], [], color=color, marker=marker, linestyle="", markersize=6, label=f"{short(n)} ({role})"
            )
            for color, marker, n, role in zip(COLORS, MARKERS, panels[0].names, ROLES, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return Drawing(figure, {"": _points_csv(panels), "distances": _distances_csv(panels)})


def _text(found: Estimate) -> str:
    return f"{found.value:#.3g} [{found.low:#.3g}, {found.high:#.3g}]"


def _draw(axes: Axes, panel: Projection) -> None:
    centres = []
    for position, (color, marker) in enumerate(zip(COLORS, MARKERS, strict=True)):
        points = panel.points[panel.position == position].numpy()
        centres.append(points.mean(0))
        size = float(np.clip(2600 / len(points), 5, 22))
        style: dict[str, Any] = {"alpha": 0.75, "linewidths": 0.3, "edgecolors": "white"}
        axes.scatter(points[:, 0], points[:, 1], s=size, c=color, marker=marker, **style)
    first, second, dissimilar = centres
    axes.plot(*np.array([first, second]).T, "-", color=INK, linewidth=1.3, marker="x", markersize=7, zorder=4)
    middle = (first + second) / 2
    toward = np.arctan2(*(dissimilar - middle)[::-1])
    for name in ("nearest", "farthest"):
        angle = toward + np.linspace(-0.3, 0.3, 61)
        arc = middle + panel.in_plane[name].value * np.stack([np.cos(angle), np.sin(angle)], 1)
        axes.plot(*arc.T, "--", color=INK, linewidth=1.1, zorder=4)
        axes.annotate(QUANTITIES[name], arc[-1], (-2, 2), textcoords="offset points", ha="right", fontsize=8)
    below = (0, -9) if first[1] <= dissimilar[1] else (0, 5)
    axes.annotate("Dc", middle, below, textcoords="offset points", ha="center", va="center", fontsize=8)
    axes.set_title(f"{panel.teacher}, {panel.split} ({len(panel.points)} samples)")
    axes.set_xlabel(f"from template {short(panel.names[0])} to {short(panel.names[1])}")
    axes.set_ylabel(f"towards template {short(panel.names[2])}")
    axes.set_aspect("equal", adjustable="box")
    for x, lines in (
        (0.0, ["[95 %]", *QUANTITIES.values()]),
        (0.26, ["in the plane", *(_text(panel.in_plane[name]) for name in QUANTITIES)]),
        (0.64, [f"all {panel.width} features", *(_text(panel.in_full_space[name]) for name in QUANTITIES)]),
    ):
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
        axes.annotate("\n".join(lines), (x, 0), (0, -33), fontsize=7.5, linespacing=1.4, **place)


def _points_csv(panels: Sequence[Projection]) -> str:
    """Return every point: ``sample`` is its row in the teacher's outputs, counted from 0."""
    lines = []
    for panel in panels:
        columns = (panel.samples, panel.position, panel.points)
        for sample, own, (x, y) in zip(*(column.tolist() for column in columns), strict=True):
            kind = [panel.teacher, panel.split, sample, panel.classes[own], panel.names[own]]
            lines.append([*kind, cell(x), cell(y)])
    return csv_text(["teacher", "split", "sample", "class_id", "class", "x", "y"], lines)


def _distances_csv(panels: Sequence[Projection]) -> str:
    """Return the measured quantities with their intervals."""
    lines = []
    for panel in panels:
        for space, found in (("plane", panel.in_plane), ("features", panel.in_full_space)):
            for name, estimate in found.items():
                numbers = [cell(x) for x in (estimate.value, estimate.low, estimate.high)]
                lines.append([panel.teacher, panel.split, space, name, *numbers])
    return csv_text(["teacher", "split", "space", "quantity", "value", "low", "high"], lines)
