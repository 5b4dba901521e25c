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

import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lskd import DivergedError, LskdError
from lskd.base.files import cannot_write
from lskd.checkpoints import file_checksum
from lskd_study.plan.plan import BEGUN, CHECKPOINT, CURVES, JOB, LOGITS
from lskd_study.results.images import read_logits
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


@pytest.fixture
def study(tmp_path, plan_of, monkeypatch):
    plan = plan_of(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    trainer = Trainer()

    class Evaluation:
        logits = torch.tensor([[9e9, 0.0, 0, 0], [0, 1, 0, 0], [2.0, 1, 0, 0]])
        labels = torch.tensor([0, 1, 1])
        keys = ("val/0/a.png", "val/1/é.png", "val/1/c.png")

    monkeypatch.setattr(TIMM, "train", trainer)
    monkeypatch.setattr("timm_ls_kd.evaluation.collect_logits", lambda *args, **kwargs: Evaluation)
    monkeypatch.chdir(tmp_path)
    return plan, trainer


def record(plan, run):
    return json.loads((plan.folder(run) / JOB).read_text())


def stop_after_an_epoch(plan, trainer, run):
    trainer.stop = 0
    with pytest.raises(KeyboardInterrupt):
        job.run_job(plan, run)
    trainer.stop = None


def test_a_run_leaves_what_later_questions_need(study):
    plan, trainer = study
    run = plan.runs[1]
    job.run_job(plan, run)
    folder = plan.folder(run)
    done = record(plan, run)
    assert done["command"].split() == ["timm", *trainer.calls[0]]
    again = done["rerun_command"].split()
    where = again.index("--output") + 1
    assert again[where] == "rerun"
    again[where] = str(Path(plan.output, "teachers"))
    assert again == ["timm", *trainer.calls[0]]
    assert done["checkpoint"]["sha256"] == file_checksum(folder / CHECKPOINT)
    assert (done["seed"], done["resumed"], done["teacher"]) == (0, 0, None)
    assert done["settings"]["smoothing"] == 0.1
    assert {"python", "torch", "timm", "lskd"} <= set(done["versions"])
    assert done["hardware"]["cores"] >= 1
    tensors = load_file(folder / LOGITS)
    assert tensors["logits"].dtype == "float16"
    assert tensors["logits"][0].tolist() == [0, -65504, -65504, -65504]  # beyond half precision, yet finite
    assert bytes(tensors["keys"]).decode().split("\n") == ["val/0/a.png", "val/1/é.png", "val/1/c.png"]
    rows = list(csv.DictReader((folder / CURVES).open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert (rows[2]["train_hard_ce"], rows[2]["train_ce"], rows[2]["val_top1"]) == ("1.5", "", "72")


def test_the_command_names_every_setting_of_the_cell(study):
    plan, trainer = study
    teacher = plan.run("teacher-big-smoothing0.1-seed2")
    student = plan.run("student-small-of-big-smoothing0.1-T1-hard0-seed2")
    job.run_job(plan, teacher)
    job.run_job(plan, student)
    first, second = (dict(zip(call[2::2], call[3::2], strict=True)) for call in trainer.calls)
    assert (first["--smoothing"], first["--smoothing-convention"], first["--seed"]) == ("0.1", "paper", "2")
    assert second["--smoothing"] == "0"  # timm's default of 0.1 must not reach a student
    assert second["--kd-teacher"] == "big"
    assert Path(second["--kd-teacher-checkpoint"]) == Path("out", teacher.folder, CHECKPOINT)
    assert (second["--kd-temperature"], second["--kd-hard-weight"]) == ("1", "0")
    expected = file_checksum(plan.folder(teacher) / CHECKPOINT)
    assert record(plan, student)["teacher"] == {"run": teacher.id, "checkpoint_sha256": expected}


def test_a_killed_run_goes_on_from_its_checkpoint(study):
    plan, trainer = study
    run = plan.runs[0]
    stop_after_an_epoch(plan, trainer, run)
    assert not plan.done(run)
    job.run_job(plan, run)
    assert trainer.calls[1][-2:] == ["--resume", f"out/{run.folder}/{CHECKPOINT}"]
    done = record(plan, run)
    assert done["resumed"] == 1
    assert "--resume" not in done["command"]
    assert len(list(csv.DictReader((plan.folder(run) / CURVES).open()))) == EPOCHS


def test_half_a_run_of_other_settings_is_started_anew(study):
    plan, trainer = study
    run = plan.runs[0]
    stop_after_an_epoch(plan, trainer, run)
    job.run_job(replace(plan, convention="uniform"), run)
    assert "--resume" not in trainer.calls[1]


def test_half_a_student_of_a_retrained_teacher_is_started_anew(study):
    plan, trainer = study
    student = next(run for run in plan.runs if run.role == "student")
    job.run_job(plan, plan.run(student.teacher))
    stop_after_an_epoch(plan, trainer, student)
    (plan.folder(plan.run(student.teacher)) / CHECKPOINT).write_text("another teacher")
    job.run_job(plan, student)
    assert "--resume" not in trainer.calls[-1]


def test_a_teacher_without_weights_is_named(study):
    plan, _ = study
    student = next(run for run in plan.runs if run.role == "student")
    with pytest.raises(LskdError, match=r"teacher's weights .*last.pth.tar are gone"):
        job.run_job(plan, student)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (SystemExit("timm: error: teacher at chance level"), "teacher at chance level"),
        (LskdError("no such flag; drop it"), "no such flag; drop it; the whole log"),
        (LskdError("no such flag (drop it)."), "no such flag (drop it); the whole log"),
        (SystemExit("timm: error: no such file (mend it)."), "no such file (mend it); the whole log"),
        (RuntimeError("out of memory\nand more"), "RuntimeError: out of memory;"),
    ],
)
def test_a_failed_run_is_one_line_and_its_log_has_the_rest(study, capfd, monkeypatch, failure, message):
    plan, _ = study
    plan.write()

    def fail(words):
        os.write(2, f"{failure}\n".encode())
        raise failure

    monkeypatch.setattr(TIMM, "train", fail)
    assert run_main.main([str(plan.root / "plan.json"), plan.runs[0].id]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2  # the start, and the error
    assert message in lines[1]
    assert "train.log" in lines[1]
    assert message.split(";")[0].split(": ")[-1] in (plan.folder(plan.runs[0]) / "train.log").read_text()
    assert not plan.done(plan.runs[0])


def test_two_processes_never_work_on_one_run(study):
    plan, trainer = study
    folder = plan.folder(plan.runs[0])
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LskdError, match="another process is at work"):
            job.run_job(plan, plan.runs[0])
    assert trainer.calls == []
    job.run_job(plan, plan.runs[0])  # the kernel let go


def test_an_epoch_logged_twice_counts_once(tmp_path):
    (tmp_path / "summary.csv").write_text(
        "epoch,train_loss,eval_top1\n0,2.0,10\n1,1.5,20\n1,1.4,21\n2,1.0,30\n"
    )
    curves = TIMM.read_curves(tmp_path, "teacher")
    assert [(row["epoch"], row["val_top1"]) for row in curves] == [("0", "10"), ("1", "21"), ("2", "30")]
    with pytest.raises(LskdError, match="left no"):
        TIMM.read_curves(tmp_path / "none", "teacher")


@pytest.mark.parametrize("offset", [0.0, 40.0, -3e3])
def test_stored_logits_make_no_ties(study, monkeypatch, offset):
    """Ties count as mistakes; a smoothed teacher's logits lie close together, far from 0."""
    plan, _ = study

    class Evaluation:
        logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)).mul(0.1) + offset
        labels = logits.argmax(-1)
        keys = tuple(f"val/0/{number:03}.png" for number in range(500))

    monkeypatch.setattr("timm_ls_kd.evaluation.collect_logits", lambda *args, **kwargs: Evaluation)
    run = plan.runs[1]
    job.run_job(plan, run)
    _, logits, labels = read_logits(plan.folder(run), 1000)
    own = logits[range(500), labels][:, None]
    ties = Evaluation.logits == Evaluation.logits.amax(-1, keepdim=True)  # those that float32 has
    assert (logits >= own).sum() == ties.sum()


