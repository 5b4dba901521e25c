"""What every run that loads the plugin gets: an end when it diverges, and checkpoints that are whole."""

import math
import os
import resource
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.file_io import PathManager
from torch.multiprocessing import ProcessExitedException

from fairseq_kd import errors
from fairseq_kd import watched_trainer as watched
from lskd import DivergedError, LskdError

STOCK = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")


def at_epoch(epoch):
    return SimpleNamespace(kd_watch=watched._Watch(epoch=epoch), get_model=lambda: torch.nn.Linear(2, 2))


def raising(text):
    def step(*_):
        raise FloatingPointError(text)

    return step


@pytest.mark.unit
@pytest.mark.parametrize(
    "text",
    [
        "gradients are Nan/Inf",
        "Minimum loss scale reached (0.0001). Your loss is probably exploding. Try lowering the learning",
        "Fatal error: gradients are inconsistent between workers.\nrank   0 = 1.0\nrank   1 = nan",
    ],
)
def test_what_fairseq_says_of_gradients_is_a_run_that_diverged(text):
    def and_fails_itself(*_):
        try:
            raise FloatingPointError(text)
        except FloatingPointError:
            raise StopIteration from None

    for step in (raising(text), and_fails_itself):
        with pytest.raises(DivergedError, match=r"^epoch 3: the gradient is nan; the run diverged"):
            watched._train_step(step, at_epoch(3), [])


@pytest.mark.unit
def test_an_error_of_the_machine_stays_what_it_is():
    step = raising("gradients are inconsistent between workers.\nrank 0 = 1.0\nrank 1 = 2.0")
    with pytest.raises(FloatingPointError, match="inconsistent"):
        watched._train_step(step, at_epoch(3), [])


@pytest.mark.unit
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_and_weights_are_finite_or_the_run_failed(value):
    def log(*_):
        return {"loss": value}

    with pytest.raises(DivergedError, match="epoch 2: the training loss is"):
        watched._train_step(log, at_epoch(2), [])
    with pytest.raises(DivergedError, match="epoch 2: the validation loss is"):
        watched._valid_step(log, at_epoch(2), {"ntokens": 3})
    trainer = at_epoch(2)
    model = trainer.get_model()
    model.bias.data[1] = value
    trainer.get_model = lambda: model
    saved = []
    with pytest.raises(DivergedError, match="epoch 2: the weights bias are not all finite"):
        watched._save_checkpoint(lambda *_: saved.append(1), None, trainer)
    with pytest.raises(DivergedError, match="epoch 2: the weights bias"):
        watched._lr_step(lambda *_: saved.append(1), trainer, 2)
    assert not saved


@pytest.mark.integration
def test_a_run_that_diverges_ends_with_3_and_one_line(corpus, commands, tmp_path):
    """One update an epoch: the training loss is finite, validation is not. Of fairseq's own criterion."""
    wild = ("--lr", "1e38", "--lr-scheduler", "fixed", "--max-tokens", 100000, "--max-epoch", 2)
    result = commands.run(*commands.training(corpus.data, tmp_path / "s", *STOCK, *wild), check=False)
    assert result.status == DivergedError.STATUS
    assert "epoch 1: the validation loss is nan; the run diverged" in result.error
    assert not list((tmp_path / "s").glob("*"))


@pytest.mark.integration
def test_checkpoints_know_dictionaries_and_validation(corpus):
    # No class of the plugin is pickled, so that old checkpoints do not depend on where a class lies.
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(corpus.teacher)
    assert not [name for name in unsafe if name.startswith("fairseq_kd")]
    state = torch.load(corpus.teacher, weights_only=True)
    record = state["extra_state"]["fairseq_kd"]
    assert watched.dictionary_checksums(object()) == {}  # of a task that is not about words
    words = SimpleNamespace(
        source_dictionary=Dictionary.load(str(corpus.data / "dict.de.txt")),
        target_dictionary=Dictionary.load(str(corpus.data / "dict.en.txt")),
    )
    assert record["dictionaries"] == watched.dictionary_checksums(words)
    last = {meter[1]: meter[3] for meter in state["extra_state"]["metrics"]["valid"]}["nll_loss"]["val"]
    assert record["valid_nll"] == pytest.approx(float(last) * math.log(2), abs=1e-3)  # of one batch


@pytest.mark.unit
def test_a_run_that_learnt_nothing_is_named(capsys):
    def run(nll, words=40):
        watched._Watch(words, nll=nll * 10, tokens=10).warn_if_guessing()
        return capsys.readouterr().out

    assert "no better than guessing: its last validation has 3.80 nats a token" in run(3.8)
    assert run(3.6) == run(3.8, words=0) == ""


@pytest.mark.unit
@pytest.mark.parametrize(("command", "says"), [("/bin/fairseq-train", True), ("/bin/lskd", False)])
def test_a_command_of_fairseq_says_it_at_its_end(monkeypatch, command, says):
    at_the_end = []
    monkeypatch.setattr(watched.atexit, "register", at_the_end.append)
    monkeypatch.setattr("sys.argv", [command])
    watched._init(lambda *_: None, SimpleNamespace(), None, None, None, None)
    assert len(at_the_end) == says


