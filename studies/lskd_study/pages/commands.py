"""The commands that rerun each run, by the cell of a table that they stand behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from lskd_study.plan.plan import Plan, Run, exact
from lskd_study.results.results import Result, Results
from lskd_study.stores.state import rerun_command


@dataclass(frozen=True)
class Command:
    """What repeats one run, to be pasted in the folder where the study was started."""

    run: str
    seconds: float
    words: str


@dataclass(frozen=True)
class Cell:
    """The finished runs of one kind of teacher or student, one for each seed; ``id`` is where they stand."""

    id: str
    title: str
    commands: list[Command]


@dataclass(frozen=True)
class Commands:
    """All cells of a study, and which of them a teacher's or a student's result comes from."""

    cells: list[Cell]
    ids: Mapping[tuple[Any, ...], str]

    @property
    def count(self) -> int:
        """How many runs have finished."""
        return sum(len(cell.commands) for cell in self.cells)

    @property
    def students(self) -> bool:
        """Whether any of them is a student's."""
        return any(key[0] == "student" for key in self.ids)

    def teacher(self, model: str, smoothing: float) -> str:
        """Return the id of these teachers' commands; empty where no such run has finished."""
        return self.ids.get(("teacher", model, "", smoothing, 1.0, 0.0), "")

    def student(
        self, model: str, teacher: str, smoothing: float, temperature: float, hard_weight: float
    ) -> str:
        """Return the id of these students' commands; empty where no such run has finished."""
        return self.ids.get(("student", model, teacher, smoothing, temperature, hard_weight), "")


def commands_of(results: Results[Result]) -> Commands:
    """Return the commands of the finished runs, in the order of the study."""
    plan = results.plan
    found: dict[tuple[Any, ...], list[Result]] = {}
    for run in plan.runs:
        if run.id in results.finished:
            found.setdefault(_kind(plan, run), []).append(results.finished[run.id])
    ids = {key: f"runs-{number}" for number, key in enumerate(found)}
    cells = [
        Cell(ids[key], _title(plan, of_kind[0].run), [_command(plan, result) for result in of_kind])
        for key, of_kind in found.items()
    ]
    return Commands(cells, ids)


def _kind(plan: Plan, run: Run) -> tuple[Any, ...]:
    if run.role == "teacher":
        return ("teacher", run.model, "", run.smoothing, 1.0, 0.0)
    teacher = plan.run(run.teacher).model
    return ("student", run.model, teacher, run.smoothing, run.temperature, run.hard_weight)


def _title(plan: Plan, run: Run) -> str:
    if run.role == "teacher":
        return f"Teacher {run.model}, α = {exact(run.smoothing)}"
    title = f"Student {run.model} of {plan.run(run.teacher).model}, α = {exact(run.smoothing)}"
    return (
        title if plan.papers_loss else f"{title}, T = {exact(run.temperature)}, λ = {exact(run.hard_weight)}"
    )


def _command(plan: Plan, result: Result) -> Command:
    job = result.job
    set_first = " ".join(f"{name}={quote(value)}" for name, value in job["environment"].items() if value)
    # Not as recorded: the output folder may have been moved since, and the teacher's weights with it.
    words = rerun_command(plan, result.run, environment=job["environment"])
    return Command(job["run"], job["wall_time_s"], f"{set_first} {words}".lstrip())
