"""What all pages have in common: templates, how numbers and findings are written, what made the runs."""

import base64
import hashlib
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lskd.base.files import write_text
from lskd_study.claims import Claim, Finding, number_of_tests
from lskd_study.claims.outlook import after, seconds_a_seed
from lskd_study.claims.recommendation import Recommendation, recommend
from lskd_study.drawing.style import Drawing, write_drawing
from lskd_study.pages.notices import Notice, at_chance, data_versions, notices_of
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.results import AnyResult, Result, Results, RunKind, kind_name
from lskd_study.stats.intervals import Interval
from lskd_study.stores.state import rerun_command
from lskd_study.stores.summary import page_rows

PAGE = "index.html"  # of each study
# The best news for smoothing first.
MARKS = {
    "supported": "✓",
    "too small to matter": "≈",
    "cannot tell": "?",
    "contradicted": "✗",
    "no verdict": "–",
}


@dataclass(frozen=True)
class Page:
    """Everything that a study's folder shows, before any of it is written.

    Attributes:
        template: of the page.
        shown: what the template takes.
        texts: files beside the page.
        drawings: figures by what the names of their files begin with, below ``figures``.
    """

    template: str
    shown: Mapping[str, Any]
    texts: Mapping[str, str]
    drawings: Mapping[str, Drawing]

    def write(self, folder: Path) -> None:
        """Write it, the page last.

        Raises:
            LskdError: when the folder cannot be written.
        """
        for stem, drawing in self.drawings.items():
            write_drawing(drawing, folder / "figures" / stem)
        for name, text in self.texts.items():
            write_text(folder / name, text)
        write_text(folder / PAGE, render(self.template, **self.shown))


def render(template: str, **shown: Any) -> str:
    """Return a template filled in as HTML text."""
    return environment().get_template(template).render(**shown)


def environment() -> Environment:
    """Return the templates, with the filters for numbers, the pages' script and the policy that admits it."""
    loader = PackageLoader("lskd_study.pages")
    found = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(
        number=number,
        exact=exact,
        interval=interval_text,
        digits=digits_of,
        sentence=sentence,
        unit=unit_text,
        method=method_text,
        p=p_text,
        css_string=css_string,
        code=code,
    )
    script = loader.get_source(found, "page.js")[0]
    found.globals.update(marks=MARKS, script=Markup(script), policy=content_security_policy(script))
    return found


def content_security_policy(script: str) -> str:
    """Return the policy of a page whose only script is this one: nothing is loaded, nothing else runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures carry their styles in attributes, which no hash can name.
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# Numbers and words


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Return a number with a true minus sign; a dash for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def counted(count: int, one: str, several: str = "") -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def digits_of(unit: str) -> int:
    """Return how many decimals a quantity of this unit is given with."""
    few = {"points": 2, "points per point": 2, "standard deviations": 2, "perplexity": 3}
    return few.get(unit, 4)


def unit_text(unit: str) -> str:
    """Return a unit as it stands behind a number in the table."""
    return {"standard deviations": "SD", "points per point": "per point"}.get(unit, unit)


def ends_text(low: float, high: float, unit: str) -> str:
    """Return ``low to high`` with signs."""
    return " to ".join(number(end, digits_of(unit), sign=True) for end in (low, high))


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return ``low to high`` with signs, or a dash."""
    return ends_text(interval.low, interval.high, unit) if interval is not None and interval.known else "–"


def p_text(p: float) -> str:
    """Return a p-value in three digits; a dash for NaN."""
    return "< 0.001" if p < 0.001 else number(p, 3)


def method_text(interval: Interval | None) -> str:
    """Return how an interval was made and of what, in words; empty where there is none."""
    if interval is None:
        return ""
    counts = [counted(interval.networks, "network")] if interval.networks else []
    counts.append(counted(interval.seeds, "seed"))
    if interval.samples > 1:
        counts.append(counted(interval.samples, "sample"))
    return f"{interval.method}; {', '.join(counts)}"


def sentence(text: str) -> str:
    """Return a text with a capital at its start, the rest as it is."""
    return text[:1].upper() + text[1:]


def code(text: str) -> Markup:
    """Return text with what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    parts[1::2] = [Markup("<code>{}</code>").format(part) for part in parts[1::2]]
    return Markup().join(parts)


def css_string(text: str) -> Markup:
    """Return text, HTML or not, as a string of a style sheet; whatever could end it is written as a code."""
    plain = Markup(text).unescape()
    return Markup('"' + "".join(c if c.isalnum() or c == " " else f"\\{ord(c):x} " for c in plain) + '"')


# The table of claims

HEADINGS = {
    "student": "Students",
    "teacher": "Teachers",
    "trend": "Trends over settings, networks or studies",
}


def claims_shown(findings: Sequence[Finding], seconds: float = math.nan) -> dict[str, Any]:
    """Return what ``claims.html.j2`` takes: findings by section and claim, their number and their outlook.

    ``seconds``: what the runs of one more seed take.
    """
    sections: dict[str, dict[Claim, list[Finding]]] = {heading: {} for heading in HEADINGS.values()}
    for finding in findings:
        sections[HEADINGS[finding.claim.role]].setdefault(finding.claim, []).append(finding)
    return {
        "claim_sections": {heading: claims for heading, claims in sections.items() if claims},
        "tested": number_of_tests(findings),
        "outlook": partial(after, seconds=seconds),
        "looks": [],
        "pooled": False,
    }


def results_shown(results: Results[AnyResult], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what the pages of studies take alike: notices, missing runs, claims, provenance, commands."""
    return {
        **claims_shown(findings, seconds_a_seed(results)),
        "looks": results.plan.looks,
        "pooled": results.plan.pool_seed_variance,
        "plan": results.plan,
        "notices": [*missing_notice(results.missing, len(results.plan.runs)), *notices_of(results)],
        "provenance": provenance_rows(results),
        "commands": commands_of(results),
    }


