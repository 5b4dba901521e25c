"""Curves by epoch in the style of the paper's Figs. 5, 6 and 7, and the headline's differences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lskd_study.base.text import cell, csv_text
from lskd_study.claims import Setting, claims_of, estimate, groups
from lskd_study.drawing.style import (
    ARMS,
    INK,
    SOFT,
    STYLE,
    STYLES,
    Drawing,
    note_failed,
    styled_axes,
    themed_svg,
)
from lskd_study.plan.plan import Plan, exact, slug
from lskd_study.results.results import (
    AnyResult,
    BySeed,
    Result,
    Results,
    common_seeds,
    failure_words,
    failures_of,
)
from lskd_study.stats.intervals import Array, Interval, no_interval
from lskd_study.stats.sequential import levels

LOSSES = (
    ("train_ce", "Distillation cross-entropy", "nats"),
    ("train_kl", "KL divergence from the teacher", "nats"),
    ("train_teacher_entropy", "Entropy of the teacher", "nats"),
)
IMAGE_CURVES = (*LOSSES, ("val_top1", "Validation top-1 accuracy", "%"))
TRANSLATION_CURVES = (*LOSSES, ("train_hard_ce", "Cross-entropy with the labels", "nats"))
# Validation scores, of which the first epochs would flatten what matters.
ZOOMED = ("val_top1", "val_bleu", "val_ppl")

Arms = Mapping[float, Mapping[int, Result]]  # results by seed, by smoothing of the teacher


@dataclass(frozen=True)
class Plot:
    """Curves on one pair of axes: their name in a page, what they show, of which runs, how they are drawn."""

    name: str
    label: str
    arms: Arms
    draw: Callable[[Axes, Arms], None]


@dataclass(frozen=True)
class CurveFigure:
    """A figure of the paper from the runs of one kind of student.

    Attributes:
        stem: what the names of its files begin with.
        plots: for the page a panel each, in the file side by side.
        panel_size: of one panel, inches.
        size: of the whole, inches.
        columns: of the whole.
        legend: whether the arms' legend stands below the whole.
    """

    stem: str
    plots: Sequence[Plot]
    panel_size: tuple[float, float]
    size: tuple[float, float]
    columns: int
    legend: bool = True

    def panels(self, prefix: str) -> list[Markup]:
        """Draw each plot for the page; ``prefix`` makes ids that no other figure has."""
        panels = []
        for plot in self.plots:
            with styled_axes(*self.panel_size) as (figure, axes):
                plot.draw(axes, plot.arms)
                note_failed(figure, len(failures_of(plot.arms.values())))
            panels.append(themed_svg(figure, f"{prefix}-{plot.name}", f"{plot.label} by epoch"))
        return panels

    def whole(self, title: str) -> Figure:
        """Draw all plots in one figure: the file beside the page."""
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            for index, plot in enumerate(self.plots, start=1):
                axes = figure.add_subplot(len(self.plots) // self.columns, self.columns, index)
                plot.draw(axes, plot.arms)
            handles, labels = axes.get_legend_handles_labels()
            if self.legend and labels:
                figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
            drawn = {id(plot.arms): plot.arms for plot in self.plots}.values()
            note_failed(figure, sum(len(failures_of(arms.values())) for arms in drawn))
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return figure


def figure5(
    arms: Arms, curves: Sequence[tuple[str, str, str]] = IMAGE_CURVES, controls: Arms = MappingProxyType({})
) -> CurveFigure:
    """Return the curves of Fig. 5, its loss taken apart; ``curves``: column, title and unit of each.

    ``controls``: the same network without a teacher, by smoothing of its labels, beside validation scores.
    """
    plots = [
        Plot(
            column,
            title,
            arms,
            partial(_draw_curves, column=column, title=f"{title} ({unit})", controls=controls),
        )
        for column, title, unit in curves
    ]
    return CurveFigure("curves", plots, (2.75, 2.15), (3.0 * len(plots), 2.9), len(plots))


def figure6(arms: Arms) -> CurveFigure | None:
    """Return Fig. 6: train and test loss, and test error with the best accuracies in the legend.

    None where a run lacks the distillation loss on the validation set, which mmcls alone logs.
    """
    results = [one for by_seed in arms.values() for result in by_seed.values() for one in result.each]
    if not results or not all(np.isfinite(result.curves.get("val_ce", [np.nan])).all() for result in results):
        return None
    plots = [
        Plot("loss", "Distillation loss on training and validation images", arms, _draw_losses),
        Plot("error", "Error on the validation images", arms, _draw_errors),
    ]
    return CurveFigure("figure6", plots, (3.6, 2.9), (7.2, 3.1), 2, legend=False)


def figure7(teachers: Arms, students: Arms, controls: Arms) -> CurveFigure:
    """Return Fig. 7: validation BLEU of teachers (left), students and controls (right); below, perplexity."""
    nothing: Arms = {}
    roles = (("teachers", teachers, nothing), ("students", students, controls))
    plots = []
    for column, score in (("val_bleu", "validation BLEU"), ("val_ppl", "validation perplexity")):
        for role, arms, beside in roles:
            title = f"{role.capitalize()}: {score}"
            draw = partial(_draw_scores, column=column, title=title, controls=beside)
            plots.append(Plot(f"{role}-{column}", title, arms, draw))
    return CurveFigure("figure7", plots, (4.2, 2.4), (7.2, 5.6), 2)


def drawable(arms: Arms) -> bool:
    """Whether every arm has a run to draw, or has runs that failed, which the figure says."""
    return all(runs or failures_of([runs]) for runs in arms.values())


def best_accuracies(results: Sequence[Result]) -> tuple[float, float]:
    """Return the best epoch's top-1 and its top-5 accuracy in percent, means over seeds, as in Fig. 6.

    The best epoch is chosen on the samples it is shown for, as the paper does; the study's claims use the
    last one.
    """
    pairs = []
    for result in results:
        best = int(np.argmax(result.curves["val_top1"]))
        pairs.append((result.curves["val_top1"][best], result.curves["val_top5"][best]))
    top1, top5 = np.mean(pairs, axis=0)
    return float(top1), float(top5)


def _drawn(arms: Arms) -> Iterator[tuple[str, Any, float, list[Result]]]:
    """Yield colour, line style, smoothing and runs of each arm: of the seeds that all have which have any."""
    seeds = common_seeds([runs for runs in arms.values() if runs])
    for index, (smoothing, runs) in enumerate(arms.items()):
        color, style = ARMS[index % len(ARMS)], STYLES[index % len(STYLES)]
        yield color, style, smoothing, [one for seed in seeds if runs for one in runs[seed].each]


def _by_epoch(results: Sequence[Result], column: str) -> tuple[Array, Array]:
    """Return the epochs, counted from 1, and the curves ``(runs, epochs)``, as far as all runs have them."""
    results = [one for result in results for one in result.each]
    shortest = min(len(result.curves["epoch"]) for result in results)
    values = np.array([result.curves[column][:shortest] for result in results])
    return results[0].curves["epoch"][:shortest] + 1, values


def _draw_curves(axes: Axes, arms: Arms, column: str, title: str, controls: Arms) -> None:
    """Draw a curve's mean over seeds for each arm that has a result, and each seed's own, thin.

    Of controls, which have no teacher's losses, the mean, where the curve is a score.
    """
    late: list[Array] = []
    for color, style, smoothing, results in _drawn(arms):
        if not results:
            continue
        epochs, values = _by_epoch(results, column)
        axes.plot(epochs, values.T, color=color, linewidth=0.7, alpha=0.4)
        label = f"teacher's smoothing {exact(smoothing)}"
        axes.plot(epochs, values.mean(0), color=color, linestyle=style, linewidth=1.9, label=label)
        late.append(values[:, len(epochs) // 2 :])
    if column in ZOOMED:
        for (smoothing, runs), style in zip(controls.items(), STYLES, strict=False):
            if runs:
                epochs, values = _by_epoch(list(runs.values()), column)
                label = f"no teacher, labels' smoothing {exact(smoothing)}"
                axes.plot(epochs, values.mean(0), color=SOFT, linestyle=style, linewidth=1.2, label=label)
                late.append(values.mean(0, keepdims=True)[:, len(epochs) // 2 :])
    if column in ZOOMED and late and all(np.isfinite(values).all() for values in late):
        # The numbers of all epochs are in the CSV.
        low, high = min(float(v.min()) for v in late), max(float(v.max()) for v in late)
        margin = max(0.12 * (high - low), 0.1)
        axes.set_ylim(low - margin, high + margin)
    _finish(axes, title)


def _draw_losses(axes: Axes, arms: Arms) -> None:
    for color, _, smoothing, results in _drawn(arms):
        for column, name, style in (("train_ce", "train", "-"), ("val_ce", "test", "--")):
            if results:
                epochs, loss = _by_epoch(results, column)
                label = f"{name}, α = {exact(smoothing)}"
                axes.plot(epochs, loss.mean(0), color=color, linestyle=style, label=label)
    _finish(axes, "Distillation loss (nats)", legend=True)


def _draw_errors(axes: Axes, arms: Arms) -> None:
    for color, style, smoothing, results in _drawn(arms):
        if results:
            epochs, accuracy = _by_epoch(results, "val_top1")
            top1, top5 = best_accuracies(results)
            label = f"α = {exact(smoothing)}: {top1:.2f} / {top5:.2f}"
            axes.plot(epochs, 100 - accuracy.mean(0), color=color, linestyle=style, label=label)
    _finish(axes, "Test error (%); best top-1 / top-5 in the legend", legend=True)


def _draw_scores(axes: Axes, arms: Arms, column: str, title: str, controls: Arms) -> None:
    """Draw curves of translation with a dot for each run's chosen checkpoint, none of them cut off."""
    _draw_curves(axes, arms, column, title, controls)
    best = np.fmin if column == "val_ppl" else np.fmax
    low, high = axes.get_ylim()
    margin = 0.04 * (high - low)
    for color, _, _, results in _drawn(arms):
        epochs = [result.curves["epoch"][result.chosen] + 1 for result in results]
        values = [result.value(column) for result in results]
        axes.plot(epochs, values, "o", color=color, markersize=4)
        values += [float(best.reduce(result.curves[column])) for result in results]
        seen = [value for value in values if np.isfinite(value)]
        low, high = min([low, *(v - margin for v in seen)]), max([high, *(v + margin for v in seen)])
    axes.set_ylim(low, high)


