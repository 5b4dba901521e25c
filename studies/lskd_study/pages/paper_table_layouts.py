"""The paper's Tables 2, 3, 4, 6, 7, 8, 9 and the figures printed in Figs. 5 and 6, row by row."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lskd_study.base.text import Measured
from lskd_study.pages.paper_table_cells import Cell, Column, Figure, Line, Measurement, Part, Text
from lskd_study.paper.printed import Paper, Row, Table
from lskd_study.plan.matching import PAPERS_ALPHA, Kind, data_sets, row_of
from lskd_study.plan.plan import exact, rest_of
from lskd_study.results.images import ImageResult


@dataclass(frozen=True)
class _Match:
    """A row of the paper and what was measured for it; one of the two may be missing."""

    paper: Paper
    row: Row | None
    measured: Measurement | None

    @property
    def name(self) -> str:
        """The paper's name of the row; empty for none."""
        return self.row.name if self.row else ""

    @property
    def kind(self) -> Kind:
        assert self.measured is not None
        return self.measured.kind

    @property
    def teacher(self) -> str:
        """The teacher as in the table."""
        if self.row is None:
            return self.kind.teacher
        return str(self.row.values.get("teacher", self.row.values.get("network")))

    @property
    def student(self) -> str:
        """The student as in the table; with temperature and hard weight where the paper has no such row."""
        if self.row is not None:
            return str(self.row["student"])
        setting = f", T = {exact(self.kind.temperature)}" if self.kind.temperature != 1 else ""
        return (
            self.kind.student
            + setting
            + (f", λ = {exact(self.kind.hard_weight)}" if self.kind.hard_weight else "")
        )

    @property
    def alpha(self) -> float:
        """The teacher's smoothing."""
        if self.measured is not None:
            return self.kind.smoothing
        return PAPERS_ALPHA if self.row is not None and self.row["smoothed"] else 0.0

    def of_teachers(self, column: str, k: int = 1) -> Figure:
        """Return the teachers' top-k accuracy and that of a column of the paper."""
        return self._figure(column, 0, k)

    def of_students(self, column: str, k: int = 1) -> Figure:
        """Return the students' top-k accuracy and that of a column of the paper."""
        return self._figure(column, 1, k)

    def _figure(self, column: str, side: int, k: int) -> Figure:
        results: Sequence[ImageResult] = ()
        failed = 0
        if self.measured is not None:
            results = (self.measured.teachers, self.measured.students)[side]
            failed = self.measured.failed[side]
        summary, row = Measured.of([result.topk(k) for result in results], failed), self.row
        if row is None:
            return Figure(summary)
        std = f"{column}_std"
        deviation = row.number(std) if std in row.values else None
        return Figure(summary, row.number(column), deviation, self.paper.errata_of_cell(row, column))


def _matches(paper: Paper, table: Table, rows: Sequence[Row], found: Sequence[Measurement]) -> list[_Match]:
    """Return rows of the paper with what was measured, then what was measured and is in none of them."""
    by_row: dict[str, Measurement] = {}
    others = []
    for m in found:
        row = row_of(paper, table.name, m.kind)
        if row is not None and row in rows and row.name not in by_row:
            by_row[row.name] = m
        else:
            others.append(m)
    printed = [_Match(paper, row, by_row.get(row.name)) for row in rows]
    return printed + [_Match(paper, None, m) for m in others]


def _smoothing(alpha: float) -> Text:
    """The column ``w/ LS``: the paper's cross and tick, with alpha where it is neither 0 nor the paper's."""
    mark = "✓" if alpha else "✗"
    return Text(mark if alpha in (0, PAPERS_ALPHA) else f"{mark} α = {exact(alpha)}", alpha)


