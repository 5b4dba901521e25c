"""The paper's tables in their own rows and columns: measured, printed, and the difference.

Which columns a table has, and what is measured for each, says ``layout`` in ``paper/tables.yaml``. A table
takes one study or several. It has every row that the paper prints of the data sets that they cover, measured
or not, and after them what they measured and the paper has not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lskd_study.base.text import Measured, cell, csv_text, escaped
from lskd_study.paper.printed import Erratum, LayoutColumn, Row, Table, load_tables
from lskd_study.plan.matching import PAPERS_ALPHA, RowKey, data_sets, row_of, runs_by_row
from lskd_study.plan.plan import exact, rest_of
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results, kind_of_run

Studies = Sequence[Results[ImageResult]]


# What a table consists of


@dataclass(frozen=True)
class Text:
    """A cell of words: as shown, and its value for a CSV where that differs."""

    text: str
    value: str | float | None = None
    errata: tuple[str, ...] = ()

    def csv(self, name: str, origin: str) -> Mapping[str, object]:
        """Return the cell of a CSV by its column."""
        return {name: self.text if self.value is None else self.value}

    def markdown(self, origin: str) -> str:
        """Return the cell with the entries of the errata."""
        return f"{self.text}{_entries(self.errata)}"


@dataclass(frozen=True)
class Accuracy:
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

    def csv(self, name: str, origin: str) -> Mapping[str, object]:
        """Return the cells of a CSV: mean, deviation, printed figure, its deviation, difference, errata."""
        paper, paper_std = (math.nan if number is None else number for number in (self.paper, self.paper_std))
        numbers = {
            name: self.measured.mean,
            f"{name}_std": self.measured.std,
            f"{name}_{origin}": paper,
            f"{name}_{origin}_std": paper_std,
            f"{name}_difference": self.difference,
        }
        cells = {key: cell(number) for key, number in numbers.items()}
        return cells | {f"{name}_errata": " ".join(self.errata)}

    def markdown(self, origin: str) -> str:
        """Return the measured, the printed, and the difference."""
        if not self.printed:
            return self.measured_text
        change = f", {self.difference_text}" if self.measured.seeds else ""
        errata = f"{';' if self.errata else ''}{_entries(self.errata)}"
        return f"{self.measured_text} ({origin} {self.printed}{change}{errata})"


Cell = Text | Accuracy


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it is called in a CSV, and whether it has numbers."""

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
    def accuracies(self) -> list[Accuracy]:
        """The cells of numbers."""
        return [own for own in self.cells if isinstance(own, Accuracy)]

    @property
    def seeds(self) -> int:
        """The seeds of the cell that has the most."""
        return max((own.measured.seeds for own in self.accuracies), default=0)


@dataclass(frozen=True)
class Part:
    """One of the tables that a table of the paper consists of, with a last line that is none of its rows."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: Line | None = None
    errata: tuple[str, ...] = ()

    @property
    def all_lines(self) -> tuple[Line, ...]:
        """The rows and the last line."""
        return (*self.lines, self.foot) if self.foot else self.lines


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or figures of another publication, beside what was measured.

    Attributes:
        name: in the paper, or the heading.
        title: what it shows.
        stem: of its files.
        parts: the tables.
        origin: what stands before a printed figure.
    """

    name: str
    title: str
    stem: str
    parts: tuple[Part, ...]
    origin: str = "paper"

    @property
    def errata(self) -> list[Erratum]:
        """The entries that its cells name."""
        named = {
            entry
            for part in self.parts
            for own in (part, *part.columns, *(one for line in part.all_lines for one in line.cells))
            for entry in own.errata
        }
        return [entry for entry in load_tables().errata if entry.id in named]

    @property
    def notes(self) -> list[str]:
        """Sentences below it."""
        lines = [line for part in self.parts for line in part.lines]
        notes = {
            "A dash for the measured value: not measured here, or not yet.": any(not x.seeds for x in lines),
            "Rows without a figure of the paper are not in its table.": any(not x.printed for x in lines),
        }
        return [note for note, needed in notes.items() if needed]

    def files(self) -> dict[str, str]:
        """Return its files: text by name."""
        return {f"{self.stem}.csv": self.csv(), f"{self.stem}.md": self.markdown()}

    def csv(self) -> str:
        """Return one line per row, in full precision; columns that a part has not are empty there."""
        lines = []
        for part in self.parts:
            for line in part.all_lines:
                own: dict[str, object] = {"table": self.name, "part": part.caption}
                for column, one in zip(part.columns, line.cells, strict=True):
                    own |= one.csv(column.name, self.origin)
                lines.append((own, line))
        names = dict.fromkeys(name for own, _ in lines for name in own)  # Table 7 has top-5 and top-3
        return csv_text(
            [*names, "seeds", "row"],
            [[*(own.get(name, "") for name in names), line.seeds, line.printed] for own, line in lines],
        )

    def markdown(self) -> str:
        """Return the parts one below the other; in each cell measured, printed, and the difference."""
        lines = [f"**{escaped(self.name)}**, {escaped(self.title)}"]
        for part in self.parts:
            lines += ["", *([f"{escaped(part.caption)}{_entries(part.errata)}", ""] if part.caption else [])]
            heads = [f"{column.label}{_entries(column.errata)}" for column in part.columns]
            lines.append(f"| {' | '.join(heads)} | Seeds |")
            lines.append("|" + "".join("---:|" if c.numbers else "---|" for c in part.columns) + "---:|")
            for line in part.all_lines:
                cells = [escaped(own.markdown(self.origin)) for own in line.cells]
                lines.append(f"| {' | '.join(cells)} | {line.seeds or '–'} |")
        lines += ["", *self.notes]
        lines += [f"{entry.id}: {entry.says} (docs/errata.md)" for entry in self.errata]
        return "\n".join(lines).rstrip() + "\n"


