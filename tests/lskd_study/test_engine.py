"""`lskd study` around the scheduler: what is run, what is refused, what is said in the end."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lskd import LskdError
from lskd.base.files import cannot_write
from lskd_study.base import stopping
from lskd_study.cli import main as cli
from lskd_study.pages.verdicts import read_record
from lskd_study.plan.plan import JOB, PLAN, Plan
from lskd_study.stores.decide import with_stores
from lskd_study.study import engine
from lskd_study.trainers import TIMM, trainer_of
from lskd_study.trainers.same import changes

pytestmark = pytest.mark.unit

MATRIX = {
    "smoothing": {"values": [0.1, 0]},
    "seeds": [0, 1],
    "students": [{"model": "test_vit", "config": "t.yaml"}],
}


@pytest.fixture
def plan(scene) -> Plan:
    return scene.plan(**MATRIX)


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
    assert out[2] == str(read_record(plan.root).recommendation)


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
        engine.run_study("study.yaml", None, 1, False, ["--executor", "local", "--retries=2"])
    assert scheduled[0][-3:] == ["--executor", "local", "--retries=2"]  # as they were given
    assert not (plan.root / "index.html").exists()
    assert Plan.read(plan.root / PLAN) == with_stores(plan)


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


# The same study in another spelling, and another one


@pytest.mark.parametrize(
    "change",
    [
        {"t.yaml": "epochs: 1\nworkers: 7\nlog_interval: 3\npin_mem: true\nmodel_kwargs: {a: ./x/}\n"},
        {"t.yaml": "epochs: 1\nmodel-kwargs: {a: x/}\n"},
        {"data": {"path": "./data/", "num_classes": 2}},
        {"data": {"path": "{here}/data", "num_classes": 2}},
        {"output": "./out//"},
        {"output": "{here}/out"},
        {"resources": {"threads": 4, "extra": {"mem_mb": 5}}},
        {"tracker": "tensorboard"},
        {"t.yaml": "epochs: 1\nlog_tensorboard: true\nwandb_project: p\nmodel_kwargs: {a: x/}\n"},
        {"teachers": [{"model": "test_resnet", "config": "./t.yaml"}]},
    ],
)
def test_what_changes_no_result_goes_on(scene, finish, scheduled, change, monkeypatch):
    monkeypatch.setattr(TIMM, "check_config", lambda *words: None)
    Path("t.yaml").write_text("epochs: 1\nmodel_kwargs: {a: x/}\n")
    plan = scene.plan(**MATRIX)
    finish(plan)
    content = {**MATRIX, **change}
    Path("t.yaml").write_text(content.pop("t.yaml", Path("t.yaml").read_text()))
    scene.write(**content)
    file = Path("study.yaml")
    file.write_text(file.read_text().replace("{here}", str(Path.cwd())))
    assert engine.run_study("./study.yaml", None, 1, False, []) == 0
    assert scheduled == []
    assert Plan.read(plan.root / PLAN).study_file == "study.yaml"


def test_a_change_of_the_result_is_named_with_both_values_and_not_mixed_in(plan, finish, scene):
    finish(plan)
    before = scene.listing()
    Path("t.yaml").write_text("epochs: 1\nbatch_size: 2\nlr: 0.5\nworkers: 3\n")
    message = r"out contains 8 runs of other settings, e\.g\. teacher-.*: lr was not set, now 0.5; set that"
    with pytest.raises(LskdError, match=message) as found:
        engine.run_study("study.yaml", None, 1, True, [])
    assert "workers" not in str(found.value)
    Path("t.yaml").write_text("epochs: 2\n")
    with pytest.raises(LskdError, match="epochs was 1, now 2"):
        engine.run_study("study.yaml", None, 1, False, [])
    assert scene.listing() == before


def test_the_folder_of_results_goes_on_with_its_study(plan, finish, scheduled, capsys):
    finish(plan)
    assert engine.run_study("study.yaml", "elsewhere", 1, True, []) == 0
    assert engine.run_study("study.yaml", None, 1, False, []) == 0
    capsys.readouterr()
    for name in ("out", "./out/", str(plan.root)):
        assert engine.run_study(name, None, 1, False, []) == 0
        assert capsys.readouterr().out.splitlines()[-2] == "out/index.html"
    plan.root.rename("moved")
    assert engine.run_study("moved", None, 1, False, []) == 0
    assert Plan.read(Path("moved", PLAN)).output == "moved"


def test_a_folder_without_a_study_is_one_line(plan):
    with pytest.raises(LskdError, match=r"no study has written into it; .* --own data$"):
        engine.run_study("data", None, 1, False, [])
    Path("empty").mkdir()
    with pytest.raises(LskdError, match=r"empty is a folder and no study has written into it"):
        engine.run_study("empty", None, 1, True, [])


def test_results_are_gone_on_with_where_they_were_begun(plan, finish, scheduled, monkeypatch):
    finish(plan)
    engine.run_study("study.yaml", None, 1, False, [])
    monkeypatch.chdir(plan.root)
    with pytest.raises(LskdError, match=f"was started in {plan.cwd}; give the command there"):
        engine.run_study(str(plan.root), None, 1, False, [])


@pytest.mark.parametrize("dry_run", [False, True])
def test_another_study_file_is_refused_before_anything_is_written(plan, finish, scheduled, dry_run):
    finish(plan)
    engine.run_study("study.yaml", None, 1, False, [])
    before = {path: path.read_bytes() for path in plan.root.rglob("*") if path.is_file()}
    Path("other.yaml").write_text(Path("study.yaml").read_text().replace("title: T", "title: Other"))
    with pytest.raises(LskdError, match=r"out contains the results of study.yaml; choose another --output"):
        engine.run_study("other.yaml", None, 1, dry_run, [])
    assert {path: path.read_bytes() for path in plan.root.rglob("*") if path.is_file()} == before
    Path("study.yaml").rename("renamed.yaml")
    assert engine.run_study("renamed.yaml", None, 1, dry_run, []) == 0


def test_a_run_folder_that_is_a_link_is_refused_before_any_run(plan, finish, scheduled):
    finish(plan)
    folder = plan.folder(plan.runs[0])
    (folder / JOB).unlink()
    folder.rename("elsewhere")
    folder.symlink_to(Path("elsewhere").absolute())
    with pytest.raises(LskdError, match="is a link, and runs write into folders of their own"):
        engine.run_study("study.yaml", None, 1, True, [])
    Path("elsewhere", JOB).touch()  # finished it is only read
    assert engine.run_study("study.yaml", None, 1, True, []) == 0


def test_a_study_does_not_write_among_the_results_of_a_list_of_teachers(plan):
    Path("out").mkdir()
    Path("out", "verdicts.json").touch()
    with pytest.raises(LskdError, match="out contains the results of a list of teachers; choose another"):
        engine.run_study("study.yaml", None, 1, True, [])


def test_what_counts_in_the_other_trainers_files():
    here = Path("/there")
    binary = {"role": "student", "ecosystem": "mmcls"}
    loader, hooks = {"num_workers": 2, "batch_size": 8}, [{"type": "A"}, {"k": 1}]
    before = {**binary, "config": {"train_dataloader": loader, "custom_hooks": hooks}}
    now = {**binary, "config": {"train_dataloader": loader | {"num_workers": 0}, "custom_hooks": hooks}}
    now["config"]["log_level"] = "DEBUG"
    assert changes(before, now, here) == []
    assert changes(before, before | {"config": {"custom_hooks": [{"type": "A"}, {"k": 2}]}}, here) == [
        "train_dataloader.batch_size was 8, now not set",
        "custom_hooks.1.k was 1, now 2",
    ]
    text = {"role": "student", "ecosystem": "fairseq"}
    one = {**text, "config": {"common": {"log_interval": 1}, "optimization": {"lr": [0.1]}}}
    other = {**text, "config": {"dataset": {"num_workers": 3}, "optimization": {"lr": [0.2]}}}
    assert changes(one, other, here) == ["optimization.lr was [0.1], now [0.2]"]


# Stopped, failed and a full disk: what the terminal shows

NOISY = """
import os, signal, subprocess, sys, time
if {stuck}:
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
print("RuleException in rule teacher", file=sys.stderr, flush=True)
with open(os.environ["LSKD_PROGRESS"], "a") as file:
    file.write({said!r})
