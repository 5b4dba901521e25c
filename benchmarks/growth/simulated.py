"""Studies on the disk as they are when all runs have ended, with simulated results."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lskd_study.base.text import csv_text
from lskd_study.plan.plan import CURVES, JOB, LOGITS, Plan, Run, expand
from lskd_study.trainers.timm import Timm

CONFIG = {"epochs": 5}


def make_plan(
    root: Path, classes: int, seeds: int, smoothing: Sequence[float] = (0.0, 0.1), students: int = 1
) -> Plan:
    """Return a plan of ``seeds`` x smoothing x (a teacher and its students) runs, below ``root``."""
    names = [(f"student{number}", "student.yaml") for number in range(students)]
    alphas, numbers = list(smoothing), list(range(seeds))
    return Plan(
        title=f"Simulated: {seeds} seeds",
        study_file="study.yaml",
        ecosystem="timm",
        cwd=str(root),
        output="out",
        data="data",
        prepare="",
        num_classes=classes,
        convention="paper",
        smoothing=alphas,
        seeds=numbers,
        threads=1,
        resources={},
        configs={"teacher.yaml": CONFIG, "student.yaml": CONFIG},
        runs=expand(alphas, numbers, [("teacher", "teacher.yaml")], names, [1.0], [0.0]),
    )


def finish(plan: Plan, samples: int, epochs: int = 5) -> None:
    """Leave what the runs of a plan leave; right answers are about as frequent as in ImageNet."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % plan.num_classes
    noise = rng.standard_normal((samples, plan.num_classes), dtype=np.float32).astype(np.float16)
    easy = rng.normal(4.0, 2.0, samples)
    for run in plan.runs:
        # The others' answers are those of other images: to draw as many anew would take longer than all else.
        logits = np.roll(noise, int(rng.integers(samples)), axis=0)
        logits[np.arange(samples), labels] = easy + 0.1 * rng.standard_normal(samples)
        write_logits(plan.folder(run), logits, labels)
        write_curves(plan.folder(run), run, epochs, rng)
        write_job(plan, run)
    plan.write()


def write_logits(folder: Path, logits: NDArray[np.float16], labels: NDArray[np.int64]) -> None:
    """Leave a run's answers to the validation images."""
    folder.mkdir(parents=True, exist_ok=True)
    names = "\n".join(f"val/{label}/image{number:07d}.png" for number, label in enumerate(labels.tolist()))
    keys = np.frombuffer(names.encode(), dtype=np.uint8)
    save_file({"logits": logits, "labels": labels, "keys": keys}, folder / LOGITS)


def write_curves(folder: Path, run: Run, epochs: int, rng: np.random.Generator) -> None:
    """Leave a run's curves."""
    columns = ["epoch", *(name for name in Timm.curve_columns if name != "epoch")]
    rows = ([epoch, *(0.5 + rng.random(len(columns) - 1)).round(4)] for epoch in range(epochs))
    (folder / CURVES).write_text(csv_text(columns, rows), encoding="utf-8")


def write_job(plan: Plan, run: Run) -> None:
    """Leave a run's record, which says that it is finished."""
    taught = {"run": run.teacher, "checkpoint_sha256": run.teacher} if run.teacher else None
    record = {
        "run": run.id,
        "role": run.role,
        "command": "simulated",
        "cwd": plan.cwd,
        "environment": {"OMP_NUM_THREADS": "1"},
        "settings": plan.settings(run),
        "seed": run.seed,
        "teacher": taught,
        "checkpoint": {"file": "last.pth.tar", "sha256": run.id},
        "data": {"path": plan.data, "sha256": "0" * 64},
        "versions": {"python": "3.11.7", "lskd": "0.1.0", "torch": "2.14.1"},
        "git": None,
        "hardware": {"cpu": "simulated", "cores": 2, "gpus": [], "system": "Linux"},
        "finished": "2026-01-01T00:00:00+00:00",
        "wall_time_s": 12.3,
        "resumed": 0,
    }
    (plan.folder(run) / JOB).write_text(json.dumps(record), encoding="utf-8")
