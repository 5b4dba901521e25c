"""The paper's claims that studies can test, and the verdict on each.

``statements``: the table of claims. ``scope``: which of them a study tests. ``settings``: where in it.
``contrasts`` and ``trends``: estimates with their intervals. ``findings``: correction and verdicts.
``judging``: one study, ``several`` and ``pooled``: several together.
"""

from lskd_study.claims.findings import Finding, Verdict, number_of_tests, verdict
from lskd_study.claims.judging import Groups, estimate, groups, judge
from lskd_study.claims.scope import claims_of
from lskd_study.claims.settings import Setting, settings
from lskd_study.claims.several import judge_several
from lskd_study.claims.statements import CLAIMS, Claim

__all__ = [
    "CLAIMS",
    "Claim",
    "Finding",
    "Groups",
    "Setting",
    "Verdict",
    "claims_of",
    "estimate",
    "groups",
    "judge",
    "judge_several",
    "number_of_tests",
    "settings",
    "verdict",
]
