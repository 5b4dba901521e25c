"""Fig. 3: what smoothing does to the binary logistic loss."""

import math
from collections.abc import Sequence

import torch

from lskd import Convention
from lskd.analysis.logistic import smoothed_logistic_loss, smoothed_logistic_minimum
from lskd_study.base.extras import needs_study_extra
from lskd_study.base.text import csv_text
from lskd_study.drawing.drawing import Drawing, number
from lskd_study.drawing.style import ARMS, INK, STYLE, STYLES
from lskd_study.plan.plan import exact

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.figure import Figure

_POINTS = 401


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
        [number(float(m)), *(number(float(x)) for x in row)] for m, *row in zip(margins, *losses, strict=True)
    ]
    least = [[exact(alpha), number(m), number(x)] for alpha, (m, x) in zip(alphas, minima, strict=True)]
    tables = {"": csv_text(header, curves), "minima": csv_text(["alpha", "margin", "loss"], least)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
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
