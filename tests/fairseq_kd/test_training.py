"""fairseq-train, -validate, -generate and -hydra-train with the plugin, as users run them."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import time

import pytest
import torch

from lskd import LskdError

pytestmark = pytest.mark.integration


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def online(corpus, *arguments):
    return ("--criterion", "ls_kd", "--kd-teacher", corpus.teacher, *arguments)


def stored(store, *arguments):
    return ("--task", "translation_ls_kd", "--kd-soft-labels", store, "--criterion", "ls_kd", *arguments)


def same_weights(one, other):
    one, other = load(one)["model"], load(other)["model"]
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_weight_0_is_label_smoothed_cross_entropy(corpus, commands, tmp_path, convention):
    eps = 0.1
    classes = len((corpus.data / "dict.en.txt").read_text().splitlines()) + 4
    theirs = eps if convention == "paper" else eps * (classes - 1) / classes
    arguments = ("--max-epoch", 2, "--report-accuracy", "--label-smoothing")
    plain = commands.train(
        corpus.data, tmp_path / "plain", "--criterion", "label_smoothed_cross_entropy", *arguments, theirs
    )
    ours = commands.train(
        *(corpus.data, tmp_path / "ours", "--criterion", "ls_kd", "--kd-weight", 0, *arguments, eps),
        *("--smoothing-convention", convention),
    )
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
        assert same_weights(tmp_path / "plain/checkpoint_last.pt", tmp_path / "ours/checkpoint_last.pt")


def test_the_teachers_bleu_is_not_the_students(corpus, commands, tmp_path):
    """With the student's task, loading a teacher replaces the generator that validation decodes with."""
    result = commands.train(corpus.data, tmp_path, *online(corpus, "--max-update", 1, *commands.bleu))
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


def test_teacher_is_not_in_the_student_and_comes_out_as_it_went_in(corpus, commands, tmp_path):
    before = checksum(corpus.teacher)
    result = commands.train(corpus.data, tmp_path / "kd", *online(corpus, "--max-epoch", 2))
    commands.train(
        corpus.data, tmp_path / "plain", "--criterion", "ls_kd", "--kd-weight", 0, "--max-epoch", 2
    )
    assert checksum(corpus.teacher) == before
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


