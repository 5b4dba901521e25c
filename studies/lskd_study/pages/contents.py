"""What a kind of study puts on its page, and the kinds of students that have curves of their own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lskd_study.pages.page import Curves
from lskd_study.plan.plan import Plan, exact, slug


@dataclass(frozen=True)
class Contents:
    """What a kind of study has of its own: files beside the page (text by name), and for its template."""

    files: dict[str, str]
    curves: list[Curves]
    own: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentKind:
    """A kind of student of a kind of teacher: one set of curves."""

    teacher: str
    model: str
    temperature: float
    hard_weight: float
    title: str

    def file(self, figure: str) -> str:
        """Return the name of a figure's file, without ending."""
        names = f"{slug(self.model)}-of-{slug(self.teacher)}"
        return f"{figure}-{names}-T{exact(self.temperature)}-hard{exact(self.hard_weight)}"


def student_kinds(plan: Plan) -> Iterator[StudentKind]:
    """Yield each kind of student of each kind of teacher, in the order of the study's file."""
    kinds = dict.fromkeys(
        (plan.run(run.teacher).model, run.model, run.temperature, run.hard_weight)
        for run in plan.runs
        if run.role == "student"
    )
    for teacher, model, t, hard in kinds:
        title = f"Student {model}, teacher {teacher}"
        if not plan.papers_loss:
            title += f", T = {exact(t)}, λ = {exact(hard)}"
        yield StudentKind(teacher, model, t, hard, title)
