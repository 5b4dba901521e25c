"""The job's own logic with a trainer that only writes files; the real trainer runs in tests/integration."""

import contextlib
import csv
import errno
import fcntl
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from events import assert_are_curves, scalars, text
from lskd import DivergedError, LskdError
from lskd.base.files import cannot_write
from lskd.checkpoints import file_checksum
from lskd_study.base import progress
from lskd_study.plan.folders import begin
from lskd_study.plan.plan import BEGUN, CHECKPOINT, CURVES, JOB, LOGITS, PLAN
from lskd_study.results.images import read_stored
from lskd_study.results.read import read_results
from lskd_study.runs import __main__ as run_main
from lskd_study.runs import job, log
from lskd_study.runs.data_checksum import data_checksum
from lskd_study.trainers import TIMM

pytestmark = pytest.mark.unit

EPOCHS = 3


class Trainer:
    """Writes what timm would; stops after ``stop`` epochs when asked to."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.stop: int | None = None

    def __call__(self, words: list[str]) -> None:
        self.calls.append(words)
        folder = Path(words[words.index("--output") + 1], words[words.index("--experiment") + 1])
        summary = folder / "summary.csv"
        begun = len(summary.read_text().splitlines()) - 1 if "--resume" in words else 0
        with summary.open("a" if begun else "w", newline="") as file:
            writer = csv.writer(file)
            if not begun:
                writer.writerow(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"])
            for epoch in range(begun, EPOCHS):
                writer.writerow([epoch, 1.5, 0.5, 70 + epoch, 100, 0.1])
                file.flush()
                torch.save({"run": f"{words} epoch {epoch}"}, folder / CHECKPOINT)
                if self.stop == epoch:
                    raise KeyboardInterrupt


class Study:
    """A study whose trainer is `Trainer`; ``run`` is its first, ``student`` its first student."""

    def __init__(self, plan, patch) -> None:
        self.plan, self.patch, self.trainer = plan, patch, Trainer()
        self.calls = self.trainer.calls
        self.run, self.student = plan.runs[0], next(run for run in plan.runs if run.teacher)
        self.folder = plan.folder(self.run)
        self.train_by(self.trainer)
        logits = torch.tensor([[9e9, 0.0, 0, 0], [0, 1, 0, 0], [2.0, 1, 0, 0]])
        self.answer(logits, torch.tensor([0, 1, 1]), ("val/0/a.png", "val/1/é.png", "val/1/c.png"))

    def train_by(self, train) -> None:
        self.patch.setattr(TIMM, "train", train)

    def answer(self, logits, labels, keys) -> None:
        found = SimpleNamespace(logits=logits, labels=labels, keys=keys)
        self.patch.setattr("timm_ls_kd.evaluation.collect_logits", lambda *_, **__: found)

    def main(self, run=None) -> int:
        return run_main.main([str(self.plan.root / PLAN), (run or self.run).id])

    def stop_after_an_epoch(self, run) -> None:
        self.trainer.stop = 0
        with pytest.raises(KeyboardInterrupt):
            job.run_job(self.plan, run)
        self.trainer.stop = None
        assert not self.plan.done(run)

    def record(self, run):
        return json.loads((self.plan.folder(run) / JOB).read_text())


@pytest.fixture
def study(tmp_path, plan_of, monkeypatch):
    plan = plan_of(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plan.write()
    return Study(plan, monkeypatch)


def curves_of(folder):
    with (folder / CURVES).open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_later_questions_need(study):
    run = study.plan.runs[1]
    job.run_job(study.plan, run)
    folder, done = study.plan.folder(run), study.record(run)
    assert done["command"].split() == ["timm", *study.calls[0]]
    again = done["rerun_command"].split()
    where = again.index("--output") + 1
    assert again[where] == "rerun"
    again[where] = str(Path(study.plan.output, "teachers"))
    assert again == ["timm", *study.calls[0]]
    assert done["checkpoint"]["sha256"] == file_checksum(folder / CHECKPOINT)
    assert (done["seed"], done["resumed"], done["teacher"]) == (0, 0, None)
    assert done["settings"]["smoothing"] == 0.1
    assert {"python", "torch", "timm", "lskd"} <= set(done["versions"])
    assert done["hardware"]["cores"] >= 1
    tensors = load_file(folder / LOGITS)
    assert tensors["logits"].dtype == "float16"
    assert tensors["logits"][0].tolist() == [0, -65504, -65504, -65504]  # beyond half precision, yet finite
    assert bytes(tensors["keys"]).decode().split("\n") == ["val/0/a.png", "val/1/é.png", "val/1/c.png"]
    rows = curves_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert (rows[2]["train_hard_ce"], rows[2]["train_ce"], rows[2]["val_top1"]) == ("1.5", "", "72")


def test_tensorboard_has_the_columns_of_curves_csv(study):
    """Each epoch once, whatever became of the process; and no trainer's command knows."""
    plan = replace(study.plan, tracker="tensorboard")
    study.trainer.stop = 1
    with pytest.raises(KeyboardInterrupt):
        job.run_job(plan, study.run)
    assert set(scalars(study.folder)["val_top1"]) == {0, 1}
    study.trainer.stop = None
    job.run_job(plan, study.run)
    assert_are_curves(study.folder)
    said = text(study.folder, "config")
    assert "study: Simulated study <of> nothing" in said
    assert f"id: {study.run.id}" in said
    assert not any("tensorboard" in word for call in study.calls for word in call)
    assert study.record(study.run)["settings"] == study.plan.settings(study.run)


