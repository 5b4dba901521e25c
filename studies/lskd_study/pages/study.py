"""Write everything a study's output folder shows: tables, figures and the page."""

from typing import Any

from lskd.base.files import cannot_write, write_text
from lskd_study.claims import judge, settings
from lskd_study.drawing.curves import (
    Panel,
    curves_csv,
    difference_csv,
    difference_figure,
    differences,
    themed_svg,
)
from lskd_study.drawing.style import save
from lskd_study.pages.contents import Contents
from lskd_study.pages.images import image_contents
from lskd_study.pages.notices import say_notices
from lskd_study.pages.page import VERDICTS, answer_sentence, render_page, words_of
from lskd_study.pages.verdicts import VERDICTS_FILE, study_record
from lskd_study.plan.plan import Plan
from lskd_study.results.read import read_results
from lskd_study.results.results import Result, Results, is_translation

PAGE = "index.html"


def write_report(plan: Plan) -> str:
    """Write tables, figures and page from the finished runs; return the answer in one sentence.

    What stands above it on the page goes to stderr, a line each.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    results = read_results(plan)
    findings = judge(results)
    try:
        difference = _difference(results)
        contents = _contents(results)
    except OSError as error:
        raise cannot_write(plan.root / "figures", error) from error
    for name, text in {**contents.files, "figures/curves.csv": curves_csv(results)}.items():
        write_text(plan.root / name, text)
    answer = answer_sentence(results, findings[0])
    write_text(plan.root / VERDICTS_FILE, study_record(results, findings, answer).text())
    write_text(plan.root / PAGE, render_page(results, findings, difference, contents.curves, **contents.own))
    say_notices(results)
    return f"{VERDICTS[findings[0].verdict or 'cannot tell']}. {answer}"


def _contents(results: Results[Any]) -> Contents:
    if is_translation(results.plan):
        from lskd_study.pages.translation import translation_contents  # needs sacreBLEU

        return translation_contents(results)
    return image_contents(results)


def _difference(results: Results[Result]) -> Panel | None:
    found = differences(results, settings(results)[0])
    if not found:
        return None
    folder, words = results.plan.root / "figures", words_of(results.plan)
    write_text(folder / "difference.csv", difference_csv(found))
    save(difference_figure(found, words.score), folder / "difference")
    label = (
        f"Difference in the students' {words.measure}, with 95 % interval, for each student and on average"
    )
    return Panel(themed_svg(difference_figure(found, words.score), "difference"), label)
