"""The bundled trainer end to end, in this process, on real digits."""

import argparse
import csv
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml

import events
from lskd import load_teacher_weights
from lskd.checkpoints import is_whole
from timm_ls_kd.task import LsKdTask
from timm_ls_kd.trainer import main as trainer
from timm_ls_kd.trainer.loop import Interrupted, stop_signals, stop_signals_wait

pytestmark = pytest.mark.integration
COLUMNS = ["train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement"]


def header(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return next(csv.reader(file))


def close(first, second, tolerance):
    for row, other in zip(first, second, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.fixture
def teachers(monkeypatch):
    """The teachers of the tasks that are made."""
    seen = []
    original = LsKdTask.__init__

    def watch(self, student_model, teacher, **kwargs):
        original(self, student_model, teacher, **kwargs)
        seen.append(teacher)

    monkeypatch.setattr(LsKdTask, "__init__", watch)
    return seen


@pytest.fixture
def own_teacher(train, runs, taught_by):
    """Train a teacher, and return the flags of its students."""

    def make(*arguments, model="test_resnet"):
        result = train("teacher", "--model", model, *arguments)
        assert result.status == 0, result.err
        return taught_by(runs / "teacher" / "last.pth.tar", model)

    return make


def test_plain_run(train, runs, summary):
    result = train("plain", "--epochs", 2, "--smoothing", 0.2, "--log-interval", 2)
    assert (result.status, result.err) == (0, "")
    lines = [line for line in result.out.splitlines() if line.startswith("epoch 0 [")]
    assert [line.split("]")[0] for line in lines] == [f"epoch 0 [{batch}/6" for batch in (1, 3, 5, 6)]
    assert "images/s" in lines[0]
    assert "target 0.8500 on the label and 0.0500 on each other class" in result.out
    folder = runs / "plain"
    assert header(folder) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in summary(folder)] == [0, 1]
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    assert (settings["model"], settings["smoothing"], settings["kd_teacher"]) == ("test_resnet", 0.2, None)
    checkpoints = {f"{name}.pth.tar" for name in ("last", "model_best", "checkpoint-0", "checkpoint-1")}
    assert {path.name for path in folder.iterdir()} == {"args.yaml", "summary.csv"} | checkpoints


def test_tensorboard_gets_the_rows_of_summary_csv(train, runs, kd, summary):
    folder = runs / "logged"
    assert train("logged", *kd, "--epochs", 2, "--log-tensorboard").status == 0
    resumed = train("logged", *kd, "--epochs", 3, "--log-tensorboard", "--resume", folder / "last.pth.tar")
    assert (resumed.status, resumed.err) == (0, "")
    rows, found = summary(folder), events.scalars(folder)
    assert {"train_kl", "eval_top1", "lr"} <= found.keys() == set(header(folder))
    for name, values in found.items():
        assert values == pytest.approx({row["epoch"]: row[name] for row in rows}), name
    assert "model: test_resnet" in events.text(folder, "config")
    # Of an epoch that is done again nothing is left.
    checkpoint = folder / "checkpoint-0.pth.tar"
    train("logged", *kd, "--epochs", 2, "--seed", 5, "--log-tensorboard", "--resume", checkpoint)
    again = events.scalars(folder)["train_loss"]
    assert again == pytest.approx({row["epoch"]: row["train_loss"] for row in summary(folder)})
    assert (again[0], list(again)) == (found["train_loss"][0], [0, 1])
    assert again[1] != found["train_loss"][1]


def test_smoothing_conventions_meet(train, runs, summary):
    """0.1 of the paper is 0.1 * 4 / 3 of timm."""
    result = train("paper", "--epochs", 1, "--smoothing", 0.1, "--smoothing-convention", "paper")
    assert "target 0.9000 on the label and 0.0333 on each other class" in result.out
    train("uniform", "--epochs", 1, "--smoothing", 0.4 / 3)
    close(summary(runs / "paper"), summary(runs / "uniform"), 1e-6)


def test_distillation(train, runs, kd, teacher, teachers, summary, weights):
    result = train("student", *kd, "--epochs", 3)
    assert result.status == 0
    assert result.err == ""
    assert "teacher 'test_resnet': right on" in result.out
    assert "of 48 validation images (chance 25.0 %)" in result.out
    assert "hard term: weight 0, the labels are not trained on" in result.out
    assert "the student's is the same" in result.out

    assert not any(module.training for module in teachers[0].model.modules())
    before = load_teacher_weights(teacher)
    assert all(torch.equal(value, before[key]) for key, value in teachers[0].model.state_dict().items())

    rows = summary(runs / "student")
    assert header(runs / "student")[2:7] == COLUMNS
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_ce"], rel=1e-6)
        assert row["train_ce"] == pytest.approx(row["train_kl"] + row["train_teacher_entropy"], rel=1e-5)
        assert 0 <= row["train_agreement"] <= 1
    assert rows[-1]["train_kl"] < rows[0]["train_kl"]

    train("plain", "--epochs", 1)
    plain, student = weights(runs / "plain"), weights(runs / "student")
    assert [(key, value.shape) for key, value in plain.items()] == [(k, v.shape) for k, v in student.items()]
    with torch.serialization.safe_globals([argparse.Namespace]):
        keys = [set(torch.load(runs / name / "last.pth.tar")) for name in ("plain", "student")]
    assert keys[0] == keys[1]


def test_hidden_smoothing_never_reaches_the_hard_term(train, runs, kd):
    hard = [*kd, "--kd-hard-weight", 0.3, "--epochs", 1]
    result = train("hidden", *hard)
    assert "weight 0.3, target 1.0000 on the label and 0.0000 on each other class" in result.out
    result = train("asked", *hard, "--smoothing", 0.1, "--smoothing-convention", "paper")
    assert "weight 0.3, target 0.9000 on the label and 0.0333 on each other class" in result.out
    assert yaml.safe_load((runs / "hidden" / "args.yaml").read_text())["smoothing"] == 0.0


def test_smoothing_from_a_config_file_is_asked_for(train, tmp_path, kd):
    config = tmp_path / "recipe.yaml"
    config.write_text("smoothing: 0.2\nlr: 1e-2\nkd_hard_weight: 0.5\nnonsense: 3\njsd_loss: false\n")
    result = train("run", *kd, "--config", config, "--epochs", 1)
    assert result.status == 0
    assert result.err.strip() == f"timm: warning: {config}: unknown key nonsense ignored"
    assert "weight 0.5, target 0.8500 on the label" in result.out


def test_args_yaml_repeats_a_run(train, runs, kd, summary, timm_command, tmp_path):
    train("first", *kd, "--epochs", 1, "--seed", 9)
    result = timm_command("train.py", "--config", runs / "first" / "args.yaml", "--experiment", "second")
    assert result.status == 0
    assert result.err == ""
    assert (runs / "first" / "summary.csv").read_bytes() == (runs / "second" / "summary.csv").read_bytes()


def stop_at(monkeypatch, epoch, steps=2):
    """Send ourselves the signal of a kill after some steps of an epoch."""
    original = trainer.train_one_epoch

    def train_one_epoch(number, task, *args, **kwargs):
        if number == epoch:
            calls = iter(range(steps))
            forward = task.forward

            def counting(*inputs):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGTERM)
                return forward(*inputs)

            task.forward = counting
        return original(number, task, *args, **kwargs)

    monkeypatch.setattr(trainer, "train_one_epoch", train_one_epoch)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--mixup 0.4 --cutmix 1 --mixup-off-epoch 3 --model-ema --model-ema-decay 0.9 --model-ema-warmup "
        "--drop 0.2 --drop-path 0.1 --reprob 0.3 --workers 2 --sched-on-updates --grad-accum-steps 2 "
        "--aa rand-m5 --opt adamw --lr 0.002",
    ],
)
def test_resumed_run_equals_the_unbroken_one(train, runs, kd, monkeypatch, arguments, same_weights):
    options = [*kd, "--epochs", 4, "--kd-hard-weight", 0.2, *arguments.split()]
    assert train("whole", *options).status == 0
    with monkeypatch.context() as patch:
        stop_at(patch, epoch=2)
        result = train("broken", *options)
    last = runs / "broken" / "last.pth.tar"
    assert result.status == 128 + 15
    assert f"stopped in epoch 2; go on by --resume {last}" in result.out
    assert result.err == ""
    assert train("broken", *options, "--resume", last).status == 0
    if not arguments:
        last.write_bytes(last.read_bytes()[:100_000])  # its last epoch is done again
        result = train("broken", *options, "--resume", last)
        assert f"going on from {runs / 'broken' / 'checkpoint-2.pth.tar'}" in result.out
        assert result.status == 0
    assert same_weights("whole", "broken")
    assert same_weights("whole", "broken", "model_best.pth.tar")
    assert (runs / "whole" / "summary.csv").read_bytes() == (runs / "broken" / "summary.csv").read_bytes()
    assert {p.name for p in (runs / "whole").iterdir()} == {p.name for p in (runs / "broken").iterdir()}
    if "--model-ema" in options:
        whole, broken = (load_teacher_weights(runs / name / "last.pth.tar") for name in ("whole", "broken"))
        assert all(torch.equal(value, broken[key]) for key, value in whole.items())


