"""The paper's claims that a study can test, and the verdict on each.

One table, ``CLAIMS``; the verdicts of a page are one family, corrected together (Holm).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lskd import LskdError
from lskd_study.plan import Plan
from lskd_study.results import Kind, PerSample, Result, Results, common_seeds, is_translation
from lskd_study.statistics import CROSSED, LEVEL, Interval, crossed_interval, holm, no_interval, seed_interval

Verdict = Literal["supported", "contradicted", "cannot tell"]
Task = Literal["images", "translation"]
# (without, with smoothing), one pair per network
Groups = Sequence[tuple[Mapping[int, Result], Mapping[int, Result]]]
BOTH: tuple[Task, ...] = ("images", "translation")


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: quantity (smoothed minus baseline) and the side it should lie on.

    ``direction`` 0 marks a part that is reported with its interval but is no claim of the paper.
    """

    id: str
    text: str
    tested: str
    source: str
    role: Literal["teacher", "student"]
    quantity: str
    unit: str
    direction: Literal[1, 0, -1]
    tasks: tuple[Task, ...] = ("images",)


CLAIMS = (
    Claim(
        "better-student",
        "A label-smoothed teacher distils a better student",
        "difference in the students’ top-1 accuracy is above 0; the paper’s words are “as good or better”, "
        "which names no margin, so the stricter half is tested; the interval says how much worse is possible",
        "Table 2",
        "student",
        "top1",
        "points",
        1,
    ),
    Claim(
        "lower-instability",
        "Label smoothing lowers the teacher’s 1−S (erases information within a class)",
        "difference in 1−S, Algorithm 1, is below 0",
        "Table 1",
        "teacher",
        "instability",
        "",
        -1,
    ),
    Claim(
        "larger-loss",
        "The distillation loss of a smoothed teacher is larger",
        "difference in the training cross-entropy of the last epoch is above 0",
        "Fig. 5",
        "student",
        "train_ce",
        "nats",
        1,
    ),
    Claim(
        "better-student",
        "A label-smoothed teacher distils a student of higher BLEU",
        "difference in the students’ BLEU on the test set (sacreBLEU, detokenised) is above 0; the paper "
        "shows curves, without numbers or a margin",
        "Fig. 7, right",
        "student",
        "bleu",
        "points",
        1,
        ("translation",),
    ),
    Claim(
        "better-teacher",
        "Label smoothing raises the teacher’s BLEU",
        "difference in the teachers’ BLEU on the test set (sacreBLEU, detokenised) is above 0",
        "Fig. 7, left",
        "teacher",
        "bleu",
        "points",
        1,
        ("translation",),
    ),
    Claim(
        "worse-perplexity",
        "Label smoothing makes the teacher’s perplexity worse",
        "difference in the teachers’ validation perplexity, measured with hard labels at the epoch of the "
        "checkpoint whose BLEU is compared, is above 0; the paper says so in words, after Vaswani et al. "
        "2017, and prints no number",
        "text on Fig. 7",
        "teacher",
        "val_ppl",
        "perplexity",
        1,
        ("translation",),
    ),
    Claim(
        "larger-loss",
        "The distillation loss of a smoothed teacher is larger",
        "difference in the training cross-entropy of the last epoch is above 0; the paper shows this for "
        "images, not for translation",
        "Fig. 5",
        "student",
        "train_ce",
        "nats",
        1,
        ("translation",),
    ),
    Claim(
        "loss-part-kl",
        "of which: KL divergence from the teacher",
        "what the student has not learned",
        "Eq. 3",
        "student",
        "train_kl",
        "nats",
        0,
        BOTH,
    ),
    Claim(
        "loss-part-entropy",
        "of which: the teacher’s entropy",
        "what no student can go below",
        "Eq. 3",
        "student",
        "train_teacher_entropy",
        "nats",
        0,
        BOTH,
    ),
)


def claims_of(plan: Plan) -> list[Claim]:
    """Return the claims that a study of this kind tests; the first is the headline of its page."""
    task: Task = "translation" if is_translation(plan) else "images"
    return [claim for claim in CLAIMS if task in claim.tasks]


@dataclass(frozen=True)
class Setting:
    """One comparison of a study: two smoothing values at one temperature and hard weight."""

    baseline: float
    smoothing: float
    temperature: float
    hard_weight: float

    def describe(self, role: Literal["teacher", "student"] = "student") -> str:
        """Return the setting in words; a teacher has no temperature and no hard weight."""
        arms = f"α {self.smoothing:g} against {self.baseline:g}"
        return arms if role == "teacher" else f"{arms}, T = {self.temperature:g}, λ = {self.hard_weight:g}"


@dataclass(frozen=True)
class Finding:
    """A claim tested in one setting. ``interval`` is None when no pair of runs is there."""

    claim: Claim
    setting: Setting
    interval: Interval | None
    verdict: Verdict | None
    adjusted_p: float
    note: str

    @property
    def changed_by_holm(self) -> bool:
        """Whether the interval excludes zero, but the correction for several claims took the verdict back."""
        if self.interval is None or self.interval.seeds < 2:
            return False
        return self.interval.p_value < 1 - LEVEL and self.verdict == "cannot tell"