if {starts}:
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("job.new", "w") as file:
        file.write(str(job.pid))
    os.rename("job.new", "job.pid")
    job.wait()
while {stuck}:
    time.sleep(600)
sys.exit(1)
"""


@pytest.fixture
def noisy(plan, monkeypatch):
    """In the place of Snakemake, what says on stderr what Snakemake does, and fails or starts a job."""

    def set_up(said: str, starts: bool, stuck: bool = False) -> None:
        words = [sys.executable, "-c", NOISY.format(said=said, starts=starts, stuck=stuck)]
        monkeypatch.setattr(engine.Schedule, "command", lambda self, plan: words)

    return set_up


@pytest.fixture
def from_a_terminal():
    """No signal is ignored from the start, as SIGHUP is where these tests run under nohup."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        assert signal.signal(number, handler) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "status", "stuck"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),
        (signal.SIGHUP, 129, False),
        (signal.SIGQUIT, 131, False),
    ],
)
def test_a_study_that_is_stopped_says_one_line(
    plan, noisy, monkeypatch, capfd, from_a_terminal, number, status, stuck
):
    """Also where the scheduler itself goes on without a job, stuck."""
    monkeypatch.setattr(stopping, "_SECONDS", 0.2)
    noisy("12:00:00  starts   a run\n", True, stuck)

    def stop() -> None:
        while not Path("job.pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)  # this process alone, as `kill` does

    thread = threading.Thread(target=stop)
    thread.start()
    assert cli.main(["study", "study.yaml"]) == status
    thread.join()
    job = int(Path("job.pid").read_text())
    assert not psutil.pid_exists(job) or psutil.Process(job).status() == psutil.STATUS_ZOMBIE
    lines = capfd.readouterr().err.splitlines()
    assert "RuleException" not in "".join(lines)
    assert (
        lines[-1] == "lskd: stopped; 0 of 8 runs are finished and kept; the same command goes on from there"
    )
    assert "RuleException" in (plan.root / "snakemake.log").read_text()
    with engine._only_study(plan):  # nobody holds it any longer
        pass


def test_a_clusters_scheduler_may_take_any_time_to_end(monkeypatch):
    """It cancels jobs, of which this machine sees none."""
    monkeypatch.setattr(stopping, "_SECONDS", 0.01)
    monkeypatch.setattr(stopping, "_ROUNDS", 0)
    slow = (
        "import os, signal\nfor number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda *_: None)\n"
        "print(flush=True)\ninput()\nos._exit(0)"  # at Python's own end a signal kills
    )

    class Scheduler(subprocess.Popen):
        rounds = 0

        def wait(self, timeout=None):
            self.rounds += 1
            if self.rounds == 5:
                self.stdin.write(b"\n")
                self.stdin.flush()
            return super().wait(timeout)

    with Scheduler([sys.executable, "-c", slow], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        stopping._end(process, told=False, local=False)
        assert process.returncode == 0


def test_a_failed_run_is_named_by_its_own_line(plan, noisy, capfd):
    noisy("lskd: error: a run failed: why; the whole log is there\n", starts=False)
    assert cli.main(["study", "study.yaml"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2] == "lskd: error: a run failed: why; the whole log is there"
    assert lines[-1].startswith("lskd: error: no run has finished")
    assert "snakemake" not in "".join(lines)


def test_where_no_run_has_said_why_snakemakes_log_is_named(plan, noisy, capfd):
    noisy("", starts=False)
    assert cli.main(["study", "study.yaml"]) == 2
    assert "lskd: snakemake ended with 1; its log is out/snakemake.log" in capfd.readouterr().err.splitlines()


def test_a_disk_that_is_full_is_said_once(plan, noisy, monkeypatch, capfd):
    noisy("", starts=False)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(engine, "full_disk", lambda folder: cannot_write(folder, full))
    assert cli.main(["study", "study.yaml"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lskd: ")]
    assert line.endswith(
        f"cannot write {plan.root}: the disk is full (No space left on device); what is finished is kept, "
        "make room and give the same command again"
    )


def test_a_diverged_run_is_named_and_trained_again_when_its_settings_change(
    plan, finish, fail, scheduled, capsys
):
    finish(plan)
    teacher = plan.runs[0]
    fail(plan, teacher, "epoch 3: the training loss is nan")
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    said = capsys.readouterr()
    assert "2 of 8 runs failed." in said.err
    assert f"{teacher.id}: epoch 3: the training loss is nan" in said.err
    assert said.out.startswith("No verdict. ")
    assert scheduled == []  # there is nothing to do
    path = plan.folder(teacher) / JOB
    record = json.loads(path.read_text())
    record["settings"]["config"] = {"epochs": 1, "lr": 1e38}
    path.write_text(json.dumps(record))
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert {run.id for run in plan.unfinished()} == {
        run.id for run in plan.runs if teacher.id in (run.id, run.teacher)
    }
    assert len(scheduled) == 1


def test_a_study_whose_data_changed_trains_no_further(plan, finish, scheduled):
    finish(plan)
    (plan.data_dir / "train" / "cat" / "1.png").rename(plan.data_dir / "train" / "cat" / "2.png")
    assert engine.run_study("study.yaml", None, 1, False, []) == 0  # all is done: the page is made again
    (plan.folder(plan.runs[-1]) / JOB).unlink()
    before = sorted(plan.root.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(
            LskdError, match=r"the data in data changed since 7 runs of out were made, e\.g\. "
        ):
            engine.run_study("study.yaml", None, 1, dry_run, [])
    assert sorted(plan.root.rglob("*")) == before
    assert scheduled == []


# Studies without students, with T^2, and with teachers taken over from another study's folder

TEACHERS = {
    "teachers": [{"model": name, "config": "t.yaml"} for name in ("test_resnet", "resnet18")],
    "students": None,
}


def test_teachers_are_compared_alone(scene, finish, capsys):
    plan = scene.plan(**TEACHERS)
    assert plan.teachers_alone
    assert [run.role for run in plan.runs] == ["teacher"] * 4
    finish(plan)
    assert engine.run_study("study.yaml", None, 1, False, []) == 0
    page = (plan.root / "index.html").read_text()
    assert "<title>T</title>" in page
    for run in plan.runs:
        assert run.id.removeprefix("teacher-") in page
    out = capsys.readouterr().out
    assert str(plan.root / "index.html") in out
    assert out.splitlines()[-1] == str(read_record(plan.root).recommendation)
    assert {"stability.csv", "table1.csv"} <= {path.name for path in plan.root.iterdir()}


def test_a_missing_teacher_is_named_and_the_others_are_compared(scene, finish, capsys, monkeypatch):
    plan = scene.plan(**TEACHERS)
    finish(plan)
    (plan.folder(plan.runs[2]) / "job.json").unlink()
    monkeypatch.setattr(engine, "_snakemake", lambda *args: None)
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert f"1 of 4 runs are missing: {plan.runs[2].id}" in capsys.readouterr().err
    page = (plan.root / "index.html").read_text()
    assert plan.runs[3].id.removeprefix("teacher-") in page
    assert "1 of 4 runs are missing" in page
    assert f"<li>{plan.runs[2].id}</li>" in page


def test_the_factor_t_squared_reaches_the_students_and_nothing_else(scene):
    plain, squared = (scene.plan(temperatures=[1, 4], temperature_squared=given) for given in (False, True))
    for before, after in zip(plain.runs, squared.runs, strict=True):
        words, more = TIMM.command(plain, before), TIMM.command(squared, after)
        changed = before.role == "student"
        assert ("--kd-temperature-squared" in more) == changed
        assert [word for word in more if word != "--kd-temperature-squared"] == words
        settings = plain.settings(before), squared.settings(after)
        assert (settings[0] != settings[1]) == changed
        for old, new in (settings, settings[::-1]):  # at T = 1 it is the same run
            assert bool(changes(old, new, Path(plain.cwd))) == (changed and before.temperature == 4)
    student = squared.runs[-1]
    assert "model.distillation.temperature_squared=True" in trainer_of("mmcls", "student").command(
        squared, student
    )
    assert not any("squared" in word for word in trainer_of("mmcls", "student").command(plain, student))


def test_teachers_are_taken_over_from_a_study_that_trained_them(scene, finish):
    """What the headers of some recipes offer: cp -r FIRST/teachers SECOND/."""
    first = scene.plan(**TEACHERS)
    finish(first)
    second = scene.plan(teachers=TEACHERS["teachers"], output="second", temperatures=[1, 2])
    second.root.mkdir()
    shutil.copytree(first.root / "teachers", second.root / "teachers")
    assert {run.role for run in second.unfinished()} == {"student"}
    assert not engine._changed_settings(second)


def test_a_failed_teacher_is_named_and_not_compared(scene, finish, fail, capsys):
    plan = scene.plan(**TEACHERS)
    finish(plan)
    fail(plan, plan.runs[2], "epoch 3: the training loss is nan")
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert f"{plan.runs[2].id}: epoch 3: the training loss is nan" in capsys.readouterr().err
    page = (plan.root / "index.html").read_text()
    assert "1 of 4 runs failed." in page.split('id="answer"')[0]
    assert f'<th scope="col" class="n">{plan.runs[2].id.removeprefix("teacher-")}</th>' not in page
    for one in plan.runs[:2] + plan.runs[3:]:
        fail(plan, one, "epoch 3: the training loss is nan")
    with pytest.raises(LskdError, match=r"there is nothing to compare: run teacher-.*, and 3 more"):
        engine.run_study("study.yaml", None, 1, False, [])
