"""Epochs in trackers: TensorBoard by its own reader, the others where they are installed, sending nothing."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from torch.utils.tensorboard import SummaryWriter

from events import scalars, text
from lskd import LskdError
from lskd.base.trackers import Tracker, _wandb_id, check_tracker, project_name

pytestmark = pytest.mark.unit

ROWS = [{"epoch": epoch, "train_ce": 1.5 / (epoch + 1), "val_top1": 70.0 + epoch} for epoch in range(5)]
# Logs two epochs, then goes on with three more, where no connection but to this machine can be made.
RUN = """
import json, sys
from pathlib import Path

def audit(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect":
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = host[0] if isinstance(host, tuple) else host
        if isinstance(host, str) and host not in ("localhost", "127.0.0.1", "::1") and host[:1] not in "/\\0":
            print("CONNECTS", event, host, flush=True)
            raise OSError("no network")

sys.addaudithook(audit)
from lskd.base.trackers import Tracker
name, folder, rows = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
for part, start in ((rows[:2], None), (rows[2:], 0)):
    config = {"lr": 0.1, "config": {"_scope_": [1]}}
    tracker = Tracker(name, folder, project="flowers", run="one", config=config, start=start)
    for row in part:
        tracker.log(row, row["epoch"])
    tracker.close()
"""


def tracker(folder, **options):
    return Tracker(
        "tensorboard", folder, project=None, run="one", config={"lr": 0.1, "model": "resnet18"}, **options
    )


def test_tensorboard_reads_what_was_logged(tmp_path):
    opened = tracker(tmp_path)
    for row in ROWS:
        opened.log(row, row["epoch"])
    opened.close()
    found = scalars(tmp_path)
    assert found.keys() == ROWS[0].keys()
    for name, values in found.items():
        assert values == pytest.approx({row["epoch"]: row[name] for row in ROWS}), name
    assert "model: resnet18" in text(tmp_path, "config")


@pytest.mark.parametrize("start", [0, 2])
def test_a_run_that_goes_on_has_each_epoch_once(tmp_path, start):
    """Of three epochs the last two are of an end that no checkpoint remembers."""
    first = tracker(tmp_path)
    for epoch in range(4):
        first.log({"loss": 9.0 if epoch >= start else 1.0}, epoch)
    first.close()
    second = tracker(tmp_path, start=start)
    for epoch in range(start, 5):
        second.log({"loss": 1.0}, epoch)
    second.close()
    assert scalars(tmp_path) == {"loss": dict.fromkeys(range(5), 1.0)}


def test_tensorboard_reads_what_goes_on_last_whatever_the_files_are_called(tmp_path, monkeypatch):
    """Files are read by name, seconds first: of one second the tenth would come before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", AtomicCounter(9))
    for start in (None, 2):
        opened = tracker(tmp_path, start=start)
        for row in ROWS[start or 0 :]:
            opened.log(row, row["epoch"])
        opened.close()
    assert scalars(tmp_path)["epoch"] == {row["epoch"]: row["epoch"] for row in ROWS}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line(name, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    for use in (lambda: check_tracker(name), lambda: Tracker(name, tmp_path, project="", run="", config={})):
        with pytest.raises(LskdError, match=f"tracker {name} is not installed here; pip install {name}$"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder `wandb` where it runs, which Python would import."""
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("surely_no_package") is not None
    with pytest.raises(LskdError, match="not installed"):
        check_tracker("surely_no_package")


def test_a_tracker_that_cannot_start_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LskdError, match=r"^tensorboard cannot be started \(.*\)$"):
        tracker(tmp_path / "file")


def test_a_tracker_that_fails_ends_no_training(tmp_path, monkeypatch, capsys):
    opened = tracker(tmp_path)
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_: 1 / 0)
    for epoch in range(3):
        opened.log({"loss": 1.0}, epoch)
    opened.close()
    assert capsys.readouterr().err.splitlines() == [
        "lskd: warning: tensorboard failed (division by zero); the run goes on without it"
    ]


def test_wandbs_run_is_the_one_begun_last(tmp_path):
    assert _wandb_id(tmp_path) is None
    for name in ("offline-run-20260102_100000-b-2", "run-20260101_100000-a1", "run-20251231_235959-z"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / f"run-{name.split('-', 2 + name.startswith('o'))[-1]}.wandb").touch()
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20260101_100000-a1")
    assert _wandb_id(tmp_path) == "b-2"


def test_a_projects_name_is_one_to_all():
    long = "a/b\\c#d?e%f:g " * 20
    assert not set("/\\#?%: ") & set(project_name(long))
    assert len(project_name(long)) == 128
    assert project_name("??") == "lskd"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_log_here_and_send_nothing(name, tmp_path):
    pytest.importorskip(name)
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_TOKEN": "hf_" + "a" * 34,
    }
    words = [sys.executable, "-c", RUN, name, str(tmp_path / "run"), json.dumps(ROWS)]
    (tmp_path / "run").mkdir()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CONNECTS" not in done.stdout
    assert "failed" not in done.stderr
    if name == "wandb":
        begun = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        assert (len(begun), len({path.name for path in begun})) == (2, 1)
    else:
        read = "import json, trackio.sqlite_storage as s; S = s.SQLiteStorage; " + (
            "print(json.dumps([len(S.get_run_records('flowers')), S.get_logs('flowers', 'one')]))"
        )
        words = [sys.executable, "-c", read]
        said = subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stdout
        runs, logs = json.loads(said.splitlines()[-1])
        assert runs == 1
        assert [{key: log[key] for key in ROWS[0]} for log in logs] == ROWS