@pytest.mark.unit
def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    last, best = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint_best.pt"
    checkpoint_utils.torch_persistent_save({"epoch": 1}, str(best))
    PathManager.copy(str(best), str(last), overwrite=True)

    def torn(source, target):
        with open(target, "wb") as file:
            file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", torn)
    with pytest.raises(KeyboardInterrupt):
        PathManager.copy(str(best), str(last), overwrite=True)
    monkeypatch.setattr(torch, "save", lambda content, file: torn(None, file.name))
    with pytest.raises(KeyboardInterrupt):
        checkpoint_utils.torch_persistent_save({"epoch": 2}, str(best))
    assert torch.load(last, weights_only=True) == torch.load(best, weights_only=True) == {"epoch": 1}
    assert {path.name for path in tmp_path.iterdir()} == {last.name, best.name}


@pytest.mark.unit
def test_a_full_disk_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(LskdError, match=r"cannot write .*last.pt: the disk is full"):
            checkpoint_utils.torch_persistent_save({"w": torch.zeros(100_000)}, str(tmp_path / "last.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_checkpoint_that_was_cut_says_how_to_go_on(corpus, commands, tmp_path):
    """As fairseq without the plugin leaves it, which writes in place."""
    best = tmp_path / "checkpoint_best.pt"
    shutil.copy(corpus.teacher, best)
    last = tmp_path / "checkpoint_last.pt"
    for size in (0, 5000):
        last.write_bytes(best.read_bytes()[:size])
        with pytest.raises(LskdError, match="was cut while it was written; go on from a whole one") as caught:
            commands.call(*commands.training(corpus.data, tmp_path, *STOCK))
        assert f"--restore-file {best}" in str(caught.value)
    best.unlink()
    with pytest.raises(LskdError, match="was cut while it was written; remove it to begin anew"):
        commands.call(*commands.training(corpus.data, tmp_path, *STOCK))


@pytest.mark.integration
def test_two_processes_that_would_train_alone(corpus, commands, tmp_path, monkeypatch):
    """What torchrun sets, without --distributed-world-size."""
    for name in ("WORLD_SIZE=2", "RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=1"):
        monkeypatch.setenv(*name.split("="))
    with pytest.raises(LskdError, match=r"2 processes were started .* add --distributed-world-size 2"):
        commands.call(*commands.training(corpus.data, tmp_path, *STOCK, "--max-update", 1))
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.integration
def test_adaptive_softmax_is_refused_before_the_first_update(corpus, commands, tmp_path):
    adaptive = ("--adaptive-softmax-cutoff", "10,20", "--max-update", 1, "--ddp-backend", "legacy_ddp")
    commands.train(corpus.data, tmp_path / "a", "--criterion", "adaptive_loss", *adaptive)
    with pytest.raises(LskdError, match="has an adaptive softmax, which gives no logits"):
        corpus.teach(tmp_path / "a" / "checkpoint_last.pt")
    student = ("--criterion", "ls_kd", "--kd-teacher", corpus.teacher, *adaptive)
    with pytest.raises(LskdError, match="drop --adaptive-softmax-cutoff"):
        commands.train(corpus.data, tmp_path / "b", *student)
    assert not list((tmp_path / "b").glob("*.pt"))


@pytest.mark.integration
def test_tasks_that_do_not_translate_are_one_line(corpus, commands, tmp_path):
    """Of language_modeling in a process of its own, which fairseq's threads used to abort."""
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(corpus.data / "dict.en.txt", folder / "dict.txt")
    teacher = ("--criterion", "ls_kd", "--kd-teacher", corpus.teacher)
    words = ("--user-dir", commands.plugin, "--cpu", "--save-dir", tmp_path / "s", "--max-tokens", 100)
    shape = ("--arch", "transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 32)
    result = commands.run(
        "fairseq-train", folder, "--task", "language_modeling", *words, *shape, *teacher, check=False
    )
    assert result.status == 2
    assert "distils translation, and the task is LanguageModelingTask" in result.error
    pairs = ("--task", "translation_multi_simple_epoch", "--langs", "de,en", "--lang-pairs", "de-en")
    with pytest.raises(LskdError, match="the task is TranslationMultiSimpleEpochTask"):
        commands.train(corpus.data, tmp_path / "s", *pairs, *teacher)


@pytest.mark.unit
@pytest.mark.parametrize(("name", "status"), [("DivergedError", 3), ("CheckpointError", 2)])
def test_an_error_of_a_process_that_fairseq_spawned_is_one_line_too(name, status):
    text = f"\n\n-- Process 1 terminated:\nTraceback ...\nlskd.errors.{name}: epoch 2: no\n"
    assert errors._as_line(Exception(text)) == ("fairseq_kd: error: epoch 2: no", status)
    assert errors._as_line(Exception("lskd is not at fault"))[0] is None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "that loads data has died"),
        (
            ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 7, -9),
            "process 1 terminated",
        ),
        (
            RuntimeError("[x/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            "of this run has died",
        ),
        (
            torch.distributed.DistNetworkError("got 0 bytes. Did the remote server shutdown?"),
            "of this run has died",
        ),
    ],
)
def test_a_process_of_the_run_that_died_is_one_line(error, words):
    line, status = errors._as_line(error)
    assert words in line
    assert status == 2


@pytest.mark.unit
def test_the_line_is_not_lost_in_a_run_of_several_processes(monkeypatch, capfd):
    """torch puts a hook around ours, and would lose what ours writes."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(os, "_exit", sys.exit)
    errors.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    error = LskdError("no")
    try:
        with pytest.raises(SystemExit):
            sys.excepthook(type(error), error, None)
    finally:
        torch.distributed.destroy_process_group()
    assert capfd.readouterr().err == "fairseq_kd: error: no\n"
