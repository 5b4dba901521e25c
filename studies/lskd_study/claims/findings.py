"""Findings: claims with their estimates, corrected for their number, and the verdicts on them."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lskd_study.claims.statements import Claim, Setting
from lskd_study.results.results import Result, common_seeds, failure_words, failures_of
from lskd_study.stats.intervals import LEVEL, Interval, holm
from lskd_study.stats.sequential import levels, sequential_p

Verdict = Literal["supported", "contradicted", "too small to matter", "cannot tell", "no verdict"]
DECIDED: tuple[Verdict, ...] = ("supported", "contradicted", "too small to matter")


@dataclass(frozen=True)
class Finding:
    """A claim tested in one setting; before ``decide`` estimated there.

    Attributes:
        claim: what was tested.
        setting: where.
        interval: None when no pair of runs is there.
        p_value: against ``null``, before the correction.
        note: what is missing, or why there is no result.
        p_small: against a difference as large as the margin, to either side; NaN for what has no margin.
        of_looks: interval and p-values are those of one of several looks.
        null: the value that the claim is tested against: 0, or the negative margin.
        runs: how many finished runs the estimate rests on.
        failed: a run that it needs failed, so it has no estimate and gets no verdict.
        verdict: None for a part that is no claim; ``no verdict`` where a run that it needs failed.
        adjusted_p: corrected for all tests of the page; NaN where nothing was tested.
    """

    claim: Claim
    setting: Setting
    interval: Interval | None = None
    p_value: float = math.nan
    p_small: float = math.nan
    of_looks: bool = False
    note: str = ""
    null: float = 0.0
    runs: int = 0
    failed: bool = False
    verdict: Verdict | None = None
    adjusted_p: float = math.nan

    @property
    def parameter(self) -> tuple[object, ...]:
        """What the claim is about: claims about one parameter count once in the correction."""
        claim = self.claim
        return claim.contrast, claim.measured_on, claim.quantity, claim.explained_by, self.setting

    @property
    def is_test(self) -> bool:
        """Whether it counts in the correction.

        One seed allows no verdict, so it is no test either and costs the others nothing. Nor does what only
        follows from the verdicts on other claims.
        """
        if self.interval is None or not self.claim.direction or self.claim.contrast == "direction":
            return False
        return self.interval.includes_seeds and not math.isnan(self.p_value)

    @property
    def changed_by_holm(self) -> bool:
        """Whether the interval excludes the null value, but the correction took the verdict back."""
        if self.interval is None or not self.interval.includes_seeds:
            return False
        return self.p_value < 1 - LEVEL and self.verdict == "cannot tell"

    def tested(self, interval: Interval, margin: float) -> "Finding":
        """Return it with its estimate, tested against ``null`` and against differences beyond the margin."""
        p_small = math.nan
        if self.claim.has_margin and interval.includes_seeds:
            p_small = max(interval.p_against(-margin), interval.p_against(margin))
            p_small = p_small if abs(interval.estimate) < margin else 1.0
        return replace(self, interval=interval, p_value=interval.p_against(self.null), p_small=p_small)

    def at_look(self, looks: Sequence[int], look: int) -> "Finding":
        """Return it as one of several looks at growing numbers of seeds (`stats.sequential`)."""
        if self.interval is None:
            return self
        return replace(
            self,
            interval=self.interval.at_level(1 - float(levels(looks)[look])),
            p_value=sequential_p(self.p_value, looks, look),
            p_small=sequential_p(self.p_small, looks, look),
            of_looks=True,
        )

    def noting(self, note: str) -> "Finding":
        """Return it with another note before its own."""
        return replace(self, note="; ".join(filter(None, [note, self.note])))

    def on_seeds(
        self, needed: Iterable[Mapping[int, Result]], planned: Sequence[int] = ()
    ) -> tuple["Finding", list[int]]:
        """Return it with the number of runs that it rests on, and the seeds that have all runs it needs.

        No seeds where one of the runs failed: those that did not are a choice by the result. The note says
        so, or which of the planned seeds are left out.
        """
        needed = list(needed)
        if failed := failures_of(needed):
            return replace(self, note=failure_words(failed), failed=True), []
        seeds = common_seeds(needed)
        if not seeds:
            return replace(self, note="no seed has all of its runs"), []
        lost = ", ".join(str(seed) for seed in planned if seed not in seeds)
        note = f"without seed {lost}: runs are missing" if lost else ""
        # By identity: runs of several studies may have one name.
        runs = len({id(one) for group in needed for seed in seeds for one in group[seed].each})
        return replace(self, note=note, runs=runs), seeds


def decide(estimated: Sequence[Finding], headline: bool = True) -> list[Finding]:
    """Correct for the number of tests and give the verdicts.

    Holm's method, claims about one parameter counted once. With ``headline`` the first finding is the
    question that the study was made for: it gets half of the error rate, all others share the other half.

    That a difference is smaller than the margin is tested too and costs nothing: if it is not, it is not zero
    either, and where it is tested for being worse by the margin, what is small to either side is also that.
    """
    first = estimated[:1] if headline else []
    family = [one.p_value if one.is_test else math.nan for one in estimated]
    family += [one.p_small if one.is_test else math.nan for one in estimated]
    others = {one.parameter for one in estimated if one.is_test} - {one.parameter for one in first}
    weights: dict[Hashable, float] = {one.parameter: float(max(len(others), 1)) for one in first}
    adjusted = list(map(float, holm(family, 2 * [one.parameter for one in estimated], weights)))
    findings = []
    for one, p, p_small in zip(estimated, adjusted, adjusted[len(estimated) :], strict=False):
        found = verdict(one.claim, one.interval, p, one.null)
        if found == "cannot tell" and p_small < 1 - LEVEL:
            found = "too small to matter"
        found = "no verdict" if found and one.failed else found
        findings.append(replace(one, verdict=found, adjusted_p=p))
    return [_follow(one, findings) if one.claim.contrast == "direction" else one for one in findings]


def number_of_tests(findings: Sequence[Finding]) -> int:
    """Return how many tests the verdicts were corrected for."""
    tested = [one for one in findings if one.claim.contrast != "direction" and not math.isnan(one.adjusted_p)]
    return len({finding.parameter for finding in tested})


def verdict(claim: Claim, interval: Interval | None, adjusted_p: float, null: float = 0.0) -> Verdict | None:
    """Return the verdict on a claim; None for a part that is no claim of the paper.

    One seed is never enough, unless networks are random too: its interval leaves out their variance.
    """
    if not claim.direction:
        return None
    if interval is None or not interval.includes_seeds or not interval.known or not adjusted_p < 1 - LEVEL:
        return "cannot tell"
    return "supported" if (interval.estimate - null) * claim.direction > 0 else "contradicted"


def _follow(finding: Finding, findings: Sequence[Finding]) -> Finding:
    """Conclude from the verdicts on teacher and student whether their differences have one sign.

    A wrong conclusion takes a wrong verdict on one of the two, so it needs no correction of its own.
    """
    # A teacher's temperature and hard weight say nothing.
    arms = finding.setting.baseline, finding.setting.smoothing
    teacher, student = (
        next((one for one in findings if one.claim.id == claim and same(one.setting)), None)
        for claim, same in (
            ("better-teacher", lambda own: (own.baseline, own.smoothing) == arms),
            ("better-student", lambda own: own == finding.setting),
        )
    )
    failed = next((one for one in (teacher, student) if one and one.verdict == "no verdict"), None)
    if failed is not None:
        return replace(finding, interval=None, verdict="no verdict", note=failed.note, runs=0)
    if teacher is None or student is None or student.interval is None or teacher.interval is None:
        return finding
    both = float(np.maximum(teacher.adjusted_p, student.adjusted_p))
    finding = replace(finding, runs=teacher.runs + student.runs, adjusted_p=both)
    if not (teacher.interval.includes_seeds and teacher.adjusted_p < 1 - LEVEL):
        note = "the teachers’ difference may have either sign, so there is no direction to follow"
        if not teacher.interval.includes_seeds:
            note = teacher.interval.note
        return replace(finding, interval=None, note=note, p_value=math.nan)
    interval = student.interval.scaled(math.copysign(1, teacher.interval.estimate))
    found = verdict(finding.claim, interval, both)
    return replace(finding, interval=interval, p_value=student.p_value, verdict=found)