def _entries(errata: tuple[str, ...]) -> str:
    return f" {', '.join(errata)}" if errata else ""


# What was measured


@dataclass(frozen=True)
class Measurement:
    """What was measured of one kind: a result for each seed.

    ``place``: the data set's name, or that of the folder; ``results``: of the teachers and of the students;
    ``failed``: how many more seeds of them failed.
    """

    kind: RowKey
    place: str
    results: dict[str, list[ImageResult]]
    failed: dict[str, int]


def measurements(studies: Studies, table: Table) -> list[Measurement]:
    """Return what studies measured for a table; of a kind that several have, the first with results."""
    found: dict[tuple[RowKey, str], Measurement] = {}
    for results in studies:
        plan = results.plan
        for kind, runs in runs_by_row(plan, table).items():
            place = kind.data_set or Path(plan.data).name
            known = found.get((kind, place))
            if known is None or not any(known.results.values()):
                kinds = dict.fromkeys(kind_of_run(plan, run) for run in runs)
                own = {
                    "teacher": dict.fromkeys(one if len(one) == 2 else one[1:3] for one in kinds),
                    "student": [one for one in kinds if len(one) > 2],
                }
                by_seed = {role: [results.by_kind[one] for one in those] for role, those in own.items()}
                measured = {
                    role: [r for one in those for r in one.values()] for role, those in by_seed.items()
                }
                failed = {role: sum(one.failed_seeds for one in those) for role, those in by_seed.items()}
                found[kind, place] = Measurement(kind, place, measured, failed)
    return list(found.values())


def _matches(
    table: Table, rows: Sequence[Row], found: Sequence[Measurement]
) -> list[tuple[Row | None, Measurement | None]]:
    """Return rows of the paper with what was measured, then what was measured and is in none of them."""
    by_row: dict[str, Measurement] = {}
    others = []
    for m in found:
        row = row_of(load_tables(), table.name, m.kind)
        if row is not None and row in rows and row.name not in by_row:
            by_row[row.name] = m
        else:
            others.append(m)
    return [*((row, by_row.get(row.name)) for row in rows), *((None, m) for m in others)]


def _cell(column: LayoutColumn, row: Row | None, measured: Measurement | None, k: int) -> Cell:
    """Return what a column shows of a row and what was measured for it, one of which may be missing.

    ``k`` is that of the data set's top-k.
    """
    role, _, rank = column.shows.partition(" top-")
    if rank:
        return _accuracy(column.printed, row, measured, role, k if rank == "k" else int(rank))
    if role == "smoothing":  # the paper's cross or tick, with alpha where it is neither 0 nor the paper's
        alpha = measured.kind.smoothing if measured else PAPERS_ALPHA * bool(row and row["smoothed"])
        mark = "✓" if alpha else "✗"
        return Text(mark if alpha in (0, PAPERS_ALPHA) else f"{mark} α = {exact(alpha)}", alpha)
    if row is None:
        assert measured is not None
        return _unprinted(role, measured.kind)
    if role == "ratio":
        errata = load_tables().errata_of_cell(row, "hard_ratio")
        return Text(f"{row['hard_ratio']} – {row['soft_ratio']}", row.number("hard_ratio"), errata)
    return Text(str(row[column.printed]) if column.printed else row.name)


