"""What the page of a study of translation has of its own: Fig. 7, signatures of BLEU, bootstrap intervals."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from lskd_study.base.text import cell, csv_text
from lskd_study.claims import claims_of, groups, settings_of
from lskd_study.drawing.curves import TRANSLATION_CURVES, drawable, figure5, figure7, student_kinds
from lskd_study.drawing.style import Drawing
from lskd_study.pages.page import Page, ends_text, number, p_text
from lskd_study.pages.tables import markdown, table_rows
from lskd_study.results.results import Results, common_seeds, failures_of
from lskd_study.results.translation import TranslationResult
from lskd_study.stats.bleu import METHOD, Score, paired_bootstrap
from lskd_study.stats.bootstrap import Estimate


@dataclass(frozen=True)
class Resampled:
    """One pair of runs that differ in the teacher's smoothing alone, compared on the test set."""

    role: str
    name: str
    setting: str
    seed: int
    first: Score
    second: Score
    difference: Estimate


def translation_page(results: Results[TranslationResult]) -> Page:
    """Return what the page of a study of translation has of its own."""
    plan, rows, resampled = results.plan, table_rows(results), list(_resampled(results))
    curves: list[tuple[str, list[Markup]]] = []
    losses: list[tuple[str, list[Markup]]] = []
    drawings = {}
    for index, student in enumerate(student_kinds(plan)):
        arms, controls = student.arms(results), student.controls(results)
        teachers = {alpha: results.teachers(student.teacher, alpha) for alpha in plan.smoothing}
        if not (drawable(teachers) and drawable(arms)):
            continue
        for figure, shown, name in (
            (figure7(teachers, arms, controls), curves, "figure7-"),
            (figure5(arms, TRANSLATION_CURVES), losses, "curve"),
        ):
            drawings[student.stem(figure.stem)] = Drawing(figure.whole(student.title))
            shown.append((student.title, figure.panels(f"{name}{index}")))
    signatures = next(
        ((r.detokenised.signature, r.tokenised.signature) for r in results.finished.values()), ("", "")
    )
    notes = [
        "Mean ± standard deviation over seeds, checkpoint with the best validation BLEU.",
        "",
        f"- BLEU: test set, sacreBLEU on detokenised text, `{signatures[0]}`",
        f"- tokenised BLEU: test set, as the data was tokenised, `{signatures[1]}`",
        "- perplexity: validation set, hard labels, per target token (subword)",
        "- ECE: expected calibration error, test set, references, per target token, 15 bins",
    ]
    texts = {"table.md": markdown(plan.kind, rows, notes), "bootstrap.csv": _bootstrap_csv(resampled)}
    own = {"rows": rows, "curves": curves, "losses": losses, "signatures": signatures}
    own |= {"bootstrap_rows": list(map(_bootstrap_cells, resampled)), "bootstrap": METHOD}
    return Page("translation.html.j2", own, texts, drawings)


def _resampled(results: Results[TranslationResult]) -> Iterator[Resampled]:
    for claim in claims_of(results.plan):
        if (claim.contrast, claim.quantity) != ("difference", "bleu"):
            continue
        for setting in settings_of(claim, results.plan):
            words = setting.describe("teacher" if results.plan.papers_loss else claim.role)
            for name, (without, with_) in groups(results, claim, setting).items():
                if failures_of([without, with_]):
                    continue  # the page and the claims say which
                for seed in common_seeds([without, with_]):
                    for first, second in zip(without[seed].each, with_[seed].each, strict=True):
                        pair, own = (first.detokenised, second.detokenised), first.run.seed
                        yield Resampled(claim.role, name, words, own, *pair, paired_bootstrap(*pair))


def _bootstrap_cells(row: Resampled) -> list[str]:
    d = row.difference
    values = number(row.first.value, 2), number(row.second.value, 2), number(d.value, 2, sign=True)
    ends = d.note or ends_text(d.low, d.high, "points")
    return [f"{row.role} {row.name}", row.setting, str(row.seed), *values, ends, p_text(d.p_value)]


def _bootstrap_csv(rows: list[Resampled]) -> str:
    header = ["role", "model", "setting", "seed", "bleu_baseline", "bleu_smoothed", "difference_points"]
    header += ["low", "high", "p_value", "note", "method", "sacrebleu_signature"]
    lines: list[list[object]] = []
    for row in rows:
        d = row.difference
        numbers = [row.first.value, row.second.value, d.value, d.low, d.high, d.p_value]
        method = "" if math.isnan(d.low) else METHOD
        kind = [row.role, row.name, row.setting, row.seed]
        lines.append([*kind, *map(cell, numbers), d.note, method, row.first.signature])
    return csv_text(header, lines)