def test_stored_everything_is_online(corpus, commands, tmp_path):
    """Top-K of the whole vocabulary in float32: the same curve and nearly the same weights."""
    classes = len((corpus.data / "dict.en.txt").read_text().splitlines()) + 4
    commands.call(
        *("fairseq_kd.soft_labels", corpus.data, "--path", corpus.teacher.parent, "--output", tmp_path / "s"),
        *("--cpu", "--top-k", classes, "--values", "float32"),
    )
    one = commands.train(corpus.data, tmp_path / "a", *online(corpus, "--max-epoch", 2))
    other = commands.train(corpus.data, tmp_path / "b", *stored(tmp_path / "s", "--max-epoch", 2))
    for ours, theirs in zip(one.numbers("train_inner"), other.numbers("train_inner"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
        assert ours["kd_kl"] == pytest.approx(theirs["kd_kl"], abs=2e-3)


def test_goes_on_along_the_curve_of_an_unbroken_run(corpus, commands, tmp_path, store):
    """Online, with dropout: loading the teacher must not move the random numbers."""
    steady = ("--task", "translation_ls_kd")
    for name, arguments in {"online": online(corpus, *steady), "stored": stored(store)}.items():
        whole = commands.train(corpus.data, tmp_path / name / "whole", *arguments, "--max-epoch", 3)
        first = commands.train(corpus.data, tmp_path / name / "parts", *arguments, "--max-epoch", 2)
        second = commands.train(corpus.data, tmp_path / name / "parts", *arguments, "--max-epoch", 3)
        inner, valid = whole.curve()
        parts = [first.curve(), second.curve()]
        assert inner == parts[0][0] + parts[1][0]
        assert valid == parts[0][1] + parts[1][1]
        assert same_weights(
            tmp_path / name / "whole/checkpoint_last.pt", tmp_path / name / "parts/checkpoint_last.pt"
        )


def test_killed_in_the_middle_of_an_epoch(corpus, commands, tmp_path):
    arguments = online(corpus, "--max-epoch", 3, "--save-interval-updates", 4)
    whole = commands.train(corpus.data, tmp_path / "whole", *arguments)
    process = commands.start_training(corpus.data, tmp_path / "parts", *arguments)
    while not (tmp_path / "parts/checkpoint_last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rest = commands.train(corpus.data, tmp_path / "parts", *arguments)
    inner, _ = whole.curve()
    after, _ = rest.curve()
    assert 0 < len(after) < len(inner)
    assert after == inner[-len(after) :]
    assert same_weights(tmp_path / "whole/checkpoint_last.pt", tmp_path / "parts/checkpoint_last.pt")


def test_update_freq_is_a_larger_batch(corpus, commands, tmp_path):
    """Without dropout two halves of a batch are the batch; sums over tokens, not means, make it so."""
    arguments = online(corpus, "--max-epoch", 1, "--dropout", 0, "--batch-size")
    large = commands.train(corpus.data, tmp_path / "large", *arguments, 400, "--max-tokens", 100000)
    small = commands.train(
        corpus.data, tmp_path / "small", *arguments, 200, "--max-tokens", 100000, "--update-freq", 2
    )
    one, other = large.numbers("train")[0], small.numbers("train")[0]
    assert one["train_num_updates"] == other["train_num_updates"] == 1
    for name in ("train_loss", "train_kd_ce", "train_kd_kl", "train_gnorm"):
        assert one[name] == pytest.approx(other[name], abs=2e-3), name


def test_two_processes_on_gloo_train_as_one(corpus, commands, tmp_path):
    """The same sentences in two processes: the same sums, so the same losses and gradients."""
    shared = online(corpus, "--max-epoch", 2, "--dropout", 0, "--max-tokens", 100000, "--batch-size")
    alone = commands.train(corpus.data, tmp_path / "one", *shared, 200, "--update-freq", 2)
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
    two = commands.result(outputs[0])
    for one, other in zip(alone.numbers("train"), two.numbers("train"), strict=True):
        for name in ("train_loss", "train_kd_kl", "train_kd_teacher_entropy", "train_gnorm"):
            assert one[name] == pytest.approx(other[name], abs=2e-3), name


def test_finetune_from_a_model_of_another_criterion(corpus, commands, tmp_path):
    result = commands.train(
        corpus.data,
        tmp_path,
        *online(corpus, "--finetune-from-model", corpus.teacher, "--max-epoch", 1, "--lr", 1e-5),
    )
    # The student begins as its teacher: what is left of the divergence is the student's dropout.
    assert result.numbers("train_inner")[0]["kd_kl"] < 0.5


def test_validate_and_generate_do_without_the_teacher(corpus, commands, tmp_path, store):
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(corpus.teacher.read_bytes())
    copy = tmp_path / "store"
    subprocess.run(["cp", "-r", store, copy], check=True)
    commands.train(
        corpus.data, tmp_path / "a", "--criterion", "ls_kd", "--kd-teacher", teacher, "--max-epoch", 1
    )
    commands.train(corpus.data, tmp_path / "b", *stored(copy, "--max-epoch", 1))
    teacher.unlink()
    subprocess.run(["rm", "-r", copy], check=True)
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


def test_presets_top_k_spread_and_ensembles(corpus, commands, tmp_path):
    for number, arguments in enumerate(
        [
            ("--kd-preset", "tan2019"),
            ("--kd-preset", "tan2019", "--kd-temperature", 2, "--kd-temperature-squared", "false"),
            ("--kd-top-k", 4, "--kd-rest", "spread", "--ignore-prefix-size", 1),
            ("--kd-teacher", f"{corpus.teacher}:{corpus.teacher.with_name('checkpoint_last.pt')}"),
        ]
    ):
        result = commands.train(
            corpus.data, tmp_path / str(number), *online(corpus, "--max-update", 3), *arguments
        )
        row = result.numbers("train")[-1]
        assert 0 < row["train_kd_kl"] < row["train_kd_ce"]


def test_hydra_train_gives_the_same_numbers(corpus, commands, tmp_path):
    plain = commands.train(
        corpus.data, tmp_path / "cli", *online(corpus, "--max-epoch", 2, "--kd-temperature", 2)
    )
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
    result = commands.run(
        "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "kd", cwd=tmp_path
    )
    assert result.curve() == plain.curve()
    refused = commands.run(
        *("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "kd", "+criterion.kd_weight=3"),
        cwd=tmp_path,
        check=False,
    )
    assert refused.status == 2
    assert "--kd-weight is 3.0" in refused.error


def test_selective_distillation_by_validation_bleu_survives_an_end(corpus, commands, tmp_path, store):
    """The teacher's BLEU is said to be low, so that the student passes it and the weight falls."""
    arguments = stored(
        *(store, "--kd-alpha-schedule", "adaptive", "--kd-alpha-interval", 1, "--kd-teacher-bleu", 1),
        *commands.bleu,
    )
    whole = commands.train(corpus.data, tmp_path / "whole", *arguments, "--max-epoch", 8)
    commands.train(corpus.data, tmp_path / "parts", *arguments, "--max-epoch", 7)
    last = commands.train(corpus.data, tmp_path / "parts", *arguments, "--max-epoch", 8)
    weights = [row["train_kd_weight"] for row in whole.numbers("train")]
    bleus = [row["valid_bleu"] for row in whole.numbers("valid")]
    expected = [0.9, *[round(0.9 * 0.5 ** max(bleu - 1 + 2, 0), 3) for bleu in bleus[:-1]]]
    assert weights == pytest.approx(expected, abs=2e-3)
    assert weights[-1] < 0.9
    assert last.numbers("train")[-1]["train_kd_weight"] == weights[-1]
    assert last.curve()[0] == whole.curve()[0][-len(last.curve()[0]) :]


def test_interval_of_three_epochs(corpus, commands, tmp_path, store):
    arguments = stored(store, "--kd-alpha-schedule", "threshold", "--kd-teacher-bleu", -0.5, *commands.bleu)
    result = commands.train(corpus.data, tmp_path, *arguments, "--max-epoch", 5)
    weights = [row["train_kd_weight"] for row in result.numbers("train")]
    bleu = result.numbers("valid")[2]["valid_bleu"]
    assert weights[:3] == [0.9] * 3
    assert weights[3:] == ([0.0] * 2 if bleu >= 0.5 else [0.9] * 2)


def test_checkpoint_with_foreign_code_is_refused_everywhere(corpus, commands, tmp_path):
    state = load(corpus.teacher)
    state["extra_state"]["surprise"] = os.system
    bad = tmp_path / "bad" / "checkpoint_last.pt"
    bad.parent.mkdir()
    torch.save(state, bad)
    shared = (corpus.data, "--user-dir", commands.plugin, "--cpu", "--path", bad)
    for command in (("generate",), ("validate", "--task", "translation", "--max-tokens", 1000)):
        with pytest.raises(LskdError, match=r"posix\.system"):
            commands.call(f"fairseq-{command[0]}", *shared, *command[1:])
    for save, teacher in ((bad.parent, ("--kd-weight", 0)), (tmp_path / "s", ("--kd-teacher", bad))):
        with pytest.raises(LskdError, match=r"posix\.system"):
            commands.train(corpus.data, save, "--criterion", "ls_kd", *teacher, "--max-epoch", 1)