def _accuracy(column: str, row: Row | None, measured: Measurement | None, role: str, k: int) -> Accuracy:
    """Return the top-k accuracy of teachers or students and that of a column of the paper."""
    results, failed = (measured.results[role], measured.failed[role]) if measured else ([], 0)
    summary = Measured.of([result.value(f"top{k}") for result in results], failed)
    if row is None:
        return Accuracy(summary)
    std = f"{column}_std"
    deviation = row.number(std) if std in row.values else None
    return Accuracy(summary, row.number(column), deviation, load_tables().errata_of_cell(row, column))


def _unprinted(shows: str, kind: RowKey) -> Text:
    """Return what names a kind of run that the paper has no row for, with what sets it apart."""
    temperature = f", T = {exact(kind.temperature)}" if kind.temperature != 1 else ""
    if shows == "teacher":
        return Text(kind.teacher)
    if shows == "student":
        hard = f", λ = {exact(kind.hard_weight)}" if kind.hard_weight else ""
        return Text(f"{kind.student}{temperature}{hard}")
    if shows == "row":
        alpha = kind.smoothing
        other = f", α = {exact(alpha)}" if alpha not in (0, PAPERS_ALPHA) else ""
        return Text(f"{kind.teacher}, with{'' if alpha else 'out'} LS{other}")
    text = f"{exact(kind.hard_weight)} – {exact(rest_of(kind.hard_weight))}"
    if (kind.teacher, kind.student) != ("ResNet-50", "ResNet-18"):
        text += f", {kind.teacher} to {kind.student}"
    return Text(text + temperature, kind.hard_weight)


# Tables


def papers_tables(studies: Studies) -> list[PaperTable]:
    """Return every table that one of the studies names, with what all who name it measured."""
    named = dict.fromkeys(name for results in studies for name in results.plan.paper)
    return [
        paper_table(name, [results for results in studies if name in results.plan.paper])
        for name in named
        if load_tables()[name].layout
    ]


def paper_table(name: str, studies: Studies) -> PaperTable:
    """Return a table of the paper with what the studies measured.

    Raises:
        KeyError: for a table that the paper does not have.
    """
    table = load_tables()[name]
    parts = list(_parts(table, measurements(studies, table)))
    if table.side_by_side and parts:
        parts = [_beside(table, parts)]
    return PaperTable(name, table.title, name.lower().replace(" ", "").replace(".", ""), tuple(parts))


def _parts(table: Table, found: Sequence[Measurement]) -> Iterator[Part]:
    """Yield a part for each data set, or half of the table, that something was measured for."""
    paper, by_data_set = load_tables(), "dataset" in table.columns
    for half, caption in table.halves.items():
        if own := [m for m in found if half == _half(m.kind)]:
            # A study's other arms follow, as the paper has one arm for each row.
            rows = table.where(group=half) if any(m.kind.data_set for m in own) else ()
            yield _part(caption, table, rows, own)
    if not table.halves:
        kinds = {row.name: row["property"] for row in paper["Table 5"].rows}
        papers = data_sets(table)
        for place in dict.fromkeys((*papers, *(m.place for m in found))):  # those of one's own come last
            if own := [m for m in found if m.place == place]:
                of_place = table.where(dataset=place) if by_data_set else table.rows
                named = place in kinds and by_data_set and not table.side_by_side
                caption = f"{place} ({kinds[place]})" if named else place
                part = _part(caption, table, of_place if place in papers else (), own)
                yield replace(part, errata=paper.errata_of_data_set(table.name, place))


def _half(kind: RowKey) -> str:
    same = kind.teacher.partition("+")[0].replace("-", "") == "ResNet50"
    return "same architecture" if same else "different architectures"


def _part(caption: str, table: Table, rows: Sequence[Row], found: Sequence[Measurement]) -> Part:
    k = int(rows[0].values.get("k", 5) or 5) if rows else 5  # of the paper's top-k; 5 for data of one's own
    columns = tuple(
        Column(c.heading.format(k=k), c.name.format(k=k), numbers=" top-" in c.shows) for c in table.layout
    )
    lines = tuple(
        Line(tuple(_cell(column, row, own, k) for column in table.layout), row.name if row else "")
        for row, own in _matches(table, rows, found)
    )
    return Part(caption, columns, lines)


