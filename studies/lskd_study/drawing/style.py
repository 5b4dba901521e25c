"""What all figures look like: palette, style, and how they are written."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lskd.base.files import whole_file
from lskd_study.base.extras import needs_study_extra

with needs_study_extra():
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

INK, RULE, SOFT = "#1b1f24", "#d0d4da", "#57606a"
# Okabe & Ito's palette, told apart with any colour vision; line styles repeat the difference.
ARMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
# rcParams are typed by a list of all their names; these are plain settings.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # names are anybody's, and none of our texts is a formula
}


def note_failed(figure: Figure, failed: int) -> None:
    """Say below a figure how many runs it leaves out because they failed."""
    if failed:
        text = f"not drawn: {failed} run{'s' if failed > 1 else ''} that failed"
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=INK, fontweight="bold")


def save(figure: Figure, stem: Path, tables: Mapping[Path, str] | None = None) -> None:
    """Write ``stem.svg`` and ``stem.png`` (fixed colours on white), and texts that belong to them.

    All are complete before the first gets its name.

    Raises:
        LskdError: when they cannot be written.
    """
    # Not with_suffix: a name may hold a number, and what follows its dot is no suffix.
    svg, png = (stem.with_name(f"{stem.name}.{ending}") for ending in ("svg", "png"))
    with ExitStack() as stack:
        new = {path: stack.enter_context(whole_file(path)) for path in (svg, png, *(tables or {}))}
        with mpl.rc_context({**STYLE, "svg.hashsalt": stem.name}):
            figure.savefig(new[svg], format="svg", facecolor="white", metadata={"Date": None})
            FigureCanvasAgg(figure)
            figure.savefig(new[png], format="png", dpi=160, facecolor="white")
        for path, text in (tables or {}).items():
            new[path].write_text(text, encoding="utf-8", newline="")
