"""Tables, figures and bootstrap intervals of a study of translation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lskd_study.base.text import cell, csv_text
from lskd_study.claims import claims_of, groups, settings
from lskd_study.drawing.curves import TRANSLATION_PANELS, curve_figure, curve_panels
from lskd_study.drawing.figure7 import Pair, figure7, figure7_panels
from lskd_study.drawing.style import save
from lskd_study.pages.contents import Contents, StudentKind, student_kinds
from lskd_study.pages.page import Curves
from lskd_study.pages.translation_tables import markdown, runs_csv, signatures, table_csv, translation_rows
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


def translation_contents(results: Results[TranslationResult]) -> Contents:
    """Draw the figures into the output folder; return tables and curves.

    Raises:
        OSError: when the folder cannot be written.
    """
    rows, how = translation_rows(results), signatures(results)
    resampled = list(_resampled(results))
    files = {
        "table.csv": table_csv(rows),
        "table.md": markdown(rows, how),
        "runs.csv": runs_csv(results),
        "bootstrap.csv": _bootstrap_csv(resampled),
    }
    folder = results.plan.root / "figures"
    shown, losses = [], []
    for index, kind in enumerate(student_kinds(results.plan)):
        pair = _pair(results, kind)
        if not pair.complete:
            continue
        save(figure7(pair, kind.title), folder / kind.file("figure7"))
        shown.append(Curves(kind.title, figure7_panels(pair, f"figure7-{index}")))
        save(curve_figure(pair.students, kind.title, TRANSLATION_PANELS), folder / kind.file("curves"))
        losses.append(Curves(kind.title, curve_panels(pair.students, f"curve{index}", TRANSLATION_PANELS)))
    own = {"rows": rows, "how": how, "losses": losses, "resampled": resampled, "bootstrap": METHOD}
    return Contents(files, shown, own)


def _pair(results: Results[TranslationResult], kind: StudentKind) -> Pair:
    smoothing = results.plan.smoothing
    return Pair(
        {alpha: results.teachers(kind.teacher, alpha) for alpha in smoothing},
        {
            alpha: results.students(kind.model, kind.teacher, alpha, kind.temperature, kind.hard_weight)
            for alpha in smoothing
        },
    )


def _resampled(results: Results[TranslationResult]) -> Iterator[Resampled]:
    compared = set()
    for claim in claims_of(results.plan):
        if claim.quantity != "bleu":
            continue
        for setting in settings(results):
            words = setting.describe("teacher" if results.plan.papers_loss else claim.role)
            if (claim.role, words) in compared:  # a teacher has no temperature
                continue
            compared.add((claim.role, words))
            for name, (without, with_) in groups(results, claim, setting).items():
                if failures_of([without, with_]):
                    continue  # the page and the claims say which
                for seed in common_seeds([without, with_]):
                    pair = without[seed].detokenised, with_[seed].detokenised
                    yield Resampled(claim.role, name, words, seed, *pair, paired_bootstrap(*pair))


def _bootstrap_csv(rows: list[Resampled]) -> str:
    header = ["role", "model", "setting", "seed", "bleu_baseline", "bleu_smoothed", "difference_points"]
    header += ["low", "high", "p_value", "note", "method", "sacrebleu_signature"]
    lines: list[list[object]] = []
    for row in rows:
        d = row.difference
        numbers = [row.first.value, row.second.value, d.value, d.low, d.high, d.p_value]
        cells = [cell(number) for number in numbers]
        method = "" if math.isnan(d.low) else METHOD
        lines.append([row.role, row.name, row.setting, row.seed, *cells, d.note, method, row.first.signature])
    return csv_text(header, lines)
