"""The paper's tables in their own rows and columns: measured, printed, and the difference.

A layout takes one study or several. It has every row that the paper prints of the data sets that they cover,
measured or not, and after them what they measured and the paper has not.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lskd_study.base.text import Measured
from lskd_study.pages.paper_table_cells import Cell, Column, Figure, Layout, Line, Measurement, Part, Text
from lskd_study.pages.paper_table_layouts import BUILDERS
from lskd_study.paper.printed import Table, load_tables
from lskd_study.plan.matching import Kind, kinds_of
from lskd_study.plan.plan import exact
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results

Studies = Sequence[Results[ImageResult]]


def papers_layouts(studies: Studies) -> list[Layout]:
    """Return the layout of every table that one of the studies names, with what all who name it measured."""
    named = dict.fromkeys(name for results in studies for name in results.plan.paper)
    return [
        layout_of(name, [results for results in studies if name in results.plan.paper])
        for name in named
        if name in BUILDERS
    ]


def layout_of(name: str, studies: Studies) -> Layout:
    """Return a table of the paper with what the studies measured.

    Raises:
        KeyError: for a table without a layout here.
    """
    paper = load_tables()
    table = paper[name]
    found = measurements(studies, table)
    parts = tuple(BUILDERS[name](paper, table, found))
    named = {entry for part in parts for entry in _errata_of(part)}
    errata = tuple(entry for entry in paper.errata if entry.id in named)
    notes = _notes(parts)
    return Layout(
        name, table.title, name.lower().replace(" ", "").replace(".", ""), parts, "paper", errata, notes
    )


def measurements(studies: Studies, table: Table) -> list[Measurement]:
    """Return what studies measured for a table; of a kind that several have, the first with results."""
    found: dict[tuple[Kind, str], Measurement] = {}
    for results in studies:
        data = Path(results.plan.data).name
        for kind, runs in kinds_of(results.plan, table).items():
            teachers = dict.fromkeys(run.teacher or run.id for run in runs)
            students = [run.id for run in runs if run.role == "student"]
            measured = Measurement(
                kind,
                data,
                tuple(results.finished[name] for name in teachers if name in results.finished),
                tuple(results.finished[name] for name in students if name in results.finished),
                (len(teachers.keys() & results.failed), len(results.failed.keys() & set(students))),
            )
            known = found.get((kind, measured.place))
            if known is None or not (known.teachers or known.students):
                found[kind, measured.place] = measured
    return list(found.values())


def published_layout(results: Results[ImageResult]) -> Layout | None:
    """Return the figures of another publication that the study's file gives, beside the study's own."""
    published = results.plan.published
    if not published:
        return None
    figures = published["figures"]
    varied = any(f["hard_weight"] for f in figures)
    columns = [
        Column("T", "temperature", numbers=True),
        Column("α", "smoothing", numbers=True),
        *([Column("λ", "hard_weight", numbers=True)] if varied else []),
        Column("Acc. (Top-1)", "student_top1", numbers=True),
        Column("Student", "student"),
        Column("Teacher", "teacher"),
    ]
    teachers = dict.fromkeys(run.model for run in results.plan.runs if run.role == "teacher")
    lines = []
    for f in figures:
        teacher = f["teacher"] or next(iter(teachers))
        own = results.students(f["student"], teacher, f["smoothing"], f["temperature"], f["hard_weight"])
        setting = [f["temperature"], f["smoothing"], *([f["hard_weight"]] if varied else [])]
        cells: tuple[Cell, ...] = (
            *(Text(f"{exact(number)}", number) for number in setting),
            Figure(Measured.of([result.top1 for result in own.values()], len(own.failed)), f["top1"]),
            Text(f["student"]),
            Text(teacher),
        )
        lines.append(Line(cells, "published"))
    part = Part("Top-1 accuracy of students", tuple(columns), tuple(lines))
    return Layout(
        "Published figures", published["source"], "published", (part,), "published", (), _notes([part])
    )


def _errata_of(part: Part) -> Iterable[str]:
    yield from part.errata
    for column in part.columns:
        yield from column.errata
    for line in (*part.lines, *((part.foot,) if part.foot else ())):
        for cell in line.cells:
            yield from cell.errata


def _notes(parts: Sequence[Part]) -> tuple[str, ...]:
    lines = [line for part in parts for line in part.lines]
    notes = []
    if any(not line.seeds for line in lines):
        notes.append("A dash for the measured value: not measured here, or not yet.")
    if any(not line.printed for line in lines):
        notes.append("Rows without a figure of the paper are not in its table.")
    return tuple(notes)
