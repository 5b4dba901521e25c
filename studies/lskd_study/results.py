"""Read a study's run folders into what tables, figures and claims need. No model, no trainer."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError, stability
from lskd_study.plan import CURVES, JOB, LOGITS, Plan, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """What one finished run left; the arrays have one value per validation sample, sorted by key."""

    run: Run
    job: dict[str, Any]
    curves: dict[str, Array]
    keys: list[str]
    labels: NDArray[np.int64]
    correct: Array
    correct5: Array
    target_probability: Array
    instability: float

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float(self.correct.mean())

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * float(self.correct5.mean())

    def last(self, column: str) -> float:
        """Return a curve's value of the last epoch; NaN where the trainer did not log it."""
        return float(self.curves[column][-1])


@dataclass(frozen=True)
class Results:
    """All finished runs of a plan, and the names of those that are missing."""

    plan: Plan
    finished: dict[str, Result]
    missing: list[str] = field(default_factory=list)

    def teachers(self, model: str, smoothing: float) -> dict[int, Result]:
        """Return the finished teachers of one kind, by seed."""
        return self._select(role="teacher", model=model, smoothing=smoothing)

    def students(
        self, model: str, teacher: str, smoothing: float, temperature: float, hard_weight: float
    ) -> dict[int, Result]:
        """Return the finished students of one kind, by seed; ``teacher`` is the teacher's model."""
        found = self._select(
            role="student", model=model, smoothing=smoothing, temperature=temperature, hard_weight=hard_weight
        )
        runs = self.plan.by_id
        return {seed: result for seed, result in found.items() if runs[result.run.teacher].model == teacher}

    def _select(self, **wanted: object) -> dict[int, Result]:
        return {
            result.run.seed: result
            for result in self.finished.values()
            if all(getattr(result.run, name) == value for name, value in wanted.items())
        }


def read_results(plan: Plan) -> Results:
    """Read every finished run of the plan.

    Raises:
        LskdError: for a run folder that is damaged or runs that were measured on different samples.
    """
    finished, missing = {}, []
    for run in plan.runs:
        if plan.done(run):
            finished[run.id] = read_result(plan.folder(run), run, plan.num_classes)
        else:
            missing.append(run.id)
    _same_samples(finished.values())
    return Results(plan, finished, missing)


def read_result(folder: Path, run: Run, num_classes: int) -> Result:
    """Read one run's folder.

    Raises:
        LskdError: when a file is missing or damaged.
    """
    from safetensors.numpy import load_file

    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        tensors = load_file(folder / LOGITS)
        with (folder / CURVES).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        keys = bytes(tensors["keys"]).decode().split("\n")
        logits, labels = tensors["logits"].astype(np.float32), tensors["labels"].astype(np.int64)
        if not rows or len(keys) != len(labels) or logits.shape != (len(labels), num_classes):
            raise ValueError("sizes do not match")
    except Exception as error:  # safetensors has an exception class of its own
        raise LskdError(f"run folder {folder} is damaged ({error}); remove it to run it again") from error
    curves = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    order = np.argsort(np.array(keys), kind="stable")
    return _measure(run, job, curves, [keys[i] for i in order], logits[order], labels[order])


def _measure(
    run: Run,
    job: dict[str, Any],
    curves: dict[str, Array],
    keys: list[str],
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> Result:
    import torch

    own = logits[np.arange(len(labels)), labels]
    finite = np.isfinite(logits).all(-1)
    # A model that diverged predicts nothing: wrong, not class 0. Ties count against the model.
    rank = (logits >= own[:, None]).sum(-1) - 1
    instability, probability = float("nan"), np.full(len(labels), np.nan)
    if finite.all():
        scores, classes = torch.from_numpy(logits), torch.from_numpy(labels)
        instability = 1 - float(stability(scores, classes, logits.shape[1]))
        probability = scores.double().softmax(-1)[torch.arange(len(classes)), classes].numpy()
    return Result(
        run=run,
        job=job,
        curves=curves,
        keys=keys,
        labels=labels,
        correct=(finite & (rank < 1)).astype(np.float64),
        correct5=(finite & (rank < 5)).astype(np.float64),
        target_probability=probability,
        instability=instability,
    )


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _same_samples(results: Iterable[Result]) -> None:
    first: Result | None = None
    for result in results:
        first = first or result
        if result.keys != first.keys or not np.array_equal(result.labels, first.labels):
            raise LskdError(
                f"{result.run.id} and {first.run.id} were measured on different validation samples; "
                "the data changed in between: remove the older runs"
            )


def common_seeds(groups: Sequence[dict[int, Result]]) -> list[int]:
    """Return the seeds that every group has: differences are paired."""
    return sorted(set.intersection(*(set(group) for group in groups))) if groups else []
