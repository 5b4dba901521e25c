"""The claims (``claims.yaml``), which of them a study tests, and in which of its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter

from lskd_study.claims.contrasts import SHOTS, classes_of_shot, is_long_tailed
from lskd_study.plan.kinds import Control
from lskd_study.plan.matching import PAPERS_ALPHA
from lskd_study.plan.plan import Plan, exact
from lskd_study.stats.trends import FEWEST

Task = Literal["images", "binary", "translation"]
Role = Literal["teacher", "student", "trend"]
# What is estimated: see `judging` for the first seven, `several` for the others.
Contrast = Literal[
    "difference",  # smoothed minus baseline
    "hard-weight",  # fitted change of one arm from the smallest to the largest hard weight
    "gain-hard-weight",  # the same of the difference
    "gain-temperature",  # the difference above the lowest temperature minus that at the lowest
    "networks",  # fitted change over teacher networks
    "control",  # students minus the same network without a teacher, see `Claim.control`
    "direction",  # whether the student's difference has the sign of the teacher's
    "gain-classes",  # over studies: fitted change of the difference for ten times the classes
    "gain-long-tail",  # over studies: the difference on long-tailed data minus that on others
]
OVER_STUDIES = ("gain-classes", "gain-long-tail")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement: a quantity, how it is contrasted, and the side of zero on which the result should lie.

    ``claims.yaml`` says what each attribute is.
    """

    id: str
    text: str
    tested: str
    source: str
    role: Role
    quantity: str
    unit: str
    direction: Literal[1, 0, -1]
    tasks: tuple[Task, ...] = ("images", "binary")
    contrast: Contrast = "difference"
    whose: Literal["teacher", "student"] = "student"
    explained_by: str = ""
    non_inferior: bool = False
    control: Control | None = None

    @property
    def has_margin(self) -> bool:
        """Whether a difference smaller than the study's margin is too small to matter: one of accuracies."""
        accuracies = self.contrast in ("difference", "control") and self.quantity == "top1"
        return accuracies and not self.non_inferior

    @property
    def measured_on(self) -> Literal["teacher", "student"]:
        """Whose runs the quantity is taken from."""
        return self.whose if self.role == "trend" else self.role


CLAIMS = TypeAdapter(tuple[Claim, ...]).validate_python(
    yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
)


# Which a study tests: that follows from its plan, and for long tails from its training data


def claims_of(plan: Plan) -> list[Claim]:
    """Return the claims that this study tests; the first is the headline of its page."""
    return [claim for claim in CLAIMS if task_of(plan) in claim.tasks and _can_test(plan, claim)]


def task_of(plan: Plan) -> Task:
    """Return the kind of study: mmcls' students are binary networks."""
    return "binary" if plan.ecosystem == "mmcls" else plan.kind.name


def _can_test(plan: Plan, claim: Claim) -> bool:
    if claim.contrast in OVER_STUDIES:
        return False
    if plan.teachers_alone and (claim.measured_on == "student"):
        return False
    if claim.control is not None:
        return claim.control in plan.controls
    if claim.contrast in ("hard-weight", "gain-hard-weight"):
        return len(hard_weights_of(plan)) > 1
    if claim.contrast == "gain-temperature":
        return len(temperatures_of(plan)) > 1
    if claim.contrast == "networks":
        return len(models_of(plan, "teacher")) >= FEWEST
    if claim.id == "long-tail":
        return is_long_tailed(plan)
    if claim.quantity in SHOTS:
        return is_long_tailed(plan) and all(classes_of_shot(plan, shot) for shot in SHOTS)
    if claim.quantity == "separation":
        return plan.num_classes > 2  # with two every pair is the similar one
    return True


# Where in it


@dataclass(frozen=True)
class Setting:
    """One comparison of a study: two smoothing values at one temperature and hard weight.

    Beside a control ``baseline`` is the smoothing of its labels.
    ``words`` says it where that is not all, for a trend over several of them.
    """

    baseline: float
    smoothing: float
    temperature: float
    hard_weight: float
    words: str = ""

    def describe(self, role: Role = "student") -> str:
        """Return the setting in words; a teacher has no temperature and no hard weight."""
        arms = _arms(self.baseline, self.smoothing)
        loss = f", T = {exact(self.temperature)}, λ = {exact(self.hard_weight)}"
        return self.words or (arms if role == "teacher" else f"{arms}{loss}")


