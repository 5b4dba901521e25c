"""Write everything a study's output folder shows: judge, make the page and its files, write them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from lskd_study.claims import Finding, claims_of, judge, settings_of
from lskd_study.claims.by_class import ClassChange, class_changes
from lskd_study.claims.findings import Verdict
from lskd_study.claims.measures import measure_study
from lskd_study.claims.outlook import after, seconds_a_seed
from lskd_study.drawing.curves import (
    Difference,
    curves_csv,
    difference_drawing,
    differences,
    drawable,
    figure5,
    figure6,
    setting_names,
    student_kinds,
)
from lskd_study.drawing.style import ARMS, Drawing, themed_svg
from lskd_study.pages.costs import costs_csv, costs_of
from lskd_study.pages.measures import chances_sentence, measures_shown
from lskd_study.pages.notices import print_notices
from lskd_study.pages.page import Page, advice_of, counted, interval_text, number, p_text, results_shown
from lskd_study.pages.paper_figures import study_figures
from lskd_study.pages.paper_tables import papers_tables, published_table
from lskd_study.pages.tables import COLUMNS, markdown, runs_csv, table_csv, table_rows
from lskd_study.pages.verdicts import VERDICTS_FILE, study_record
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Results
from lskd_study.stores.summary import loss_note

VERDICTS = {verdict: verdict.capitalize() for verdict in get_args(Verdict)}
VERDICTS["contradicted"] = "Not supported: contradicted"


def write_report(plan: Plan) -> str:
    """Write tables, figures and page from the finished runs; return the answer and what would decide it.

    What stands above it on the page goes to stderr, a line each.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    results = read_results(plan)
    findings = judge(results)
    study_page(results, findings).write(plan.root)
    print_notices(results)
    answer = f"{VERDICTS[findings[0].verdict or 'cannot tell']}. {answer_sentence(results, findings[0])}"
    outlook = after(findings[0], seconds_a_seed(results))
    if outlook and len(results.plan.seeds) > 1:  # of one seed the answer says it
        answer += f" What would decide it: {outlook}."
    return answer


def study_page(results: Results[Any], findings: Sequence[Finding]) -> Page:
    """Return everything that a study's folder shows; ``findings[0]`` is the headline."""
    plan, kind, answer = results.plan, results.plan.kind, answer_sentence(results, findings[0])
    if kind is TRANSLATION:
        from lskd_study.pages.translation import translation_page  # needs sacreBLEU

        own = translation_page(results)
    else:
        own = images_page(results)
    recommendation = advice_of(results, findings)
    by_student = differences(results, findings[0].setting, findings[0].interval)
    drawings, inline = {}, {}
    for name, rows, which in (
        ("difference", by_student, "for each student and on average"),
        ("settings", _by_setting(results, findings), "in each setting"),
    ):
        if rows:
            drawn = [difference_drawing(rows, kind.score, last_pools=name == "difference") for _ in range(2)]
            drawings[name] = drawn[0]
            label = f"Difference in the students' {kind.measure}, with 95 % interval, {which}"
            inline[name] = themed_svg(drawn[1].figure, name, label)
    measures = measure_study(results)
    costs = costs_of(results)
    deployed = any(cost.file_bytes > 0 for cost in costs)
    shown = {
        "kind": kind,
        "headline": findings[0],
        "answer": answer,
        "recommendation": recommendation,
        "cost_rows": [cost.cells() + (cost.deployed() if deployed else []) for cost in costs],
        "costs_deployed": deployed,
        **results_shown(results, findings),
        **measures_shown(measures, plan),
        "chances": chances_sentence(findings[0], plan.margin),
        "verdicts": VERDICTS,
        "scores": COLUMNS[kind].scores,
        "varied": not plan.papers_loss,
        "loss_note": loss_note(plan),
        "difference": inline.get("difference"),
        "by_setting": inline.get("settings"),
        "difference_rows": len(by_student),
        "arms": list(enumerate(plan.smoothing)),
        "control_labels": plan.control_labels,
        "controls_drawn": plan.controls_drawn,
        "colors": len(ARMS),
        "samples": results.samples,
    }
    texts = {
        **own.texts,
        "table.csv": table_csv(own.shown["rows"]),
        "runs.csv": runs_csv(results),
        "costs.csv": costs_csv(costs),
        "figures/curves.csv": curves_csv(results),
        VERDICTS_FILE: study_record(results, findings, answer, recommendation, measures).text(),
    }
    return Page(own.template, {**shown, **own.shown}, texts, {**drawings, **own.drawings})