def _beside(table: Table, parts: Sequence[Part]) -> Part:
    """Return data sets side by side: a pair of columns for each, a row for each network and smoothing."""
    columns = list(parts[0].columns[:2])
    by_key: dict[tuple[Cell, ...], dict[str, Line]] = {}
    for part in parts:
        name = part.caption.lower().replace("-", "_").replace(" ", "_")
        for index, column in enumerate(part.columns[2:]):
            label, errata = f"{part.caption} {column.label}", () if index else part.errata
            columns.append(replace(column, label=label, name=f"{name}_{column.name}", errata=errata))
        for line in part.lines:
            by_key.setdefault(line.cells[:2], {})[part.caption] = line
    nothing = Accuracy(Measured.of([]))
    networks = list(dict.fromkeys(network for network, _ in by_key))
    lines = []
    for key in sorted(by_key, key=lambda key: (networks.index(key[0]), _value(key[1]))):
        own = by_key[key]
        cells = [own[p.caption].cells[2:] if p.caption in own else (nothing, nothing) for p in parts]
        printed = next((line.printed for line in own.values() if line.printed), "")
        lines.append(Line((*key, *(one for pair in cells for one in pair)), printed))
    foot = _averages([part.caption for part in parts], lines) if table.name == "Table 4" else None
    return Part("", tuple(columns), tuple(lines), foot)


def _value(smoothing: Cell) -> float:
    assert isinstance(smoothing, Text)
    return float(smoothing.value or 0)


def _averages(places: Sequence[str], lines: Sequence[Line]) -> Line:
    """Table 4's last row: gains averaged over networks, the paper's two where these were measured."""
    paper = load_tables()
    printed = {str(row["dataset"]): row for row in paper["Table 4 (average)"].rows}
    cells: list[Cell] = [Text("Average (↑)"), Text("")]
    for index, place in enumerate(places):
        for position, column in enumerate(("top1_gain", "top5_gain")):
            gains = _gains(lines, 2 * index + position)
            # A mean over networks has no deviation over seeds that the cells above would give.
            measured = Measured(float(np.mean(gains)), math.nan, 1) if gains else Measured.of([])
            row = printed.get(place)
            gain = row.number(column) if row else None
            errata = paper.errata_of_cell(row, column) if row else ()
            cells.append(Accuracy(measured, gain, errata=errata, signed=True))
    return Line(tuple(cells), "Average")


def _gains(lines: Sequence[Line], at: int) -> list[float]:
    """Return the gain of each network in one column: of the paper's networks, or, where it has none, of all.

    Nothing as long as one of them is not measured, for an average over others is another quantity.
    """
    sides: dict[Cell, dict[float, Accuracy]] = {}
    for line in lines:
        sides.setdefault(line.cells[0], {})[_value(line.cells[1])] = line.accuracies[at]
    pairs = [(both.get(0.0), both.get(PAPERS_ALPHA)) for both in sides.values()]
    in_paper = [pair for pair in pairs if any(own and own.paper is not None for own in pair)]
    chosen = in_paper or pairs
    if any(own and own.measured.failed for pair in chosen for own in pair):
        return []
    gains = [b.measured.mean - a.measured.mean if a and b else math.nan for a, b in chosen]
    return [] if any(math.isnan(gain) for gain in gains) else gains


def published_table(results: Results[ImageResult]) -> PaperTable | None:
    """Return the figures of another publication that the study's file gives, beside the study's own."""
    published = results.plan.published
    if not published:
        return None
    figures = published["figures"]
    settings = {"T": "temperature", "α": "smoothing", "λ": "hard_weight"}
    if not any(f["hard_weight"] for f in figures):
        del settings["λ"]
    columns = (
        *(Column(symbol, name, numbers=True) for symbol, name in settings.items()),
        Column("Acc. (Top-1)", "student_top1", numbers=True),
        Column("Student", "student"),
        Column("Teacher", "teacher"),
    )
    first = next(run.model for run in results.plan.runs if run.role == "teacher")
    lines = []
    for f in figures:
        teacher = f["teacher"] or first
        own = results.students(f["student"], teacher, f["smoothing"], f["temperature"], f["hard_weight"])
        measured = Measured.of([result.top1 for result in own.values()], own.failed_seeds)
        cells: tuple[Cell, ...] = (
            *(Text(exact(f[name]), f[name]) for name in settings.values()),
            Accuracy(measured, f["top1"]),
            Text(f["student"]),
            Text(teacher),
        )
        lines.append(Line(cells, "published"))
    part = Part("Top-1 accuracy of students", columns, tuple(lines))
    return PaperTable("Published figures", published["source"], "published", (part,), "published")