def test_what_is_begun_anew_has_no_epochs_of_another_run(study):
    plan = replace(study.plan, tracker="tensorboard")
    study.trainer.stop = 1
    with pytest.raises(KeyboardInterrupt):
        job.run_job(plan, study.run)
    study.trainer.stop = 0
    with pytest.raises(KeyboardInterrupt):
        job.run_job(replace(plan, convention="uniform"), study.run)
    assert set(scalars(study.folder)["val_top1"]) == {0}


def test_a_tracker_that_cannot_start_ends_the_run_before_it_trains(study, capfd):
    (study.plan.root / "plan.json").unlink()
    replace(study.plan, tracker="wandb").write()
    study.patch.setattr("lskd_study.runs.watch.Tracker", refuse)
    assert study.main() == 1
    assert study.calls == []
    assert "wandb cannot be started (no key)" in capfd.readouterr().err


def test_a_run_whose_network_cannot_be_measured_is_no_worse_for_it(study):
    study.patch.setattr(type(TIMM), "size", lambda *_: 1 / 0)
    job.run_job(study.plan, study.run)
    assert study.record(study.run)["size"] is None


def refuse(*arguments, **options):
    raise LskdError("wandb cannot be started (no key)")


def test_epochs_are_said(study, tmp_path, monkeypatch):
    path = tmp_path / "progress.log"
    monkeypatch.setenv(progress.VARIABLE, str(path))
    study.stop_after_an_epoch(study.run)
    job.run_job(study.plan, study.run)
    found = [progress.EPOCH.fullmatch(line) for line in path.read_text().splitlines()]
    said = [(line[1], int(line[2]), int(line[3])) for line in found if line]
    # The file says 5; what the trainer left are 3.
    assert said == [(study.run.id, done, 5) for done in (0, 1, 1, 3)]


def test_the_command_names_every_setting_of_the_cell(study):
    plan = study.plan
    teacher = plan.run("teacher-big-smoothing0.1-seed2")
    student = plan.run("student-small-of-big-smoothing0.1-T1-hard0-seed2")
    job.run_job(plan, teacher)
    job.run_job(plan, student)
    first, second = (dict(zip(call[2::2], call[3::2], strict=True)) for call in study.calls)
    assert (first["--smoothing"], first["--smoothing-convention"], first["--seed"]) == ("0.1", "paper", "2")
    assert second["--smoothing"] == "0"  # timm's default of 0.1 must not reach a student
    assert second["--kd-teacher"] == "big"
    assert Path(second["--kd-teacher-checkpoint"]) == Path("out", teacher.folder, CHECKPOINT)
    assert (second["--kd-temperature"], second["--kd-hard-weight"]) == ("1", "0")
    expected = file_checksum(plan.folder(teacher) / CHECKPOINT)
    assert study.record(student)["teacher"] == {"run": teacher.id, "checkpoint_sha256": expected}


def test_forked_jobs_find_the_plan_read(study, monkeypatch):
    plan, reading = study.plan, []
    plan.write()
    monkeypatch.chdir(plan.root.parent)
    relative = Path(plan.root.name, PLAN)
    read = job.Plan.read
    monkeypatch.setattr(job.Plan, "read", lambda path: reading.append(path) or read(path))
    job.know_plan(str(plan.root.parent), [str(relative), study.run.id])
    assert job.do_job([str(relative), study.run.id]) == 0
    assert reading == [plan.root / PLAN]
    job.know_plan(str(plan.root), ["none.json"])  # the job itself complains of that


