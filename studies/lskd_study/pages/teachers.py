"""The page of a list of teachers: one self-contained HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass

from lskd_study.base import provenance
from lskd_study.claims import Finding, number_of_tests
from lskd_study.pages.claims_table import claim_sections
from lskd_study.pages.commands import Commands
from lskd_study.pages.notices import Notice
from lskd_study.pages.page import MARKS, environment, machine_text
from lskd_study.pages.paper_figures import PageFigure
from lskd_study.pages.paper_table_cells import Layout
from lskd_study.pages.teachers_paper_tables import StabilityTable
from lskd_study.plan.teacher_list import TeacherList
from lskd_study.teachers import report as render
from lskd_study.teachers.compare import Comparison


@dataclass(frozen=True)
class OfStudy:
    """What a study adds to the page of its teachers; a list of teachers alone adds nothing.

    ``layouts``: further tables of the paper, which come first; ``drawn``: its figures; ``findings``: the
    verdicts on its claims; ``missing``: teachers that are not there yet; ``notices``: what stands before the
    answer; ``provenance`` and ``commands``: what the runs were made with, and how to repeat them.
    """

    layouts: Sequence[Layout] = ()
    drawn: Sequence[PageFigure] = ()
    findings: Sequence[Finding] = ()
    missing: Sequence[str] = ()
    notices: Sequence[Notice] = ()
    provenance: Sequence[tuple[str, str]] = ()
    commands: Commands | None = None


ALONE = OfStudy()


def render_teachers(
    study: TeacherList,
    comparison: Comparison,
    tables: Sequence[StabilityTable],
    files: dict[str, str],
    beside: OfStudy,
) -> str:
    """Return the page as HTML text; ``files`` are the stems of the tables' own files, by name."""
    return (
        environment()
        .get_template("teachers.html.j2")
        .render(
            study=study,
            comparison=comparison,
            answer=answer_of(comparison),
            warnings=list(render.warning_lines(comparison)),
            missing=beside.missing,
            notices=beside.notices,
            tables=tables,
            files=files,
            layouts=beside.layouts,
            drawn=beside.drawn,
            claim_sections=claim_sections(beside.findings),
            tested=number_of_tests(beside.findings),
            marks=MARKS,
            measures=list(render.measure_rows(comparison)),
            differences=list(render.difference_rows(comparison)),
            method=render.method_line(comparison),
            provenance=beside.provenance or measured_with(comparison),
            commands=beside.commands,
        )
    )


def measured_with(comparison: Comparison) -> list[tuple[str, str]]:
    """Return where each teacher's answers come from, and what they were measured with, as (name, value)."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return [
        *((teacher.name, teacher.source) for teacher in comparison.teachers),
        ("Draws of the bootstrap", f"{comparison.replicates}, seed {comparison.seed}"),
        ("Hardware", machine_text(provenance.hardware())),
        ("Versions", versions),
    ]


def answer_of(comparison: Comparison) -> str:
    """Return the page's first sentence: which teacher is the most accurate."""
    reading = [f"{line[0].upper()}{line[1:]}." for line in render.reading(comparison)]
    alone = "One teacher, so there is nothing to compare." if len(comparison.teachers) == 1 else ""
    return " ".join(reading) or alone or "These teachers saw different samples and are not compared."
