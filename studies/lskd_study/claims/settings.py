"""Where in a study a claim is tested: which smoothing values, temperature and hard weight."""

from collections.abc import Sequence
from dataclasses import dataclass

from lskd_study.claims.statements import Claim, Role
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.results import Kind, Results


@dataclass(frozen=True)
class Setting:
    """One comparison of a study: two smoothing values at one temperature and hard weight.

    ``words`` says it where that is not all, for a trend over several of them.
    """

    baseline: float
    smoothing: float
    temperature: float
    hard_weight: float
    words: str = ""

    def describe(self, role: Role = "student") -> str:
        """Return the setting in words; a teacher has no temperature and no hard weight."""
        if self.words:
            return self.words
        arms = f"α {exact(self.smoothing)} against {exact(self.baseline)}"
        return (
            arms
            if role == "teacher"
            else f"{arms}, T = {exact(self.temperature)}, λ = {exact(self.hard_weight)}"
        )


def settings(results: Results[Kind]) -> list[Setting]:
    """Return the comparisons of a study, in the order of its file."""
    plan = results.plan
    baseline, *others = plan.smoothing
    return [Setting(baseline, alpha, t, hard) for t, hard in _losses(plan) for alpha in others]


def settings_of(claim: Claim, plan: Plan) -> list[Setting]:
    """Return the settings that a claim is tested in; of a trend each holds all that the trend is over."""
    baseline, *others = plan.smoothing
    losses = _losses(plan)
    first_t, first_hard = losses[0]
    if claim.role == "teacher":
        return [Setting(baseline, alpha, first_t, first_hard) for alpha in others]
    temperatures, hard_weights = temperatures_of(plan), hard_weights_of(plan)
    if claim.contrast == "hard-weight":
        return [
            Setting(
                baseline,
                alpha,
                t,
                first_hard,
                f"teacher’s α = {exact(alpha)}, T = {exact(t)}, {_range('λ', hard_weights)}",
            )
            for t in temperatures
            for alpha in plan.smoothing
        ]
    if claim.contrast == "gain-hard-weight":
        return [
            Setting(
                baseline,
                alpha,
                t,
                first_hard,
                f"{_arms(baseline, alpha)}, T = {exact(t)}, {_range('λ', hard_weights)}",
            )
            for t in temperatures
            for alpha in others
        ]
    if claim.contrast == "gain-temperature":
        low, *higher = temperatures
        over = f"T = {', '.join(f'{exact(t)}' for t in higher)} against {exact(low)}"
        return [
            Setting(baseline, alpha, low, hard, f"{_arms(baseline, alpha)}, {over}, λ = {exact(hard)}")
            for hard in hard_weights
            for alpha in others
        ]
    if claim.contrast == "networks":
        every = f"mean over α {', '.join(f'{exact(alpha)}' for alpha in plan.smoothing)}"
        if claim.measured_on == "teacher":
            return [Setting(baseline, others[-1], first_t, first_hard, every)]
        return [
            Setting(baseline, others[-1], t, hard, f"{every}; T = {exact(t)}, λ = {exact(hard)}")
            for t, hard in losses
        ]
    return [Setting(baseline, alpha, t, hard) for t, hard in losses for alpha in others]


def temperatures_of(plan: Plan) -> list[float]:
    """Return the temperatures of a study's students, in rising order."""
    return sorted({run.temperature for run in plan.runs if run.role == "student"})


def hard_weights_of(plan: Plan) -> list[float]:
    """Return the hard weights of a study's students, in rising order."""
    return sorted({run.hard_weight for run in plan.runs if run.role == "student"})


def models_of(plan: Plan, role: str) -> list[str]:
    """Return the networks of a study's teachers or students, in the order of its file."""
    return list(dict.fromkeys(run.model for run in plan.runs if run.role == role))


def _losses(plan: Plan) -> list[tuple[float, float]]:
    """Return temperature and hard weight of each kind of student; the paper's own where there are none."""
    students = [run for run in plan.runs if run.role == "student"]
    return list(dict.fromkeys((run.temperature, run.hard_weight) for run in students)) or [(1.0, 0.0)]


def _arms(baseline: float, alpha: float) -> str:
    return f"α {exact(alpha)} against {exact(baseline)}"


def _range(name: str, values: Sequence[float]) -> str:
    return f"{name} {exact(values[0])} to {exact(values[-1])}"
