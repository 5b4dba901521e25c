"""`lskd study` as a user runs it, in miniature: killed half way, gone on with, looked at."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TRAINER = {
    "in_chans": 1,
    "img_size": 32,
    "mean": [0.5],
    "std": [0.5],
    "crop_pct": 1.0,
    "batch_size": 64,
    "validation_batch_size": 300,
    "workers": 0,
    "opt": "sgd",
    "lr": 0.05,
    "sched": "multistep",
    "decay_milestones": [2],
    "warmup_epochs": 0,
    "scale": [0.9, 1.0],
    "hflip": 0.0,
    "color_jitter": 0.0,
    "checkpoint_hist": 1,
}
STUDY = {
    "title": "Miniature",
    "data": {"path": "data/digits", "num_classes": 10, "prepare": "digits"},
    "output": "runs/mini",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0, 1],
    "teachers": [{"model": "test_byobnet", "config": "teacher.yaml"}],
    "students": [{"model": "test_byobnet", "config": "student.yaml"}],
    "resources": {"threads": 1, "extra": {"gpu": 1}},
}
LSKD = [sys.executable, "-m", "lskd_study"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("study")
    (root / "teacher.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 3}))
    (root / "student.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 1}))
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # taken at its word, GPUs or not
        yield root


def lskd(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LSKD, *words], cwd=folder, capture_output=True, text=True, timeout=400)


def finished(folder: Path) -> dict[str, int]:
    return {str(path.parent.name): path.stat().st_mtime_ns for path in folder.glob("runs/mini/*/*/job.json")}


def test_a_study_survives_being_killed(folder):
    dry = lskd(folder, "study", "study.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "8 runs: 0 finished, 8 to do" in dry.stdout
    assert not (folder / "runs").exists()
    assert not (folder / "data").exists()

    command = [*LSKD, "study", "study.yaml", "--cores", "2"]
    with (folder / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(finished(folder)) < 2:
        assert first.poll() is None, (folder / "first.log").read_text()
        assert time.monotonic() < deadline, (folder / "first.log").read_text()
        time.sleep(0.2)
    # A second study on the same folder is refused while the first one lives ...
    second = lskd(folder, "study", "study.yaml")
    assert second.returncode == 2
    assert second.stderr == "lskd: error: another study is running in runs/mini; wait for it or end it\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = finished(folder)
    assert 2 <= len(before) < 8

    # ... and not any longer when it was killed, whatever locks it left.
    again = lskd(folder, "study", "study.yaml", "--cores", "2")
    assert again.returncode == 0, again.stderr
    after = finished(folder)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert "[8 of 8 done]" in again.stderr
    assert "Traceback" not in again.stderr
    assert "95 % interval" in again.stdout or "no interval can be made" in again.stdout
    assert not (folder / ".snakemake").exists()

    page = folder / "runs" / "mini" / "index.html"
    page.unlink()
    third = lskd(folder, "study", "study.yaml")
    assert third.returncode == 0, third.stderr
    assert finished(folder) == after
    assert page.exists()
    assert third.stderr == ""


def test_the_recorded_command_and_curves_are_the_trainers_own(folder):
    """Needs the study of the test above."""
    name = "student-test_byobnet-of-test_byobnet-smoothing0.1-T1-hard0-seed1"
    run = folder / "runs" / "mini" / "students" / name
    if not (run / "job.json").exists():
        pytest.skip("the study above did not finish")
    job = json.loads((run / "job.json").read_text())
    teacher = json.loads((run.parents[1] / "teachers" / job["settings"]["teacher"] / "job.json").read_text())
    assert job["teacher"]["checkpoint_sha256"] == teacher["checkpoint"]["sha256"]
    header, row = (line.split(",") for line in (run / "curves.csv").read_text().splitlines())
    values = dict(zip(header, row, strict=True))
    parts = float(values["train_kl"]) + float(values["train_teacher_entropy"])
    assert float(values["train_ce"]) == pytest.approx(parts, rel=1e-3)
    top1 = (run.parents[1] / "runs.csv").read_text().split(name)[1].split("\n")[0].split(",")[7]
    assert float(top1) == pytest.approx(float(values["val_top1"]), abs=0.35)  # float16 may break a tie

    # Verbatim from the page, as it would be pasted into a shell in that folder.
    page = (run.parents[1] / "index.html").read_text()
    shown = [html.unescape(text) for text in re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page)]
    (command,) = [text for text in shown if text.endswith(f"--experiment {name}")]
    assert command.endswith(job["rerun_command"])
    device = job["environment"]["CUDA_VISIBLE_DEVICES"]
    assert device in {"0", "1"}
    assert f"CUDA_VISIBLE_DEVICES={device} " in command
    assert f"CUDA_VISIBLE_DEVICES={device}" in (run / "train.log").read_text()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    again = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert again.returncode == 0, again.stderr
    rerun = (folder / "rerun" / name / "summary.csv").read_text()
    assert rerun == (run / "summary.csv").read_text()


def test_changed_settings_do_not_mix_with_older_runs(folder):
    """Needs the study of the first test."""
    if not finished(folder):
        pytest.skip("the study above did not finish")
    before = finished(folder)
    (folder / "teacher.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 4}))
    changed = lskd(folder, "study", "study.yaml")
    assert changed.returncode == 2
    assert "holds 4 runs of other settings" in changed.stderr
    assert len(changed.stderr.splitlines()) == 1
    assert finished(folder) == before
