"""What all figures look like: palette, style, SVG in the page's colours, and the files that they become."""

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lskd import LskdError
from lskd.base.files import whole_file
from lskd_study.base.files import check_writable

INK, RULE, SOFT = "#1b1f24", "#d0d4da", "#57606a"
# Okabe & Ito's palette, told apart with any colour vision; line styles repeat the difference.
ARMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "^", "s", "D", "v", "P")
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


@dataclass(frozen=True)
class Drawing:
    """A figure, and CSV texts by the name that is put behind the figure's own (empty: none)."""

    figure: Figure
    tables: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def styled_axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of so many inches and its axes, to be drawn on in the style of all figures."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def note_failed(figure: Figure, failed: int) -> None:
    """Write below a figure how many runs it leaves out because they failed."""
    if failed:
        text = f"not drawn: {failed} run{'s' if failed > 1 else ''} that failed"
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=INK, fontweight="bold")


def short(name: str, limit: int = 22) -> str:
    """Return a name that fits into a figure: ImageNet's list synonyms, the first of which is known best."""
    first = name.partition(",")[0]
    return first if len(first) <= limit else f"{first[: limit - 1]}…"


# The page


def themed_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return SVG for inlining: colours as CSS variables, ids of its own, no fixed size, no fonts named.

    So it follows the page's light or dark scheme; the files beside the page keep fixed colours on white.
    ``name`` begins the ids, ``label`` (HTML) says what is shown.
    """
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
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"'))


def _only_size(match: re.Match[str]) -> str:
    size = re.match(r"font: ([\d.]+px)", match.group())
    return f"font-size: {size.group(1)}" if size else ""


# Files


def figure_stem(output: Path) -> Path:
    """Return what the names of all files begin with: the path, without an ending that is given anyway."""
    return output.with_suffix("") if output.suffix.lower() in (".png", ".svg", ".csv") else output


def check_figure(stem: Path) -> None:
    """Find out before any work whether the figure's files can be written; leave nothing behind.

    Raises:
        LskdError: with what is in the way.
    """
    if not stem.name or os.path.isdir(stem):  # which, unlike Path.is_dir, takes a name of any length
        raise LskdError(f"--output {stem} names a folder; add the beginning of the files' names")
    for ending in ("png", "svg", "csv"):
        check_writable(_file(stem, "", ending))


def write_drawing(drawing: Drawing, stem: Path) -> list[Path]:
    """Write ``stem.png``, ``stem.svg`` and the tables ``stem.csv``, ``stem-NAME.csv``; return their paths.

    Colours are fixed, on white. All files are complete before the first gets its name.

    Raises:
        LskdError: when they cannot be written.
    """
    png, svg = (_file(stem, "", ending) for ending in ("png", "svg"))
    tables = {_file(stem, name, "csv"): text for name, text in drawing.tables.items()}
    for path in (png, svg, *tables):
        check_writable(path)
    with ExitStack() as stack:
        new = {path: stack.enter_context(whole_file(path)) for path in (svg, png, *tables)}
        with mpl.rc_context({**STYLE, "svg.hashsalt": stem.name}):
            drawing.figure.savefig(new[svg], format="svg", facecolor="white", metadata={"Date": None})
            FigureCanvasAgg(drawing.figure)
            drawing.figure.savefig(new[png], format="png", dpi=160, facecolor="white")
        for path, text in tables.items():
            new[path].write_text(text, encoding="utf-8", newline="")
    return [png, svg, *tables]


def _file(stem: Path, name: str, ending: str) -> Path:
    # Not with_suffix: a name may contain a number, and what follows its dot is no suffix.
    return stem.with_name(f"{stem.name}{'-' if name else ''}{name}.{ending}")
