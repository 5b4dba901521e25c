"""The paper's Fig. 7: validation BLEU of teachers (left) and students (right) by epoch; below, perplexity."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lskd_study.base.extras import needs_study_extra
from lskd_study.drawing.curves import Panel, draw_curves, drawable, drawn_seeds, themed_svg
from lskd_study.drawing.style import ARMS, STYLE, note_failed
from lskd_study.results.results import failures_of
from lskd_study.results.translation import TranslationResult

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TranslationArms = Mapping[float, Mapping[int, TranslationResult]]


@dataclass(frozen=True)
class Pair:
    """Teachers and their students, each by smoothing of the teacher and seed."""

    teachers: TranslationArms
    students: TranslationArms

    @property
    def complete(self) -> bool:
        """Whether every arm of both has a run to draw, or has runs that failed."""
        return all(map(drawable, (self.teachers, self.students)))

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return len(failures_of([*self.teachers.values(), *self.students.values()]))


_SHOWN = (
    ("teachers", "val_bleu", "Teachers: validation BLEU"),
    ("students", "val_bleu", "Students: validation BLEU"),
    ("teachers", "val_ppl", "Teachers: validation perplexity"),
    ("students", "val_ppl", "Students: validation perplexity"),
)


def figure7(pair: Pair, title: str) -> Figure:
    """Draw the four panels with a legend: the file beside the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        for index, (role, column, name) in enumerate(_SHOWN, start=1):
            axes = figure.add_subplot(2, 2, index)
            _draw(axes, getattr(pair, role), column, name)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        note_failed(figure, pair.failed)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def figure7_panels(pair: Pair, prefix: str) -> list[Panel]:
    """Draw the panels for the page."""
    panels = []
    for role, column, name in _SHOWN:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(4.2, 2.4), layout="constrained")
            _draw(figure.add_subplot(), getattr(pair, role), column, name)
            note_failed(figure, len(failures_of(getattr(pair, role).values())))
        panels.append(Panel(themed_svg(figure, f"{prefix}-{role}-{column}"), f"{name} by epoch"))
    return panels


def _draw(axes: Axes, arms: TranslationArms, column: str, title: str) -> None:
    draw_curves(axes, arms, column, title)
    best = np.fmin if column == "val_ppl" else np.fmax
    low, high = axes.get_ylim()
    margin = 0.04 * (high - low)
    for index, by_seed in enumerate(arms.values()):
        chosen = [by_seed[seed] for seed in drawn_seeds(arms) if by_seed]
        epochs = [result.curves["epoch"][result.chosen] + 1 for result in chosen]
        values = [result.value(column) for result in chosen]
        axes.plot(epochs, values, "o", color=ARMS[index % len(ARMS)], markersize=4)
        values += [float(best.reduce(result.curves[column])) for result in chosen]
        seen = [value for value in values if np.isfinite(value)]
        low, high = min([low, *(v - margin for v in seen)]), max([high, *(v + margin for v in seen)])
    axes.set_ylim(low, high)
