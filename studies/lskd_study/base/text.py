"""Text and numbers as every table, page and file has them."""

import csv
import difflib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation (unbiased, over seeds; NaN for one seed); how many more seeds failed."""

    mean: float
    std: float
    seeds: int
    failed: int = 0

    @classmethod
    def of(cls, values: Sequence[float], failed: int = 0) -> "Measured":
        """Summarise one value per seed."""
        import numpy as np

        if not values:
            return cls(float("nan"), float("nan"), 0, failed)
        std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        return cls(float(np.mean(values)), std, len(values), failed)

    def text(self, digits: int) -> str:
        """Return ``mean ± std`` and how many failed; a dash where there is nothing."""
        if not self.seeds:
            return "failed" if self.failed else "–"
        if math.isnan(self.mean):  # of a seed or more nothing was stored
            return f"–{f', {self.failed} failed' if self.failed else ''}"
        spread = f" ± {self.std:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.mean:.{digits}f}{spread}{f', {self.failed} failed' if self.failed else ''}"


def csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return lines as CSV text, in which no name is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_no_formula(value) for value in line] for line in (header, *lines))
    return text.getvalue()


def _no_formula(value: object) -> object:
    """Return a cell; text that a spreadsheet would run gets an apostrophe in front, numbers stay."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def escaped(text: str) -> str:
    """Return text for Markdown, a table's cell too: one line, no HTML, no markup."""
    plain = html.escape(" ".join(text.splitlines()), quote=False)
    return re.sub(r"([\\`*|\[\]])", r"\\\1", plain)


def cell(number: float) -> str:
    """Return a number for a CSV file; empty for NaN."""
    return "" if math.isnan(number) else f"{number:.8g}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the known name that is most like a name; empty where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a question that names the nearest of the known names; ``otherwise`` where none is near.

    >>> did_you_mean("sedes", ["seeds", "title"]), did_you_mean("x", ["title"], "see the manual")
    ("did you mean 'seeds'?", 'see the manual')
    """
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else otherwise


def first_problem(error: Any) -> str:
    """Return the first thing that a ``pydantic.ValidationError`` names, with its place, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:80]
    return " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())


def storable(name: str) -> bool:
    """Return whether a name is UTF-8 text in one line, as tables and files of keys need it."""
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        return False
    return not {"\n", "\r"} & set(name)


def listed(words: Iterable[object], joined: str = "and") -> str:
    """Return words in a row, each once; there must be one.

    >>> listed([3, 5, 8]), listed(["a", "b"], "or")
    ('3, 5 and 8', 'a or b')
    """
    *most, last = dict.fromkeys(map(str, words))
    return f"{', '.join(most)} {joined} {last}" if most else last


def first_of(names: Iterable[str], limit: int = 5) -> str:
    """Return names for a message, not too many."""
    shown = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def gigabytes(count: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a time in words, to the precision of an estimate.

    >>> [duration(value) for value in (42, 250, 1_500, 5_000, 30_000, 400_000)]
    ['42 s', '4.2 min', '25 min', '1.4 hours', '8.3 hours', '4.6 days']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min" if seconds < 570 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"