def test_a_run_in_pieces_equals_the_whole(train, runs, summary, same_weights):
    """--resume auto starts and goes on, --stop-epoch leaves the schedule as it is, --save-epochs keeps."""
    options = shlex.split("--epochs 3 --sched wsd --decay-epochs 2 --save-epochs 1 --checkpoint-hist 1")
    assert train("whole", *options).status == 0
    for stop in (["--stop-epoch", 1], []):
        result = train("pieces", *options, *stop, "--resume", "auto")
        assert result.status == 0, result.err
    for name in ("last.pth.tar", "milestone-1.pth.tar"):
        assert same_weights("whole", "pieces", name)
    whole, pieces = (summary(runs / name) for name in ("whole", "pieces"))
    assert whole == pieces
    # Two of three epochs decay, by 1 - sqrt(share of the decay that is over).
    assert [row["lr"] for row in whole] == pytest.approx([0.05, 0.05, 0.05 * (1 - 0.5**0.5)])


def test_stop_before_the_first_checkpoint(train, runs, monkeypatch):
    stop_at(monkeypatch, epoch=0)
    result = train("broken", "--epochs", 2)
    assert result.status == 143
    assert "start again" in result.out
    monkeypatch.undo()
    assert train("broken", "--epochs", 1).status == 0


def test_gradient_accumulation_equals_the_larger_batch(train, runs, kd, summary, weights):
    """With a model that has no batch statistics; 96 images make 3 steps of 32, 6 of 16."""
    options = [*kd, "--model", "test_vit", "--epochs", 2, "--clip-grad", 1.0]
    train("large", *options, "--batch-size", 32)
    train("small", *options, "--batch-size", 16, "--grad-accum-steps", 2)
    close(summary(runs / "large"), summary(runs / "small"), 2e-4)
    small = weights(runs / "small")
    for key, value in weights(runs / "large").items():
        torch.testing.assert_close(value, small[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        "--amp --amp-dtype bfloat16",
        "--amp --amp-dtype bfloat16 --kd-teacher-dtype float32 --channels-last",
        "--kd-teacher-dtype bfloat16",
        "--channels-last",
        "--torchcompile aot_eager --model-ema",
        "--no-prefetcher",
        "--mixup 0.5 --kd-hard-weight 0.5 --smoothing 0.1",
        "--no-prefetcher --mixup 0.5",
        "--kd-temperature 4 --kd-temperature-squared --kd-hard-weight 0.5",
        "--kd-teacher-img-size 48",
        "--mean 0.3 --std 0.4",
        "--sched multistep --decay-milestones 1 --warmup-epochs 1",
        "--sched step --decay-epochs 1",
        "--grad-checkpointing",
        "--model-ema --model-ema-force-cpu",
    ],
)
def test_options_train(train, runs, kd, summary, weights, arguments):
    """Each way of training gets nearer to the teacher, and saves the student alone."""
    result = train("run", *kd, "--epochs", 3, *arguments.split())
    assert result.status == 0, result.err
    rows = summary(runs / "run")
    assert rows[-1]["train_kl"] < rows[0]["train_kl"]
    assert not any(
        key.startswith(("module.", "_orig_mod.")) or "teacher" in key for key in weights(runs / "run")
    )