# What lies in a run's folder already


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in folder.iterdir() if path.is_file()}


def test_what_no_run_of_the_study_left_is_moved_aside(study, capfd):
    """A finished checkpoint and notes, without the file that says whose they are."""
    plan, trainer = study
    run = plan.runs[0]
    for number in (1, 2):
        folder = plan.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKPOINT).write_text(f"weights of weeks {number}")
        (folder / "notes").mkdir()
        (folder / "notes" / "mine.txt").write_text("mine")
        (folder / BEGUN).unlink(missing_ok=True)
        (folder / JOB).unlink(missing_ok=True)
        capfd.readouterr()
        job.run_job(plan, run)
        aside = folder.with_name(f"{folder.name}.aside-{number}")
        assert files_of(aside)[CHECKPOINT] == f"weights of weeks {number}"
        assert (aside / "notes" / "mine.txt").read_text() == "mine"
        assert f"moved to out/teachers/{aside.name}" in capfd.readouterr().err
        assert "--resume" not in trainer.calls[-1]
        assert plan.done(run)


def test_of_half_a_run_only_what_it_wrote_is_removed(study):
    plan, trainer = study
    run = plan.runs[0]
    stop_after_an_epoch(plan, trainer, run)
    elsewhere = plan.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("theirs")
    folder = plan.folder(run)
    (folder / "checkpoint-0.pth.tar").symlink_to(elsewhere / "data")
    (folder / "more").symlink_to(elsewhere)
    (folder / "notes.txt").write_text("mine")
    job.run_job(replace(plan, convention="uniform"), run)
    assert "--resume" not in trainer.calls[-1]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "more" / "data").read_text() == "theirs"
    assert not (folder / "checkpoint-0.pth.tar").exists()
    assert len(list(csv.DictReader((folder / CURVES).open()))) == EPOCHS