def test_a_killed_run_goes_on_from_its_checkpoint(study):
    study.stop_after_an_epoch(study.run)
    job.run_job(study.plan, study.run)
    assert study.calls[1][-2:] == ["--resume", f"out/{study.run.folder}/{CHECKPOINT}"]
    done = study.record(study.run)
    assert done["resumed"] == 1
    assert "--resume" not in done["command"]
    assert len(curves_of(study.folder)) == EPOCHS


def test_half_a_student_of_a_retrained_teacher_is_started_anew(study):
    with pytest.raises(LskdError, match=r"teacher's weights .*last.pth.tar are gone"):
        job.run_job(study.plan, study.student)
    job.run_job(study.plan, study.run)
    study.stop_after_an_epoch(study.student)
    (study.folder / CHECKPOINT).write_text("another teacher")
    job.run_job(study.plan, study.student)
    assert "--resume" not in study.calls[-1]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (SystemExit("timm: error: teacher at chance level"), "teacher at chance level"),
        (LskdError("no such flag; drop it"), "no such flag; drop it; the whole log"),
        (LskdError("no such flag (drop it)."), "no such flag (drop it); the whole log"),
        (SystemExit("timm: error: no such file (fix it)."), "no such file (fix it); the whole log"),
        (RuntimeError("out of memory\nand more"), "RuntimeError: out of memory;"),
    ],
)
def test_a_failed_run_is_one_line_and_its_log_has_the_rest(study, capfd, failure, message):
    def fail(words):
        os.write(2, f"{failure}\n".encode())
        raise failure

    study.train_by(fail)
    assert study.main() == 1
    _, error = capfd.readouterr().err.splitlines()  # the start, and the error
    assert message in error
    assert "train.log" in error
    assert message.split(";")[0].split(": ")[-1] in (study.folder / "train.log").read_text()
    assert not study.plan.done(study.run)


def test_two_processes_never_work_on_one_run(study):
    study.folder.mkdir(parents=True)
    with (study.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LskdError, match="another process is at work"):
            job.run_job(study.plan, study.run)
    assert study.calls == []
    job.run_job(study.plan, study.run)  # the kernel let go


def test_an_epoch_logged_twice_counts_once(tmp_path):
    (tmp_path / "summary.csv").write_text(
        "epoch,train_loss,eval_top1\n0,2.0,10\n1,1.5,20\n1,1.4,21\n2,1.0,30\n"
    )
    curves = TIMM.read_curves(tmp_path, "teacher")
    assert [(row["epoch"], row["val_top1"]) for row in curves] == [("0", "10"), ("1", "21"), ("2", "30")]
    with pytest.raises(LskdError, match="left no"):
        TIMM.read_curves(tmp_path / "none", "teacher")


@pytest.mark.parametrize("offset", [0.0, 40.0, -3e3])
def test_stored_logits_make_no_ties(study, offset):
    """Ties count as mistakes; a smoothed teacher's logits lie close together, far from 0."""
    said = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)).mul(0.1) + offset
    study.answer(said, said.argmax(-1), tuple(f"val/0/{number:03}.png" for number in range(500)))
    job.run_job(study.plan, study.run)
    stored = read_stored(study.folder, 1000)
    logits = stored.logits.float()
    own = logits.gather(1, stored.labels[:, None])
    assert (logits >= own).sum() == (said == said.amax(-1, keepdim=True)).sum()  # those that float32 has


# What lies in a run's folder already


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in folder.iterdir() if path.is_file()}


def test_what_no_run_of_the_study_left_is_moved_aside(study, capfd):
    """A finished checkpoint and notes, without the file that says whose they are."""
    folder = study.folder
    for number in (1, 2):
        (folder / "notes").mkdir(parents=True)
        (folder / CHECKPOINT).write_text(f"weights of weeks {number}")
        (folder / "notes" / "mine.txt").write_text("mine")
        (folder / BEGUN).unlink(missing_ok=True)
        (folder / JOB).unlink(missing_ok=True)
        capfd.readouterr()
        job.run_job(study.plan, study.run)
        aside = folder.with_name(f"{folder.name}.aside-{number}")
        assert files_of(aside)[CHECKPOINT] == f"weights of weeks {number}"
        assert (aside / "notes" / "mine.txt").read_text() == "mine"
        assert f"moved to out/teachers/{aside.name}" in capfd.readouterr().err
        assert "--resume" not in study.calls[-1]
        assert study.plan.done(study.run)


