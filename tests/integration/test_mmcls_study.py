"""`lskd study` with binary students of mmcls, in miniature: two teachers of timm, two students, the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from events import assert_are_curves
from image_folders import write_digits
from lskd.base.files import read_csv

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TEACHER = yaml.safe_load((ROOT / "recipes" / "digits" / "teacher.yaml").read_text())


def test_a_study_of_binary_students(tmp_path):
    write_digits(tmp_path / "digits", classes=10, per_class=60)
    teacher = {**TEACHER, "epochs": 3, "decay_milestones": [2], "batch_size": 16}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    (tmp_path / "student.py").write_text(
        f"_base_ = {str(ROOT / 'recipes' / 'digits_bnn' / 'student.py')!r}\n"
        "model = dict(backbone=dict(width=0.125), head=dict(in_channels=64))\n"
        "train_cfg = dict(max_epochs=2)\n"
    )
    study = {
        "title": "Miniature",
        "ecosystem": "mmcls",
        "data": {"path": "digits", "num_classes": 10},
        "output": "runs/mini",
        "smoothing": {"values": [0, 0.1]},
        "seeds": [0],
        "controls": ["smoothed", "real"],
        "teachers": [{"model": "test_resnet", "config": "teacher.yaml"}],
        "students": [{"model": "ReActNet-18", "config": "student.py"}],
        "tracker": "tensorboard",
        "soft_labels": {"top_k": 4, "rest": "lump", "views": 1, "values": "packed"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words = [sys.executable, "-m", "lskd_study", "study", "study.yaml", "--cores", "2"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "runs" / "mini"
    students = sorted((runs / "students").iterdir())
    assert len(students) == 2
    for folder in students:
        job = json.loads((folder / "job.json").read_text())
        teacher = runs / "teachers" / job["teacher"]["run"] / "job.json"
        # The student was taught by the very file that timm's trainer wrote.
        assert job["teacher"]["checkpoint_sha256"] == json.loads(teacher.read_text())["checkpoint"]["sha256"]
        asked = {"top_k": 4, "values": "packed", "views": 1, "rest": "lump"}
        assert job["settings"]["soft_labels"] == asked
        assert (job["soft_labels"]["top_k"], job["soft_labels"]["epochs"]) == (4, 1)
        assert "distillation.soft_labels.rest=lump" in job["rerun_command"]
        assert job["rerun_command"].startswith("mim train mmcls student.py --work-dir rerun/")
        curves, own = read_csv(folder / "curves.csv"), read_csv(folder / "epochs.csv")
        assert [row["epoch"] for row in curves] == ["0", "1"]
        assert [row["val_ce"] for row in curves] == [row["val_ce"] for row in own]
        assert_are_curves(folder)
        # From the stored logits, and as the trainer itself counted.
        (measured,) = (row for row in read_csv(runs / "runs.csv") if row["run"] == folder.name)
        assert float(measured["top1"]) == pytest.approx(float(own[-1]["val_top1"]), abs=0.6)
    controls = {folder.name: folder for folder in (runs / "controls").iterdir()}
    assert set(controls) == {
        f"control-ReActNet_18{kind}-seed0" for kind in ("-smoothing0.1", "_real-smoothing0")
    }
    for name, folder in controls.items():
        job = json.loads((folder / "job.json").read_text())
        assert (job["role"], job["teacher"]) == ("control", None)
        assert "teacher" not in job["command"]
        curves = read_csv(folder / "curves.csv")
        assert all(row["train_hard_ce"] and not row["train_ce"] for row in curves)
        assert not any(row["val_ce"] for row in curves)
        # Only the real-valued one has no binary weights that flip.
        assert all(row["flip_ratio"] == "" for row in curves) == ("_real" in name)
    page = (runs / "index.html").read_text()
    assert "Fig. 6" in page
    assert "test, α = 0.1" in page
    assert list((runs / "figures").glob("figure6-*.svg"))

    again = subprocess.run([*words, "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "6 runs: 6 finished, 0 to do" in again.stdout