@pytest.mark.parametrize("name", ["folder", ".lock", "train.log", BEGUN])
def test_no_link_is_followed(study, name):
    plan, trainer = study
    run = plan.runs[0]
    folder, theirs = plan.folder(run), plan.root / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "file").write_text("theirs")
    if name == "folder":
        folder.parent.mkdir()
        folder.symlink_to(theirs)
    else:
        folder.mkdir(parents=True)
        (folder / name).symlink_to(theirs / "file")
    if name in {"folder", ".lock", BEGUN}:
        with pytest.raises(LskdError, match=r"is a link|is damaged"):
            job.run_job(plan, run)
        assert trainer.calls == []
    else:
        job.run_job(plan, run)
    assert files_of(theirs) == {"file": "theirs"}


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '{"resumed": "x"}', '{"resumed": 1e999}', "\x80"])
def test_a_damaged_note_of_what_was_begun_is_one_line(study, capfd, text):
    plan, trainer = study
    plan.write()
    run = plan.runs[0]
    plan.folder(run).mkdir(parents=True)
    (plan.folder(run) / BEGUN).write_bytes(text.encode("latin-1"))
    (plan.folder(run) / CHECKPOINT).write_text("weights")
    assert run_main.main([str(plan.root / "plan.json"), run.id]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"out/{run.folder}/{BEGUN} is damaged" in err
    assert trainer.calls == []
    assert (plan.folder(run) / CHECKPOINT).read_text() == "weights"


# A trainer that is stopped, and disks that are full


def own_streams(monkeypatch) -> None:
    """Put Python's streams on the descriptors themselves, as they are in a process without pytest."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def test_a_trainers_own_advice_is_not_said_when_it_is_stopped(study, capfd, monkeypatch):
    plan, _ = study
    plan.write()
    own_streams(monkeypatch)

    def stop(words):
        print("stopped in epoch 1; go on by --resume last.pth.tar")
        raise SystemExit(130)

    monkeypatch.setattr(TIMM, "train", stop)
    assert run_main.main([str(plan.root / "plan.json"), plan.runs[0].id]) == 130
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1  # that it starts
    assert "--resume" not in err


TORCH = "[enforce fail at inline_container.cc:626] . unexpected pos 35008 vs 34904"


@pytest.mark.parametrize(
    ("failure", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError(TORCH), False),  # what could not be written is gone by now
        (RuntimeError(TORCH), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), False),
        (SystemExit(1), True),
        (LskdError("something that came of it"), True),
    ],
)
def test_a_full_disk_is_one_line(study, capfd, monkeypatch, failure, full):
    """The log takes nothing either: whatever is printed fails."""
    plan, _ = study
    plan.write()
    own_streams(monkeypatch)

    def fail(words):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print("an epoch", file=stream, flush=True)
        logging.getLogger("trainer").warning("an epoch")
        print("what is still to be flushed", end="")
        raise failure

    monkeypatch.setattr(TIMM, "train", fail)
    taken = cannot_write("out", OSError(errno.ENOSPC, "No space left on device")) if full else None
    monkeypatch.setattr(log, "full_disk", lambda folder: taken)
    monkeypatch.setattr(log, "open_log", lambda path: open("/dev/full", "a"))  # noqa: SIM115
    assert run_main.main([str(plan.root / "plan.json"), plan.runs[0].id]) == 1
    print("afterwards", flush=True)
    out, err = capfd.readouterr()
    assert out == "afterwards\n"
    started, line = err.splitlines()
    assert "starts" in started
    assert line.startswith(f"lskd: error: {plan.runs[0].id} failed: ")
    assert "the disk is full" in line
    assert "what is finished is kept" in line
    assert not plan.done(plan.runs[0])


def test_a_disk_that_takes_not_even_the_folder(study, capfd, monkeypatch):
    plan, trainer = study
    plan.write()

    def full(*words, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert run_main.main([str(plan.root / "plan.json"), plan.runs[0].id]) == 1
    err = capfd.readouterr().err
    assert "the disk is full" in err
    assert err.count("\n") == 1
    assert trainer.calls == []


def diverge(words):
    os.write(2, b"Train: 0\ntimm: error: epoch 1: the training loss is nan; the run diverged\n")
    raise SystemExit(3)


def say_so(words):
    raise DivergedError("epoch 1: the training loss is nan; the run diverged")


@pytest.mark.parametrize("train", [diverge, say_so])
def test_a_run_that_diverged_is_finished_as_failed_and_its_students_are_not_trained(
    study, capfd, monkeypatch, train
):
    plan, trainer = study
    plan.write()
    teacher = plan.runs[0]
    students = [run for run in plan.runs if run.teacher == teacher.id]
    monkeypatch.setattr(TIMM, "train", train)
    assert run_main.main([str(plan.root / "plan.json"), teacher.id]) == 0
    assert plan.done(teacher)
    assert plan.failed(teacher) == "epoch 1: the training loss is nan; the run diverged"
    assert "failed   teacher-big-smoothing0-seed0  epoch 1: the training" in capfd.readouterr().err
    assert "the training loss is nan" in (plan.folder(teacher) / "train.log").read_text()
    monkeypatch.setattr(TIMM, "train", trainer)
    assert run_main.main([str(plan.root / "plan.json"), students[0].id]) == 0
    assert trainer.calls == []
    assert plan.failed(students[0]) == f"its teacher {teacher.id} failed: {plan.failed(teacher)}"
    assert record(plan, students[0])["teacher"] == {"run": teacher.id, "checkpoint_sha256": ""}
    results = read_results(plan)
    assert [str(one) for one in results.failed.values()] == [
        f"run {teacher.id} failed in epoch 1",
        f"run {students[0].id} failed with its teacher",
    ]


@pytest.mark.parametrize(("value", "what"), [("nan", "val_loss is nan"), ("inf", "val_loss is inf")])
def test_a_loss_that_is_not_finite_fails_a_run_whose_trainer_did_not_look(study, monkeypatch, value, what):
    plan, trainer = study
    run = plan.runs[0]

    def train(words):
        trainer(words)
        summary = plan.folder(run) / "summary.csv"
        summary.write_text(summary.read_text().replace("1,1.5,0.5,", f"1,1.5,{value},"))

    monkeypatch.setattr(TIMM, "train", train)
    job.run_job(plan, run)
    assert plan.failed(run).startswith(f"epoch 1: {what}")
    assert record(plan, run)["checkpoint"]["sha256"] == file_checksum(plan.folder(run) / CHECKPOINT)


def test_logits_that_are_not_finite_fail_a_run(study, monkeypatch):
    plan, _ = study

    class Evaluation:
        logits = torch.tensor([[0.0, torch.nan]])
        labels = torch.tensor([0])
        keys = ("val/0/a.png",)

    monkeypatch.setattr("timm_ls_kd.evaluation.collect_logits", lambda *args, **kwargs: Evaluation)
    job.run_job(plan, plan.runs[0])
    assert plan.failed(plan.runs[0]).startswith("epoch 2: the logits of the validation images are not all")


def test_data_that_change_while_a_run_trains_are_named_and_it_starts_anew(study, monkeypatch):
    plan, trainer = study
    run = plan.runs[0]
    image = plan.data_dir / "train" / "0" / "a.png"
    image.parent.mkdir()
    image.write_bytes(b"one")

    def train(words):
        trainer(words)
        image.write_bytes(b"two")

    monkeypatch.setattr(TIMM, "train", train)
    with pytest.raises(LskdError, match=r"the data in data changed while teacher-.* was trained"):
        job.run_job(plan, run)
    assert not plan.done(run)
    monkeypatch.setattr(TIMM, "train", trainer)
    job.run_job(plan, run)
    assert "--resume" not in trainer.calls[-1]
    assert plan.done(run)


def test_the_checksum_of_the_data_covers_names_and_contents_and_reads_them_once(study, monkeypatch):
    plan, _ = study
    image = plan.data_dir / "train" / "0" / "a.png"
    image.parent.mkdir()
    image.write_bytes(b"one")
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