def test_of_half_a_run_of_other_settings_only_what_it_wrote_is_removed(study):
    study.stop_after_an_epoch(study.run)
    folder, elsewhere = study.folder, study.plan.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("theirs")
    (folder / "checkpoint-0.pth.tar").symlink_to(elsewhere / "data")
    (folder / "more").symlink_to(elsewhere)
    (folder / "notes.txt").write_text("mine")
    job.run_job(replace(study.plan, convention="uniform"), study.run)
    assert "--resume" not in study.calls[-1]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "more" / "data").read_text() == "theirs"
    assert not (folder / "checkpoint-0.pth.tar").exists()
    assert len(curves_of(folder)) == EPOCHS


@pytest.mark.parametrize("name", ["", ".lock", "train.log", BEGUN])
def test_no_link_is_followed(study, name):
    link, theirs = study.folder / name, study.plan.root / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs / "file" if name else theirs)
    if name == "train.log":
        job.run_job(study.plan, study.run)
    else:
        with pytest.raises(LskdError, match=r"is a link|is damaged"):
            job.run_job(study.plan, study.run)
        assert study.calls == []
    assert files_of(theirs) == {"file": "theirs"}


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '{"resumed": "x"}', '{"resumed": 1e999}', "\x80"])
def test_a_damaged_note_of_what_was_begun_is_one_line(study, capfd, text):
    study.folder.mkdir(parents=True)
    (study.folder / BEGUN).write_bytes(text.encode("latin-1"))
    (study.folder / CHECKPOINT).write_text("weights")
    assert study.main() == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"out/{study.run.folder}/{BEGUN} is damaged" in err
    assert study.calls == []
    assert (study.folder / CHECKPOINT).read_text() == "weights"


# A trainer that is stopped, and disks that are full


