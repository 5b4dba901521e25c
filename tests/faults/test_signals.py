"""Requests to stop, from a terminal, a cluster or `kill`: the same command goes on as if unbroken."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from faults import test_kills
from faults.killing import Command, Moment, assert_same_files
from faults.test_full_disk import note
from timm_runs import SCRIPT

pytestmark = pytest.mark.integration
digits, teacher, numbers, recipe = (
    getattr(test_kills, name) for name in ("digits", "teacher", "numbers", "recipe")
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
OURS = {"timm train.py": "stopped in epoch ", "lskd study": "lskd: stopped; "}  # what each says last
# What theirs say of the checkpoint that they go on from.
WENT_ON = {
    "timm's own train.py": "Loaded checkpoint ",
    "fairseq-hydra-train": "Loaded checkpoint ",
    "mmcls' tools/train.py": "resumed epoch: ",
}
SAME = {
    "timm train.py": assert_same_files,
    "fairseq-hydra-train": test_kills.assert_same_fairseq,
    "mmcls' tools/train.py": test_kills.assert_same_mmcls,
    "lskd study": test_kills.assert_same_study,
}


class Asked(Command):
    """A command that has a checkpoint and is asked to stop: its process alone, or all of it as by Ctrl-C."""

    number = signal.SIGTERM
    begun = False

    def has_begun(self, folder: Path) -> bool:
        self.begun = super().has_begun(folder)
        return self.begun

    def kill(self, process: int) -> bool:
        if self.begun:
            (os.killpg if self.number == signal.SIGINT else os.kill)(process, self.number)
        return self.begun


@pytest.fixture
def given(request, tmp_path, digits, teacher):
    """Return what makes a folder for a kind's command, and the command."""

    def give(kind: str) -> Asked:
        if kind == "lskd study":
            content = test_kills.STUDY | {"data": {"path": str(digits), "num_classes": 4}}
            (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
            (tmp_path / "trainer.yaml").write_text(yaml.safe_dump(test_kills.TRAINER))
            study = test_kills.Study("top")
            return Asked(study.words, study.imported, study.checkpoint)
        if kind == "fairseq-hydra-train":
            made = request.getfixturevalue("numbers")
            asked = f"criterion.kd_teacher='{made / 'out' / 'checkpoint_best.pt'}'"
            words = test_kills.fairseq_words("student", made / "bin", asked)
            return Asked(words, test_kills.OF_FAIRSEQ, "out/checkpoint_last.pt")
        if kind == "mmcls' tools/train.py":
            script = Path(find_spec("mmcls").origin).parent / ".mim" / "tools" / "train.py"
            words = [script, request.getfixturevalue("recipe"), "--work-dir", "out", "--resume"]
            return Asked(words, test_kills.OF_MMCLS, "out/last_checkpoint")
        script = SCRIPT if kind == "timm's own train.py" else "train.py"
        words = ["-m", "timm_ls_kd", script, digits, *test_kills.TIMM, "--kd-teacher-checkpoint", teacher]
        return Asked(words, test_kills.OF_TIMM, "run/last.pth.tar")

    return give


@pytest.fixture
def from_a_terminal():
    """SIGHUP is not ignored, as it is where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def begin(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for path in tmp_path.glob("*.yaml"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", [*SAME, "timm's own train.py"])
def test_a_run_that_is_asked_to_stop(kind, given, from_a_terminal, tmp_path, request):
    """By each signal once."""
    if not request.config.getoption("--long"):
        pytest.skip("in the long form alone")
    if kind == "timm's own train.py" and not Path(SCRIPT).is_file():
        pytest.skip("TIMM_TRAIN_SCRIPT is not set")
    command = given(kind)
    command.imported = (*command.imported, "signal")  # a server of its own, which ignores no signal
    whole = begin(tmp_path, "whole")
    unbroken = command.start(None, whole, Moment())
    assert unbroken.status == 0, unbroken.output
    for number in SIGNALS:
        run = begin(tmp_path, number.name)
        command.number = number
        done = command.start(None, run, Moment(0))
        print(f"{kind}: {number.name}: status {done.status}: {done.output.splitlines()[-1:]}", flush=True)
        assert done.killed, f"{number.name}: it had ended"
        if kind in OURS:
            assert done.status == 128 + number, done.output
            assert done.output.splitlines()[-1].startswith(OURS[kind]), done.output
            assert "Traceback" not in done.output, done.output
        else:  # their own process; timm's own script takes Ctrl-C as an end like any other
            ends = (1, -number) if kind in SAME or number != signal.SIGINT else (0,)
            assert done.status in ends, done.output
        again = command.start(None, run, Moment())
        assert again.status == 0, again.output
        assert WENT_ON.get(kind, "") in again.output, again.output
        assert "epoch 0 done" not in again.output, again.output  # of ours
        if kind in SAME:
            SAME[kind](whole, run)
    said = "one line, status 128 + signal; " if kind in OURS else ""
    after = "the same command ends as unbroken" if kind in SAME else "the same command goes on to its end"
    note("INT, TERM, HUP or QUIT", kind, said + after, len(SIGNALS))


@pytest.mark.parametrize("kind", list(SAME))
def test_a_closed_terminal_under_nohup(kind, given, tmp_path, request):
    if not request.config.getoption("--long"):
        pytest.skip("in the long form alone")
    command = given(kind)
    whole = begin(tmp_path, "whole")
    assert command.start(None, whole, Moment()).status == 0
    run = begin(tmp_path, "under nohup")
    words = [str(word) for word in command.words]
    if words[0] == "fairseq-hydra-train":
        words = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    else:
        words = [sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            ["nohup", *words],
            cwd=run,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not command.has_begun(run) and process.poll() is None:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait() == 0, (tmp_path / "output").read_text()
    assert not psutil.wait_procs(family, 10)[1]
    SAME[kind](whole, run)
    note("HUP under nohup", kind, "goes on; ends as unbroken", 1)
