"""What a table of the paper consists of when measured figures stand beside the printed ones."""

import math
from dataclasses import dataclass

from lskd_study.base.text import Measured
from lskd_study.paper.printed import Erratum
from lskd_study.plan.matching import Kind
from lskd_study.results.images import ImageResult


@dataclass(frozen=True)
class Text:
    """A cell of words: as shown, and its value for a CSV where that differs."""

    text: str
    value: str | float | None = None
    errata: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A cell of numbers: measured, printed (None: nothing) with its deviation, entries of the errata."""

    measured: Measured
    paper: float | None = None
    paper_std: float | None = None
    errata: tuple[str, ...] = ()
    signed: bool = False

    @property
    def difference(self) -> float:
        """Measured minus printed; NaN where one is missing."""
        return math.nan if self.paper is None else self.measured.mean - self.paper

    @property
    def measured_text(self) -> str:
        """Mean ± deviation, three decimals as in the paper; a dash where there is nothing."""
        text = self.measured.text(3)
        return f"{'+' if self.signed and self.measured.mean > 0 else ''}{text}".replace("-", "−")

    @property
    def difference_text(self) -> str:
        """The difference with its sign; empty where there is none."""
        return "" if math.isnan(self.difference) else f"{self.difference:+.3f}".replace("-", "−")

    @property
    def printed(self) -> str:
        """As in the paper; empty where it has nothing."""
        if self.paper is None:
            return ""
        spread = "" if self.paper_std is None else f" ± {self.paper_std:.3f}"
        return f"{self.paper:{'+' if self.signed else ''}.3f}{spread}".replace("-", "−")


Cell = Text | Figure


@dataclass(frozen=True)
class Column:
    """A column: its heading, and what it is called in a CSV."""

    label: str
    name: str
    numbers: bool = False
    errata: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A row; ``printed`` is the paper's name of it in ``tables.yaml``, empty where it has none."""

    cells: tuple[Cell, ...]
    printed: str = ""

    @property
    def figures(self) -> list[Figure]:
        """The cells of numbers."""
        return [cell for cell in self.cells if isinstance(cell, Figure)]

    @property
    def seeds(self) -> int:
        """The seeds of the cell that has the most."""
        return max((figure.measured.seeds for figure in self.figures), default=0)


@dataclass(frozen=True)
class Part:
    """One of the tables that a table of the paper consists of, with a last line that is none of its rows."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: Line | None = None
    errata: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A table of the paper, or figures of another publication, beside what was measured.

    Attributes:
        name: in the paper, or the heading.
        title: what it shows.
        stem: of its files.
        parts: the tables.
        origin: what stands before a printed figure.
        errata: the entries that its cells name.
        notes: sentences below it.
    """

    name: str
    title: str
    stem: str
    parts: tuple[Part, ...]
    origin: str = "paper"
    errata: tuple[Erratum, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What was measured of one kind: a result for each seed; ``data`` is the folder's name.

    ``failed``: how many more teachers, and how many more students, failed.
    """

    kind: Kind
    data: str
    teachers: tuple[ImageResult, ...]
    students: tuple[ImageResult, ...]
    failed: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        """The data set's name, or that of the folder."""
        return self.kind.data_set or self.data
