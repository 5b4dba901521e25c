"""Which GPUs a run takes: locks of real processes over made-up names of devices; no GPU is needed."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest

from lskd import LskdError
from lskd_study.base import gpus
from lskd_study.base.gpus import CANDIDATES, VISIBLE, chosen_gpus, gpus_for_all, visible_gpus
from lskd_study.plan.plan import JOB
from lskd_study.runs import job, work
from lskd_study.trainers import TIMM

pytestmark = pytest.mark.unit

HOLDER = """
import time
from lskd_study.base.gpus import chosen_gpus
with chosen_gpus({"gpu": 1}) as devices:
    print(*devices.values(), flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv(CANDIDATES, "0,1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def taken(count: int = 1) -> str:
    """Return which devices a run gets now."""
    with chosen_gpus({"gpu": count}) as devices:
        return devices[VISIBLE]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0,1", ["0", "1"]),
        (" 3 , GPU-1a2b ", ["3", "GPU-1a2b"]),
        ("", []),
        ("-1", []),
        ("2,-1,0", ["2"]),  # CUDA stops there
    ],
)
def test_the_variable_says_what_is_visible(given, expected, monkeypatch):
    monkeypatch.setenv(VISIBLE, given)
    assert visible_gpus() == expected


def test_without_the_variable_torch_counts():
    import torch

    assert visible_gpus() == [str(index) for index in range(torch.cuda.device_count())]


def test_runs_take_different_devices_and_the_dead_give_theirs_back():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline().strip() == "0"
            with chosen_gpus({"gpu": 1}) as devices:
                assert devices == {VISIBLE: "1"}
                assert os.environ[VISIBLE] == "1"
            assert VISIBLE not in os.environ
        finally:
            other.kill()
    said = []
    with chosen_gpus({"gpu": 1}, said.append) as devices:
        assert devices == {VISIBLE: "0"}
    assert said == []


def test_a_run_waits_for_as_many_as_it_asks_for(monkeypatch):
    with ExitStack() as other:
        other.enter_context(chosen_gpus({"gpu": 1}))
        monkeypatch.setattr(gpus.time, "sleep", lambda seconds: other.close())
        said = []
        with chosen_gpus({"gpu": 2}, said.append) as devices:
            assert devices == {VISIBLE: "0,1"}
    assert said == ["waits for 2 GPUs: too few of 0, 1 are free"]


@pytest.mark.parametrize("candidates", ["", None])
def test_where_a_cluster_gives_the_devices_nothing_is_changed(candidates, monkeypatch):
    monkeypatch.setenv(VISIBLE, "5")
    monkeypatch.delenv(CANDIDATES)
    if candidates is not None:
        monkeypatch.setenv(CANDIDATES, candidates)
    with chosen_gpus({"gpu": 1}) as devices:
        assert (devices, os.environ[VISIBLE]) == ({}, "5")


def test_all_visible_ones_unless_it_is_said(monkeypatch):
    monkeypatch.setenv(VISIBLE, "2,3,5")
    assert gpus_for_all({"gpu": 1}, None) == (3, ["2", "3", "5"])
    assert gpus_for_all({"gpu": 1}, 2) == (2, ["2", "3", "5"])
    assert gpus_for_all({"mem_mb": 100}, None) == (0, [])


@pytest.mark.parametrize(
    ("visible", "resources", "limit", "message"),
    [
        ("", {"gpu": 1}, None, r"each run asks for 1 GPU but 0 are visible \(CUDA_VISIBLE_DEVICES=\); take"),
        ("0", {"gpu": 2}, None, r"each run asks for 2 GPUs but 1 is visible \(CUDA_VISIBLE_DEVICES=0\)"),
        ("0", {"gpu": 1}, 4, r"--resources gpu=4 but 1 is visible \(CUDA_VISIBLE_DEVICES=0\); give 1"),
        ("0,1", {"gpu": 2}, 1, "each run asks for 2 GPUs but --resources gives 1; give 2 or more"),
        ("0", {"gpu": "two"}, None, "resources.extra.gpu is 'two'; it is the number"),
        ("0", {"gpu": True}, None, "resources.extra.gpu is True; it is the number"),
    ],
)
def test_fewer_devices_than_asked_for_is_one_line(visible, resources, limit, message, monkeypatch):
    monkeypatch.setenv(VISIBLE, visible)
    with pytest.raises(LskdError, match=message) as raised:
        gpus_for_all(resources, limit)
    assert "\n" not in str(raised.value)


def test_allocations_of_slurm_may_both_have_a_device_0(monkeypatch):
    with chosen_gpus({"gpu": 2}):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert taken(2) == "0,1"


def test_somebody_elses_lock_folder_is_not_used(tmp_path):
    (tmp_path / f"lskd-gpus-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(LskdError, match="belongs to somebody else; set TMPDIR"):
        taken()


def test_the_trainer_sees_the_chosen_device_and_the_page_repeats_it(tmp_path, plan_of, monkeypatch, capsys):
    plan = replace(plan_of(tmp_path), resources={"gpu": 1})
    (tmp_path / "data" / "train").mkdir(parents=True)
    run = plan.runs[0]
    seen = []

    def train(words):
        seen.append(os.environ[VISIBLE])
        (plan.folder(run) / TIMM.checkpoint).write_text("weights")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TIMM, "train", train)
    monkeypatch.setattr(TIMM, "read_curves", lambda folder, role: [])
    monkeypatch.setattr(TIMM, "collect", lambda folder, data_dir: None)
    monkeypatch.setattr(work, "_store_logits", lambda *args: "fine")
    with chosen_gpus({"gpu": 1}):
        job.run_job(plan, run)
    assert seen == ["1"]
    assert f"starts   {run.id}  CUDA_VISIBLE_DEVICES=1" in capsys.readouterr().err
    record = json.loads((plan.folder(run) / JOB).read_text())
    assert record["environment"][VISIBLE] == "1"
    assert "CUDA_VISIBLE_DEVICES=1" in (plan.folder(run) / job.LOG).read_text()
