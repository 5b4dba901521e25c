"""The numbers that the paper prints, each with its table and row, and what the errata say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Value = bool | int | float | str | None
"""A cell: a number, a name, a flag, or ``None`` where the paper prints nothing or a dash."""


@dataclass(frozen=True)
class Row:
    """One printed row, or its part about one data set.

    Attributes:
        table: ``"Table 1"``, ``"Fig. 5"``, ``"Appendix A"``.
        name: the row's name, unique in its table.
        values: a cell for each column of the table.
        about: columns that the paper prints with a tilde.
    """

    table: str
    name: str
    values: Mapping[str, Value]
    about: frozenset[str] = frozenset()

    @property
    def place(self) -> str:
        """Where the row stands in the paper, for a report."""
        return f"{self.table}, {self.name}"

    def __getitem__(self, column: str) -> Value:
        """Return the cell of a column; ``KeyError`` for a column that the table does not have."""
        return self.values[column]

    def number(self, column: str) -> float | None:
        """Return a numeric cell, ``None`` where the paper prints a dash.

        Raises:
            KeyError: for a column that the table does not have.
            TypeError: for a cell that is not a number.
        """
        value = self.values[column]
        if isinstance(value, (bool, str)):
            raise TypeError(f"{self.place}: {column} is {value!r}, not a number")
        return None if value is None else float(value)


class LayoutColumn(NamedTuple):
    """A column of a table that has measured figures beside the printed ones.

    ``shows``: ``teacher``, ``student``, ``row`` (the row's name), ``smoothing``, ``ratio``; or an accuracy,
    ``teacher top-1``; ``printed``: the column it is printed in. ``top-k`` and ``{k}`` in heading and name (of
    a CSV's column) are the data set's own k.
    """

    heading: str
    name: str
    shows: str
    printed: str = ""


@dataclass(frozen=True)
class Table:
    """A table, figure or section of the paper that prints numbers.

    Attributes:
        name: as in the paper.
        title: what it shows.
        columns: the meaning and unit of each column.
        rows: in the paper's order.
        layout: its columns where studies show it; empty where they do not.
        side_by_side: whether the data sets are columns, not parts.
        halves: headings of the parts by ``group``, where the parts are not data sets.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    layout: tuple[LayoutColumn, ...] = ()
    side_by_side: bool = False
    halves: Mapping[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Return the row of that name; ``KeyError`` where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.name} has no row {name!r}")

    def where(self, **cells: Value) -> tuple[Row, ...]:
        """Return the rows whose cells equal all those given."""
        return tuple(row for row in self.rows if all(row[column] == cell for column, cell in cells.items()))


@dataclass(frozen=True)
class Erratum:
    """An entry of ``docs/errata.md`` and the cells that it is about.

    Attributes:
        id: the entry's, ``"E16"``.
        says: of these cells, in short.
        data_sets: by table, data sets whose every cell it is about.
        cells: table, names of rows, and columns.
    """

    id: str
    says: str
    data_sets: Mapping[str, Sequence[str]]
    cells: tuple[tuple[str, frozenset[str], frozenset[str]], ...]


@dataclass(frozen=True)
class Paper:
    """All tables by name, and what the errata say of cells."""

    tables: Mapping[str, Table]
    errata: tuple[Erratum, ...] = ()

    def __getitem__(self, table: str) -> Table:
        """Return a table by its name in the paper; ``KeyError`` where there is none."""
        return self.tables[table]

    def errata_of_cell(self, row: Row, column: str) -> tuple[str, ...]:
        """Return the entries about one cell alone, not its whole data set."""
        return tuple(
            entry.id
            for entry in self.errata
            if any(row.table == t and row.name in names and column in cs for t, names, cs in entry.cells)
        )

    def errata_of_data_set(self, table: str, data_set: str) -> tuple[str, ...]:
        """Return the entries about every cell of a data set in a table."""
        return tuple(entry.id for entry in self.errata if data_set in entry.data_sets.get(table, ()))


@cache
def load_tables() -> Paper:
    """Read ``tables.yaml``, the paper's numbers as printed.

    Raises:
        ValueError: for a row that does not fit its table's columns, or a name that occurs twice.

    >>> load_tables()["Table 1"].row("ResNet-18").number("instability_without")
    0.3359
    """
    content = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
    return Paper(
        {name: _table(name, **table) for name, table in content["tables"].items()},
        tuple(_erratum(entry_id, **entry) for entry_id, entry in content["errata"].items()),
    )


def _table(
    name: str, title: str, columns: Any, rows: Any, about: Any = (), layout: Any = (), **more: Any
) -> Table:
    columns, about = dict(columns), dict(about)
    read = tuple(
        Row(name, row_name, dict(zip(columns, cells, strict=True)), frozenset(about.get(row_name, ())))
        for row_name, *cells in rows
    )
    names = {row.name for row in read}
    if len(names) < len(read) or not names.issuperset(about):
        raise ValueError(f"{name}: a row's name occurs twice, or `about` names a row that is not there")
    return Table(name, title, columns, read, tuple(LayoutColumn(*column) for column in layout), **more)


def _erratum(entry_id: str, says: str, data_sets: Any = (), cells: Any = ()) -> Erratum:
    about = tuple((table, frozenset(rows), frozenset(columns)) for table, rows, columns in cells)
    return Erratum(entry_id, says, dict(data_sets), about)
