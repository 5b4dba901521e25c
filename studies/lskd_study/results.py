"""Read a study's run folders into what tables, figures and claims need. No model, no trainer.

What all studies share; `image_results` and `translation_results` hold what each measures.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd_study.plan import Plan, Run

Array = NDArray[np.float64]


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

    def same_samples(self, other: "Result") -> bool:
        """Whether both were measured on the same samples."""
        return self.keys == other.keys


Kind = TypeVar("Kind", bound=Result)


@dataclass(frozen=True)
class Results(Generic[Kind]):
    """All finished runs of a plan, and the names of those that are missing."""

    plan: Plan
    finished: dict[str, Kind]
    missing: list[str] = field(default_factory=list)

    def teachers(self, model: str, smoothing: float) -> dict[int, Kind]:
        """Return the finished teachers of one kind, by seed."""
        return dict(self._by_kind.get((model, smoothing), {}))

    def students(
        self, model: str, teacher: str, smoothing: float, temperature: float, hard_weight: float
    ) -> dict[int, Kind]:
        """Return the finished students of one kind, by seed; ``teacher`` is the teacher's model."""
        return dict(self._by_kind.get((model, teacher, smoothing, temperature, hard_weight), {}))

    @cached_property
    def _by_kind(self) -> dict[tuple[object, ...], dict[int, Kind]]:
        """All finished runs by what tells kinds apart, then by seed."""
        found: dict[tuple[object, ...], dict[int, Kind]] = defaultdict(dict)
        for result in self.finished.values():
            run = result.run
            kind: tuple[object, ...] = (run.model, run.smoothing)
            if run.role == "student":
                # Students of several teachers have the same seeds, so the teacher is part of the kind.
                teacher = self.plan.by_id[run.teacher].model
                kind = (run.model, teacher, run.smoothing, run.temperature, run.hard_weight)
            found[kind][run.seed] = result
        return dict(found)


def is_translation(plan: Plan) -> bool:
    """Whether the study's models translate; otherwise they classify images."""
    return plan.ecosystem == "fairseq"


def read_results(plan: Plan) -> Results[Any]:
    """Read every finished run of the plan, as ``ImageResult`` or ``TranslationResult``.

    Raises:
        LskdError: for a run folder that is damaged or runs that were measured on different samples.
    """
    finished, missing = {}, []
    for run in plan.runs:
        if plan.done(run):
            finished[run.id] = _read(plan, run)
        else:
            missing.append(run.id)
    _same_samples(finished.values(), "test sentences" if is_translation(plan) else "validation samples")
    return Results(plan, finished, missing)


def _read(plan: Plan, run: Run) -> Result:
    folder = plan.folder(run)
    try:
        if is_translation(plan):
            from lskd_study.translation_results import read_translation_result

            return read_translation_result(folder, run)
        from lskd_study.image_results import read_image_result

        return read_image_result(folder, run, plan.num_classes)
    except LskdError:
        raise
    except Exception as error:  # safetensors has an exception class of its own
        reason = " ".join(str(error).split())
        raise LskdError(f"run folder {folder} is damaged ({reason}); remove it to run it again") from error


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


def _same_samples(results: Iterable[Result], samples: str) -> None:
    first: Result | None = None
    for result in results:
        first = first or result
        if not result.same_samples(first):
            raise LskdError(
                f"{result.run.id} and {first.run.id} were measured on different {samples}; "
                "the data changed in between: remove the older runs"
            )


def common_seeds(groups: Sequence[Mapping[int, Result]]) -> list[int]:
    """Return the seeds that every group has: differences are paired."""
    return sorted(set.intersection(*(set(group) for group in groups))) if groups else []
