"""What a check found, and how it is said."""

from dataclasses import dataclass, field

from lskd_study.recipe_check.cost import ASSUMPTION, schedule_text, size_text
from lskd_study.trainers.size import Network


@dataclass(frozen=True)
class CheckedRun:
    """A kind of run of a recipe: a network and a trainer's file, with its teacher.

    Attributes:
        name: role, model, teacher and settings in words.
        network: its size; None where that is not counted.
        corners: the learning rate's, by epoch (or update).
        length: epochs (or updates) in all.
        hours: estimate of GPU-hours for one run; None where there is none.
        runs: how many of this kind the recipe has.
        unit: of ``length``.
    """

    name: str
    network: Network | None
    corners: list[tuple[int, float]]
    length: int
    hours: float | None
    runs: int = 1
    unit: str = "epochs"

    def line(self) -> str:
        """Return it in one line."""
        parts = [size_text(self.network)] if self.network else []
        if self.corners:
            parts.append(schedule_text(self.corners, self.length, self.unit))
        if self.hours is not None:
            parts.append(f"{self.runs} x {hours_text(self.hours)}")
        return f"  {self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe that is in order."""

    name: str
    runs: list[CheckedRun] = field(default_factory=list)

    @property
    def hours(self) -> float | None:
        """GPU-hours of all its runs; None where they are not estimated."""
        known = [run.hours * run.runs for run in self.runs if run.hours is not None]
        return sum(known) if known else None

    def text(self) -> str:
        """Return it in lines, the recipe's own first."""
        total = "" if self.hours is None else f", {hours_text(self.hours)} in all"
        count = sum(run.runs for run in self.runs)
        first = f"{self.name}: ok, {count} run{'s' * (count != 1)}{total}"
        return "\n".join([first, *(run.line() for run in self.runs)])


def hours_text(hours: float) -> str:
    """Return GPU-hours to two digits; less than a minute and a half is said so."""
    if hours < 0.025:
        return "< 0.03 GPU-hours"
    return f"{hours:.2g} GPU-hours" if hours < 10 else f"{hours:.0f} GPU-hours"


def footer() -> str:
    """Return what the estimates assume."""
    return (
        f"GPU-hours: an estimate, {ASSUMPTION}. GFLOPs: one image (or sentence) forward, multiplication "
        "and addition as two."
    )
