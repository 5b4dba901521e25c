"""Write everything a study's output folder shows: tables, figures and the page."""

from lskd import LskdError
from lskd_study.claims import judge, settings
from lskd_study.figure6 import figure6, figure6_panels, has_test_loss
from lskd_study.figure_style import save
from lskd_study.figures import (
    Panel,
    curve_figure,
    curve_panels,
    curves_csv,
    difference_csv,
    difference_figure,
    differences,
    themed_svg,
)
from lskd_study.page import VERDICTS, Curves, answer_sentence, render_page
from lskd_study.plan import Plan, slug, write_text
from lskd_study.results import Results, read_results
from lskd_study.tables import markdown, runs_csv, table_csv, table_rows

PAGE = "index.html"


def write_report(plan: Plan) -> str:
    """Write tables, figures and page from the finished runs; return the answer in one sentence.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    results = read_results(plan)
    findings = judge(results)
    rows = table_rows(results)
    root = plan.root
    write_text(root / "table.csv", table_csv(rows))
    write_text(root / "table.md", markdown(rows))
    write_text(root / "runs.csv", runs_csv(results))
    try:
        difference = _difference(results)
        curves = _curves(results)
    except OSError as error:
        raise LskdError(f"cannot write {plan.output}/figures ({error.strerror}); mend the folder") from error
    write_text(root / PAGE, render_page(results, findings, rows, difference, curves))
    verdict = VERDICTS[findings[0].verdict or "cannot tell"]
    return f"{verdict}. {answer_sentence(results, findings[0])}"


def _difference(results: Results) -> Panel | None:
    found = differences(results, settings(results)[0])
    if not found:
        return None
    folder = results.plan.root / "figures"
    write_text(folder / "difference.csv", difference_csv(found))
    save(difference_figure(found), folder / "difference")
    label = "Difference in the students' accuracy, with 95 % interval, for each student and on average"
    return Panel(themed_svg(difference_figure(found), "difference"), label)


def _curves(results: Results) -> list[Curves]:
    plan = results.plan
    folder = plan.root / "figures"
    write_text(folder / "curves.csv", curves_csv(results))
    kinds = dict.fromkeys(
        (plan.run(run.teacher).model, run.model, run.temperature, run.hard_weight)
        for run in plan.runs
        if run.role == "student"
    )
    shown = []
    for index, (teacher, model, t, hard) in enumerate(kinds):
        arms = {alpha: results.students(model, teacher, alpha, t, hard) for alpha in plan.smoothing}
        if not all(arms.values()):
            continue
        title = f"Student {model}, teacher {teacher}"
        if not plan.papers_loss:
            title += f", T = {t:g}, λ = {hard:g}"
        name = f"curves-{slug(model)}-of-{slug(teacher)}-T{t:g}-hard{hard:g}"
        save(curve_figure(arms, title), folder / name)
        shown.append(Curves(title, curve_panels(arms, f"curve{index}")))
        if has_test_loss(arms):
            save(figure6(arms, title), folder / name.replace("curves", "figure6", 1))
            heading = f"{title}, as the paper’s Fig. 6: loss on training and test images, test error"
            shown.append(Curves(heading, figure6_panels(arms, f"figure6-{index}")))
    return shown