def test_amp_and_bfloat16_teacher_say_nearly_the_same(train, runs, kd, summary):
    for name, arguments in {"full": [], "amp": ["--amp", "--amp-dtype", "bfloat16"]}.items():
        train(name, *kd, "--epochs", 1, "--lr", 0, *arguments)
    full, amp = summary(runs / "full")[0], summary(runs / "amp")[0]
    assert amp["train_ce"] == pytest.approx(full["train_ce"], rel=0.03)
    assert amp["train_ce"] != full["train_ce"]


def test_normalisation_override_reaches_the_teacher(train, runs, kd, summary):
    """The teacher says the same whatever the student's --mean and --std are."""
    train("same", *kd, "--epochs", 1, "--lr", 0)
    result = train("other", *kd, "--epochs", 1, "--lr", 0, "--mean", 0.2, "--std", 0.7)
    assert "converted" in result.out
    first, second = summary(runs / "same")[0], summary(runs / "other")[0]
    assert second["train_teacher_entropy"] == pytest.approx(first["train_teacher_entropy"], rel=1e-4)


def test_normalisation_of_the_teachers_run_is_used(train, taught_by, teacher_run, tmp_path):
    """args.yaml beside the checkpoint says how the teacher was trained."""
    folder = Path(shutil.copytree(teacher_run, tmp_path / "moved"))
    settings = yaml.safe_load((folder / "args.yaml").read_text()) | {"mean": [0.1], "std": [0.9]}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    kd = taught_by(folder / "last.pth.tar")
    result = train("run", *kd, "--epochs", 1)
    assert "mean (0.1, 0.1, 0.1) std (0.9, 0.9, 0.9), of the run beside its checkpoint" in result.out
    (folder / "args.yaml").unlink()
    assert "timm's default for this model" in train("bare", *kd, "--epochs", 1).out


