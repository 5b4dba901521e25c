"""A tiny corpus of number words, a teacher that knows them, and fairseq's own commands in subprocesses."""

import fcntl
import importlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from num2words import num2words

import forked
from fairseq_kd.teacher import Teacher  # all of the plugin, before any test: torch's list of safe types too

FAIRSEQ = ("fairseq_cli.train", "fairseq_cli.preprocess", "fairseq_cli.generate", "fairseq_cli.validate")
PLUGIN = Path(__file__).parents[2] / "plugins" / "fairseq_kd"
SHAPE = [
    *("--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
]
TRAINING = [
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20"),
    *("--max-tokens", "1000", "--dropout", "0.1", "--seed", "3", "--num-workers", "0"),
    *("--log-format", "json", "--log-interval", "1", "--no-progress-bar", "--no-epoch-checkpoints"),
]
BLEU = [
    *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_a": 1.2, "max_len_b": 10}'),
    *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
]


class Result(SimpleNamespace):
    """What a command left: exit status, output, and the numbers that fairseq logged."""

    def numbers(self, kind):
        """Return the logged numbers of 'train', 'train_inner' or 'valid', in order."""
        # Of fairseq-train and, behind the bar, of fairseq-hydra-train.
        marker = re.compile(rf"(?:\| {kind} \| |\[{kind}\]\[INFO\] - )({{.*}})")
        lines = [found[1] for line in self.output.splitlines() if (found := marker.search(line))]
        return [{name: float(value) for name, value in json.loads(line).items()} for line in lines]

    def curve(self):
        """Return what does not depend on the clock, of every update and validation."""
        inner = ("loss", "nll_loss", "kd_ce", "kd_kl", "kd_weight", "num_updates", "lr", "gnorm")
        valid = ("valid_loss", "valid_nll_loss", "valid_bleu")
        return tuple(
            [{name: row[name] for name in names if name in row} for row in self.numbers(kind)]
            for kind, names in (("train_inner", inner), ("valid", valid))
        )

    @property
    def error(self):
        """Return the plugin's line; there must be one, and no traceback."""
        lines = [line for line in self.output.splitlines() if line.startswith("fairseq_kd: error: ")]
        assert len(lines) == 1, self.output[-3000:]
        assert "Traceback" not in self.output
        return lines[0]


def environment():
    paths = [str(PLUGIN.parents[1] / part) for part in ("common", "plugins", "studies")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(*command, cwd=None, check=True):
    """Run a command of fairseq's or of the plugin where fairseq, not the plugin, is imported."""
    if command[0].startswith("fairseq_kd"):
        command = ("-m", *command)
    done = forked.run(*command, imported=FAIRSEQ, cwd=cwd, env=environment())
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, output[-4000:]
    return Result(status=done.returncode, output=output)


def call(name, *words):
    """Call a command in this process: its errors as they are raised, without the seconds of an import."""
    words = [str(word) for word in words]
    root = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["within tests", *words])
        patch.setattr(root, "handlers", [*root.handlers])  # the commands set up their own log
        patch.setattr(root, "level", root.level)
        if name.startswith("fairseq_kd."):
            return importlib.import_module(name).main(words)
        return importlib.import_module(name.replace("fairseq-", "fairseq_cli.")).cli_main()


def training(data, save, *arguments, shape=SHAPE):
    where = (data, "--user-dir", PLUGIN, "--cpu", "--save-dir", save)
    return ["fairseq-train", *where, *shape, *TRAINING, *arguments]


def train(data, save, *arguments, **shape):
    """Train in this process, as in one of its own: with one thread, and a best validation of its own."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"| {record.name} | {record.getMessage()}")
    root, threads = logging.getLogger(), torch.get_num_threads()
    level = root.level
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    root.addHandler(handler)
    root.setLevel("INFO")
    torch.set_num_threads(1)
    try:
        call(*training(data, save, *arguments, **shape))
    finally:
        torch.set_num_threads(threads)
        root.setLevel(level)
        root.removeHandler(handler)
    return Result(status=0, output="\n".join(lines))


def start_training(data, save, *arguments):
    name, *words = map(str, training(data, save, *arguments))
    command = [str(Path(sys.executable).with_name(name)), *words]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), **output)


def write_numbers(folder, numbers):
    """German as letters, English as words: a task that a tiny model learns in seconds."""
    folder.mkdir()
    for split, part in numbers.items():
        for language in ("de", "en"):
            words = [num2words(number, lang=language).replace("-", " ") for number in part]
            lines = [" ".join(word) if language == "de" else word for word in words]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def preprocess(text, destination, *arguments):
    call(
        *("fairseq-preprocess", "-s", "de", "-t", "en", "--workers", 1, "--destdir", destination),
        *("--trainpref", text / "train", "--validpref", text / "valid", "--testpref", text / "test"),
        *arguments,
    )
    return destination


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return text, data-bin, a teacher, what loads and forges one; for all processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "numbers"
    with open(f"{root}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "store" / "manifest.json").exists():
            shutil.rmtree(root, ignore_errors=True)  # of a process that failed
            make_corpus(root)
    teacher, data = root / "teacher" / "checkpoint_best.pt", root / "bin"
    classes = len((data / "dict.en.txt").read_text().splitlines()) + 4  # and fairseq's own words
    same = {"root": root, "text": root / "text", "data": data, "teacher": teacher, "classes": classes}

    def forge(path, change):
        """Write the teacher's checkpoint with a change."""
        state = torch.load(teacher, weights_only=True)
        change(state)
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        return path

    return SimpleNamespace(**same, forge=forge, teach=lambda path: Teacher([path], str(data), "de", "en"))


def make_corpus(root):
    root.mkdir()
    numbers = random.Random(0).sample(range(1000), 460)
    write_numbers(root / "text", {"train": numbers[:400], "valid": numbers[400:430], "test": numbers[430:]})
    data = preprocess(root / "text", root / "bin")
    teacher = root / "teacher"
    smoothed = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
    result = train(data, teacher, *smoothed, "--max-epoch", 12, *BLEU)
    assert result.numbers("valid")[-1]["valid_bleu"] > 20
    best = teacher / "checkpoint_best.pt"
    run("fairseq_kd.soft_labels", data, "--path", best, "--output", root / "store", "--cpu")


@pytest.fixture(scope="session")
def store(corpus):
    """Return soft labels of the training set, top 8."""
    return corpus.root / "store"


@pytest.fixture(scope="session")
def commands():
    return SimpleNamespace(
        run=run,
        call=call,
        environment=environment,
        train=train,
        training=training,
        start_training=start_training,
        result=lambda output: Result(status=0, output=output),
        preprocess=preprocess,
        write_numbers=write_numbers,
        plugin=PLUGIN,
        bleu=BLEU,
    )
