"""How Snakemake is called: profiles by name, executors, cores, GPUs, progress; nothing is run."""

import errno
import importlib.util
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.base import gpus, progress
from lskd_study.plan.recipes import recipes_folder
from lskd_study.runs import clusters, scheduler
from lskd_study.runs.scheduler import make_schedule, shipped_profiles

pytestmark = pytest.mark.unit


@pytest.fixture
def plan(tmp_path, plan_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    return plan_of(tmp_path)


@pytest.fixture
def plan_on_volume(plan_of, monkeypatch):
    """In a folder without a space in its name, which that of the tests may have."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.chdir(folder)
        yield plan_of(Path(folder))


@pytest.fixture
def slurm_here(monkeypatch):
    """A machine where jobs can be submitted, without accounting."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("snakemake-executor-plugin-slurm is not installed")
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: "/sbatch" if name == "sbatch" else real(name))
    monkeypatch.setattr(clusters, "_accounting", lambda: False)


def value(words, option):
    return words[words.index(option) + 1]


def test_alone_it_is_this_machine_and_one_run_at_a_time(plan):
    schedule = make_schedule(plan, None, [])
    assert schedule.executor == "local"
    assert value(schedule.command(plan), "--cores") == "1"
    assert "--logger" not in schedule.command(plan)
    assert schedule.environment == {progress.VARIABLE: str(plan.root / "progress.log")}
    assert value(make_schedule(plan, 3, []).command(plan), "--cores") == "3"