def test_vit_teacher_at_its_own_size(train, own_teacher):
    kd = own_teacher("--img-size", 48, "--epochs", 8, "--lr", 0.02, model="test_vit")
    result = train("student", *kd, "--epochs", 1, "--kd-preflight-samples", 0)
    assert result.status == 0, result.err
    assert "resized to 48 x 48" in result.out


def test_grey_images(train, own_teacher):
    grey = ["--in-chans", 1]
    result = train("student", *own_teacher(*grey, "--epochs", 10), *grey, "--epochs", 1)
    assert result.status == 0, result.err
    assert "normalisation mean (0.5) std (0.5)" in result.out


def test_ema_is_what_is_validated(train, runs, summary):
    """With decay 1 the average stays at its start, so validation does not move while training does."""
    train("run", "--model-ema", "--model-ema-decay", 1, "--epochs", 2)
    rows = summary(runs / "run")
    assert rows[0]["eval_loss"] == rows[1]["eval_loss"]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


def test_validation_interval_and_no_validation(train, runs, summary):
    train("rare", "--epochs", 3, "--val-interval", 2)
    assert [row["epoch"] for row in summary(runs / "rare")] == [1, 2]
    assert train("none", "--epochs", 2, "--val-split", "", "--eval-metric", "loss").status == 0
    assert list(summary(runs / "none")[0]) == ["epoch", "train_loss", "lr"]


def test_warning_of_a_temperature_above_one(train, own_teacher):
    kd = own_teacher("--epochs", 5, "--smoothing", 0.1, "--smoothing-convention", "paper")
    kd += ["--epochs", "1"]
    warm = train("warm", *kd, "--kd-temperature", 3)
    assert warm.status == 0
    # 1 / (1 + 3 (0.1 / 3 / 0.9) ** (1 / 3)) = 0.500
    assert "was trained with smoothing 0.1" in warm.out
    assert "from about 0.900 to 0.500 at --kd-temperature 3" in warm.out
    assert "was trained with smoothing" not in train("cool", *kd).out


def test_class_map(train, tmp_path, own_digits):
    """Classes in an order of one's own; a folder that the map leaves out is left out."""
    (own_digits / "train" / "unused").mkdir()
    names = tmp_path / "classes.txt"
    names.write_text("digit3\ndigit2\ndigit1\ndigit0\n")
    assert train("run", "--class-map", names, "--epochs", 1, data=own_digits).status == 0
    names.write_text("a\nb\ndigit2\ndigit1\ndigit0\n")
    refused = train("bad", "--class-map", names, "--epochs", 1, data=own_digits)
    refused.assert_one_clear_line("labels up to 4", "4 classes", "--num-classes 5")
    train("bad", "--class-map", "nosuch.txt", data=own_digits).assert_one_clear_line("nosuch.txt")


def test_each_epoch_sees_other_crops_and_a_run_that_ends_at_chance_says_so(train, runs, summary):
    result = train("run", "--epochs", 2, "--lr", 0)
    first, second = summary(runs / "run")
    assert first["train_loss"] != pytest.approx(second["train_loss"], rel=1e-5)
    assert "the run ended at chance: right on " in result.out
    assert "% of 48 validation images (chance 25.0 %)" in result.out