def arms_of(plan: Plan) -> list[float]:
    """Return the teachers' smoothing: the smallest, which is the baseline, the paper's 0.1, the others."""
    baseline, *others = plan.smoothing
    return [baseline, *sorted(others, key=lambda alpha: alpha != PAPERS_ALPHA)]


def settings_of(claim: Claim, plan: Plan) -> list[Setting]:
    """Return the settings that a claim is tested in; of a trend each has all that the trend is over."""
    baseline, *others = arms_of(plan)
    losses, temperatures, hard_weights = losses_of(plan), temperatures_of(plan), hard_weights_of(plan)
    if claim.control is not None:
        alike = claim.control == "smoothed"
        pairs = [(a if alike else 0.0, a) for a in (others if alike else plan.smoothing)]
        varied = len(temperatures) > 1, len(hard_weights) > 1
        return [Setting(*arms, *loss, _beside(*arms, loss, varied)) for loss in losses for arms in pairs]
    if claim.contrast == "networks":
        every = every_arm(plan)
        if claim.measured_on == "teacher":
            return [Setting(baseline, plan.smoothing[-1], *losses[0], every)]
        return [
            Setting(baseline, plan.smoothing[-1], t, hard, f"{every}; T = {exact(t)}, λ = {exact(hard)}")
            for t, hard in losses
        ]
    if claim.contrast in ("hard-weight", "gain-hard-weight"):
        over = f"λ {exact(hard_weights[0])} to {exact(hard_weights[-1])}"
        fixed = [(t, losses[0][1], f"T = {exact(t)}, {over}") for t in temperatures]
    elif claim.contrast == "gain-temperature":
        low, *higher = temperatures
        over = f"T = {', '.join(map(exact, higher))} against {exact(low)}"
        fixed = [(low, hard, f"{over}, λ = {exact(hard)}") for hard in hard_weights]
    else:
        losses = losses[:1] if claim.role == "teacher" else losses
        return [Setting(baseline, alpha, t, hard) for t, hard in losses for alpha in others]
    arms = {alpha: _arms(baseline, alpha) for alpha in others}
    if claim.contrast == "hard-weight":
        arms = {alpha: f"teacher’s α = {exact(alpha)}" for alpha in plan.smoothing}
    return [
        Setting(baseline, alpha, t, hard, f"{words}, {rest}")
        for t, hard, rest in fixed
        for alpha, words in arms.items()
    ]


def every_arm(plan: Plan) -> str:
    """Return in words what a trend over networks takes of each."""
    return f"mean over α {', '.join(map(exact, plan.smoothing))}"


def temperatures_of(plan: Plan) -> list[float]:
    """Return the temperatures of a study's students, in rising order."""
    return sorted({run.temperature for run in plan.runs if run.role == "student"})


def hard_weights_of(plan: Plan) -> list[float]:
    """Return the hard weights of a study's students, in rising order."""
    return sorted({run.hard_weight for run in plan.runs if run.role == "student"})


def models_of(plan: Plan, role: str) -> list[str]:
    """Return the networks of a study's teachers or students, in the order of its file."""
    return list(dict.fromkeys(run.model for run in plan.runs if run.role == role))


def losses_of(plan: Plan) -> Sequence[tuple[float, float]]:
    """Return temperature and hard weight of each kind of student; the paper's own where there are none."""
    students = [run for run in plan.runs if run.role == "student"]
    return list(dict.fromkeys((run.temperature, run.hard_weight) for run in students)) or [(1.0, 0.0)]


def _beside(labels: float, alpha: float, loss: Sequence[float], varied: Sequence[bool]) -> str:
    own = (
        f", {name} = {exact(value)}" for name, value, named in zip("Tλ", loss, varied, strict=True) if named
    )
    return f"teacher’s α = {exact(alpha)}{''.join(own)} against labels’ α = {exact(labels)}"


def _arms(baseline: float, alpha: float) -> str:
    return f"α {exact(alpha)} against {exact(baseline)}"