def _finish(axes: Axes, title: str, legend: bool = False) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axes.legend(frameon=False, fontsize=7.5)


def curves_csv(results: Results[Result]) -> str:
    """Return every run's curves in one long table: what the curve figures are drawn from."""
    header = ["run", "role", "model", "smoothing", "seed", "study_seed"]
    lines: list[list[object]] = []
    first = next((result.curves for result in results.finished.values()), {})
    columns = [name for name in first if name != "epoch"]
    for result in results.finished.values():
        run = result.run
        for position, epoch in enumerate(result.curves["epoch"]):
            values = [f"{result.curves[name][position]:.8g}" for name in columns]
            own = [run.id, run.role, run.model, run.smoothing, run.seed, run.study_seed]
            lines.append([*own, int(epoch), *values])
    return csv_text([*header, "epoch", *columns], lines)


@dataclass(frozen=True)
class StudentKind:
    """A kind of student of a kind of teacher, whose figures show all arms; ``setting``: T and λ in words."""

    model: str
    teacher: str
    temperature: float
    hard_weight: float
    setting: str

    @property
    def title(self) -> str:
        """The heading of its figures."""
        return f"Student {self.model}, teacher {self.teacher}{self.setting}"

    def arms(self, results: Results[AnyResult]) -> dict[float, BySeed[AnyResult]]:
        """Return its results by smoothing of the teacher."""
        kind = (self.temperature, self.hard_weight)
        return {
            alpha: results.students(self.model, self.teacher, alpha, *kind)
            for alpha in results.plan.smoothing
        }

    def controls(self, results: Results[AnyResult]) -> dict[float, BySeed[AnyResult]]:
        """Return the same network's results without a teacher, by smoothing of the labels."""
        return {alpha: results.controls(self.model, alpha) for alpha in results.plan.controls_drawn}

    def stem(self, figure: str) -> str:
        """Return what the names of a figure's files begin with."""
        names = f"{slug(self.model)}-of-{slug(self.teacher)}"
        return f"{figure}-{names}-T{exact(self.temperature)}-hard{exact(self.hard_weight)}"