@pytest.mark.parametrize("distils", [False, True])
def test_mixup_smooths_as_asked_and_not_otherwise(train, runs, kd, summary, distils):
    """Mixup that never mixes leaves just its smoothing."""
    never = ["--mixup", 1, "--mixup-prob", 0, "--epochs", 1]
    # From trained weights: what smoothing costs a model that knows nothing yet is next to nothing.
    trained = ["--initial-checkpoint", kd[-1]]
    options = [*kd, "--kd-hard-weight", 0.5, *trained] if distils else trained
    asked = [*options, "--smoothing", 0.2, "--smoothing-convention", "paper"]
    unasked = options if distils else [*options, "--smoothing", 0]
    for name, arguments in {"asked": asked, "unasked": unasked}.items():
        train(name, *arguments, "--epochs", 1)
        train(f"{name}-mixup", *arguments, *never)
        close(summary(runs / name), summary(runs / f"{name}-mixup"), 1e-5)
    assert summary(runs / "asked")[0]["train_loss"] > 1.02 * summary(runs / "unasked")[0]["train_loss"]


def test_teacher_has_the_students_memory_layout(train, kd, teachers):
    train("last", *kd, "--epochs", 1, "--channels-last")
    train("first", *kd, "--epochs", 1)
    filters = [teacher.model.layer2[0].conv2.weight for teacher in teachers]
    layout = {"memory_format": torch.channels_last}
    assert [weight.is_contiguous(**layout) for weight in filters] == [True, False]


def test_resume_with_another_architecture(train, runs):
    train("run", "--epochs", 1)
    again = ["--epochs", 2, "--resume", runs / "run" / "last.pth.tar"]
    train("run", *again, "--model", "test_vit").assert_one_clear_line("another architecture")
    adamw = train("run", *again, "--opt", "adamw", "--weight-decay", 0)
    adamw.assert_one_clear_line("--resume", "cannot be used")


def test_resume_of_a_plain_run_with_a_teacher(train, runs, kd):
    train("run", "--epochs", 1)
    folder = runs / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = train("run", *kd, "--epochs", 2, "--resume", folder / "last.pth.tar")
    result.assert_one_clear_line("was not distilled", "another --experiment")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_what_the_process_was_started_to_ignore_stays_ignored(ignored):
    """Ctrl-C in a shell's background, SIGHUP under nohup; every other request to end is heard."""
    requests = {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP}
    before = {number: signal.signal(number, signal.SIG_DFL) for number in requests}
    try:
        signal.signal(ignored, signal.SIG_IGN)
        for number in requests - {ignored}:
            with stop_signals():
                os.kill(os.getpid(), ignored)
                with pytest.raises(Interrupted) as asked:
                    os.kill(os.getpid(), number)
            assert asked.value.args == (number,)
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_to_end_waits_for_the_checkpoint(train, runs, monkeypatch, workers):
    """In the middle of `torch.save` it would end in torch's error about a file that is too short.

    A terminal that is closed tells the loading processes, too, and torch of their end.
    """
    save = torch.save

    def closed_in_the_middle(content, file):
        class Note:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGHUP)
                for loading in multiprocessing.active_children():
                    os.kill(loading.pid, signal.SIGHUP)
                    loading.join()
                return (OrderedDict, ())

        save({"note": Note(), **content}, file)

    monkeypatch.setattr(torch, "save", closed_in_the_middle)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or under nohup it would not be heard
    try:
        result = train("run", "--epochs", 3, "--workers", workers)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.status, result.err) == (128 + signal.SIGHUP, "")
    last = runs / "run" / "last.pth.tar"
    assert f"stopped in epoch 0; go on by --resume {last}" in result.out
    assert is_whole(last)


def test_the_end_of_a_loading_process_that_comes_with_the_request_is_not_heard(monkeypatch):
    """Both wait until a step ends, as in a long backward pass; torch would raise then, Python complain."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    def torchs(number, frame):
        raise RuntimeError("DataLoader worker is killed")

    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGCHLD)}

    def both_at_once():
        signal.pthread_sigmask(signal.SIG_BLOCK, before)
        for number in before:
            signal.raise_signal(number)  # to this thread: another one would take it at once
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)

    try:
        signal.signal(signal.SIGCHLD, torchs)
        with pytest.raises(Interrupted), stop_signals():
            both_at_once()
        time.sleep(0.01)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert complaints == []


def test_a_second_request_waits_for_nothing():
    def twice():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted), stop_signals(), stop_signals_wait():
        twice()