def _by_setting(results: Results[Any], findings: Sequence[Finding]) -> list[Difference]:
    """Return the headline claim's differences, of all students together, where it has several settings."""
    own = [one for one in findings if one.claim == findings[0].claim]
    rows = []
    for name, one in zip(setting_names([one.setting for one in own]), own, strict=True):
        if name and (found := differences(results, one.setting, one.interval)):
            rows.append(replace(found[-1], name=name))
    return rows


def images_page(results: Results[ImageResult]) -> Page:
    """Return what the page of a study of image classifiers has of its own."""
    rows, curves, drawings = table_rows(results), [], {}
    for index, student in enumerate(student_kinds(results.plan)):
        arms, controls = student.arms(results), student.controls(results)
        if not drawable(arms):
            continue
        of_figure_6 = f"{student.title}, as the paper’s Fig. 6: loss on training and test images, test error"
        for figure, name, title in (
            (figure5(arms, controls=controls), "curve", student.title),
            (figure6(arms), "figure6-", of_figure_6),
        ):
            if figure is not None:
                drawings[student.stem(figure.stem)] = Drawing(figure.whole(student.title))
                curves.append((title, figure.panels(f"{name}{index}")))
    tables = papers_tables([results])
    if (published := published_table(results)) is not None:
        tables.append(published)
    drawn = study_figures(results)
    last = results.plan.last_epochs
    note = "Mean ± standard deviation over seeds, last epoch."
    note += f" Top-1 is the mean of the last {last} epochs." * (last > 1)
    texts = {"table.md": markdown(results.plan.kind, rows, [note])}
    for table in tables:
        texts |= table.files()
    claim = claims_of(results.plan)[0]
    shown = {"rows": rows, "curves": curves, "paper_tables": tables, "drawn": drawn}
    shown["changes"] = changes = class_changes(results, claim, settings_of(claim, results.plan)[0])
    shown["class_rows"] = [_class_cells(change) for change in changes.largest] if changes else []
    return Page("images.html.j2", shown, texts, drawings | {figure.stem: figure.drawing for figure in drawn})


def _class_cells(change: ClassChange) -> list[str]:
    numbers = (
        number(change.before, 2),
        number(change.after, 2),
        number(change.interval.estimate, 2, sign=True),
    )
    ends = interval_text(change.interval, "points")
    return [change.name, str(change.images), *numbers, ends, p_text(change.adjusted_p)]


# The answer


def answer_sentence(results: Results[Any], finding: Finding) -> str:
    """Return the sentence on the headline: difference, interval, seeds, in words that fit the verdict."""
    kind, setting, interval = results.plan.kind, finding.setting, finding.interval
    alpha = f"label-smoothed teachers (α\u00a0=\u00a0{exact(setting.smoothing)})"
    if finding.verdict == "no verdict":
        return f"For students of {alpha}: {finding.note}, and without it nothing is compared."
    if interval is None:
        return f"Nothing to compare yet: for students of {alpha}, {finding.note}."
    students = len({run.model for run in results.plan.runs if run.role == "student"})
    repeats = results.plan.student_seeds
    each = f" with {repeats} runs of each student" if repeats > 1 else ""
    basis = f"{counted(interval.seeds, 'seed')}{each}, {counted(students, 'student')}"
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
        return (
            f"{text}. The interval alone excludes zero; corrected for the claims tested together it does not."
        )
    return f"{text}: a difference of either sign is possible."


def compared(first: str, second: str, score: str, difference: float) -> str:
    """Return a difference in points in words; none where its two decimals show none."""
    size = number(abs(difference), 2)
    if float(size) == 0:
        return f"{first} showed no difference in {score} from {second}"
    return f"{first} scored {size} points {'higher' if difference > 0 else 'lower'} in {score} than {second}"
