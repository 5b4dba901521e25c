"""A finished study without any training: run folders with simulated logits, as a job would write them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lskd_study.ecosystems.timm import CURVE_COLUMNS
from lskd_study.plan import CURVES, JOB, LOGITS, Plan, Run, expand

NUM_CLASSES = 4


def make_plan(root: Path, **changes: object) -> Plan:
    matrix = {
        "smoothing": [0.0, 0.1],
        "seeds": [0, 1, 2],
        "teachers": [("big", "teacher.yaml")],
        "students": [("small", "student.yaml"), ("big", "student.yaml")],
        "temperatures": [1.0],
        "hard_weights": [0.0],
    }
    matrix |= {key: value for key, value in changes.items() if key in matrix}
    return Plan(
        title="Simulated study <of> nothing",
        study_file="study.yaml",
        ecosystem="timm",
        cwd=str(root),
        output="out",
        data="data",
        prepare="",
        num_classes=NUM_CLASSES,
        convention="paper",
        smoothing=sorted(matrix["smoothing"]),
        seeds=matrix["seeds"],
        threads=1,
        resources={},
        configs={"teacher.yaml": {"epochs": 5}, "student.yaml": {"epochs": 5}},
        runs=expand(**matrix),
    )


def write_run(plan: Plan, run: Run, logits: np.ndarray, labels: np.ndarray, curves: dict[str, float]) -> None:
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    names = "\n".join(f"val/{label}/{i:04d}.png" for i, label in enumerate(labels.tolist()))
    tensors = {
        "logits": logits.astype(np.float16),
        "labels": labels.astype(np.int64),
        "keys": np.frombuffer(names.encode(), dtype=np.uint8),
    }
    save_file(tensors, folder / LOGITS)
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for epoch in range(5):
        row = dict.fromkeys(CURVE_COLUMNS, "") | {
            name: str(v + 1 / (epoch + 1)) for name, v in curves.items()
        }
        writer.writerow(row | {"epoch": str(epoch)})
    (folder / CURVES).write_text(text.getvalue())
    job = {
        "run": run.id,
        "role": run.role,
        "command": f"timm train.py data --model {run.model} --seed {run.seed} --experiment {run.id}",
        "cwd": plan.cwd,
        "environment": {"OMP_NUM_THREADS": "1"},
        "settings": plan.settings(run),
        "seed": run.seed,
        "teacher": {"run": run.teacher, "checkpoint_sha256": run.teacher} if run.teacher else None,
        "checkpoint": {"file": "last.pth.tar", "sha256": run.id},
        "data": {"path": "data", "listing_sha256": "0" * 64},
        "versions": {"python": "3.11.7", "lskd": "0.1.0", "torch": "2.14.1"},
        "git": {"commit": "a" * 40, "modified": True},
        "hardware": {"cpu": "A processor", "cores": 2, "gpus": [], "system": "Linux"},
        "finished": "2026-01-01T00:00:00+00:00",
        "wall_time_s": 12.3,
        "resumed": 0,
    }
    (folder / JOB).write_text(json.dumps(job))


StudyMaker = Callable[..., Plan]


@pytest.fixture
def plan_of() -> StudyMaker:
    """Make a plan without any runs."""
    return make_plan


def study_maker(root: Path) -> StudyMaker:
    """Make finished studies; ``effect``: added to the right class in students of smoothed teachers."""

    def make(
        effect: float = 0.0, per_class: int = 60, noise: float = 0.3, seed: int = 0, **changes: object
    ) -> Plan:
        plan = make_plan(root, **changes)
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(NUM_CLASSES), per_class)
        easy = rng.normal(2.0, 1.5, len(labels))
        own = np.eye(NUM_CLASSES)[labels]
        for run in plan.runs:
            strength = easy + noise * rng.standard_normal(len(labels))
            smoothed = run.smoothing > 0
            if run.role == "teacher" and smoothed:
                strength = 0.5 * strength + 1.5
            if run.role == "student" and smoothed:
                strength = strength + effect
            logits = own * strength[:, None] + 0.2 * rng.standard_normal((len(labels), NUM_CLASSES))
            jitter = 0.01 * rng.standard_normal()
            entropy = 0.5 if smoothed else 0.1
            curves = {"val_top1": 70 + jitter, "val_top5": 100.0, "val_loss": 0.3}
            if run.role == "teacher":
                curves["train_hard_ce"] = 0.2 + jitter
            else:
                parts = {"train_kl": 0.05 + jitter, "train_teacher_entropy": entropy + jitter}
                curves |= parts | {
                    "train_ce": sum(parts.values()),
                    "train_hard_ce": 0.2,
                    "train_agreement": 0.9,
                }
            write_run(plan, run, logits, labels, curves)
        plan.write()
        return plan

    return make


@pytest.fixture
def finish() -> Callable[[Plan], None]:
    """Finish all runs of a plan, as if they had been trained (logits without meaning)."""

    def write_all(plan: Plan) -> None:
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(plan.num_classes), 10)
        for run in plan.runs:
            names = ("val_top1", "train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce")
            curves = {name: float(rng.random()) for name in names}
            write_run(plan, run, rng.normal(size=(len(labels), plan.num_classes)), labels, curves)
            begun = {"settings": plan.settings(run)}
            (plan.folder(run) / "begun.json").write_text(json.dumps(begun))

    return write_all


@pytest.fixture
def fake_study(tmp_path: Path) -> StudyMaker:
    return study_maker(tmp_path)


@pytest.fixture(scope="session")
def fake_study_at() -> Callable[[Path], StudyMaker]:
    return study_maker
