"""What tables, figures and claims need of a study's runs. No model, no trainer.

What all studies share; `images` and `translation` have what each measures.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd.base.files import read_csv
from lskd_study.plan.plan import TEACHER_FAILED, Plan, Run, exact
from lskd_study.stats.intervals import Array


@dataclass(frozen=True)
class PerSample:
    """One value per sample whose mean is a run's result, and what an interval needs to know of them.

    Attributes:
        values: ``(N,)``.
        strata: ``(N,)`` int, where samples are drawn within fixed classes.
        bounded: the values are 0 or 1, or are those moved alike to a mean over epochs.
        scale: factor to the unit in which the result is given.
        problem: why no interval can be made from the values; empty where one can.
    """

    values: Array
    strata: NDArray[np.int64] | None = None
    bounded: bool = False
    scale: float = 1.0
    problem: str = ""

    @classmethod
    def mean(cls, several: Sequence["PerSample"]) -> "PerSample":
        """Return the mean of what several runs have for the same samples."""
        problem = next((one.problem for one in several if one.problem), "")
        return replace(several[0], values=np.mean([one.values for one in several], axis=0), problem=problem)


@dataclass(frozen=True)
class Result:
    """What one finished run left; ``keys`` name the samples it was measured on, in sorted order.

    ``parts``: of several students of one teacher's seed the result of each; this one is then their mean, has
    no record and no curves, and the first one's ``run``.
    """

    run: Run
    job: dict[str, Any]
    curves: dict[str, Array]
    keys: list[str]
    parts: Sequence[Any] = field(default=(), kw_only=True)

    def mean_of(self, parts: Sequence[Any]) -> Self:
        """Return the mean of several runs, of which this is the first."""
        return replace(self, job={}, curves={}, parts=parts)

    @property
    def each(self) -> Sequence[Self]:
        """The runs that it is the mean of, or it alone."""
        return self.parts or (self,)

    @property
    def chosen(self) -> int:
        """The epoch (from 0) of the checkpoint that was measured: the last."""
        return len(self.curves["epoch"]) - 1

    def value(self, quantity: str) -> float:
        """Return a quantity of the run: of a curve its last epoch's, NaN where the trainer did not log it."""
        return float(np.mean([one._value(quantity) for one in self.each]))

    def per_sample(self, quantity: str) -> PerSample | None:
        """Return a quantity sample by sample, None for one that has one value per run.

        Raises:
            LskdError: for 1-S with too few images in a class.
        """
        found = [one._per_sample(quantity) for one in self.each]
        several = [one for one in found if one is not None]
        return PerSample.mean(several) if len(several) > 1 else found[0]

    def _value(self, quantity: str) -> float:
        return float(self.curves[quantity][-1])

    def _per_sample(self, quantity: str) -> PerSample | None:
        return None

    def at_chance(self) -> str:
        """Return how good it is where that is no better than guessing; else nothing."""
        return ""

    def same_samples(self, other: "Result") -> bool:
        """Whether both were measured on the same samples."""
        return self.keys == other.keys


@dataclass(frozen=True)
class Failure:
    """A run that ended and has no result: it diverged, or its teacher did."""

    run: Run
    job: dict[str, Any]

    @property
    def reason(self) -> str:
        """Why, in the one line of its record."""
        return str(self.job["failed"])

    @property
    def epoch(self) -> int | None:
        """The epoch that the line names, as the trainer counts; of a student whose teacher failed, None."""
        found = None if self._with_teacher else re.search(r"\bepoch (\d{1,9})", self.reason)
        return int(found[1]) if found else None

    @property
    def _with_teacher(self) -> bool:
        return self.reason.startswith(TEACHER_FAILED)

    def __str__(self) -> str:
        """Return it in words, e.g. ``run teacher-big-smoothing0-seed1 failed in epoch 3``."""
        when = "" if self.epoch is None else f" in epoch {self.epoch}"
        return f"run {self.run.id} failed{' with its teacher' if self._with_teacher else when}"


AnyResult = TypeVar("AnyResult", bound=Result)
RunKind = tuple[str | float, ...]
"""What tells kinds of run apart: of a teacher model and smoothing; of a student also teacher, T and λ.

A control is a student of no teacher, ``""``, with T = 1 and λ = 1.
"""


class BySeed(dict[int, AnyResult]):
    """The results of one kind of run by seed; ``failed``: its runs that have none."""

    def __init__(self, results: Mapping[int, AnyResult], failed: Iterable[Failure] = ()) -> None:
        super().__init__(results)
        self.failed = list(failed)

    @property
    def failed_seeds(self) -> int:
        """Of how many of the study's seeds some run failed."""
        return len({one.run.study_seed for one in self.failed})