def student_kinds(plan: Plan) -> list[StudentKind]:
    """Return each kind of student of each kind of teacher, in the order of the study's file."""
    kinds = dict.fromkeys(
        (run.model, plan.run(run.teacher).model, run.temperature, run.hard_weight)
        for run in plan.runs
        if run.role == "student"
    )
    setting = "" if plan.papers_loss else ", T = {}, λ = {}"
    return [StudentKind(*kind, setting.format(*map(exact, kind[2:]))) for kind in kinds]


# The headline's differences


@dataclass(frozen=True)
class Difference:
    """The headline's difference for one network: its interval, and each seed's own difference (points).

    ``failed``: which run failed that it needs; then there is no interval.
    """

    name: str
    interval: Interval
    by_seed: Mapping[int, float]
    failed: str = ""


def differences(results: Results[Result], setting: Setting, own: Interval | None = None) -> list[Difference]:
    """Return the headline's differences (students' accuracy or BLEU), each and (if several) averaged.

    ``own``: the last one's interval, where the headline has another than its runs alone give.
    """
    headline = claims_of(results.plan)[0]
    pairs = {
        name: pair
        for name, pair in groups(results, headline, setting).items()
        if common_seeds(pair) or failures_of(pair)
    }
    chosen = {name: [pair] for name, pair in pairs.items()}
    if len(pairs) > 1:
        chosen["all students"] = list(pairs.values())
    found = []
    for name, members in chosen.items():
        needed = [group for pair in members for group in pair]
        seeds = common_seeds(needed)
        if failed := failure_words(failures_of(needed)):
            found.append(Difference(name, no_interval(np.nan, 0, 0, "", failed), {}, failed))
        elif seeds:
            by_seed = {seed: estimate(headline.quantity, members, [seed]).estimate for seed in seeds}
            shown = estimate(headline.quantity, members, seeds)
            if looks := results.plan.looks:
                shown = shown.at_level(1 - float(levels(looks)[results.plan.look]))
            found.append(Difference(name, shown, by_seed))
    if own is not None and found and not found[-1].failed:
        found[-1] = replace(found[-1], interval=own)
    return found


