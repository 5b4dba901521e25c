"""The table of claims for a page: sections of student, teacher and trends; each claim with its settings."""

from collections.abc import Sequence
from dataclasses import dataclass

from lskd_study.claims import Claim, Finding
from lskd_study.stats.intervals import Interval

HEADINGS = {
    "student": "Students",
    "teacher": "Teachers",
    "trend": "Trends over settings, networks or studies",
}


@dataclass(frozen=True)
class Statement:
    """A claim with its findings, one for each setting, and the parts that it consists of."""

    claim: Claim
    findings: list[Finding]

    @property
    def margin(self) -> float:
        """How much worse still counts as good; 0 where the claim has no margin."""
        return abs(self.findings[0].null)

    @property
    def method(self) -> str:
        """How the intervals were made, where that is the same for all findings; else empty."""
        methods = {method_text(finding.interval) for finding in self.findings}
        return methods.pop() if len(methods) == 1 else ""


@dataclass(frozen=True)
class Section:
    """The claims about students, about teachers, or about trends."""

    heading: str
    statements: list[Statement]


def method_text(interval: Interval | None) -> str:
    """Return how an interval was made and of what, in words; empty where there is none."""
    if interval is None:
        return ""
    counts = [_count(interval.networks, "network")] if interval.networks else []
    counts.append(_count(interval.seeds, "seed"))
    if interval.samples > 1:
        counts.append(_count(interval.samples, "sample"))
    return f"{interval.method}; {', '.join(counts)}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    """Return a text with a capital at its start, the rest as it is."""
    return text[:1].upper() + text[1:]


def unit_text(unit: str) -> str:
    """Return a unit as it stands behind a number in the table."""
    return {"standard deviations": "SD", "points per point": "per point"}.get(unit, unit)


def claim_sections(findings: Sequence[Finding]) -> list[Section]:
    """Return findings by section and claim, in the order in which they come."""
    by_claim: dict[Claim, list[Finding]] = {}
    for finding in findings:
        by_claim.setdefault(finding.claim, []).append(finding)
    statements = [Statement(claim, found) for claim, found in by_claim.items()]
    by_role = {
        role: [statement for statement in statements if statement.claim.role == role] for role in HEADINGS
    }
    return [Section(HEADINGS[role], found) for role, found in by_role.items() if found]
