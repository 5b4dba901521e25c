"""The paper's Fig. 6: train and test loss of the distillation, and test error, best accuracies in the legend.

Drawn where the trainer logs the distillation loss on the validation set too; mmcls does.
"""

from collections.abc import Mapping

import numpy as np

from lskd_study.base.extras import needs_study_extra
from lskd_study.drawing.curves import Arms, Panel, drawn_seeds, themed_svg
from lskd_study.drawing.style import ARMS, STYLE, STYLES, note_failed
from lskd_study.plan.plan import exact
from lskd_study.results.results import Result, failures_of
from lskd_study.stats.intervals import Array

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator


def has_test_loss(arms: Arms) -> bool:
    """Whether every run of the arms has the distillation loss on the validation set."""
    results = [result for by_seed in arms.values() for result in by_seed.values()]
    return bool(results) and all(
        "val_ce" in result.curves and np.isfinite(result.curves["val_ce"]).all() for result in results
    )


def best_accuracies(results: Mapping[int, Result]) -> tuple[float, float]:
    """Return the best epoch's top-1 and its top-5 accuracy in percent, means over seeds, as in the legend.

    The best epoch is chosen on the samples it is shown for, as the paper does; the study's claims use the
    last one.
    """
    pairs = []
    for result in results.values():
        best = int(np.argmax(result.curves["val_top1"]))
        pairs.append((result.curves["val_top1"][best], result.curves["val_top5"][best]))
    top1, top5 = np.mean(pairs, axis=0)
    return float(top1), float(top5)


def figure6(arms: Arms, title: str) -> Figure:
    """Draw both panels side by side; ``arms``: results by seed, by smoothing of the teacher."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.1), layout="constrained")
        _draw_losses(figure.add_subplot(1, 2, 1), arms)
        _draw_errors(figure.add_subplot(1, 2, 2), arms)
        note_failed(figure, len(failures_of(arms.values())))
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def figure6_panels(arms: Arms, prefix: str) -> list[Panel]:
    """Draw the panels for the page."""
    panels = []
    for name, draw, label in (
        ("loss", _draw_losses, "Distillation loss on training and validation images by epoch"),
        ("error", _draw_errors, "Error on the validation images by epoch"),
    ):
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(3.6, 2.9), layout="constrained")
            draw(figure.add_subplot(), arms)
            note_failed(figure, len(failures_of(arms.values())))
        panels.append(Panel(themed_svg(figure, f"{prefix}-{name}"), label))
    return panels


def _draw_losses(axes: Axes, arms: Arms) -> None:
    for index, smoothing, results in _drawn(arms):
        for column, name, style in (("train_ce", "train", "-"), ("val_ce", "test", "--")):
            epochs, loss = _mean(arms, results, column)
            label = f"{name}, α = {exact(smoothing)}"
            axes.plot(epochs, loss, color=ARMS[index % len(ARMS)], linestyle=style, label=label)
    axes.set_title("Distillation loss (nats)")
    _finish(axes)


def _draw_errors(axes: Axes, arms: Arms) -> None:
    for index, smoothing, results in _drawn(arms):
        epochs, accuracy = _mean(arms, results, "val_top1")
        top1, top5 = best_accuracies({seed: results[seed] for seed in drawn_seeds(arms)})
        label = f"α = {exact(smoothing)}: {top1:.2f} / {top5:.2f}"
        color, style = ARMS[index % len(ARMS)], STYLES[index % len(STYLES)]
        axes.plot(epochs, 100 - accuracy, color=color, linestyle=style, label=label)
    axes.set_title("Test error (%); best top-1 / top-5 in the legend")
    _finish(axes)


def _drawn(arms: Arms) -> list[tuple[int, float, Mapping[int, Result]]]:
    """Return number, smoothing and runs of the arms that have any, as long as these share a seed."""
    found = [(index, smoothing, runs) for index, (smoothing, runs) in enumerate(arms.items()) if runs]
    return found if drawn_seeds(arms) else []


def _mean(arms: Arms, results: Mapping[int, Result], column: str) -> tuple[Array, Array]:
    curves = [results[seed].curves for seed in drawn_seeds(arms)]
    shortest = min(len(curve["epoch"]) for curve in curves)
    values = np.array([curve[column][:shortest] for curve in curves])
    return curves[0]["epoch"][:shortest] + 1, values.mean(0)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7.5)
