"""A figure with the numbers behind it, and the files it becomes."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lskd import LskdError
from lskd_study.base.extras import needs_study_extra
from lskd_study.drawing.style import save

with needs_study_extra():
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure, and CSV texts by the name that is put behind the figure's own (empty: none)."""

    figure: Figure
    tables: Mapping[str, str]


def figure_stem(output: Path) -> Path:
    """Return what the names of all files begin with: the path, without an ending that is given anyway."""
    return output.with_suffix("") if output.suffix.lower() in (".png", ".svg", ".csv") else output


def check_writable(stem: Path) -> None:
    """Find out before any work whether the figure's files can be written; leave nothing behind.

    Raises:
        LskdError: saying what is in the way.
    """
    if not stem.name or stem.is_dir():
        raise LskdError(f"--output {stem} names a folder; add the beginning of the files' names")
    folder = stem.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise LskdError(f"cannot write {stem}: {folder} is no folder; choose another --output")
    _refuse_folders(_file(stem, "", ending) for ending in ("png", "svg", "csv"))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LskdError(f"cannot write {stem} ({error.strerror}); choose another --output") from error


def write_drawing(drawing: Drawing, stem: Path) -> list[Path]:
    """Write ``stem.png``, ``stem.svg`` and the tables ``stem.csv``, ``stem-NAME.csv``; return their paths.

    All files are complete before the first gets its name.

    Raises:
        LskdError: when they cannot be written.
    """
    figures = [_file(stem, "", ending) for ending in ("png", "svg")]
    tables = {_file(stem, name, "csv"): text for name, text in drawing.tables.items()}
    _refuse_folders([*figures, *tables])
    save(drawing.figure, stem, tables)
    return [*figures, *tables]


def _refuse_folders(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise LskdError(f"cannot write {path}: it is a folder; choose another --output")


def number(value: float) -> str:
    """Return a number for a CSV: 8 digits, empty where there is none."""
    return "" if value != value else f"{value:.8g}"


def short(name: str, limit: int = 22) -> str:
    """Return a name that fits into a figure: ImageNet's list synonyms, the first of which is known best."""
    first = name.partition(",")[0]
    return first if len(first) <= limit else f"{first[: limit - 1]}…"


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return names for an error, not too many."""
    shown: Sequence[str] = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _file(stem: Path, name: str, ending: str) -> Path:
    return stem.with_name(f"{stem.name}{'-' if name else ''}{name}.{ending}")