def own_streams(monkeypatch) -> None:
    """Put Python's streams on the descriptors themselves, as they are in a process without pytest."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def test_a_trainers_own_advice_is_not_said_when_it_is_stopped(study, capfd, monkeypatch):
    own_streams(monkeypatch)

    def stop(words):
        print("stopped in epoch 1; go on by --resume last.pth.tar")
        raise SystemExit(130)

    study.train_by(stop)
    assert study.main() == 130
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1  # that it starts
    assert "--resume" not in err


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
TORCH = "[enforce fail at inline_container.cc:626] . unexpected pos 35008 vs 34904"


@pytest.mark.parametrize(
    ("failure", "full"),
    [
        (NO_SPACE, True),
        (RuntimeError(TORCH), False),  # what could not be written is gone by now
        (RuntimeError(TORCH), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), False),
        (SystemExit(1), True),
        (LskdError("something that came of it"), True),
    ],
)
def test_a_full_disk_is_one_line(study, capfd, monkeypatch, failure, full):
    """The log takes nothing either: whatever is printed fails."""
    own_streams(monkeypatch)

    def fail(words):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print("an epoch", file=stream, flush=True)
        logging.getLogger("trainer").warning("an epoch")
        print("what is still to be flushed", end="")
        raise failure

    study.train_by(fail)
    monkeypatch.setattr(log, "full_disk", lambda folder: cannot_write("out", NO_SPACE) if full else None)
    monkeypatch.setattr(log, "open_log", lambda path: open("/dev/full", "a"))  # noqa: SIM115
    assert study.main() == 1
    print("afterwards", flush=True)
    out, err = capfd.readouterr()
    assert out == "afterwards\n"
    started, line = err.splitlines()
    assert "starts" in started
    assert line.startswith(f"lskd: error: {study.run.id} failed: ")
    assert "the disk is full" in line
    assert "what is finished is kept" in line
    assert not study.plan.done(study.run)


def test_a_disk_that_takes_not_even_the_folder(study, capfd, monkeypatch):
    def full(*words, **options):
        raise NO_SPACE

    monkeypatch.setattr(Path, "mkdir", full)
    assert study.main() == 1
    err = capfd.readouterr().err
    assert "the disk is full" in err
    assert err.count("\n") == 1
    assert study.calls == []


# Runs that diverge, and data that change


def diverge(words):
    os.write(2, b"Train: 0\ntimm: error: epoch 1: the training loss is nan; the run diverged\n")
    raise SystemExit(3)


def say_so(words):
    raise DivergedError("epoch 1: the training loss is nan; the run diverged")


@pytest.mark.parametrize("train", [diverge, say_so])
def test_a_run_that_diverged_is_finished_as_failed_and_its_students_are_not_trained(study, capfd, train):
    plan, teacher, student = study.plan, study.run, study.student
    study.train_by(train)
    assert study.main() == 0
    assert plan.done(teacher)
    assert plan.failed(teacher) == "epoch 1: the training loss is nan; the run diverged"
    assert "failed   teacher-big-smoothing0-seed0  epoch 1: the training" in capfd.readouterr().err
    assert "the training loss is nan" in (study.folder / "train.log").read_text()
    study.train_by(study.trainer)
    assert study.main(student) == 0
    assert study.calls == []
    assert plan.failed(student) == f"its teacher {teacher.id} failed: {plan.failed(teacher)}"
    assert study.record(student)["teacher"] == {"run": teacher.id, "checkpoint_sha256": ""}
    assert [str(one) for one in read_results(plan).failed.values()] == [
        f"run {teacher.id} failed in epoch 1",
        f"run {student.id} failed with its teacher",
    ]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_fails_a_run_whose_trainer_did_not_look(study, value):
    def train(words):
        study.trainer(words)
        summary = study.folder / "summary.csv"
        summary.write_text(summary.read_text().replace("1,1.5,0.5,", f"1,1.5,{value},"))

    study.train_by(train)
    job.run_job(study.plan, study.run)
    assert study.plan.failed(study.run).startswith(f"epoch 1: val_loss is {value}")
    assert study.record(study.run)["checkpoint"]["sha256"] == file_checksum(study.folder / CHECKPOINT)


def test_logits_that_are_not_finite_fail_a_run(study):
    study.answer(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), ("val/0/a.png",))
    job.run_job(study.plan, study.run)
    assert study.plan.failed(study.run).startswith("epoch 2: the logits of the validation images are not all")


@pytest.fixture
def image(study):
    path = study.plan.data_dir / "train" / "0" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"one")
    return path


def test_data_that_change_while_a_run_trains_are_named_and_it_starts_anew(study, image):
    def train(words):
        study.trainer(words)
        image.write_bytes(b"two")

    study.train_by(train)
    with pytest.raises(LskdError, match=r"the data in data changed while teacher-.* was trained"):
        job.run_job(study.plan, study.run)
    assert not study.plan.done(study.run)
    study.train_by(study.trainer)
    job.run_job(study.plan, study.run)
    assert "--resume" not in study.calls[-1]
    assert study.plan.done(study.run)


def test_the_checksum_of_the_data_covers_names_and_contents_and_reads_them_once(study, image, monkeypatch):
    plan = study.plan
    (plan.data_dir / "train" / "1").symlink_to(image.parent)  # as the trainers follow it
    first = data_checksum(plan)
    with monkeypatch.context() as patch:
        patch.setattr("lskd_study.runs.data_checksum.file_checksum", None)
        assert data_checksum(plan) == first  # nothing is read
    before = image.stat()
    image.write_bytes(b"two")  # of the same size, and as old
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = data_checksum(plan)
    image.write_bytes(b"one")
    (image.parent / ".hidden").write_bytes(b"of no account")
    assert data_checksum(plan) == first != other
    image.rename(image.with_name("b.png"))
    assert data_checksum(plan) not in (first, other)


def test_half_of_a_note_is_of_this_run_and_not_moved_aside(tmp_path):
    """What is left by a run that was killed at its very beginning."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".{BEGUN}.lskd-0123abcd.new").write_text("{")
    assert begin(tmp_path / "run", {}, lambda before: True, lambda: False, ()) == (0, False)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", BEGUN]


def test_a_kill_while_what_is_of_no_use_goes_leaves_the_note(tmp_path, monkeypatch):
    """Or the next one would take the rest for somebody else's, and move it aside."""
    folder = tmp_path / "run"
    folder.mkdir()

    def again():
        return begin(folder, {}, lambda before: True, lambda: False, ["*.pth.tar"])

    again()
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (folder / name).write_text("cut off")
    with monkeypatch.context() as patch:
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path: [unlink(path), sys.exit()])
        with pytest.raises(SystemExit):
            again()
    assert again() == (0, False)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", BEGUN]
