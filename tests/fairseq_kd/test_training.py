"""fairseq-train, -validate, -generate and -hydra-train with the plugin, as users run them."""

import math
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch

from events import scalars
from lskd import LskdError, SoftLabels

pytestmark = pytest.mark.integration


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def train(corpus, commands, tmp_path):
    """Return a function that trains in a folder of that name."""
    return lambda name, *arguments: commands.train(corpus.data, tmp_path / name, *arguments)


@pytest.fixture
def online(corpus):
    return lambda *arguments: ("--criterion", "ls_kd", "--kd-teacher", corpus.teacher, *arguments)


def stored(store, *arguments):
    return ("--task", "translation_ls_kd", "--kd-soft-labels", store, "--criterion", "ls_kd", *arguments)


def same_weights(*folders):
    one, other = (load(folder / "checkpoint_last.pt")["model"] for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def agree(one, other, *names):
    for ours, theirs in zip(one, other, strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], abs=2e-3), name


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_weight_0_is_label_smoothed_cross_entropy(corpus, train, tmp_path, convention):
    eps = 0.1
    theirs = eps if convention == "paper" else eps * (corpus.classes - 1) / corpus.classes
    arguments = ("--max-epoch", 2, "--report-accuracy", "--label-smoothing")
    plain = train("plain", "--criterion", "label_smoothed_cross_entropy", *arguments, theirs)
    ours = ("--criterion", "ls_kd", "--kd-weight", 0, "--smoothing-convention", convention)
    ours = train("ours", *ours, *arguments, eps)
    clock = {"wps", "ups", "train_wall", "wall", "wpb"}
    for kind in ("train_inner", "valid", "train"):
        rows = [
            [
                {k: v for k, v in row.items() if not any(k.endswith(name) for name in clock)}
                for row in one.numbers(kind)
            ]
            for one in (plain, ours)
        ]
        assert rows[0]
        assert rows[0] == rows[1]
    if convention == "paper":
        assert same_weights(tmp_path / "plain", tmp_path / "ours")


def test_tensorboard_has_what_fairseq_logs(corpus, commands, online, tmp_path):
    words = online("--max-epoch", 2, "--tensorboard-logdir", tmp_path / "logs")
    result = commands.run(*commands.training(corpus.data, tmp_path, *words))
    rows, found = result.numbers("train"), scalars(tmp_path / "logs" / "train")
    for name in ("kd_ce", "kd_kl", "kd_teacher_entropy", "kd_hard_ce", "kd_agreement", "loss"):
        logged = [row[f"train_{name}"] for row in rows]
        assert list(found[name].values()) == pytest.approx(logged, abs=2e-3), name
    assert {"loss", "nll_loss"} <= scalars(tmp_path / "logs" / "valid").keys()


def test_the_teachers_bleu_is_not_the_students(corpus, commands, train, online, tmp_path):
    """With the student's task, loading a teacher replaces the generator that validation decodes with."""
    result = train(".", *online("--max-update", 1, *commands.bleu))
    during = result.numbers("valid")[-1]["valid_bleu"]
    alone = commands.run(
        *("fairseq-validate", corpus.data, "--user-dir", commands.plugin, "--task", "translation", "--cpu"),
        *("--path", tmp_path / "checkpoint_last.pt", "--max-tokens", 1000, "--log-format", "json"),
    )
    teacher = load(corpus.teacher)["extra_state"]["val_loss"]
    assert teacher > 20
    assert during < 5  # one update: the student knows nothing
    # Batches are padded differently, which moves the last digit of what decides between two words.
    assert alone.numbers("valid")[-1]["valid_bleu"] == pytest.approx(during, abs=1)


