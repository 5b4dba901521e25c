"""`lskd study` with controls, two students of each teacher and the mean of last epochs."""

import json

import numpy as np
import pytest
import yaml

import forked
from lskd.base.files import read_csv
from lskd_study.plan.recipes import recipes_folder

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STUDENT = yaml.safe_load((recipes_folder() / "digits" / "student.yaml").read_text())
FILE = {**STUDENT, "epochs": 6, "decay_milestones": [4], "warmup_epochs": 0, "batch_size": 16}
STUDY = {
    "title": "Miniature",
    "data": {"path": "digits", "num_classes": 4},
    "output": "runs/mini",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "student_seeds": 2,
    "last_epochs": 2,
    "controls": ["hard", "smoothed"],
    "teachers": [{"model": "test_byobnet", "config": "one.yaml"}],
    "students": [{"model": "test_byobnet", "config": "one.yaml"}],
}


def test_students_of_both_teachers_and_controls_that_are_their_twins(digits, tmp_path):
    (tmp_path / "digits").symlink_to(digits)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(FILE))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    runs = tmp_path / "runs" / "mini"

    def study(*words):
        words = ("-m", "lskd_study", "study", "study.yaml", "--cores", "2", *words)
        return forked.run(*words, imported=("timm", "lskd_study.pages.study"), cwd=tmp_path)

    # Snakemake is asked for controls alone: they take no teacher, and none is trained for them.
    first = study("--until", "control")
    assert first.returncode == 1
    assert "6 of 10 runs are missing" in first.stderr
    assert not (runs / "teachers").exists()
    controls = sorted((runs / "controls").iterdir())
    assert len(controls) == 4
    done = {folder.name: (folder / "job.json").stat().st_mtime_ns for folder in controls}

    result = study()
    assert result.returncode == 0, result.stderr
    assert "[10 of 10 done]" in result.stderr
    # Of a network that teaches, too, they are its teachers, to the last bit.
    for folder in controls:
        job = json.loads((folder / "job.json").read_text())
        assert done[folder.name] == (folder / "job.json").stat().st_mtime_ns
        assert (job["role"], job["teacher"], job["soft_labels"]) == ("control", None, None)
        assert "kd" not in job["command"]
        if folder.name.endswith("-student1"):  # of the second students; teachers have none of these
            continue
        twin = runs / "teachers" / folder.name.replace("control", "teacher")
        assert job["data"] == json.loads((twin / "job.json").read_text())["data"]
        for name in ("val_logits.safetensors", "curves.csv"):
            assert (folder / name).read_bytes() == (twin / name).read_bytes()

    table = read_csv(runs / "runs.csv")

    def mean(role, alpha):
        own = [row for row in table if (row["role"], row["smoothing"]) == (role, alpha)]
        assert {row["seed"] for row in own} == {"0", "1000000"}
        curves = [read_csv(runs / f"{role}s" / row["run"] / "curves.csv") for row in own]
        late = [np.mean([float(epoch["val_top1"]) for epoch in curve[-2:]]) for curve in curves]
        assert [float(row["top1"]) for row in own] == pytest.approx(late, abs=1e-6)
        return np.mean(late)

    verdicts = json.loads((runs / "verdicts.json").read_text())
    found = verdicts["findings"][0]
    assert (found["seeds"], found["runs"]) == (1, 4)
    assert found["estimate"] == pytest.approx(mean("student", "0.1") - mean("student", "0.0"), abs=1e-6)
    (found,) = [one for one in verdicts["findings"] if one["claim"] == "more-than-smoothing"]
    assert found["estimate"] == pytest.approx(mean("student", "0.1") - mean("control", "0.1"), abs=1e-6)

    # The two students of a teacher are not one and the same.
    two = sorted((runs / "students").glob("*smoothing0-T1-hard0-seed0*/val_logits.safetensors"))
    assert len(two) == 2
    assert two[0].read_bytes() != two[1].read_bytes()
    jobs = [json.loads((path.parent / "job.json").read_text()) for path in two]
    assert len({job["teacher"]["checkpoint_sha256"] for job in jobs}) == 1
    # What was declared may not change now.
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "student_seeds": 1}))
    refused = study()
    assert refused.returncode == 2
    assert "was made with student_seeds: 2, which may not change afterwards (now 1)" in refused.stderr
