"""Which claims a study can test; that follows from its plan, and for long tails from its training data."""

from lskd_study.claims.long_tail import SHOTS, classes_of_shot, is_long_tailed
from lskd_study.claims.settings import hard_weights_of, models_of, temperatures_of
from lskd_study.claims.statements import CLAIMS, OVER_STUDIES, Claim, Task
from lskd_study.plan.plan import Plan
from lskd_study.results.results import is_translation
from lskd_study.stats.trends import FEWEST


def claims_of(plan: Plan) -> list[Claim]:
    """Return the claims that this study tests; the first is the headline of its page."""
    return [claim for claim in CLAIMS if task_of(plan) in claim.tasks and _can_test(plan, claim)]


def task_of(plan: Plan) -> Task:
    """Return the kind of study: mmcls' students are binary networks."""
    if is_translation(plan):
        return "translation"
    return "binary" if plan.ecosystem == "mmcls" else "images"


def _can_test(plan: Plan, claim: Claim) -> bool:
    if claim.contrast in OVER_STUDIES:
        return False
    if plan.teachers_alone and (claim.measured_on == "student"):
        return False
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
