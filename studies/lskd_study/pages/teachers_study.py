"""A list of teachers from a file, with the paper's Tables 1 and 10 beside what is measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.pages.teachers import ALONE, OfStudy, answer_of, render_teachers
from lskd_study.pages.teachers_paper_tables import TableName, paper_table, table_csv
from lskd_study.pages.verdicts import VERDICTS_FILE, DataRecord, teachers_record
from lskd_study.plan.teacher_list import TeacherEntry, TeacherList
from lskd_study.teachers.evaluate import TeacherSpec
from lskd_study.teachers.run import WRITERS, ComparisonSettings, run_teachers

FILES: dict[TableName, str] = {"Table 1": "table1", "Table 10": "table10"}
PAGE = "index.html"


def run_teacher_list(
    study: TeacherList,
    settings: ComparisonSettings,
    files: Mapping[str, Path | None] | None = None,
    beside: OfStudy = ALONE,
) -> Path | None:
    """Measure the teachers of a list and write its output folder.

    It gets ``stability.json`` and ``.csv`` with everything, ``table1.csv`` and ``table10.csv`` in the paper's
    layout, with its own figures beside the measured ones, a page, ``index.html``, and ``verdicts.json`` for
    `lskd index`.
    ``beside``: what the page shows of the study that they belong to.

    Returns:
        The output folder; None on the processes of torchrun other than the first.

    Raises:
        LskdError: for whatever the user can mend.
    """
    settings = _with_data(study, settings)
    output = Path(study.output)
    own = {suffix: output / f"stability{suffix}" for suffix in WRITERS}
    for path in (files or {}).values():
        if path is not None:
            raise LskdError(f"a list of teachers writes into its own folder, {output}; leave out {path}")
    comparison = run_teachers([_spec(entry) for entry in study.teachers], settings, own)
    if comparison is None:
        return None
    tables = [paper_table(name, comparison, study.teachers) for name in FILES]
    for table in tables:
        write_text(output / f"{FILES[table.name]}.csv", table_csv(table))
    names = [teacher.name for teacher in comparison.teachers]
    data = study.data.path if study.data else ""
    measures = comparison.teachers[0].measures
    seen = DataRecord(path=data, classes=measures.num_classes, samples=measures.samples)
    record = teachers_record(study.title, names, answer_of(comparison), seen)
    write_text(output / VERDICTS_FILE, record.text())
    page = output / PAGE
    stems = {str(name): stem for name, stem in FILES.items()}
    write_text(page, render_teachers(study, comparison, tables, stems, beside))
    print(page)
    return output


def _with_data(study: TeacherList, settings: ComparisonSettings) -> ComparisonSettings:
    settings = replace(settings, temperatures=study.temperatures)
    if study.data is None:
        return settings
    # What the command line names wins.
    given = {key: value for key, value in settings.evaluation.items() if value is not None}
    data = {"data_dir": Path(study.data.path), "split": study.data.split}
    return replace(settings, evaluation={**settings.evaluation, **data, **given})


def _spec(entry: TeacherEntry) -> TeacherSpec:
    paths = {
        name: Path(value)
        for name in ("config", "checkpoint", "logits")
        if (value := getattr(entry, name)) is not None
    }
    return TeacherSpec(name=entry.name, model=entry.model, **paths)
