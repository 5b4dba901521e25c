"""The paper's claims that studies can test, and the verdict on each.

``claims.yaml``: the table of claims. ``statements``: which of them a study tests, and where in it.
``contrasts``: estimates with their intervals. ``findings``: correction and verdicts. ``judging``: one study,
``several``: several together.
"""

from lskd_study.claims.findings import DECIDED, Finding, number_of_tests, verdict
from lskd_study.claims.judging import estimate, groups, judge
from lskd_study.claims.several import judge_several
from lskd_study.claims.statements import CLAIMS, Claim, Setting, claims_of, settings_of

__all__ = [
    "CLAIMS",
    "DECIDED",
    "Claim",
    "Finding",
    "Setting",
    "claims_of",
    "estimate",
    "groups",
    "judge",
    "judge_several",
    "number_of_tests",
    "settings_of",
    "verdict",
]
