"""Figures: curves in the style of the paper's Fig. 5, and the headline's differences with their intervals.

In the page a panel's colours become CSS variables, so that it follows the page's light or dark scheme; the
files beside the page keep fixed colours on white.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lskd_study.base.extras import needs_study_extra
from lskd_study.base.text import cell, csv_text
from lskd_study.claims import Setting, claims_of, estimate, groups
from lskd_study.drawing.style import ARMS, INK, RULE, SOFT, STYLE, STYLES, note_failed
from lskd_study.plan.plan import exact
from lskd_study.results.results import Result, Results, common_seeds, failure_words, failures_of
from lskd_study.stats.intervals import Array, Interval, no_interval

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

PANELS = (
    ("train_ce", "Distillation cross-entropy", "nats"),
    ("train_kl", "KL divergence from the teacher", "nats"),
    ("train_teacher_entropy", "Entropy of the teacher", "nats"),
    ("val_top1", "Validation top-1 accuracy", "%"),
)
TRANSLATION_PANELS = (*PANELS[:3], ("train_hard_ce", "Cross-entropy with the labels", "nats"))
# Validation scores, of which the first epochs would flatten what matters.
ZOOMED = ("val_top1", "val_bleu", "val_ppl")


Arms = Mapping[float, Mapping[int, Result]]  # results by seed, by smoothing of the teacher


@dataclass(frozen=True)
class Panel:
    """One drawing for the page: SVG markup and what it shows, in words."""

    svg: str
    label: str


@dataclass(frozen=True)
class Difference:
    """The headline's difference for one network: its interval, and each seed's own difference (points).

    ``failed``: which run failed that it needs; then there is no interval.
    """

    name: str
    interval: Interval
    by_seed: dict[int, float]
    failed: str = ""


def differences(results: Results[Result], setting: Setting) -> list[Difference]:
    """Return the headline's differences (students' accuracy or BLEU), each and (if several) averaged."""
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
            found.append(Difference(name, estimate(headline.quantity, members, seeds), by_seed))
    return found


def difference_csv(rows: Sequence[Difference]) -> str:
    """Return the numbers behind the figure of differences."""
    seeds = sorted({seed for row in rows for seed in row.by_seed})
    header = ["students", "difference_points", "low", "high", "p_value", "failed"]
    header += [f"seed{seed}" for seed in seeds]
    lines = []
    for row in rows:
        i = row.interval
        numbers = [cell(number) for number in (i.estimate, i.low, i.high, i.p_value)]
        own = [cell(row.by_seed.get(seed, np.nan)) for seed in seeds]
        lines.append([row.name, *numbers, row.failed, *own])
    return csv_text(header, lines)


def difference_figure(rows: Sequence[Difference], score: str = "top-1 accuracy") -> Figure:
    """Draw each row's interval with a dot per seed, around the line of no difference."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 0.7 + 0.4 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=0.9)
        for y, row in enumerate(reversed(rows)):
            pooled = row.name == rows[-1].name
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
    return figure


def curves_csv(results: Results[Result]) -> str:
    """Return every run's curves in one long table: what the curve figures are drawn from."""
    header = ["run", "role", "model", "smoothing", "seed"]
    lines: list[list[object]] = []
    first = next((result.curves for result in results.finished.values()), {})
    columns = [name for name in first if name != "epoch"]
    for result in results.finished.values():
        run = result.run
        for position, epoch in enumerate(result.curves["epoch"]):
            values = [f"{result.curves[name][position]:.8g}" for name in columns]
            lines.append([run.id, run.role, run.model, run.smoothing, run.seed, int(epoch), *values])
    return csv_text([*header, "epoch", *columns], lines)


def curve_panels(arms: Arms, prefix: str, shown: Sequence[tuple[str, str, str]] = PANELS) -> list[Panel]:
    """Draw one student's panels for the page; ``arms``: results by seed, by smoothing value."""
    panels = []
    for column, title, unit in shown:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(2.75, 2.15), layout="constrained")
            draw_curves(figure.add_subplot(), arms, column, f"{title} ({unit})")
            note_failed(figure, len(failures_of(arms.values())))
        panels.append(Panel(themed_svg(figure, f"{prefix}-{column}"), f"{title} by epoch"))
    return panels


def curve_figure(arms: Arms, title: str, shown: Sequence[tuple[str, str, str]] = PANELS) -> Figure:
    """Draw one student's panels side by side, with a legend: the file beside the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.0 * len(shown), 2.9), layout="constrained")
        for index, (column, name, unit) in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), index)
            draw_curves(axes, arms, column, f"{name} ({unit})")
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        note_failed(figure, len(failures_of(arms.values())))
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def drawable(arms: Arms) -> bool:
    """Whether every arm has a run to draw, or has runs that failed, which the figure says."""
    return all(runs or failures_of([runs]) for runs in arms.values())


def drawn_seeds(arms: Arms) -> list[int]:
    """Return the seeds that all arms have which have any run to draw."""
    return common_seeds([runs for runs in arms.values() if runs])


def draw_curves(axes: Axes, arms: Arms, column: str, title: str) -> None:
    """Draw a curve's mean over seeds for each arm that has a result, and each seed's own, thin."""
    seeds = drawn_seeds(arms)
    late: list[Array] = []
    for index, (smoothing, results) in enumerate(arms.items()):
        color, style = ARMS[index % len(ARMS)], STYLES[index % len(STYLES)]
        curves = [results[seed].curves for seed in seeds if results]
        shortest = min((len(curve["epoch"]) for curve in curves), default=0)
        if not shortest:
            continue
        epochs = curves[0]["epoch"][:shortest] + 1
        values = np.array([curve[column][:shortest] for curve in curves])
        axes.plot(epochs, values.T, color=color, linewidth=0.7, alpha=0.4)
        label = f"teacher's smoothing {exact(smoothing)}"
        axes.plot(epochs, values.mean(0), color=color, linestyle=style, linewidth=1.9, label=label)
        late.append(values[:, shortest // 2 :])
    if column in ZOOMED and late and all(np.isfinite(values).all() for values in late):
        # The numbers of all epochs are in the CSV.
        low, high = min(float(v.min()) for v in late), max(float(v.max()) for v in late)
        margin = max(0.12 * (high - low), 0.1)
        axes.set_ylim(low - margin, high + margin)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def themed_svg(figure: Figure, name: str) -> str:
    """Return SVG for inlining: colours as CSS variables, ids of its own, no fixed size, no fonts named."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font-family: [^;\"]+;?|font: [\d.]+px [^;\"]+", _only_size, svg)
    named = [(INK, "ink"), (RULE, "rule"), (SOFT, "soft"), ("#ffffff", "paper")]
    for color, variable in [*named, *((c, f"arm-{i}") for i, c in enumerate(ARMS))]:
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def _only_size(match: re.Match[str]) -> str:
    size = re.match(r"font: ([\d.]+px)", match.group())
    return f"font-size: {size.group(1)}" if size else ""
