"""The page of a study without students: its teachers side by side (Tables 1, 3 and 4)."""

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.claims import judge
from lskd_study.pages.commands import commands_of
from lskd_study.pages.notices import say_notices
from lskd_study.pages.page import provenance_rows
from lskd_study.pages.paper_figures import study_figures
from lskd_study.pages.paper_table_files import write_layout
from lskd_study.pages.paper_tables import papers_layouts
from lskd_study.pages.teachers import OfStudy
from lskd_study.pages.teachers_study import run_teacher_list
from lskd_study.pages.verdicts import VERDICTS_FILE, of_study, read_record
from lskd_study.paper.printed import load_tables
from lskd_study.plan.matching import names_table, teacher_name
from lskd_study.plan.plan import LOGITS, Plan, Run
from lskd_study.plan.teacher_list import TeacherEntry, TeacherList
from lskd_study.results.read import read_results
from lskd_study.results.results import failure_words
from lskd_study.teachers.run import ComparisonSettings

# The networks of Tables 1 and 10 have seen ImageNet-1K.
_PAPERS_DATA = "imagenet"


def write_teachers_report(plan: Plan) -> None:
    """Compare the finished teachers, as ``lskd stability`` does, into the study's output folder.

    Tables 1 and 10 show the paper's own figures beside them where the data are ImageNet's and there is one
    run of each kind.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    papers = plan.data_dir.name == _PAPERS_DATA or names_table(plan, ("Table 1", "Table 10"))
    papers = papers and plan.num_classes == 1000 and len(plan.seeds) == 1
    results = read_results(plan)
    entries = [
        TeacherEntry(
            name=run.id.removeprefix("teacher-"),
            logits=str(plan.folder(run) / LOGITS),
            network=_row(plan, run) if papers else None,
            smoothing=run.smoothing,
        )
        for run in plan.runs
        if run.id in results.finished
    ]
    if not entries:
        raise LskdError(f"there is nothing to compare: {failure_words(list(results.failed.values()))}")
    study = TeacherList(
        kind="stability", title=plan.title, output=str(plan.root), temperatures=[1.0], teachers=entries
    )
    layouts, drawn = papers_layouts([results]), study_figures(results)
    for layout in layouts:
        write_layout(layout, plan.root)
    for figure in drawn:
        figure.write(plan.root / "figures")
    findings = judge(results)
    notices = say_notices(results)
    made = provenance_rows(results), commands_of(results)
    run_teacher_list(
        study, ComparisonSettings(), beside=OfStudy(layouts, drawn, findings, results.missing, notices, *made)
    )
    record = of_study(read_record(plan.root), results, findings)
    write_text(plan.root / VERDICTS_FILE, record.text())


def _row(plan: Plan, run: Run) -> str | None:
    name = teacher_name(run.model, plan.configs.get(run.config, {}), plan.num_classes)
    return name if any(row.name == name for row in load_tables()["Table 1"].rows) else None