def failures_of(groups: Iterable[Mapping[int, Result]]) -> list[Failure]:
    """Return the failed runs of some kinds."""
    return [one for group in groups if isinstance(group, BySeed) for one in group.failed]


def failure_words(failed: Sequence[Failure]) -> str:
    """Return which runs failed, the first by its name; empty for none."""
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{failed[0]}{more}" if failed else ""


@dataclass(frozen=True)
class Results(Generic[AnyResult]):
    """All finished runs of a plan, those of them that failed, and the names of those that are missing."""

    plan: Plan
    finished: dict[str, AnyResult]
    missing: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The records of all runs that ended, failed ones too."""
        results = [result.job for result in self.finished.values()]
        return results + [failure.job for failure in self.failed.values()]

    @property
    def samples(self) -> int:
        """On how many samples the runs were measured."""
        return len(next((result.keys for result in self.finished.values()), ()))

    def teachers(self, model: str, smoothing: float) -> BySeed[AnyResult]:
        """Return the teachers of one kind that have a result, by seed."""
        return self.by_kind.get((model, smoothing), BySeed({}))

    def students(
        self, model: str, teacher: str, smoothing: float, temperature: float, hard_weight: float
    ) -> BySeed[AnyResult]:
        """Return the students of one kind that have a result, by seed; ``teacher`` is the teacher's model."""
        return self.by_kind.get((model, teacher, smoothing, temperature, hard_weight), BySeed({}))

    def controls(self, model: str, smoothing: float) -> BySeed[AnyResult]:
        """Return the networks of one kind of student that learned from (smoothed) labels alone, by seed."""
        return self.students(model, "", smoothing, 1.0, 1.0)

    @cached_property
    def finished_by_kind(self) -> dict[RunKind, list[AnyResult]]:
        """All finished runs of each kind, in the order of the study's file."""
        found: dict[RunKind, list[AnyResult]] = {}
        for result in self.finished.values():
            found.setdefault(kind_of_run(self.plan, result.run), []).append(result)
        return found

    @cached_property
    def by_kind(self) -> dict[RunKind, BySeed[AnyResult]]:
        """The runs of each kind by the study's seed, in the order of its file.

        Of several students for one seed of their teacher it is their mean, once all of them are finished.
        """
        found: dict[RunKind, BySeed[AnyResult]] = {}
        parts: dict[tuple[RunKind, int], list[AnyResult]] = {}
        for run in self.plan.runs:
            kind, seed = kind_of_run(self.plan, run), run.study_seed
            own = found.setdefault(kind, BySeed({}))
            if run.id in self.finished:
                several = parts.setdefault((kind, seed), [])
                several.append(self.finished[run.id])
                if run.role == "teacher" or self.plan.student_seeds == 1:
                    own[seed] = several[0]
                elif len(several) == self.plan.student_seeds:
                    own[seed] = several[0].mean_of(several)
            elif run.id in self.failed:
                own.failed.append(self.failed[run.id])
        return found


def kind_of_run(plan: Plan, run: Run) -> RunKind:
    """Return what tells a run's kind apart; students of several teachers have the same seeds."""
    if run.role == "teacher":
        return run.model, run.smoothing
    teacher = plan.by_id[run.teacher].model if run.teacher else ""
    return run.model, teacher, run.smoothing, run.temperature, run.hard_weight


def kind_name(plan: Plan, kind: RunKind) -> str:
    """Return a kind of run in words, with temperature and hard weight where they are not the paper's."""
    if len(kind) == 2:
        return f"teacher {kind[0]}, α = {exact(float(kind[1]))}"
    model, teacher, *setting = kind
    if not teacher:
        return f"control {model}, labels’ α = {exact(float(setting[0]))}"
    words = [f"{name} = {exact(float(value))}" for name, value in zip("αTλ", setting, strict=True)]
    return f"student {model} of {teacher}, {', '.join(words[:1] if plan.papers_loss else words)}"


def read_curves(path: Path) -> dict[str, Array]:
    """Return a run's curves by column, one value per epoch; NaN where the trainer did not log one.

    Raises:
        ValueError: for a file that cannot be read, is no whole table, has no epochs or more than numbers;
            `results.read_results` says what to do, as nobody but the run itself can write it.
    """
    try:
        rows = read_csv(path)
    except LskdError as error:
        raise ValueError(str(error).rpartition("; ")[0]) from error  # less its advice
    if not rows:
        raise ValueError(f"{path.name} has no epochs")
    if not path.read_bytes().endswith(b"\n"):  # perhaps cut within its last number
        raise ValueError(f"{path.name} is cut short")
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def common_seeds(groups: Sequence[Mapping[int, Result]]) -> list[int]:
    """Return the seeds that every group has: differences are paired."""
    return sorted(set.intersection(*(set(group) for group in groups))) if groups else []
