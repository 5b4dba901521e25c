"""`lskd study` as a user runs it, in miniature: killed half way, gone on with, looked at.

Two students of each teacher, so that teachers are asked once and both read what is stored.
"""

import argparse
import contextlib
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import forked
from events import assert_are_curves
from lskd import SoftLabels
from lskd_study.plan.plan import Plan

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
    "seeds": [0],
    "teachers": [{"model": "test_byobnet", "config": "teacher.yaml"}],
    "students": [
        {"model": "test_byobnet", "config": "student.yaml"},
        {"model": "test_resnet", "config": "student.yaml"},
    ],
    "tracker": "tensorboard",
    "soft_labels": {"mode": "always"},  # these teachers are too small for auto
    "resources": {"threads": 1, "extra": {"gpu": 1}},
}
# Writes a store and is killed while it does.
KILLED_WRITER = """
import os, signal, sys
from lskd_study.runs.__main__ import main
from timm_ls_kd.trainer import main as trainer
from lskd import FrozenTeacher

trainer._BATCHES, asked, ask = 2, 0, FrozenTeacher.__call__

def kill(self, batch):
    global asked
    asked += 1
    if asked == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(self, batch)

FrozenTeacher.__call__ = kill
main(sys.argv[1:])
"""
LSKD = [sys.executable, "-m", "lskd_study"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("study")
    (root / "teacher.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 3}))
    (root / "student.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 2}))
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # taken at its word, GPUs or not
        (root / "tmp").mkdir()
        patch.setenv("TMPDIR", str(root / "tmp"))  # where the locks of GPUs are: other tests have such, too
        yield root


def lskd(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "lskd_study", *words, imported=("timm", "lskd_study.pages.study"), cwd=folder)


def runs_of_the_server(study: int) -> set[int]:
    """Return the processes that a study's server of forks has at this moment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(study).children():
            if "lskd_study.runs.forkserver" in child.cmdline():
                return {run.pid for run in child.children()}
    return set()


def finished(folder: Path) -> dict[str, int]:
    records = [*folder.glob("runs/mini/teachers/*/job.json"), *folder.glob("runs/mini/students/*/job.json")]
    return {str(path.parent.name): path.stat().st_mtime_ns for path in records}


def kill_a_writer(folder: Path) -> Path:
    """Kill a process that writes a store that a student still needs; return the store's folder."""
    plan = Plan.read(folder / "runs" / "mini" / "plan.json")
    store = next(
        store for store in plan.stores if any(not plan.done(plan.run(name)) for name in store.students)
    )
    shutil.rmtree(plan.root / store.folder, ignore_errors=True)  # it may be whole by now
    words = [sys.executable, "-c", KILLED_WRITER, plan.root / "plan.json", store.id]
    killed = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stored = len(SoftLabels(plan.root / store.folder / "labels"))
    assert 0 < stored < 2 * 1201
    return plan.root / store.folder


@pytest.fixture(scope="module")
def study(folder):
    """Return the folder of a study that was killed, with a writer of its soft labels, and gone on with."""
    dry = lskd(folder, "study", "study.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "6 runs: 0 finished, 6 to do" in dry.stdout
    assert "2 stores, all classes in float32, serve 4 students" in dry.stdout
    assert "about 4,804 images instead of 9,608: 4,804 passes saved" in dry.stdout
    assert not (folder / "runs").exists()
    assert not (folder / "data").exists()

    command = [*LSKD, "study", "study.yaml", "--cores", "2"]
    with (folder / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    forked_runs = set()
    while len(list(folder.glob("runs/mini/teachers/*/job.json"))) < 2:
        assert first.poll() is None, (folder / "first.log").read_text()
        forked_runs |= runs_of_the_server(first.pid)
        time.sleep(0.2)
    assert len(forked_runs) >= 2  # the next run may have begun
    # A second study on the same folder is refused while the first one lives ...
    second = lskd(folder, "study", "study.yaml")
    assert second.returncode == 2
    assert second.stderr == "lskd: error: another study is running in runs/mini; wait for it or end it\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    # And the clock was an hour fast until then, so that students will end before their teachers did.
    for path in folder.glob("runs/mini/*/*/job.json"):
        os.utime(path, (time.time() + 3600,) * 2)
    before = finished(folder)
    assert 2 <= len(before) < 6
    store = kill_a_writer(folder)

    # ... and not any longer when it was killed, whatever locks it left.
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    after = finished(folder)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert "[6 of 6 done]" in again.stderr
    record = json.loads((store / "job.json").read_text())
    assert record["resumed"] >= 1
    assert record["soft_labels"]["rows"] == 2 * 1201
    assert record["removed"]
    assert not list(folder.glob("runs/mini/soft_labels/*/labels"))
    assert "4,804 passes saved" in (folder / "runs" / "mini" / "index.html").read_text()
    assert "Traceback" not in again.stderr
    assert "95 % interval" in again.stdout or "no interval can be made" in again.stdout
    assert not (folder / ".snakemake").exists()

    page = folder / "runs" / "mini" / "index.html"
    page.unlink()
    third = lskd(folder, "study", "study.yaml")
    assert third.returncode == 0, third.stderr
    assert finished(folder) == after
    assert page.exists()
    assert all(line.startswith("lskd: note: ") for line in third.stderr.splitlines()), third.stderr
    return folder


def test_a_study_survives_being_killed(study):
    assert len(finished(study)) == 6


def test_each_runs_curves_are_in_tensorboard_whatever_was_killed(study):
    for path in study.glob("runs/mini/*/*/curves.csv"):
        assert_are_curves(path.parent)
    said = (study / "runs" / "mini" / "progress.log").read_text()
    for name in finished(study):
        total = 3 if name.startswith("teacher") else 2
        assert f"  epoch    {name}  {total} of {total}\n" in said
    assert not any("  epoch  " in line for line in (study / "first.log").read_text().splitlines())


def test_the_recorded_command_and_curves_are_the_trainers_own(study):
    folder, name = study, "student-test_resnet-of-test_byobnet-smoothing0.1-T1-hard0-seed0"
    run = folder / "runs" / "mini" / "students" / name
    job = json.loads((run / "job.json").read_text())
    teacher = json.loads((run.parents[1] / "teachers" / job["settings"]["teacher"] / "job.json").read_text())
    assert job["teacher"]["checkpoint_sha256"] == teacher["checkpoint"]["sha256"]
    header, _, row = (line.split(",") for line in (run / "curves.csv").read_text().splitlines())
    values = dict(zip(header, row, strict=True))
    parts = float(values["train_kl"]) + float(values["train_teacher_entropy"])
    assert float(values["train_ce"]) == pytest.approx(parts, rel=1e-3)
    top1 = (run.parents[1] / "runs.csv").read_text().split(name)[1].split("\n")[0].split(",")[8]
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
    )
    assert again.returncode == 0, again.stderr
    rerun = (folder / "rerun" / name / "summary.csv").read_text()
    assert rerun == (run / "summary.csv").read_text()

    # Without any store: the student that asks its teacher has the same weights to the last bit.
    assert job["soft_labels"]["store"].startswith(job["settings"]["teacher"])
    words = shlex.split(job["rerun_command"])
    first = words.index("--kd-soft-labels")
    online = [*words[1:first], *words[words.index("--output") :]]
    online[online.index("--output") + 1] = "online"
    alone = subprocess.run(
        [sys.executable, "-m", "timm_ls_kd", *online], cwd=folder, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert "soft labels" not in alone.stdout
    expected = weights(folder / "online" / name)
    for folder_of_run in (run, folder / "rerun" / name):
        found = weights(folder_of_run)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "last.pth.tar", weights_only=True)["state_dict"]


def test_changed_settings_do_not_mix_with_older_runs(study):
    before = finished(study)
    config = study / "teacher.yaml"
    settings = config.read_text()
    config.write_text(yaml.safe_dump({**TRAINER, "epochs": 4}))
    try:
        changed = lskd(study, "study", "study.yaml")
    finally:
        config.write_text(settings)
    assert changed.returncode == 2
    assert "contains 2 runs of other settings" in changed.stderr
    assert len(changed.stderr.splitlines()) == 1
    assert finished(study) == before
