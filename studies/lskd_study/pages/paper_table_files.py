"""A table of the paper as CSV and Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

from lskd.base.files import write_text
from lskd_study.base.text import cell, csv_text, escaped
from lskd_study.pages.paper_table_cells import Figure, Layout, Line, Part, Text


def write_layout(layout: Layout, folder: Path) -> None:
    """Write ``STEM.csv`` and ``STEM.md``.

    Raises:
        LskdError: when the folder cannot be written.
    """
    for name, text in layout_files([layout]).items():
        write_text(folder / name, text)


def layout_files(layouts: Sequence[Layout]) -> dict[str, str]:
    """Return the files of some layouts: text by name."""
    texts = {".csv": layout_csv, ".md": layout_markdown}
    return {f"{layout.stem}{suffix}": text(layout) for layout in layouts for suffix, text in texts.items()}


def layout_csv(layout: Layout) -> str:
    """Return one line per row, in full precision; columns of a part that others have not are empty there.

    Behind each column of numbers stand its deviation over seeds, the printed figure, its deviation, the
    difference (measured minus printed), and entries of the errata.
    """
    columns = dict.fromkeys(column for part in layout.parts for column in part.columns)
    names = {column.name: column for column in columns}  # Table 7 has top-5 and top-3
    header = ["table", "part"]
    for name, column in names.items():
        header.append(name)
        if _of_figures(layout, name):
            parts = ("std", layout.origin, f"{layout.origin}_std", "difference", "errata")
            header += [f"{name}_{part}" for part in parts]
        assert column.name == name
    header += ["seeds", "row"]
    lines: list[list[object]] = []
    for part in layout.parts:
        for line in (*part.lines, *((part.foot,) if part.foot else ())):
            own = dict(zip((column.name for column in part.columns), line.cells, strict=True))
            cells: list[object] = [layout.name, part.caption]
            for name in names:
                cells += _csv_cells(own.get(name), _of_figures(layout, name))
            lines.append([*cells, line.seeds, line.printed])
    return csv_text(header, lines)


def _of_figures(layout: Layout, name: str) -> bool:
    for part in layout.parts:
        for column, own in zip(part.columns, part.lines[0].cells if part.lines else (), strict=False):
            if column.name == name:
                return isinstance(own, Figure)
    return False


def _csv_cells(own: Text | Figure | None, figures: bool) -> list[object]:
    if isinstance(own, Figure):
        paper = [math.nan if number is None else number for number in (own.paper, own.paper_std)]
        numbers = (own.measured.mean, own.measured.std, *paper, own.difference)
        return [*(cell(number) for number in numbers), " ".join(own.errata)]
    if own is None:
        return [""] * (6 if figures else 1)
    return [own.text if own.value is None else own.value]


def layout_markdown(layout: Layout) -> str:
    """Return the parts one below the other; in each cell the measured, the printed, and the difference."""
    lines = [f"**{escaped(layout.name)}**, {escaped(layout.title)}"]
    for part in layout.parts:
        lines += ["", *([f"{escaped(part.caption)}{_entries(part.errata)}", ""] if part.caption else [])]
        lines.append("| " + " | ".join(f"{c.label}{_entries(c.errata)}" for c in part.columns) + " | Seeds |")
        lines.append("|" + "".join("---:|" if c.numbers else "---|" for c in part.columns) + "---:|")
        lines += [_markdown_line(line, layout.origin) for line in _all_lines(part)]
    lines += ["", *(f"{note}" for note in layout.notes)]
    lines += [f"{entry.id}: {entry.says} (docs/errata.md)" for entry in layout.errata]
    return "\n".join(lines).rstrip() + "\n"


def _all_lines(part: Part) -> list[Line]:
    return [*part.lines, *([part.foot] if part.foot else [])]


def _markdown_line(line: Line, origin: str) -> str:
    cells = [escaped(_markdown_cell(cell, origin)) for cell in line.cells]
    return f"| {' | '.join(cells)} | {line.seeds or '–'} |"


def _markdown_cell(own: Text | Figure, origin: str) -> str:
    if isinstance(own, Text):
        return f"{own.text}{_entries(own.errata)}"
    measured = own.measured_text
    if not own.printed:
        return measured
    change = f", {own.difference_text}" if own.measured.seeds else ""
    return f"{measured} ({origin} {own.printed}{change}{';' if own.errata else ''}{_entries(own.errata)})"


def _entries(errata: tuple[str, ...]) -> str:
    return f" {', '.join(errata)}" if errata else ""