def test_teacher_is_not_in_the_student_and_comes_out_as_it_went_in(corpus, train, online, tmp_path):
    before = corpus.teacher.read_bytes()
    result = train("kd", *online("--max-epoch", 2))
    train("plain", "--criterion", "ls_kd", "--kd-weight", 0, "--max-epoch", 2)
    assert corpus.teacher.read_bytes() == before
    ours, plain = load(tmp_path / "kd/checkpoint_last.pt"), load(tmp_path / "plain/checkpoint_last.pt")
    assert ours["model"].keys() == plain["model"].keys()
    assert "criterion" not in ours or not ours["criterion"]
    states = [state["last_optimizer_state"]["state"] for state in (ours, plain)]
    assert len(states[0]) == len(states[1])
    row = result.numbers("train")[-1]
    assert row["train_kd_ce"] == pytest.approx(row["train_kd_kl"] + row["train_kd_teacher_entropy"], abs=2e-3)
    assert row["train_kd_weight"] == 0.9
    # Dropout is off: the teacher's entropy over the same sentences is the same in both epochs.
    entropies = [row["train_kd_teacher_entropy"] for row in result.numbers("train")]
    assert entropies[0] == entropies[1]


def test_stored_everything_is_online(corpus, commands, train, online, tmp_path):
    """Top-K of the whole vocabulary in float32: the same curve and nearly the same weights."""
    commands.call(
        *("fairseq_kd.soft_labels", corpus.data, "--path", corpus.teacher.parent, "--output", tmp_path / "s"),
        *("--cpu", "--top-k", corpus.classes, "--values", "float32"),
    )
    one = train("a", *online("--max-epoch", 2))
    other = train("b", *stored(tmp_path / "s", "--max-epoch", 2))
    agree(one.numbers("train_inner"), other.numbers("train_inner"), "loss", "kd_kl")


def test_stored_draws_are_read_as_such(corpus, commands, train, tmp_path):
    """Drawn by sentence and token, whatever the batch; neither read as the likeliest nor tempered."""
    for name, tokens in (("s", 1000), ("t", 300)):
        commands.call(
            *("fairseq_kd.soft_labels", corpus.data, "--path", corpus.teacher.parent, "--cpu"),
            *("--output", tmp_path / name, "--sampled", 3, "--max-tokens", tokens, "--values", "float32"),
        )
    one, other = (SoftLabels(tmp_path / name) for name in "st")
    same = [(one[key].ids == other[key].ids).mean() for key in range(len(one))]
    assert np.mean(same) > 0.99  # other batches round otherwise, and a draw may fall to the next word
    at_a_url = stored(f"file://{tmp_path}/s", "--kd-soft-labels-cache", tmp_path / "cache")
    row = train("a", *at_a_url, "--max-update", 3).numbers("train")[-1]
    assert list((tmp_path / "cache").glob("*/manifest.json"))
    assert row["train_kd_ce"] > 0
    assert math.isnan(row["train_kd_kl"])  # drawn words do not say it
    for words, message in (
        (("--kd-rest", "lump"), "are 3 drawn of"),
        (("--kd-top-k", 3), "are 3 drawn of"),
        (("--kd-temperature", 2), "biased at 2"),
    ):
        with pytest.raises(LskdError, match=message):
            train("b", *stored(tmp_path / "s", "--max-update", 3, *words))


@pytest.mark.parametrize("asked", ["online", "stored"])
def test_goes_on_along_the_curve_of_an_unbroken_run(train, online, tmp_path, store, asked):
    """Online, with dropout: loading the teacher must not move the random numbers."""
    arguments = stored(store) if asked == "stored" else online("--task", "translation_ls_kd")
    inner, valid = train("whole", *arguments, "--max-epoch", 3).curve()
    first, second = (train("parts", *arguments, "--max-epoch", last).curve() for last in (2, 3))
    assert inner == first[0] + second[0]
    assert valid == first[1] + second[1]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_update_freq_is_a_larger_batch(train, online):
    """Without dropout two halves of a batch are the batch; sums over tokens, not means, make it so."""
    arguments = online("--max-epoch", 1, "--dropout", 0, "--max-tokens", 100000, "--batch-size")
    large = train("large", *arguments, 400).numbers("train")
    small = train("small", *arguments, 200, "--update-freq", 2).numbers("train")
    assert large[0]["train_num_updates"] == 1
    agree(large, small, "train_num_updates", "train_loss", "train_kd_ce", "train_kd_kl", "train_gnorm")