def settings(results: Results[Kind]) -> list[Setting]:
    """Return the comparisons of a study, in the order of its file."""
    plan = results.plan
    students = [run for run in plan.runs if run.role == "student"]
    pairs = dict.fromkeys((run.temperature, run.hard_weight) for run in students)
    baseline, *others = plan.smoothing
    return [Setting(baseline, alpha, t, hard) for t, hard in pairs for alpha in others]


def judge(results: Results[Kind]) -> list[Finding]:
    """Test every claim in every setting; verdicts are corrected for their number (Holm)."""
    drafts: list[tuple[Claim, Setting, Interval | None, str]] = []
    for position, setting in enumerate(settings(results)):
        for claim in claims_of(results.plan):
            # A teacher has no temperature and no hard weight: once per smoothing value is enough.
            if claim.role == "teacher" and position >= len(results.plan.smoothing) - 1:
                continue
            interval, note = _estimate(results, claim, setting)
            drafts.append((claim, setting, interval, note))
    return _decide(drafts)


def _decide(drafts: Sequence[tuple[Claim, Setting, Interval | None, str]]) -> list[Finding]:
    # One seed allows no verdict, so it is no test either and costs the others nothing.
    family = [
        interval.p_value if interval is not None and interval.seeds > 1 and claim.direction else math.nan
        for claim, _, interval, _ in drafts
    ]
    return [
        Finding(claim, setting, interval, verdict(claim, interval, float(p)), float(p), note)
        for (claim, setting, interval, note), p in zip(drafts, holm(family), strict=True)
    ]


def verdict(claim: Claim, interval: Interval | None, adjusted_p: float) -> Verdict | None:
    """Return the verdict on a claim; None for a part that is no claim of the paper.

    One seed is never enough: its interval leaves out what seeds vary.
    """
    if not claim.direction:
        return None
    if interval is None or interval.seeds < 2 or not interval.known or not adjusted_p < 1 - LEVEL:
        return "cannot tell"
    return "supported" if interval.estimate * claim.direction > 0 else "contradicted"


def groups(
    results: Results[Kind], claim: Claim, setting: Setting
) -> dict[str, tuple[dict[int, Kind], dict[int, Kind]]]:
    """Return (without, with smoothing) results by seed for each teacher, or each student of each teacher."""
    plan = results.plan
    arms = (setting.baseline, setting.smoothing)
    teachers = dict.fromkeys(run.model for run in plan.runs if run.role == "teacher")
    if claim.role == "teacher":
        pairs = {name: [results.teachers(name, alpha) for alpha in arms] for name in teachers}
    else:
        models = dict.fromkeys(run.model for run in plan.runs if run.role == "student")
        t, hard = setting.temperature, setting.hard_weight
        pairs = {
            (f"{student} of {teacher}" if len(teachers) > 1 else student): [
                results.students(student, teacher, alpha, t, hard) for alpha in arms
            ]
            for teacher in teachers
            for student in models
        }
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()}


def _estimate(results: Results[Kind], claim: Claim, setting: Setting) -> tuple[Interval | None, str]:
    pairs = list(groups(results, claim, setting).values())
    seeds = common_seeds([group for pair in pairs for group in pair])
    lost = [seed for seed in results.plan.seeds if seed not in seeds]
    note = f"without seed {', '.join(map(str, lost))}: runs are missing" if lost else ""
    if not seeds:
        return None, "no seed has all of its runs"
    try:
        return estimate(claim.quantity, pairs, seeds), note
    except LskdError as error:
        return None, "; ".join(filter(None, [str(error), note]))


def estimate(quantity: str, pairs: Groups, seeds: Sequence[int]) -> Interval:
    """Return the paired difference (smoothed minus baseline), averaged over networks, with its interval.

    Accuracy is in percentage points, BLEU in points, losses in nats, 1-S and perplexity as they are.

    Raises:
        LskdError: when the quantity is missing or not finite in some run.
    """
    if pairs[0][0][seeds[0]].per_sample(quantity) is None:
        by_seed = [
            np.mean([with_[seed].value(quantity) - without[seed].value(quantity) for without, with_ in pairs])
            for seed in seeds
        ]
        return seed_interval(by_seed)
    measured = [
        [(_per_sample(without[seed], quantity), _per_sample(with_[seed], quantity)) for seed in seeds]
        for without, with_ in pairs
    ]
    rows = [[after.values - before.values for before, after in network] for network in measured]
    table = np.asarray(np.mean(rows, axis=0))
    one = measured[0][0][0]
    problems = [
        sample.problem for network in measured for pair in network for sample in pair if sample.problem
    ]
    if problems:
        nothing = no_interval(float(table.mean()), len(seeds), table.shape[1], CROSSED, problems[0])
        return nothing.scaled(one.scale)
    return crossed_interval(table, one.strata, bounded=one.bounded).scaled(one.scale)


def _per_sample(result: Result, quantity: str) -> PerSample:
    found = result.per_sample(quantity)
    assert found is not None  # the same for every run of a study
    return found
