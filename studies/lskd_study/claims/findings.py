"""Findings: claims with their estimates, corrected for their number, and the verdicts on them."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lskd_study.claims.settings import Setting
from lskd_study.claims.statements import Claim
from lskd_study.stats.intervals import LEVEL, Interval, holm

Verdict = Literal["supported", "contradicted", "cannot tell", "no verdict"]


@dataclass(frozen=True)
class Finding:
    """A claim tested in one setting.

    Attributes:
        claim: what was tested.
        setting: where.
        interval: None when no pair of runs is there.
        verdict: None for a part that is no claim; ``no verdict`` where a run that it needs failed.
        adjusted_p: corrected for all tests of the page; NaN where nothing was tested.
        note: what is missing, or why there is no result.
        p_value: before the correction.
        null: the value that the claim is tested against: 0, or the negative margin.
        runs: how many finished runs the estimate rests on.
    """

    claim: Claim
    setting: Setting
    interval: Interval | None
    verdict: Verdict | None
    adjusted_p: float
    note: str
    p_value: float = math.nan
    null: float = 0.0
    runs: int = 0

    @property
    def parameter(self) -> tuple[object, ...]:
        """What the claim is about: claims about one parameter count once in the correction."""
        return _parameter(self.claim, self.setting)

    @property
    def changed_by_holm(self) -> bool:
        """Whether the interval excludes the null value, but the correction took the verdict back."""
        if self.interval is None or not self.interval.holds_seeds:
            return False
        return self.p_value < 1 - LEVEL and self.verdict == "cannot tell"


@dataclass(frozen=True)
class Draft:
    """A claim estimated in one setting, before the correction; ``p_value`` is against ``null``.

    ``failed``: a run that it needs failed, so it has no estimate and gets no verdict.
    """

    claim: Claim
    setting: Setting
    interval: Interval | None = None
    p_value: float = math.nan
    note: str = ""
    null: float = 0.0
    runs: int = 0
    failed: bool = False

    @property
    def parameter(self) -> tuple[object, ...]:
        """What the claim is about: claims about one parameter count once in the correction."""
        return _parameter(self.claim, self.setting)

    @property
    def is_test(self) -> bool:
        """Whether it counts in the correction.

        One seed allows no verdict, so it is no test either and costs the others nothing. Nor does what only
        follows from the verdicts on other claims.
        """
        if self.interval is None or not self.claim.direction or self.claim.contrast == "direction":
            return False
        return self.interval.holds_seeds and not math.isnan(self.p_value)


def decide(drafts: Sequence[Draft], headline: bool = True) -> list[Finding]:
    """Correct for the number of tests and give the verdicts.

    Holm's method, claims about one parameter counted once. With ``headline`` the first draft is the question
    that the study was made for: it gets half of the error rate, and all others share the other half.
    """
    first = drafts[:1] if headline else []
    family = [draft.p_value if draft.is_test else math.nan for draft in drafts]
    others = {draft.parameter for draft in drafts if draft.is_test} - {draft.parameter for draft in first}
    weights: dict[Hashable, float] = {draft.parameter: float(max(len(others), 1)) for draft in first}
    adjusted = holm(family, [draft.parameter for draft in drafts], weights)
    findings = [_finding(draft, float(p)) for draft, p in zip(drafts, adjusted, strict=True)]
    return [
        _follow(finding, findings) if finding.claim.contrast == "direction" else finding
        for finding in findings
    ]


def number_of_tests(findings: Sequence[Finding]) -> int:
    """Return how many tests the verdicts were corrected for."""
    return len(
        {
            finding.parameter
            for finding in findings
            if not math.isnan(finding.adjusted_p) and finding.claim.contrast != "direction"
        }
    )


def verdict(claim: Claim, interval: Interval | None, adjusted_p: float, null: float = 0.0) -> Verdict | None:
    """Return the verdict on a claim; None for a part that is no claim of the paper.

    One seed is never enough, unless networks are random too: its interval leaves out what seeds vary.
    """
    if not claim.direction:
        return None
    if interval is None or not interval.holds_seeds or not interval.known or not adjusted_p < 1 - LEVEL:
        return "cannot tell"
    return "supported" if (interval.estimate - null) * claim.direction > 0 else "contradicted"


def _finding(draft: Draft, adjusted_p: float) -> Finding:
    found = verdict(draft.claim, draft.interval, adjusted_p, draft.null)
    return Finding(
        draft.claim,
        draft.setting,
        draft.interval,
        "no verdict" if found and draft.failed else found,
        adjusted_p,
        draft.note,
        draft.p_value,
        draft.null,
        draft.runs,
    )


def _parameter(claim: Claim, setting: Setting) -> tuple[object, ...]:
    return claim.contrast, claim.measured_on, claim.quantity, claim.explained_by, setting


def _follow(finding: Finding, findings: Sequence[Finding]) -> Finding:
    """Conclude from the verdicts on teacher and student whether their differences have one sign.

    A wrong conclusion takes a wrong verdict on one of the two, so it needs no correction of its own.
    """
    teacher = _of(findings, "better-teacher", replace(finding.setting, temperature=0, hard_weight=0))
    student = _of(findings, "better-student", finding.setting)
    failed = next((one for one in (teacher, student) if one and one.verdict == "no verdict"), None)
    if failed is not None:
        return replace(finding, interval=None, verdict="no verdict", note=failed.note, runs=0)
    if teacher is None or student is None or student.interval is None or teacher.interval is None:
        return finding
    finding = replace(finding, runs=teacher.runs + student.runs)
    both = float(np.maximum(teacher.adjusted_p, student.adjusted_p))
    if not (teacher.interval.holds_seeds and teacher.adjusted_p < 1 - LEVEL):
        note = "the teachers’ difference may have either sign, so there is no direction to follow"
        if not teacher.interval.holds_seeds:
            note = teacher.interval.note
        return replace(finding, interval=None, note=note, p_value=math.nan, adjusted_p=both)
    sign = math.copysign(1, teacher.interval.estimate)
    interval = student.interval.scaled(sign)
    return replace(
        finding,
        interval=interval,
        p_value=student.p_value,
        adjusted_p=both,
        verdict=verdict(finding.claim, interval, both),
    )


def _of(findings: Sequence[Finding], claim: str, setting: Setting) -> Finding | None:
    """Return the finding of a claim in a setting; a teacher's temperature and hard weight say nothing."""
    for finding in findings:
        if finding.claim.id != claim:
            continue
        own = finding.setting
        if finding.claim.role == "teacher":
            own = replace(own, temperature=0, hard_weight=0)
        if own == setting:
            return finding
    return None
