"""`lskd study` around the scheduler: what is run, what is refused, what is said in the end."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lskd import LskdError
from lskd_study import engine
from lskd_study.plan import JOB, PLAN, Plan
from lskd_study.stores.decide import with_stores

pytestmark = pytest.mark.unit

STUDY = {
    "title": "T",
    "data": {"path": "data", "num_classes": 2},
    "output": "out",
    "smoothing": {"values": [0.1, 0]},
    "seeds": [0, 1],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}],
    "students": [{"model": "test_vit", "config": "t.yaml"}],
}


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "data" / name / "1.png")
    (tmp_path / "t.yaml").write_text("epochs: 1\nbatch_size: 2\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return engine.make_plan("study.yaml", None)


@pytest.fixture
def scheduled(monkeypatch) -> list[list[str]]:
    """Commands that would have started Snakemake; nothing is run."""
    commands: list[list[str]] = []
    real = subprocess.Popen

    class Process:
        def wait(self):
            return 1

    def start(command, **options):
        if "snakemake" not in command:  # what plugins of Snakemake ask the machine
            return real(command, **options)
        assert options["pass_fds"]
        commands.append(command)
        return Process()

    monkeypatch.setattr(engine.subprocess, "Popen", start)
    return commands


def test_the_baseline_is_the_smallest_smoothing_value(plan):
    assert plan.smoothing == [0, 0.1]
    assert engine.make_plan("study.yaml", "elsewhere").output == "elsewhere"


def test_a_finished_study_only_rebuilds_its_page(plan, finish, scheduled, capsys):
    finish(plan)
    assert engine.run_study("study.yaml", None, 1, False, []) == 0
    assert scheduled == []
    assert (plan.root / "index.html").exists()
    out = capsys.readouterr().out.splitlines()
    assert "top-1 accuracy" in out[0]
    assert out[1] == "out/index.html"


def test_a_failed_run_does_not_lose_the_others(plan, finish, scheduled, capsys):
    finish(plan)
    lost = plan.runs[-1]
    (plan.folder(lost) / JOB).unlink()
    assert engine.run_study("study.yaml", None, 2, False, []) == 1
    assert len(scheduled) == 1
    assert {"--keep-going", "--nolock", "--ignore-incomplete"} <= set(scheduled[0])
    assert scheduled[0][scheduled[0].index("--directory") + 1] == str(plan.root)
    assert scheduled[0][scheduled[0].index("--cores") + 1] == "2"
    err = capsys.readouterr().err
    assert f"1 of 8 runs are missing: {lost.id}" in err
    assert lost.id in (plan.root / "index.html").read_text()


def test_without_any_result_there_is_no_page(plan, scheduled):
    with pytest.raises(LskdError, match="no run has finished"):
        engine.run_study("study.yaml", None, 1, False, [])
    assert not (plan.root / "index.html").exists()
    assert Plan.read(plan.root / PLAN) == with_stores(plan)


def test_options_reach_snakemake_as_they_are(plan, scheduled):
    with pytest.raises(LskdError):
        engine.run_study("study.yaml", None, 1, False, ["--executor", "local", "--retries=2"])
    assert scheduled[0][-3:] == ["--executor", "local", "--retries=2"]


def test_runs_of_other_settings_are_not_mixed_in(plan, finish, scheduled):
    finish(plan)
    before = sorted(plan.root.rglob("*"))
    Path("t.yaml").write_text("epochs: 2\n")
    with pytest.raises(LskdError, match=r"out holds 8 runs of other settings, e\.g\. teacher-"):
        engine.run_study("study.yaml", None, 1, False, [])
    assert sorted(plan.root.rglob("*")) == before


def test_students_of_a_retrained_teacher_are_made_again(plan, finish, scheduled):
    finish(plan)
    teacher = plan.runs[0]
    path = plan.folder(teacher) / JOB
    job = json.loads(path.read_text())
    job["checkpoint"]["sha256"] = "another"
    path.write_text(json.dumps(job))
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert [run.teacher for run in plan.unfinished()] == [teacher.id]


def test_two_studies_never_share_an_output_folder(plan, finish):
    finish(plan)
    with engine._only_study(plan), pytest.raises(LskdError, match="another study is running in out"):
        engine.run_study("study.yaml", None, 1, False, [])
    assert engine.run_study("study.yaml", None, 1, False, []) == 0
