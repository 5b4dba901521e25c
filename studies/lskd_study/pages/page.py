"""The study's page: one self-contained HTML file that opens with the answer.

What all studies share; `images.html.j2` and `translation.html.j2` fill in the rest.
"""

import base64
import hashlib
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lskd_study.base.extras import needs_study_extra
from lskd_study.claims import Finding, number_of_tests
from lskd_study.drawing.curves import Panel
from lskd_study.drawing.style import ARMS
from lskd_study.pages.claims_table import claim_sections, method_text, sentence, unit_text
from lskd_study.pages.commands import commands_of
from lskd_study.pages.notices import notices_of
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.results import Result, Results, is_translation
from lskd_study.stats.intervals import Interval
from lskd_study.stores.words import loss_note, page_rows

with needs_study_extra():
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

VERDICTS = {
    "supported": "Supported",
    "contradicted": "Not supported: contradicted",
    "cannot tell": "Cannot tell",
    "no verdict": "No verdict",
}
MARKS = {"supported": "✓", "contradicted": "✗", "cannot tell": "?", "no verdict": "–"}


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


def compared(first: str, second: str, score: str, difference: float) -> str:
    """Return a difference in points in words; none where its two decimals show none."""
    size = number(abs(difference), 2)
    if float(size) == 0:
        return f"{first} showed no difference in {score} from {second}"
    return f"{first} scored {size} points {'higher' if difference > 0 else 'lower'} in {score} than {second}"


def digits_of(unit: str) -> int:
    """Return how many decimals a quantity of this unit is given with."""
    few = {"points": 2, "points per point": 2, "standard deviations": 2, "perplexity": 3}
    return few.get(unit, 4)


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return ``low to high`` with signs, or a dash."""
    if interval is None or not interval.known:
        return "–"
    digits = digits_of(unit)
    return f"{number(interval.low, digits, sign=True)} to {number(interval.high, digits, sign=True)}"


def answer_sentence(results: Results[Result], finding: Finding) -> str:
    """Return the page's first sentence: difference, interval, seeds, in words that fit the verdict."""
    words = words_of(results.plan)
    alpha = f"label-smoothed teachers (α\u00a0=\u00a0{exact(finding.setting.smoothing)})"
    interval = finding.interval
    if finding.verdict == "no verdict":
        return f"For students of {alpha}: {finding.note}, and without it nothing is compared."
    if interval is None:
        return f"Nothing to compare yet: for students of {alpha}, {finding.note}."
    students = len({run.model for run in results.plan.runs if run.role == "student"})
    basis = f"{_count(interval.seeds, 'seed')}, {_count(students, 'student')}"
    basis += f", {interval.samples} {words.samples}"
    if not results.plan.papers_loss:
        setting = finding.setting
        basis += f", T\u00a0=\u00a0{exact(setting.temperature)}, λ\u00a0=\u00a0{exact(setting.hard_weight)}"
    other = (
        f"teachers with α\u00a0=\u00a0{exact(finding.setting.baseline)}"
        if finding.setting.baseline
        else "unsmoothed teachers"
    )
    body = compared(f"students of {alpha}", f"students of {other}", words.score, interval.estimate)
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


def css_string(text: str) -> Markup:
    """Return text, HTML or not, as a string of a style sheet; whatever could end it is written as a code."""
    plain = Markup(text).unescape()
    return Markup('"' + "".join(c if c.isalnum() or c == " " else f"\\{ord(c):x} " for c in plain) + '"')


def content_security_policy(script: str) -> str:
    """Return the policy of a page whose only script is this one: nothing is loaded, nothing else runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures carry their styles in attributes, which no hash can name.
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def environment() -> Environment:
    """Return the templates, with the filters for numbers, the pages' script and the policy that admits it."""
    loader = PackageLoader("lskd_study.pages")
    found = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=number,
        exact=exact,
        interval=interval_text,
        digits=digits_of,
        markup=Markup,
        css_string=css_string,
    )
    found.filters.update(sentence=sentence, unit=unit_text, method=method_text)
    script = loader.get_source(found, "page.js")[0]
    found.globals.update(script=Markup(script), policy=content_security_policy(script))
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
            claim_sections=claim_sections(findings),
            tested=number_of_tests(findings),
            verdicts=VERDICTS,
            marks=MARKS,
            words=words,
            varied=not plan.papers_loss,
            loss_note=loss_note(plan),
            difference=difference,
            curves=curves,
            arms=list(enumerate(plan.smoothing)),
            colors=len(ARMS),
            samples=results.samples,
            notices=notices_of(results),
            missing=results.missing,
            provenance=provenance_rows(results),
            commands=commands_of(results),
            **own,
        )
    )


def provenance_rows(results: Results[Result]) -> list[tuple[str, str]]:
    """Return what the study was made with, as (name, value); what differs between runs is listed."""
    seen: dict[str, dict[str, None]] = defaultdict(dict)
    for job in results.jobs:
        for name, version in job["versions"].items():
            seen[name][version] = None
        seen["hardware"][machine_text(job["hardware"])] = None
        git = job["git"]
        state = (
            f"{git['commit'][:12]}{', with local changes' if git['modified'] else ''}"
            if git
            else "not a checkout"
        )
        seen["git"][state] = None
        sha256 = str(job["data"].get("sha256", ""))[:16]
        seen["data"][f"{job['data']['path']}{f', sha256 {sha256}' if sha256 else ''}"] = None
    jobs = results.jobs
    total = sum(job["wall_time_s"] for job in jobs)
    resumed = sum(job["resumed"] for job in jobs)
    failed = f"{len(results.failed)} failed, " if results.failed else ""
    prepare = results.plan.prepare_arguments
    made = [("Data made by", shlex.join(["lskd", *prepare]))] if prepare else []
    own = [
        ("Study file", results.plan.study_file),
        ("Data", " / ".join(seen.pop("data"))),
        *made,
        ("Seeds", ", ".join(map(str, results.plan.seeds))),
        (
            "Runs",
            f"{len(results.finished)} finished, {failed}{len(results.missing)} missing, {resumed} resumed",
        ),
        ("Time in runs", f"{total / 60:.1f} minutes, all runs one after the other"),
        ("Hardware", " / ".join(seen.pop("hardware"))),
        ("Git state of the code", " / ".join(seen.pop("git"))),
        ("Last run finished", max(job["finished"] for job in jobs)[:16].replace("T", " ") + " UTC"),
    ]
    versions = ", ".join(f"{name} {' / '.join(values)}" for name, values in seen.items())
    return [*own, *page_rows(results.plan), ("Versions", versions)]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return processor, cores and GPUs (equal ones counted) in words."""
    gpus = [f"{count} × {name}" if count > 1 else name for name, count in Counter(machine["gpus"]).items()]
    cuda = f" (CUDA {machine['cuda']})" if machine.get("cuda") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {', '.join(gpus) or 'no GPU'}{cuda}"
