"""Write everything a study's output folder shows: judge, make the page and its files, write them."""

from collections.abc import Sequence
from typing import Any

from lskd_study.claims import Finding, judge, settings
from lskd_study.claims.outlook import after, next_seeds, seconds_a_seed
from lskd_study.drawing.curves import (
    curves_csv,
    difference_drawing,
    differences,
    drawable,
    figure5,
    figure6,
    student_kinds,
)
from lskd_study.drawing.style import ARMS, Drawing, themed_svg
from lskd_study.pages.notices import print_notices
from lskd_study.pages.page import Page, counted, interval_text, number, results_shown
from lskd_study.pages.paper_figures import study_figures
from lskd_study.pages.paper_tables import papers_tables, published_table
from lskd_study.pages.tables import COLUMNS, markdown, runs_csv, table_csv, table_rows
from lskd_study.pages.verdicts import VERDICTS_FILE, study_record
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import Plan, exact, more_seeds
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Results
from lskd_study.stores.summary import loss_note

VERDICTS = {
    "supported": "Supported",
    "contradicted": "Not supported: contradicted",
    "too small to matter": "Too small to matter",
    "cannot tell": "Cannot tell",
    "no verdict": "No verdict",
}


def write_report(plan: Plan) -> str:
    """Write tables, figures and page from the finished runs; return the answer in one sentence.

    What stands above it on the page goes to stderr, a line each.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    results = read_results(plan)
    findings = judge(results)
    study_page(results, findings).write(plan.root)
    print_notices(results)
    return f"{VERDICTS[findings[0].verdict or 'cannot tell']}. {answer_sentence(results, findings[0])}"


def study_page(results: Results[Any], findings: Sequence[Finding]) -> Page:
    """Return everything that a study's folder shows; ``findings[0]`` is the headline."""
    plan, kind, answer = results.plan, results.plan.kind, answer_sentence(results, findings[0])
    if kind is TRANSLATION:
        from lskd_study.pages.translation import translation_page  # needs sacreBLEU

        own = translation_page(results)
    else:
        own = images_page(results)
    difference, drawings = None, dict(own.drawings)
    if found := differences(results, settings(results)[0]):
        drawings = {"difference": difference_drawing(found, kind.score), **drawings}
        label = (
            f"Difference in the students' {kind.measure}, with 95 % interval, for each student and on average"
        )
        difference = themed_svg(difference_drawing(found, kind.score).figure, "difference", label)
    shown = {
        "plan": plan,
        "kind": kind,
        "headline": findings[0],
        "answer": answer,
        **results_shown(results, findings),
        "verdicts": VERDICTS,
        "scores": COLUMNS[kind].scores,
        "varied": not plan.papers_loss,
        "loss_note": loss_note(plan),
        "difference": difference,
        "arms": list(enumerate(plan.smoothing)),
        "colors": len(ARMS),
        "samples": results.samples,
    }
    texts = {
        **own.texts,
        "table.csv": table_csv(own.shown["rows"]),
        "runs.csv": runs_csv(results),
        "figures/curves.csv": curves_csv(results),
        VERDICTS_FILE: study_record(results, findings, answer).text(),
    }
    return Page(own.template, {**shown, **own.shown}, texts, drawings)


def images_page(results: Results[ImageResult]) -> Page:
    """Return what the page of a study of image classifiers has of its own."""
    rows, curves, drawings = table_rows(results), [], {}
    for index, student in enumerate(student_kinds(results.plan)):
        arms = student.arms(results)
        if not drawable(arms):
            continue
        of_figure_6 = f"{student.title}, as the paper’s Fig. 6: loss on training and test images, test error"
        for figure, name, title in (
            (figure5(arms), "curve", student.title),
            (figure6(arms), "figure6-", of_figure_6),
        ):
            if figure is not None:
                drawings[student.stem(figure.stem)] = Drawing(figure.whole(student.title))
                curves.append((title, figure.panels(f"{name}{index}")))
    tables = papers_tables([results])
    if (published := published_table(results)) is not None:
        tables.append(published)
    drawn = study_figures(results)
    note = "Mean ± standard deviation over seeds, last epoch."
    texts = {"table.md": markdown(results.plan.kind, rows, [note])}
    for table in tables:
        texts |= table.files()
    shown = {"rows": rows, "curves": curves, "paper_tables": tables, "drawn": drawn}
    return Page("images.html.j2", shown, texts, drawings | {figure.stem: figure.drawing for figure in drawn})


# The answer


def answer_sentence(results: Results[Any], finding: Finding) -> str:
    """Return the page's first sentence: difference, interval, seeds, in words that fit the verdict."""
    kind, setting, interval = results.plan.kind, finding.setting, finding.interval
    alpha = f"label-smoothed teachers (α\u00a0=\u00a0{exact(setting.smoothing)})"
    if finding.verdict == "no verdict":
        return f"For students of {alpha}: {finding.note}, and without it nothing is compared."
    if interval is None:
        return f"Nothing to compare yet: for students of {alpha}, {finding.note}."
    students = len({run.model for run in results.plan.runs if run.role == "student"})
    basis = f"{counted(interval.seeds, 'seed')}, {counted(students, 'student')}"
    basis += f", {interval.samples} {kind.samples}"
    if not results.plan.papers_loss:
        basis += f", T\u00a0=\u00a0{exact(setting.temperature)}, λ\u00a0=\u00a0{exact(setting.hard_weight)}"
    other = (
        f"teachers with α\u00a0=\u00a0{exact(setting.baseline)}"
        if setting.baseline
        else "unsmoothed teachers"
    )
    body = compared(f"students of {alpha}", f"students of {other}", kind.score, interval.estimate)
    if not interval.known:
        return f"On these data {body} ({basis}); no interval can be made: {interval.note}."
    over = f" over the {kind.short} alone" if interval.seeds == 1 else ""
    if results.plan.looks:
        over = f" for looks after {', '.join(map(str, results.plan.looks))} seeds"
    text = f"On these data {body} (95 % interval{over} {interval_text(interval, 'points')}; {basis})"
    if interval.seeds == 1:
        return f"{text}. One seed: how much seeds vary is unknown, so no verdict is possible; add seeds."
    if finding.verdict == "too small to matter":
        return f"{text}: smaller than the margin of {exact(results.plan.margin)} points, whatever its sign."
    if finding.verdict != "cannot tell":
        return f"{text}."
    if finding.changed_by_holm:
        text += ". The interval alone excludes zero; corrected for the claims tested together it does not."
    else:
        text += ": the interval contains zero, so a difference of either sign is possible."
    outlook = after(finding, seconds_a_seed(results))
    if not results.plan.looks and (numbers := next_seeds(finding)):
        seeds = [*results.plan.seeds, *more_seeds(results.plan.seeds, numbers[0] - len(results.plan.seeds))]
        outlook += f"; the line to change: seeds: {seeds}"
    return f"{text} What would decide it: {outlook}." if outlook else text


def compared(first: str, second: str, score: str, difference: float) -> str:
    """Return a difference in points in words; none where its two decimals show none."""
    size = number(abs(difference), 2)
    if float(size) == 0:
        return f"{first} showed no difference in {score} from {second}"
    return f"{first} scored {size} points {'higher' if difference > 0 else 'lower'} in {score} than {second}"
