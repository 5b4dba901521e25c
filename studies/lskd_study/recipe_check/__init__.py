"""``lskd recipe check``: every recipe's real parts on a miniature of its data, so that no recipe rots."""

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lskd import LskdError
from lskd_study.plan.recipes import Recipe

if TYPE_CHECKING:
    from lskd_study.recipe_check.fairseq import FairseqChecks
    from lskd_study.recipe_check.mmcls import MmclsChecks
    from lskd_study.recipe_check.report import CheckedRecipe, CheckedRun
    from lskd_study.recipe_check.timm import TimmChecks


@dataclass(frozen=True)
class Outcome:
    """What came of one recipe.

    Attributes:
        name: the recipe's.
        checked: what was found; None where it was not in order or not tried.
        problem: what is wrong, in one line.
        missing: the extra that is not installed here.
    """

    name: str
    checked: "CheckedRecipe | None" = None
    problem: str = ""
    missing: str = ""


class Checks:
    """All checks of one call: what one recipe has tried is not tried again in the next."""

    def __init__(self, scratch: Path) -> None:
        """Keep a folder to write in."""
        self.scratch = scratch

    def check_all(self, recipes: Sequence[Recipe]) -> Iterator[Outcome]:
        """Yield what comes of each recipe, one after the other."""
        for recipe in recipes:
            missing = missing_extra(recipe)
            if missing:
                yield Outcome(recipe.name, missing=missing)
                continue
            try:
                yield Outcome(recipe.name, self._check(recipe))
            except LskdError as error:
                yield Outcome(recipe.name, problem=" ".join(str(error).split()))
            finally:
                shutil.rmtree(self.scratch / "runs", ignore_errors=True)

    def _check(self, recipe: Recipe) -> "CheckedRecipe":
        if recipe.kind == "teachers":
            from lskd_study.recipe_check.teacher_list import check_teacher_list

            return check_teacher_list(recipe, self.scratch)
        if recipe.ecosystem == "fairseq":
            return self._fairseq.check(recipe)
        if recipe.kind == "run":
            return self._mmcls.check(recipe)
        return self._timm.check(recipe) if recipe.ecosystem == "timm" else self._check_mmcls_study(recipe)

    def _check_mmcls_study(self, recipe: Recipe) -> "CheckedRecipe":
        """Check a study whose teachers are timm's and whose students are mmcls'."""
        from lskd_study.recipe_check.miniature import data_set
        from lskd_study.recipe_check.report import CheckedRecipe
        from lskd_study.study.engine import make_plan
        from lskd_study.trainers import trainer_of

        plan = make_plan(str(recipe.path), None)
        found: list[CheckedRun] = self._timm.check_plan(
            plan, data_set(plan.data, plan.num_classes), roles=("teacher",)
        )
        students = [run for run in plan.runs if run.role == "student"]
        for config in dict.fromkeys(run.config for run in students):
            members = [run for run in students if run.config == config]
            words = trainer_of("mmcls", "student").command(plan, members[-1])
            options = dict(word.split("=", 1) for word in words[words.index("--cfg-options") + 1 :])
            changes = {key: _value(text) for key, text in options.items()}
            name = f"student {members[-1].model}, {Path(config).name}"
            found.append(self._mmcls.check_file(Path(config), name, changes, len(members)))
        return CheckedRecipe(recipe.name, found)

    @cached_property
    def _timm(self) -> "TimmChecks":
        from lskd_study.recipe_check.timm import TimmChecks

        return TimmChecks(self.scratch)

    @cached_property
    def _mmcls(self) -> "MmclsChecks":
        from lskd_study.recipe_check.mmcls import MmclsChecks

        return MmclsChecks(self.scratch)

    @cached_property
    def _fairseq(self) -> "FairseqChecks":
        from lskd_study.recipe_check.fairseq import FairseqChecks

        return FairseqChecks(self.scratch)


def _value(text: str) -> str | float:
    """Return an option as the command line's reader would take it: a whole number, a number, or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def missing_extra(recipe: Recipe) -> str:
    """Return the extra that a recipe needs and that is not installed here; '' where nothing is missing."""
    if importlib.util.find_spec(recipe.ecosystem) is None:
        return recipe.ecosystem
    return ""
