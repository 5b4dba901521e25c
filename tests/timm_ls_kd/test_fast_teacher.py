"""A fast teacher in timm's trainers: models of timm folded, the line before training, what is refused."""

import copy
import hashlib
import re

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "share"),
    [("resnet18", 1), ("test_efficientnet", 1), ("tf_mobilenetv3_small_minimal_100", 1), ("test_vit", None)],
)
def test_models_of_timm_are_folded(name, share):
    from lskd.teachers.fast import fold_batch_norm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    model.eval()
    folded = copy.deepcopy(model)
    folding = fold_batch_norm(folded)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
    if share is None:
        assert folding == "no batch norm to fold"
    else:
        assert re.fullmatch(r"(\d+) of \1 batch norms folded", folding)
    assert not any(isinstance(module, nn.BatchNorm2d | BatchNormAct2d) for module in folded.modules())


MODES = r"(float32|bfloat16|convolutions in int8)"


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "auto"])
def test_training_with_a_fast_teacher(train, kd, teacher, summary, tmp_path, mode):
    checksum = hashlib.sha256(teacher.read_bytes()).hexdigest()
    for name, flags in (("exact", []), ("fast", ["--kd-teacher-fast", mode])):
        result = train(name, *kd, *flags, "--epochs", 1, "--lr", 0)  # one student for both
        assert result.status == 0, result.err
    line = next(line for line in result.out.splitlines() if ", fast: " in line)
    assert re.search(
        rf"fast: {MODES}, 15 of 15 batch norms folded, channels-last: [\d.]+ times as fast .*"
        r"KL\(exact \|\| fast\) [\d.e-]+ nats on the mean of 72 images, [\d.e-]+ at most, same class for",
        line,
    )
    exact, fast = (summary(tmp_path / "runs" / name)[0] for name in ("exact", "fast"))
    for column in ("train_ce", "train_kl", "train_teacher_entropy"):
        assert fast[column] == pytest.approx(exact[column], rel=0.1, abs=0.05), column
    if mode == "bfloat16":  # it was another teacher; in float32 the mean may be the same number
        assert exact["train_ce"] != fast["train_ce"]
    assert hashlib.sha256(teacher.read_bytes()).hexdigest() == checksum


def test_resumed_run_equals_an_unbroken_one(train, kd, same_weights, runs):
    flags = [*kd, "--kd-teacher-fast", "float32", "--sched", "none"]
    assert train("whole", *flags, "--epochs", 2).status == 0
    assert train("broken", *flags, "--epochs", 1).status == 0
    last = runs / "broken" / "last.pth.tar"
    assert train("broken", *flags, "--epochs", 2, "--resume", last).status == 0
    assert same_weights("whole", "broken")


def test_measured_on_training_images_with_or_without_validation_images(train, kd):
    plain = ["--kd-teacher-fast", "float32", "--epochs", 1]
    with_, without = (
        train(f"run {len(split)}", *kd, *plain, *split)
        for split in ([], ["--val-split", "", "--eval-metric", "loss"])
    )
    assert without.status == 0, without.err
    assert "on the mean of 72 images" in without.out
    # The run's own draws are untouched: both train on the same images.
    lines = [[x for x in run.out.splitlines() if "train loss" in x] for run in (with_, without)]
    losses = [line[0].split("train loss ")[1].split(",")[0] for line in lines]
    assert losses[0] == losses[1]


def test_without_bfloat16_it_is_float32_and_said(train, kd, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    result = train("run", *kd, "--kd-teacher-fast", "bfloat16", "--epochs", 1)
    assert result.status == 0, result.err
    assert "fast: float32," in result.out
    assert "no bfloat16 on this CPU" in result.out
