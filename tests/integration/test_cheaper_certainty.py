"""`lskd study` with several students of a teacher and the mean of last epochs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import forked
from lskd.base.files import read_csv

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STUDENT = yaml.safe_load((ROOT / "recipes" / "digits" / "student.yaml").read_text())
STUDY = {
    "title": "Miniature",
    "data": {"path": "data/digits", "num_classes": 10, "prepare": "digits"},
    "output": "runs/mini",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "student_seeds": 2,
    "last_epochs": 2,
    "teachers": [{"model": "test_byobnet", "config": "one.yaml"}],
    "students": [{"model": "test_byobnet", "config": "one.yaml"}],
}


def lskd(folder, *words):
    return forked.run("-m", "lskd_study", *words, imported=("timm", "lskd_study.pages.study"), cwd=folder)


def test_a_study_of_both_on_real_digits(tmp_path):
    file = {**STUDENT, "epochs": 3, "sched": "multistep", "decay_milestones": [2], "warmup_epochs": 0}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(file))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    result = lskd(tmp_path, "study", "study.yaml", "--cores", "2")
    assert result.returncode == 0, result.stderr
    assert "[6 of 6 done]" in result.stderr
    runs = tmp_path / "runs" / "mini"
    verdicts = json.loads((runs / "verdicts.json").read_text())
    found = verdicts["findings"][0]
    assert (found["seeds"], found["runs"]) == (1, 4)

    def mean(alpha):
        own = [row for row in read_csv(runs / "runs.csv") if row["role"] == "student"]
        own = [row for row in own if (row["smoothing"], row["temperature"]) == (alpha, "1.0")]
        assert {row["seed"] for row in own} == {"0", "1000000"}
        curves = [read_csv(runs / "students" / row["run"] / "curves.csv") for row in own]
        late = [np.mean([float(epoch["val_top1"]) for epoch in curve[-2:]]) for curve in curves]
        assert [float(row["top1"]) for row in own] == pytest.approx(late, abs=1e-6)
        return np.mean(late)

    assert found["estimate"] == pytest.approx(mean("0.1") - mean("0.0"), abs=1e-6)
    # The two students of a teacher are not one and the same.
    two = sorted((runs / "students").glob("*smoothing0-T1-hard0-seed0*/val_logits.safetensors"))
    assert len(two) == 2
    assert two[0].read_bytes() != two[1].read_bytes()
    teacher = {
        json.loads((path.parent / "job.json").read_text())["teacher"]["checkpoint_sha256"] for path in two
    }
    assert len(teacher) == 1
    # What was declared may not change now.
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "student_seeds": 1}))
    refused = lskd(tmp_path, "study", "study.yaml", "--cores", "2")
    assert refused.returncode == 2
    assert "was made with student_seeds: 2, which may not change afterwards (now 1)" in refused.stderr
