"""The page of a list of teachers: one self-contained HTML file."""

from collections.abc import Sequence

from lskd_study.page import environment
from lskd_study.teachers import render
from lskd_study.teachers.compare import Comparison
from lskd_study.teachers.paper_tables import StabilityTable
from lskd_study.teachers.schema import TeacherList


def render_teachers(
    study: TeacherList,
    comparison: Comparison,
    tables: Sequence[StabilityTable],
    files: dict[str, str],
    missing: Sequence[str] = (),
) -> str:
    """Return the page as HTML text.

    ``files`` are the stems of the tables' own files, by name; ``missing``: teachers that are not there yet.
    """
    reading = [f"{line[0].upper()}{line[1:]}." for line in render.reading(comparison)]
    alone = "One teacher, so there is nothing to compare." if len(comparison.teachers) == 1 else ""
    answer = " ".join(reading) or alone or "These teachers saw different samples and are not compared."
    return (
        environment()
        .get_template("teachers.html.j2")
        .render(
            study=study,
            comparison=comparison,
            answer=answer,
            warnings=list(render.warning_lines(comparison)),
            missing=missing,
            tables=tables,
            files=files,
            measures=list(render.measure_rows(comparison)),
            differences=list(render.difference_rows(comparison)),
            method=render.method_line(comparison),
        )
    )
