"""The numbers that the paper prints, each with its table and row, and where they contradict each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Table:
    """A table, figure or section of the paper that prints numbers.

    Attributes:
        name: as in the paper.
        title: what it shows.
        columns: the meaning and unit of each column.
        rows: in the paper's order.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]

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
class Inconsistency:
    """A place where the paper contradicts itself.

    Attributes:
        id: the check that finds it, and the place.
        found: what is printed there, and what it contradicts.
        errata: the entry of ``docs/errata.md``.
    """

    id: str
    found: str
    errata: str


@dataclass(frozen=True)
class Paper:
    """All tables by name, and the known inconsistencies."""

    tables: Mapping[str, Table]
    known_inconsistencies: tuple[Inconsistency, ...]

    def __getitem__(self, table: str) -> Table:
        """Return a table by its name in the paper; ``KeyError`` where there is none."""
        return self.tables[table]


def load_tables() -> Paper:
    """Read ``tables.yaml``, the paper's numbers as printed.

    Raises:
        ValueError: for a row that does not fit its table's columns, or a name that occurs twice.

    >>> load_tables()["Table 1"].row("ResNet-18").number("instability_without")
    0.3359
    """
    content = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
    tables = {name: _table(name, table) for name, table in content["tables"].items()}
    known = tuple(Inconsistency(**entry) for entry in content["known_inconsistencies"])
    return Paper(tables, known)


def _table(name: str, content: dict[str, Any]) -> Table:
    columns = dict(content["columns"])
    about = content.get("about", {})
    rows = tuple(
        Row(
            name,
            row_name,
            dict(zip(columns, cells, strict=True)),
            frozenset(about.get(row_name, ())),
        )
        for row_name, *cells in content["rows"]
    )
    names = {row.name for row in rows}
    if len(names) < len(rows) or not names.issuperset(about):
        raise ValueError(f"{name}: a row's name occurs twice, or `about` names a row that is not there")
    return Table(name, content["title"], columns, rows)