def test_two_processes_on_gloo_train_as_one(corpus, commands, train, online, tmp_path):
    """The same sentences in two processes: the same sums, so the same losses and gradients."""
    shared = online("--max-epoch", 2, "--dropout", 0, "--max-tokens", 100000, "--batch-size")
    alone = train("one", *shared, 200, "--update-freq", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed = [
        *("--distributed-world-size", 2, "--distributed-init-method", f"tcp://127.0.0.1:{port}"),
        *("--distributed-no-spawn", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"),
    ]
    processes = [
        commands.start_training(
            corpus.data, tmp_path / "two", *shared, 200, *distributed, "--distributed-rank", rank
        )
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    names = ("train_loss", "train_kd_kl", "train_kd_teacher_entropy", "train_gnorm")
    agree(alone.numbers("train"), commands.result(outputs[0]).numbers("train"), *names)


def test_finetune_from_a_model_of_another_criterion(corpus, train, online):
    result = train("s", *online("--finetune-from-model", corpus.teacher, "--max-epoch", 1, "--lr", 1e-5))
    # The student begins as its teacher: what is left of the divergence is the student's dropout.
    assert result.numbers("train_inner")[0]["kd_kl"] < 0.5


def test_validate_and_generate_do_without_the_teacher(corpus, commands, train, tmp_path, store):
    teacher = shutil.copy(corpus.teacher, tmp_path / "teacher.pt")
    copy = shutil.copytree(store, tmp_path / "store")
    train("a", "--criterion", "ls_kd", "--kd-teacher", teacher, "--max-epoch", 1)
    train("b", *stored(copy, "--max-epoch", 1))
    teacher.unlink()
    shutil.rmtree(copy)
    documented = (commands.plugin.parents[1] / "docs" / "fairseq.md").read_text()
    for student, subset in (("a", "valid"), ("b", "train")):
        places = {
            "data-bin": corpus.data,
            "plugins/fairseq_kd": commands.plugin,
            "checkpoints/checkpoint_best.pt": tmp_path / student / "checkpoint_last.pt",
        }
        for name in ("validate", "generate"):
            (line,) = re.findall(rf"^fairseq-{name} .*$", documented, re.MULTILINE)
            words = [places.get(word, word) for word in line.split()]
            chosen = ("--valid-subset", subset) if name == "validate" else ()
            said = commands.run(*words, "--cpu", *chosen, "--log-format", "json")
            if name == "validate":
                assert said.numbers(subset)[-1][f"{subset}_loss"] > 0
            else:
                assert "Generate test with beam=5: BLEU4 = " in said.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kd-preset", "tan2019"),
        ("--kd-preset", "tan2019", "--kd-temperature", 2, "--kd-temperature-squared", "false"),
        ("--kd-top-k", 4, "--kd-rest", "spread", "--ignore-prefix-size", 1),
        ("--kd-sampled", 4),
        ("--kd-teacher", "{0}/checkpoint_best.pt:{0}/checkpoint_last.pt"),
    ],
)
def test_presets_top_k_spread_and_ensembles(corpus, train, online, arguments):
    words = [str(word).format(corpus.teacher.parent) for word in arguments]
    row = train("s", *online("--max-update", 3, *words)).numbers("train")[-1]
    assert 0 < row["train_kd_kl"] < row["train_kd_ce"] or "--kd-sampled" in words


def test_on_policy_goes_on_along_the_curve_of_an_unbroken_run(train, online, tmp_path):
    """Half of the updates draw sentences: the numbers they are drawn with follow from the update."""
    own = ("--kd-divergence", "reverse", "--kd-on-policy", 0.5)
    arguments = online("--task", "translation_ls_kd", *own)
    whole = train("whole", *arguments, "--max-epoch", 2)
    assert all(math.isfinite(row["train_kd_divergence"]) for row in whole.numbers("train"))
    first, second = (train("parts", *arguments, "--max-epoch", last).curve() for last in (1, 2))
    assert whole.curve()[0] == first[0] + second[0]
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_hydra_train_gives_the_same_numbers(corpus, commands, train, online, tmp_path):
    plain = train("cli", *online("--max-epoch", 2, "--kd-temperature", 2))
    config = f"""
common: {{user_dir: {commands.plugin}, cpu: true, seed: 3, log_format: json, log_interval: 1,
         no_progress_bar: true}}
checkpoint: {{save_dir: {tmp_path / "hydra"}, no_epoch_checkpoints: true}}
task: {{_name: translation, data: {corpus.data}, source_lang: de, target_lang: en}}
dataset: {{max_tokens: 1000, num_workers: 0}}
optimization: {{max_epoch: 2, lr: [0.005]}}
criterion: {{_name: ls_kd, kd_teacher: {corpus.teacher}, kd_temperature: 2}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 20}}
model:
  _name: transformer
  dropout: 0.1
  encoder: {{layers: 1, embed_dim: 32, ffn_embed_dim: 64, attention_heads: 2}}
  decoder: {{layers: 1, embed_dim: 32, ffn_embed_dim: 64, attention_heads: 2}}
"""
    (tmp_path / "kd.yaml").write_text(config)
    hydra = ("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "kd")
    assert commands.run(*hydra, cwd=tmp_path).curve() == plain.curve()
    refused = commands.run(*hydra, "+criterion.kd_weight=3", cwd=tmp_path, check=False)
    assert refused.status == 2
    assert "--kd-weight is 3.0" in refused.error


def test_selective_distillation_by_validation_bleu_survives_an_end(commands, train, store):
    """The teacher's BLEU is said to be low: every third epoch the weight falls as the student passes it."""
    arguments = stored(
        *(store, "--kd-alpha-schedule", "adaptive", "--kd-teacher-bleu", 1),
        *commands.bleu,
    )
    whole = train("whole", *arguments, "--max-epoch", 8)
    train("parts", *arguments, "--max-epoch", 7)
    last = train("parts", *arguments, "--max-epoch", 8)
    weights = [row["train_kd_weight"] for row in whole.numbers("train")]
    bleus = [row["valid_bleu"] for row in whole.numbers("valid")]
    looks = [0.9, *(0.9 * 0.5 ** (bleus[epoch - 1] - 1 + 2) for epoch in (3, 6))]
    assert weights == pytest.approx([looks[epoch // 3] for epoch in range(8)], abs=2e-3)
    assert last.numbers("train")[-1]["train_kd_weight"] == weights[-1]
    assert last.curve()[0] == whole.curve()[0][-len(last.curve()[0]) :]


def test_checkpoint_with_foreign_code_is_refused_everywhere(corpus, commands, train, tmp_path):
    bad = tmp_path / "bad" / "checkpoint_last.pt"
    corpus.forge(bad, lambda state: state["extra_state"].update(surprise=os.system))
    shared = (corpus.data, "--user-dir", commands.plugin, "--cpu", "--path", bad)
    for command in (("generate",), ("validate", "--task", "translation", "--max-tokens", 1000)):
        with pytest.raises(LskdError, match=r"posix\.system"):
            commands.call(f"fairseq-{command[0]}", *shared, *command[1:])
    for save, teacher in (("bad", ("--kd-weight", 0)), ("s", ("--kd-teacher", bad))):
        with pytest.raises(LskdError, match=r"posix\.system"):
            train(save, "--criterion", "ls_kd", *teacher, "--max-epoch", 1)
