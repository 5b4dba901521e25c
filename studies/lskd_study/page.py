"""The study's page: one self-contained HTML file that opens with the answer.

What all studies share; `images.html.j2` and `translation.html.j2` fill in the rest.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lskd_study.claims import Finding
from lskd_study.extras import needs_study_extra
from lskd_study.figure_style import ARMS
from lskd_study.figures import Panel
from lskd_study.plan import Plan
from lskd_study.results import Result, Results, is_translation
from lskd_study.statistics import Interval
from lskd_study.stores.words import loss_note, page_rows

with needs_study_extra():
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

VERDICTS = {
    "supported": "Supported",
    "contradicted": "Not supported: contradicted",
    "cannot tell": "Cannot tell",
}
MARKS = {"supported": "✓", "contradicted": "✗", "cannot tell": "?"}


@dataclass(frozen=True)
class Words:
    """How a kind of study is spoken of: its template, its samples (full and short), its headline's score."""

    template: str
    samples: str
    short: str
    score: str
    measure: str


IMAGES = Words("images.html.j2", "validation images", "images", "top-1 accuracy", "accuracy")
TRANSLATION = Words("translation.html.j2", "test sentences", "sentences", "BLEU", "BLEU")


def words_of(plan: Plan) -> Words:
    """Return the words for a study of this kind."""
    return TRANSLATION if is_translation(plan) else IMAGES


@dataclass(frozen=True)
class Curves:
    """One student's panels with their heading."""

    title: str
    panels: list[Panel]


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Return a number with a true minus sign; a dash for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def digits_of(unit: str) -> int:
    """Return how many decimals a quantity of this unit is given with."""
    return {"points": 2, "perplexity": 3}.get(unit, 4)


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return ``low to high`` with signs, or a dash."""
    if interval is None or not interval.known:
        return "–"
    digits = digits_of(unit)
    return f"{number(interval.low, digits, sign=True)} to {number(interval.high, digits, sign=True)}"


def answer_sentence(results: Results[Result], finding: Finding) -> str:
    """Return the page's first sentence: difference, interval, seeds, in words that fit the verdict."""
    words = words_of(results.plan)
    alpha = f"label-smoothed teachers (α\u00a0=\u00a0{finding.setting.smoothing:g})"
    interval = finding.interval
    if interval is None:
        return f"Nothing to compare yet: for students of {alpha}, {finding.note}."
    students = len({run.model for run in results.plan.runs if run.role == "student"})
    basis = f"{_count(interval.seeds, 'seed')}, {_count(students, 'student')}"
    basis += f", {interval.samples} {words.samples}"
    if not results.plan.papers_loss:
        basis += (
            f", T\u00a0=\u00a0{finding.setting.temperature:g}, λ\u00a0=\u00a0{finding.setting.hard_weight:g}"
        )
    size = number(abs(interval.estimate), 2)
    side = "higher" if interval.estimate >= 0 else "lower"
    other = (
        f"teachers with α\u00a0=\u00a0{finding.setting.baseline:g}"
        if finding.setting.baseline
        else "unsmoothed teachers"
    )
    body = f"students of {alpha} scored {size} points {side} in {words.score} than students of {other}"
    if not interval.known:
        return f"On these data {body} ({basis}); no interval can be made: {interval.note}."
    over = f" over the {words.short} alone" if interval.seeds == 1 else ""
    text = f"On these data {body} (95 % interval{over} {interval_text(interval, 'points')}; {basis})"
    if interval.seeds == 1:
        return f"{text}. One seed: how much seeds vary is unknown, so no verdict is possible; add seeds."
    if finding.changed_by_holm:
        return (
            f"{text}. The interval alone excludes zero; corrected for the claims tested together it does not."
        )
    if finding.verdict == "cannot tell":
        return f"{text}: the interval holds zero, so a difference of either sign is possible."
    return f"{text}."


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def environment() -> Environment:
    """Return the templates, with the filters for numbers."""
    found = Environment(
        loader=PackageLoader("lskd_study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(number=number, interval=interval_text, digits=digits_of, markup=Markup)
    return found


def render_page(
    results: Results[Result],
    findings: Sequence[Finding],
    difference: Panel | None,
    curves: Sequence[Curves],
    **own: Any,
) -> str:
    """Return the page as HTML text. ``findings[0]`` is the headline; ``own``: for the kind's own template."""
    plan = results.plan
    words = words_of(plan)
    return (
        environment()
        .get_template(words.template)
        .render(
            plan=plan,
            headline=findings[0],
            answer=answer_sentence(results, findings[0]),
            findings=findings,
            several=len({finding.setting for finding in findings}) > 1,
            tested=sum(not math.isnan(finding.adjusted_p) for finding in findings),
            verdicts=VERDICTS,
            marks=MARKS,
            words=words,
            varied=not plan.papers_loss,
            loss_note=loss_note(plan),
            difference=difference,
            curves=curves,
            arms=list(enumerate(plan.smoothing)),
            colors=len(ARMS),
            samples=len(next(iter(results.finished.values())).keys),
            missing=results.missing,
            provenance=provenance_rows(results),
            jobs=[result.job for result in results.finished.values()],
            **own,
        )
    )


def provenance_rows(results: Results[Result]) -> list[tuple[str, str]]:
    """Return what the study was made with, as (name, value); what differs between runs is listed."""
    seen: dict[str, dict[str, None]] = defaultdict(dict)
    for result in results.finished.values():
        job = result.job
        for name, version in job["versions"].items():
            seen[name][version] = None
        machine = job["hardware"]
        gpus = ", ".join(machine["gpus"]) or "no GPU"
        seen["hardware"][f"{machine['cpu']}, {machine['cores']} cores, {gpus}"] = None
        git = job["git"]
        state = (
            f"{git['commit'][:12]}{', with local changes' if git['modified'] else ''}"
            if git
            else "not a checkout"
        )
        seen["git"][state] = None
        seen["data"][f"{job['data']['path']}, listing sha256 {job['data']['listing_sha256'][:16]}"] = None
    jobs = [result.job for result in results.finished.values()]
    total = sum(job["wall_time_s"] for job in jobs)
    resumed = sum(job["resumed"] for job in jobs)
    own = [
        ("Study file", results.plan.study_file),
        ("Data", " / ".join(seen.pop("data"))),
        ("Seeds", ", ".join(map(str, results.plan.seeds))),
        ("Runs", f"{len(jobs)} finished, {len(results.missing)} missing, {resumed} resumed"),
        ("Time in runs", f"{total / 60:.1f} minutes, all runs one after the other"),
        ("Hardware", " / ".join(seen.pop("hardware"))),
        ("Git state of the code", " / ".join(seen.pop("git"))),
        ("Last run finished", max(job["finished"] for job in jobs)[:16].replace("T", " ") + " UTC"),
    ]
    versions = ", ".join(f"{name} {' / '.join(values)}" for name, values in seen.items())
    return [*own, *page_rows(results.plan), ("Versions", versions)]
