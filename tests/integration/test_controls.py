"""`lskd study` with controls: of a network that teaches, too, they are its teachers, to the last bit."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

import forked
from lskd.base.files import read_csv

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STUDENT = yaml.safe_load((ROOT / "recipes" / "digits" / "student.yaml").read_text())
FILE = {**STUDENT, "epochs": 3, "decay_milestones": [2], "warmup_epochs": 0}
STUDY = {
    "title": "Miniature",
    "data": {"path": "data/digits", "num_classes": 10, "prepare": "digits"},
    "output": "runs/mini",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "controls": ["hard", "smoothed"],
    "teachers": [{"model": "test_byobnet", "config": "one.yaml"}],
    "students": [{"model": "test_byobnet", "config": "one.yaml"}],
}


def lskd(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "lskd_study", *words, imported=("timm", "lskd_study.pages.study"), cwd=folder)


def test_controls_are_what_teachers_of_the_same_network_are(tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(FILE))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    runs = tmp_path / "runs" / "mini"
    # Snakemake is asked for controls alone: they take no teacher, and none is trained for them.
    first = lskd(tmp_path, "study", "study.yaml", "--cores", "2", "--until", "control")
    assert first.returncode == 1
    assert "4 of 6 runs are missing" in first.stderr
    assert not (runs / "teachers").exists()
    controls = sorted((runs / "controls").iterdir())
    assert len(controls) == 2
    done = {folder.name: (folder / "job.json").stat().st_mtime_ns for folder in controls}

    result = lskd(tmp_path, "study", "study.yaml", "--cores", "2")
    assert result.returncode == 0, result.stderr
    assert "[6 of 6 done]" in result.stderr
    for folder in controls:
        job = json.loads((folder / "job.json").read_text())
        assert done[folder.name] == (folder / "job.json").stat().st_mtime_ns
        assert (job["role"], job["teacher"], job["soft_labels"]) == ("control", None, None)
        assert "kd" not in job["command"]
        twin = runs / "teachers" / folder.name.replace("control", "teacher")
        assert job["data"] == json.loads((twin / "job.json").read_text())["data"]
        for name in ("val_logits.safetensors", "curves.csv"):
            assert (folder / name).read_bytes() == (twin / name).read_bytes()
    verdicts = json.loads((runs / "verdicts.json").read_text())
    (found,) = [one for one in verdicts["findings"] if one["claim"] == "more-than-smoothing"]
    table = read_csv(runs / "runs.csv")

    def mean(role: str, alpha: str) -> float:
        own = [float(row["top1"]) for row in table if (row["role"], row["smoothing"]) == (role, alpha)]
        return sum(own) / len(own)

    expected = mean("student", "0.1") - mean("control", "0.1")
    assert found["estimate"] == pytest.approx(expected, abs=1e-6)