def _by_place(table: Table, found: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Return what was measured by data set, in the paper's order; those of one's own come last."""
    seen = dict.fromkeys(m.place for m in found)
    order = [*(name for name in data_sets(table) if name in seen), *seen]
    return {place: [m for m in found if m.place == place] for place in order}


def _printed_rows(table: Table, place: str) -> tuple[Row, ...]:
    if place not in data_sets(table):
        return ()
    return table.where(dataset=place) if "dataset" in table.columns else table.rows


def _k(rows: Sequence[Row]) -> int:
    """The k of the paper's top-k; 5 for a data set of one's own."""
    return int(rows[0].values.get("k", 5) or 5) if rows else 5


def _caption(paper: Paper, place: str) -> str:
    known = {row.name: str(row["property"]) for row in paper["Table 5"].rows}
    return f"{place} ({known[place]})" if place in known else place


def _distillation(paper: Paper, table: Table, found: Sequence[Measurement]) -> Iterable[Part]:
    """Tables 2, 6 and 7: a part for each data set."""
    for place, own in _by_place(table, found).items():
        rows = _printed_rows(table, place)
        k = _k(rows)
        columns = (
            Column("Teacher", "teacher"),
            Column("w/\u00a0LS", "smoothing"),
            Column("Acc. (Top-1)", "teacher_top1", numbers=True),
            Column(f"Acc. (Top-{k})", f"teacher_top{k}", numbers=True),
            Column("Student", "student"),
            Column("Acc. (Top-1)", "student_top1", numbers=True),
            Column(f"Acc. (Top-{k})", f"student_top{k}", numbers=True),
        )
        lines = []
        for match in _matches(paper, table, rows, own):
            cells = (
                Text(match.teacher),
                _smoothing(match.alpha),
                match.of_teachers("teacher_top1"),
                match.of_teachers("teacher_topk", k),
                Text(match.student),
                match.of_students("student_top1"),
                match.of_students("student_topk", k),
            )
            lines.append(Line(cells, match.name))
        errata = paper.errata_of_data_set(table.name, place)
        yield Part(_caption(paper, place), columns, tuple(lines), errata=errata)


def _curves(paper: Paper, table: Table, found: Sequence[Measurement]) -> Iterable[Part]:
    """Figs. 5 and 6: the accuracies printed in them."""
    for place, own in _by_place(table, found).items():
        columns = [
            Column("Teacher", "teacher"),
            Column("Student", "student"),
            Column("w/\u00a0LS", "smoothing"),
            Column("Acc. (Top-1)", "student_top1", numbers=True),
        ]
        top5 = "student_top5" in table.columns
        if top5:
            columns.append(Column("Acc. (Top-5)", "student_top5", numbers=True))
        lines = []
        for match in _matches(paper, table, _printed_rows(table, place), own):
            cells: list[Cell] = [
                Text(match.teacher),
                Text(match.student),
                _smoothing(match.alpha),
                match.of_students("student_top1"),
            ]
            if top5:
                cells.append(match.of_students("student_top5", 5))
            lines.append(Line(tuple(cells), match.name))
        errata = paper.errata_of_data_set(table.name, place)
        yield Part(_caption(paper, place), tuple(columns), tuple(lines), errata=errata)


def _teachers(paper: Paper, table: Table, found: Sequence[Measurement]) -> Iterable[Part]:
    """Tables 3 and 4: a pair of columns for each data set, a row for each network and side."""
    places = _by_place(table, found)
    columns = [Column("Teacher", "teacher"), Column("w/\u00a0LS", "smoothing")]
    by_key: dict[tuple[str, float], dict[str, _Match]] = {}
    for place, own in places.items():
        rows = _printed_rows(table, place)
        for match in _matches(paper, table, rows, own):
            by_key.setdefault((match.teacher, match.alpha), {})[place] = match
        errata = paper.errata_of_data_set(table.name, place)
        name, k = place.lower().replace("-", "_").replace(" ", "_"), _k(rows)
        for kind in (1, k):
            label = f"{place} Acc. (Top-{kind})"
            columns.append(
                Column(label, f"{name}_top{kind}", numbers=True, errata=errata if kind == 1 else ())
            )
    networks = list(dict.fromkeys(network for network, _ in by_key))
    lines = []
    for network, alpha in sorted(by_key, key=lambda key: (networks.index(key[0]), key[1])):
        matches = by_key[network, alpha]
        cells: list[Cell] = [Text(network), _smoothing(alpha)]
        for place in places:
            k = _k(_printed_rows(table, place))
            second = "topk" if "topk" in table.columns else "top5"
            if place in matches:
                cells += [matches[place].of_teachers("top1"), matches[place].of_teachers(second, k)]
            else:
                cells += [Figure(Measured.of([]))] * 2
        lines.append(Line(tuple(cells), next((m.name for m in matches.values() if m.name), "")))
    foot = _averages(paper, list(places), lines) if table.name == "Table 4" else None
    yield Part("", tuple(columns), tuple(lines), foot)


def _averages(paper: Paper, places: Sequence[str], lines: Sequence[Line]) -> Line:
    """Table 4's last row: gains averaged over networks, the paper's two where these were measured."""
    printed = {str(row["dataset"]): row for row in paper["Table 4 (average)"].rows}
    cells: list[Cell] = [Text("Average (↑)"), Text("")]
    for index, place in enumerate(places):
        for position, column in enumerate(("top1_gain", "top5_gain")):
            gains = _gains(lines, 2 + 2 * index + position)
            # A mean over networks has no deviation over seeds that the cells above would give.
            measured = Measured(float(np.mean(gains)), math.nan, 1) if gains else Measured.of([])
            row = printed.get(place)
            gain = row.number(column) if row else None
            errata = paper.errata_of_cell(row, column) if row else ()
            cells.append(Figure(measured, gain, errata=errata, signed=True))
    return Line(tuple(cells), "Average")


def _gains(lines: Sequence[Line], at: int) -> list[float]:
    """Return the gain of each network in one column: of the paper's networks, or, where it has none, of all.

    Nothing as long as one of them is not measured, for an average over others is another quantity.
    """
    sides: dict[str, dict[float, Figure]] = {}
    for line in lines:
        network, alpha, figure = line.cells[0], line.cells[1], line.cells[at]
        assert isinstance(network, Text)
        assert isinstance(alpha, Text)
        assert isinstance(figure, Figure)
        sides.setdefault(network.text, {})[float(alpha.value or 0)] = figure
    pairs = [(both.get(0.0), both.get(PAPERS_ALPHA)) for both in sides.values()]
    in_paper = [pair for pair in pairs if any(figure and figure.paper is not None for figure in pair)]
    chosen = in_paper or pairs
    if any(figure and figure.measured.failed for pair in chosen for figure in pair):
        return []
    gains = [b.measured.mean - a.measured.mean if a and b else math.nan for a, b in chosen]
    return [] if any(math.isnan(gain) for gain in gains) else gains


_GROUPS = {
    "same architecture": "Teacher (same arch)",
    "different architectures": "Teacher (different archs)",
}


def _table_8(paper: Paper, table: Table, found: Sequence[Measurement]) -> Iterable[Part]:
    """Table 8: its halves are parts; a study's other arms follow, as the paper has one arm for each row."""
    for group, caption in _GROUPS.items():
        own = [m for m in found if _group(m.kind) == group]
        if not own:
            continue
        columns = (
            Column("Teacher", "teacher"),
            Column("Acc. (Top-1)", "teacher_top1", numbers=True),
            Column("Student", "student"),
            Column("Acc. (Top-1)", "student_top1", numbers=True),
        )
        printed = [row for row in table.rows if row["group"] == group and any(m.kind.data_set for m in own)]
        lines = []
        for match in _matches(paper, table, printed, own):
            cells = (
                Text(match.name or _teacher_8(match.kind)),
                match.of_teachers("teacher_top1"),
                Text(match.student),
                match.of_students("student_top1"),
            )
            lines.append(Line(cells, match.name))
        yield Part(caption, columns, tuple(lines))


def _group(kind: Kind) -> str:
    same = kind.teacher.partition("+")[0].replace("-", "") == "ResNet50"
    return "same architecture" if same else "different architectures"


def _teacher_8(kind: Kind) -> str:
    side = "without LS" if not kind.smoothing else "with LS"
    if kind.smoothing not in (0, PAPERS_ALPHA):
        side += f", α = {exact(kind.smoothing)}"
    return f"{kind.teacher}, {side}"


def _table_9(paper: Paper, table: Table, found: Sequence[Measurement]) -> Iterable[Part]:
    """Table 9: a row for each ratio of hard to soft labels and side."""
    for place, own in _by_place(table, found).items():
        columns = (
            Column("Ratio (hard label – soft label)", "hard_weight"),
            Column("w/\u00a0LS", "smoothing"),
            Column("Acc. (Top-1)", "student_top1", numbers=True),
            Column("Acc. (Top-5)", "student_top5", numbers=True),
        )
        lines = []
        for match in _matches(paper, table, _printed_rows(table, place), own):
            cells = (
                _ratio(match),
                _smoothing(match.alpha),
                match.of_students("top1"),
                match.of_students("top5", 5),
            )
            lines.append(Line(cells, match.name))
        yield Part(place, columns, tuple(lines))


def _ratio(match: _Match) -> Text:
    row = match.row
    if row is not None:
        errata = match.paper.errata_of_cell(row, "hard_ratio")
        return Text(f"{row['hard_ratio']} – {row['soft_ratio']}", row.number("hard_ratio"), errata)
    kind = match.kind
    text = f"{exact(kind.hard_weight)} – {exact(rest_of(kind.hard_weight))}"
    if (kind.teacher, kind.student) != ("ResNet-50", "ResNet-18"):
        text += f", {kind.teacher} to {kind.student}"
    return Text(
        text + (f", T = {exact(kind.temperature)}" if kind.temperature != 1 else ""), kind.hard_weight
    )


_Builder = Callable[[Paper, Table, Sequence[Measurement]], Iterable[Part]]
BUILDERS: dict[str, _Builder] = {
    "Table 2": _distillation,
    "Table 3": _teachers,
    "Table 4": _teachers,
    "Table 6": _distillation,
    "Table 7": _distillation,
    "Table 8": _table_8,
    "Table 9": _table_9,
    "Fig. 5": _curves,
    "Fig. 6": _curves,
}
