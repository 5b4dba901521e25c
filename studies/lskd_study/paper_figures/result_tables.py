"""Tables of results, from any CSV file: the columns that a figure needs, as text and numbers."""

import csv
import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from lskd import LskdError
from lskd_study.paper_figures.drawing import listed

Row = dict[str, str]


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read a CSV table that has at least some columns.

    Raises:
        LskdError: for a file that cannot be read, is no table, or has not these columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except OSError as error:
        raise LskdError(f"cannot read {path} ({error.strerror}); name a CSV table") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LskdError(f"{path} is no CSV table ({error}); name one in UTF-8 with a header") from error
    for column in columns:
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {listed(header, 12)}"
            raise LskdError(f"{path} has no column {column!r}; {hint}")
    if not rows:
        raise LskdError(f"{path} has a header and no rows; name a table with results")
    for index, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise LskdError(f"{path}: row {index} has not as many cells as the header; mend the table")
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
        raise LskdError(f"{path}: {text!r} in column {column!r} is no number; mend it or leave it empty")
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