def setting_names(settings: Sequence[Any]) -> list[str]:
    """Return for each setting (or its record) what tells it from the others: smoothing, T or λ."""
    parts = {"smoothing": "α", "temperature": "T", "hard_weight": "λ"}
    varied = [part for part in parts if len({getattr(one, part) for one in settings}) > 1]
    return [", ".join(f"{parts[part]} = {exact(getattr(one, part))}" for part in varied) for one in settings]


def difference_drawing(rows: Sequence[Difference], score: str, last_pools: bool) -> Drawing:
    """Draw each row's interval with a tick per seed, around the line of no difference.

    ``last_pools``: the last row is of all others together, and drawn so.
    """
    with styled_axes(4.6, 0.7 + 0.4 * len(rows)) as (figure, axes):
        axes.axvline(0, color=INK, linewidth=0.9)
        for y, row in enumerate(reversed(rows)):
            pooled = last_pools and row.name == rows[-1].name
            i = row.interval
            if row.failed:
                # In the middle, whatever is drawn beside it.
                place = axes.get_yaxis_transform()
                axes.text(0.5, y, "no difference: a run failed", transform=place, ha="center", va="center")
                continue
            if i.known:
                axes.plot([i.low, i.high], [y, y], color=ARMS[1], linewidth=3.2 if pooled else 1.8)
            axes.plot([i.estimate], [y], "D" if pooled else "o", color=ARMS[1], markersize=7)
            seeds = list(row.by_seed.values())
            axes.plot(seeds, [y + 0.24] * len(seeds), "|", color=INK, markersize=7, markeredgewidth=1.1)
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axes.set_ylim(-0.5, len(rows) - 0.3)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"difference in {score} (points)")
    all_seeds = sorted({seed for row in rows for seed in row.by_seed})
    header = ["students", "difference_points", "low", "high", "p_value", "failed"]
    lines = []
    for row in rows:
        i = row.interval
        numbers = [cell(number) for number in (i.estimate, i.low, i.high, i.p_value)]
        own = [cell(row.by_seed.get(seed, np.nan)) for seed in all_seeds]
        lines.append([row.name, *numbers, row.failed, *own])
    return Drawing(figure, {"": csv_text([*header, *(f"seed{seed}" for seed in all_seeds)], lines)})
