"""`--train-only` and `--train-statistics`: what moves in a training run, and what does not."""

import pytest
import timm
import torch

from timm_ls_kd.evaluation import collect_logits
from timm_ls_kd.models import load_weights

pytestmark = pytest.mark.integration


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    # timm's frozen BatchNorm does not count batches.
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.fixture
def fine_tuned(train, teacher, runs):
    def run(name, *words):
        arguments = ("--epochs", 1, "--initial-checkpoint", teacher, *words)
        result = train(name, *arguments)
        assert (result.status, result.err) == (0, "")
        return runs / name

    return run


@pytest.mark.parametrize("distil", [False, True])
def test_only_the_classifier_and_one_layers_statistics_move(
    fine_tuned, weights, teacher_run, digits, kd, distil
):
    words = ("--train-only", "fc", "--train-statistics", "layer4.0.bn2")
    folder = fine_tuned("tuned", *words, *(kd if distil else ()))
    before, after = weights(teacher_run), weights(folder)
    statistics = {f"layer4.0.bn2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved(before, after) == {"fc.weight", "fc.bias"} | statistics
    # The file is a plain network's: it can be evaluated, trained on and taught with.
    load_weights(timm.create_model("test_resnet", num_classes=4), "model", str(folder / "last.pth.tar"))
    found = collect_logits(folder, checkpoint="last.pth.tar", data_dir=digits)
    assert (found.logits.argmax(-1) == found.labels).float().mean() > 0.5


def test_without_statistics_every_batchnorm_stands_still(fine_tuned, weights, teacher_run):
    folder = fine_tuned("still", "--train-only", "fc")
    assert moved(weights(teacher_run), weights(folder)) == {"fc.weight", "fc.bias"}


def test_a_run_goes_on(train, runs, weights, teacher):
    words = ("--train-only", "fc", "--train-statistics", "layer4.0.bn2", "--initial-checkpoint", teacher)
    whole = train("whole", *words, "--epochs", 2)
    train("parts", *words, "--epochs", 1)
    again = train("parts", *words, "--epochs", 2, "--resume", runs / "parts" / "last.pth.tar")
    assert (whole.status, again.status) == (0, 0)
    files = [weights(runs / name) for name in ("whole", "parts")]
    assert not moved(*files)
