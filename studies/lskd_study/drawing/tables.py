"""Tables of results, from any CSV file: the columns that a figure needs, as text and numbers."""

import math
from collections.abc import Sequence
from pathlib import Path

from lskd import LskdError
from lskd.base.files import read_csv
from lskd_study.base.text import did_you_mean, first_of

Row = dict[str, str]


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read a CSV table that has at least some columns.

    Raises:
        LskdError: for a file that cannot be read, is no table, or has not these columns.
    """
    rows = read_csv(path)
    if not rows:
        raise LskdError(f"{path} has no rows below a header; name a table with results")
    header = list(rows[0])
    for column in columns:
        if column not in header:
            hint = did_you_mean(column, header, f"there are {first_of(header, 12)}")
            raise LskdError(f"{path} has no column {column!r}; {hint}")
    return rows


def table_number(row: Row, column: str, path: Path) -> float | None:
    """Return a cell as a number, ``None`` where it is empty.

    Raises:
        LskdError: for a cell that is no finite number.
    """
    text = row[column].strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LskdError(f"{path}: {text!r} in column {column!r} is no number; fix it or leave it empty")
    return value


def table_flag(row: Row, column: str, path: Path) -> bool | None:
    """Return whether a cell says that there was smoothing: a number above 0, true or yes; None where empty.

    Raises:
        LskdError: for another text.
    """
    text = row[column].strip().lower()
    if text in ("true", "yes"):
        return True
    if text in ("false", "no"):
        return False
    value = table_number(row, column, path)
    return None if value is None else value > 0
