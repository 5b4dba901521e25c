"""What tables, figures and claims need of a study's runs. No model, no trainer.

What all studies share; `image_results` and `translation_results` hold what each measures.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lskd_study.plan.plan import TEACHER_FAILED, Plan, Run
from lskd_study.stats.intervals import Array


@dataclass(frozen=True)
class PerSample:
    """One value per sample whose mean is a run's result, and what an interval needs to know of them.

    Attributes:
        values: ``(N,)``.
        strata: ``(N,)`` int, where samples are drawn within fixed classes.
        bounded: the values are 0 or 1.
        scale: factor to the unit in which the result is given.
        problem: why no interval can be made from the values; empty where one can.
    """

    values: Array
    strata: NDArray[np.int64] | None = None
    bounded: bool = False
    scale: float = 1.0
    problem: str = ""


@dataclass(frozen=True)
class Result:
    """What one finished run left; ``keys`` name the samples it was measured on, in sorted order."""

    run: Run
    job: dict[str, Any]
    curves: dict[str, Array]
    keys: list[str]

    def last(self, column: str) -> float:
        """Return a curve's value of the last epoch; NaN where the trainer did not log it."""
        return float(self.curves[column][-1])

    def value(self, quantity: str) -> float:
        """Return a quantity that has one value per run."""
        return self.last(quantity)

    def per_sample(self, quantity: str) -> PerSample | None:
        """Return a quantity sample by sample, None for one that has one value per run."""
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
        found = None if self._with_teacher else re.search(r"\bepoch (\d+)", self.reason)
        return int(found[1]) if found else None

    @property
    def _with_teacher(self) -> bool:
        return self.reason.startswith(TEACHER_FAILED)

    def __str__(self) -> str:
        """Return it in words, e.g. ``run teacher-big-smoothing0-seed1 failed in epoch 3``."""
        when = "" if self.epoch is None else f" in epoch {self.epoch}"
        return f"run {self.run.id} failed{' with its teacher' if self._with_teacher else when}"


Kind = TypeVar("Kind", bound=Result)


class BySeed(dict[int, Kind]):
    """The results of one kind of run by seed; ``failed``: its runs that have none."""

    def __init__(self, results: Mapping[int, Kind], failed: Iterable[Failure] = ()) -> None:
        """Take both."""
        super().__init__(results)
        self.failed = list(failed)


def failures_of(groups: Iterable[Mapping[int, Result]]) -> list[Failure]:
    """Return the failed runs of some kinds."""
    return [one for group in groups if isinstance(group, BySeed) for one in group.failed]


def failure_words(failed: Sequence[Failure]) -> str:
    """Return which runs failed, the first by its name; empty for none."""
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{failed[0]}{more}" if failed else ""


@dataclass(frozen=True)
class Results(Generic[Kind]):
    """All finished runs of a plan, those of them that failed, and the names of those that are missing."""

    plan: Plan
    finished: dict[str, Kind]
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

    def teachers(self, model: str, smoothing: float) -> BySeed[Kind]:
        """Return the teachers of one kind that have a result, by seed."""
        return self._of_kind((model, smoothing))

    def students(
        self, model: str, teacher: str, smoothing: float, temperature: float, hard_weight: float
    ) -> BySeed[Kind]:
        """Return the students of one kind that have a result, by seed; ``teacher`` is the teacher's model."""
        return self._of_kind((model, teacher, smoothing, temperature, hard_weight))

    def _of_kind(self, kind: tuple[object, ...]) -> BySeed[Kind]:
        return BySeed(self._by_kind.get(kind, {}), self._failed_by_kind.get(kind, ()))

    @cached_property
    def _by_kind(self) -> dict[tuple[object, ...], dict[int, Kind]]:
        """All runs with a result by what tells kinds apart, then by seed."""
        found: dict[tuple[object, ...], dict[int, Kind]] = defaultdict(dict)
        for result in self.finished.values():
            found[self._kind(result.run)][result.run.seed] = result
        return dict(found)

    @cached_property
    def _failed_by_kind(self) -> dict[tuple[object, ...], list[Failure]]:
        found: dict[tuple[object, ...], list[Failure]] = defaultdict(list)
        for failure in self.failed.values():
            found[self._kind(failure.run)].append(failure)
        return dict(found)

    def _kind(self, run: Run) -> tuple[object, ...]:
        if run.role == "teacher":
            return run.model, run.smoothing
        # Students of several teachers have the same seeds, so the teacher is part of the kind.
        teacher = self.plan.by_id[run.teacher].model
        return run.model, teacher, run.smoothing, run.temperature, run.hard_weight


def is_translation(plan: Plan) -> bool:
    """Whether the study's models translate; otherwise they classify images."""
    return plan.ecosystem == "fairseq"


def read_curves(path: Path) -> dict[str, Array]:
    """Return a run's curves by column, one value per epoch; NaN where the trainer did not log one.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a file without epochs or with more than numbers.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path.name} has no epochs")
    try:
        return {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def common_seeds(groups: Sequence[Mapping[int, Result]]) -> list[int]:
    """Return the seeds that every group has: differences are paired."""
    return sorted(set.intersection(*(set(group) for group in groups))) if groups else []