def missing_notice(missing: Sequence[str], planned: int) -> list[Notice]:
    """Return which runs are missing; nothing where none is. The command names them itself."""
    title = f"{len(missing)} of {planned} runs are missing; what follows is made from the others."
    return [Notice(title, tuple(missing))] if missing else []


def advice_of(results: Results[AnyResult], findings: Sequence[Finding]) -> Recommendation:
    """Return what the page opens with: nothing is recommended where the runs cannot be compared."""
    # A control at chance leaves only what was held against it unknown.
    weak = (results.plan.by_id[name] for name in at_chance(results))
    controls = {(run.real, run.smoothing) for run in weak if run.role == "control"}
    return recommend(results, [_against(one, controls) for one in findings], barred(results))


def barred(results: Results[AnyResult]) -> str:
    """Return why the runs cannot be compared; empty where they can."""
    if data_versions(results):
        return "the data changed within the study"
    weak = [name for name in at_chance(results) if results.plan.by_id[name].role != "control"]
    return f"{counted(len(weak), 'run is', 'runs are')} no better than chance" if weak else ""


def _against(finding: Finding, weak: Container[tuple[bool, float]]) -> Finding:
    """Return a finding, without a result where it is against a kind of control that is at chance."""
    control = finding.claim.control
    if control is None or (control == "real", finding.setting.baseline) not in weak:
        return finding
    note = "networks without a teacher are no better than chance"
    return replace(finding, interval=None, verdict="no verdict", failed=True, note=note)


# Provenance


def commands_of(results: Results[AnyResult]) -> dict[RunKind, dict[str, Any]]:
    """Return what repeats the finished runs by kind: place and heading on the page; run, seconds, command.

    To be pasted in the folder where the study was started.
    """
    return {
        kind: {
            "id": f"runs-{position}",
            "title": sentence(kind_name(results.plan, kind)),
            "of_runs": [_command(results.plan, result) for result in runs],
        }
        for position, (kind, runs) in enumerate(results.finished_by_kind.items())
    }


def _command(plan: Plan, result: Result) -> tuple[str, float, str]:
    job, environment = result.job, result.job["environment"]
    set_first = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items() if value)
    # Not as recorded: the output folder may have been moved since, and the teacher's weights with it.
    command = rerun_command(plan, result.run, environment=environment)
    return job["run"], job["wall_time_s"], f"{set_first} {command}".lstrip()


def provenance_rows(results: Results[AnyResult]) -> list[tuple[str, str]]:
    """Return what the study was made with, as (name, value); what differs between runs is listed."""
    seen: dict[str, dict[str, None]] = defaultdict(dict)
    jobs = results.jobs
    for job in jobs:
        git = job["git"]
        changed = ", with local changes" if git and git["modified"] else ""
        for name, value in (
            *job["versions"].items(),
            ("hardware", machine_text(job["hardware"])),
            ("git", f"{git['commit'][:12]}{changed}" if git else "not a checkout"),
            ("data", f"{job['data']['path']}, sha256 {job['data']['sha256'][:16]}"),
        ):
            seen[name][value] = None
    resumed = sum(job["resumed"] for job in jobs)
    failed = f"{len(results.failed)} failed, " if results.failed else ""
    prepare = results.plan.prepare_arguments
    own = [
        ("Study file", results.plan.study_file),
        ("Data", " / ".join(seen.pop("data"))),
        *([("Data made by", shlex.join(["lskd", *prepare]))] if prepare else []),
        ("Seeds", ", ".join(map(str, results.plan.seeds))),
        *([("Students for each seed", str(repeats))] if (repeats := results.plan.student_seeds) > 1 else []),
        (
            "Runs",
            f"{len(results.finished)} finished, {failed}{len(results.missing)} missing, {resumed} resumed",
        ),
        (
            "Time in runs",
            f"{sum(job['wall_time_s'] for job in jobs) / 60:.1f} minutes, all runs one after the other",
        ),
        ("Hardware", " / ".join(seen.pop("hardware"))),
        ("Git state of the code", " / ".join(seen.pop("git"))),
        ("Last run finished", max(job["finished"] for job in jobs)[:16].replace("T", " ") + " UTC"),
    ]
    versions = ", ".join(f"{name} {' / '.join(values)}" for name, values in seen.items())
    return [*own, *page_rows(results.plan), ("Versions", versions)]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return CPU, cores and GPUs (equal ones counted) in words."""
    gpus = [f"{count} × {name}" if count > 1 else name for name, count in Counter(machine["gpus"]).items()]
    cuda = f" (CUDA {machine['cuda']})" if machine.get("cuda") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {', '.join(gpus) or 'no GPU'}{cuda}"