def test_without_a_home_to_write_to_the_output_takes_snakemakes_cache(plan, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HF_HOME", "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "XDG_CACHE_HOME" not in make_schedule(plan, 1, []).environment
    assert not list(tmp_path.glob(".cache"))
    monkeypatch.setenv("HOME", "/dev/null")  # as the user nobody's /nonexistent, for root too
    found = make_schedule(plan, 1, []).environment
    assert found["XDG_CACHE_HOME"] == str(plan.root.resolve() / ".snakemake")
    assert found["TORCH_HOME"] == "/dev/null/.cache/torch"  # where weights are looked for is as it was
    assert "HF_HOME" not in found


def test_a_study_of_gpus_gets_all_that_are_visible(plan):
    asks = replace(plan, resources={"gpu": 1})
    schedule = make_schedule(asks, 2, [])
    assert schedule.options == ["--resources", "gpu=2"]
    assert schedule.environment[gpus.CANDIDATES] == "0,1"
    assert schedule.process_environment()[gpus.VISIBLE] == "0,1"
    fewer = make_schedule(asks, 2, ["--resources", "gpu=1"])
    assert fewer.options == ["--resources", "gpu=1"]
    others = make_schedule(asks, 2, ["--resources", "mem_mb=900"])
    assert others.options[2:] == ["--resources", "mem_mb=900", "gpu=2"]
    with pytest.raises(LskdError, match="--resources gpu=3 but 2 are visible"):
        make_schedule(asks, 2, ["--resources", "gpu=3"])


def test_a_finished_study_needs_no_gpu(plan, finish, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "")
    asks = replace(plan, resources={"gpu": 1})
    with pytest.raises(LskdError, match="asks for 1 GPU but 0 are visible"):
        make_schedule(asks, 1, [])
    finish(plan)
    assert gpus.CANDIDATES not in make_schedule(asks, 1, []).environment


@pytest.mark.parametrize("form", [["--profile", "slurm"], ["--profile=slurm"]])
def test_a_profile_that_comes_with_lskd_is_known_by_its_name(form, plan, slurm_here, monkeypatch):
    monkeypatch.setenv(gpus.CANDIDATES, "0")
    schedule = make_schedule(replace(plan, resources={"gpu": 1}), None, form)
    words = schedule.command(plan)
    folder = str(recipes_folder() / "profiles" / "slurm")
    assert folder in words or f"--profile={folder}" in words
    assert schedule.executor == "slurm"
    # The cluster counts cores and gives each job its GPUs.
    assert "--cores" not in words
    assert "--resources" not in words
    assert gpus.CANDIDATES not in schedule.process_environment()
    assert value(words, "--slurm-status-command") == "squeue"
    assert value(words, "--slurm-jobname-prefix") == clusters.job_prefix(plan.root)
    assert schedule.environment[progress.VARIABLE] == str(plan.root / "progress.log")


def test_what_the_user_says_of_slurm_stands(plan, slurm_here):
    with pytest.raises(LskdError, match="--executor slurm needs --jobs N too"):
        make_schedule(plan, None, ["--executor", "slurm"])
    given = ["--profile", "slurm", "--slurm-status-command", "sacct", "--slurm-jobname-prefix", "mine"]
    schedule = make_schedule(plan, 8, given)
    assert schedule.options[2:] == given[2:]
    assert value(schedule.command(plan), "--cores") == "8"


def test_a_profile_of_the_users_comes_first(plan, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "config.yaml").write_text("executor: local\nretries: 2\n")
    schedule = make_schedule(plan, None, ["--profile", "slurm"])
    assert (schedule.executor, schedule.options) == ("local", ["--profile", "slurm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "slrum"], "no profile slrum: no such folder with a config.yaml; with lskd come "),
        (["--executor", "slurm"], "no sbatch here; start the study on a machine of the cluster"),
        (["--executor", "condor"], "executor condor is not installed here; pip install snakemake-exec"),
        (["--profile", "broken"], "not valid YAML"),
        (["--profile", "odd"], "fix the profile odd"),
        (["--directory", "x"], "--directory is set by lskd study itself"),
        (["--no-such-option"], "an option of neither lskd study nor snakemake"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything(options, message, plan, tmp_path, monkeypatch):
    for name, content in {"broken": "a: [", "odd": "retries: many\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(content)
    monkeypatch.setattr(scheduler.shutil, "which", lambda name: None)
    if "slurm" in options:
        monkeypatch.setattr(scheduler.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(LskdError, match=message) as raised:
        make_schedule(plan, 1, options)
    assert "\n" not in str(raised.value)
    assert not plan.root.exists()


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_missing_executor_names_the_extra(name, plan, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if name in module else real(module))
    with pytest.raises(LskdError, match=re.escape(f"{name} is not installed here; {how_to_install(name)}")):
        make_schedule(plan, None, ["--profile", name])


@pytest.mark.parametrize("options", [["--verbose"], ["-p"]])
def test_snakemake_itself_is_heard_where_it_was_asked_for(plan, options):
    assert not make_schedule(plan, 1, ["--retries", "2"]).speaks
    assert make_schedule(plan, 1, options).speaks


def test_lines_of_runs_reach_who_follows(tmp_path, monkeypatch):
    path = tmp_path / "progress.log"
    path.write_text("of an earlier study\n")
    shown = []
    looked = threading.Event()

    def look() -> None:
        if looked.is_set():  # the thread is still there
            follower._end.set()
        looked.set()
        raise OSError(errno.ESTALE, "Stale file handle")

    follower = progress.Follower(path, shown.append, look)
    follower._thread.join()
    assert follower._end.is_set()
    follower = progress.Follower(path, shown.append)
    monkeypatch.setenv(progress.VARIABLE, str(path))
    progress.say("lskd: error: é", timed=False)
    progress.say("starts")
    with path.open("a") as file:
        file.write("half a li")
    follower.stop()
    assert shown[0] == "lskd: error: é"
    assert shown[1].endswith("  starts")
    assert len(shown) == 2


def test_jobs_that_a_killed_study_left_are_cancelled(tmp_path, monkeypatch):
    prefix, asked = clusters.job_prefix(tmp_path), []
    queue = f"7 {prefix}_aa\n8 other\n9_3 {prefix}_aa\n10 {prefix}0_aa\n"

    def run(words, **options):
        asked.append(words)
        cancelled = any(words[0] == "scancel" for words in asked)
        return subprocess.CompletedProcess(words, 0, "8 other\n" if cancelled else queue)

    monkeypatch.setattr(clusters.subprocess, "run", run)
    assert clusters.cancel_orphans(tmp_path) == 2
    assert ["scancel", "7", "9_3"] in asked
    assert clusters.cancel_orphans(tmp_path) == 0
    assert asked[-1][0] == "squeue"


@pytest.mark.parametrize("name", shipped_profiles())
def test_profiles_say_how_they_are_used(name):
    path = recipes_folder() / "profiles" / name / "config.yaml"
    text = path.read_text()
    assert yaml.safe_load(text)["executor"] == name
    assert f"--profile {name}" in text
    assert f"pip install -c constraints.txt -e '.[all,{name}]'" in text


IMAGE = ["--container-image", "i"]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ([], {}, "needs --container-image IMAGE too"),
        (IMAGE, {}, "needs --kubernetes-persistent-volumes CLAIM:PATH too"),
        (
            [*IMAGE, "--kubernetes-persistent-volumes", "a:/mnt/a", "b:/mnt/b"],
            {},
            " is not below /mnt/a, /mnt/b; jobs see nothing but that volume",
        ),
        (
            [*IMAGE, "--kubernetes-persistent-volumes", "a:/"],
            {"prepare": "digits"},
            "data is not there yet; make it with `lskd data digits --output data`",
        ),
        (
            [*IMAGE, "--kubernetes-persistent-volumes", "a:/"],
            {"data": "/a b"},
            "/a b has a space in its name; jobs on Kubernetes would not find it",
        ),
    ],
)
def test_kubernetes_needs_an_image_and_all_on_a_volume(options, changes, message, plan_on_volume):
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    with pytest.raises(LskdError, match=message):
        make_schedule(replace(plan_on_volume, **changes), None, ["--profile", "kubernetes", *options])


def test_kubernetes_is_sent_the_workflow_and_looks_on_the_volume(plan_on_volume):
    plan = plan_on_volume
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    options = ["--profile", "kubernetes", *IMAGE, "--kubernetes-persistent-volumes", "a:/"]
    schedule = make_schedule(plan, None, options)
    words = schedule.command(plan)
    assert value(words, "--default-storage-prefix") == str(plan.root)
    schedule.prepare(plan)
    snakefile = plan.root / "Snakefile"
    assert value(words, "--snakefile") == str(snakefile)
    assert snakefile.read_text() == scheduler.SNAKEFILE.read_text()
    plain = replace(schedule, copied=False)
    assert value(plain.command(plan), "--snakefile") == str(scheduler.SNAKEFILE)
