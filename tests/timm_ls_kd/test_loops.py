"""The loops on a linear model, against gradients and means computed apart."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from lskd import DivergedError
from timm_ls_kd.trainer.loop import train_one_epoch, validate

pytestmark = pytest.mark.unit
ARGS = Namespace(
    grad_accum_steps=1,
    channels_last=False,
    clip_grad=None,
    clip_mode="norm",
    log_interval=100,
    world_size=1,
    rank=0,
    distributed=False,
)


class Batches(list):
    device = torch.device("cpu")


class Task:
    def __init__(self, model):
        self.model, self.steps = model, []

    def __call__(self, images, targets):
        return {"loss": functional.cross_entropy(self.model(images), targets)}

    def get_trainable_module(self):
        return self.model

    def get_clip_parameters(self, exclude_head=False):
        return self.model.parameters()

    def no_sync(self):
        return nullcontext()

    def update_ema(self, step):
        self.steps.append(step)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def batches(sizes):
    generator = torch.Generator().manual_seed(5)
    return Batches(
        (torch.randn(n, 3, generator=generator), torch.randint(0, 4, (n,), generator=generator))
        for n in sizes
    )


def epoch(model, data, number=0, **changes):
    """Train an epoch without moving; return the gradient of each step, the metrics and the steps' numbers."""
    gradients = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.weight.grad.clone()))
    task = Task(model)
    args = Namespace(**{**vars(ARGS), **changes})
    metrics = train_one_epoch(number, task, data, optimizer, args, autocast=nullcontext)
    return gradients, metrics, task.steps


def gradient(model, data):
    images, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    return torch.autograd.grad(functional.cross_entropy(model(images), targets), model.weight)[0]


def test_steps_are_means_over_their_batches(model):
    """Seven batches in steps of three: the last step has one batch, and its mean, not a third of it."""
    data = batches([8] * 7)
    gradients, _, steps = epoch(model, data, number=2, grad_accum_steps=3)
    assert steps == [7, 8, 9]
    for found, start in zip(gradients, (0, 3, 6), strict=True):
        torch.testing.assert_close(found, gradient(model, data[start : start + 3]))


def test_clipping_acts_on_the_whole_step(model):
    data = batches([8] * 4)
    gradients, _, _ = epoch(model, data, grad_accum_steps=2, clip_grad=0.01)
    for found in gradients:
        assert float(found.norm()) < 0.0101
    assert len(gradients) == 2


def test_loss_is_the_mean_over_samples(model):
    data = batches([8, 8, 2])
    _, metrics, _ = epoch(model, data)
    images, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert metrics["loss"] == pytest.approx(functional.cross_entropy(model(images), targets).item(), rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_run(model):
    model.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"epoch 3: the training loss is nan"):
        epoch(model, batches([4]), number=3)


@pytest.mark.parametrize("bias", ["nan", "-inf"])  # -inf leaves the loss finite
def test_logits_that_are_no_numbers_are_no_validation(model, bias):
    model.bias.data[3] = float(bias)
    data = Batches((images, targets % 3) for images, targets in batches([8, 8]))
    with pytest.raises(DivergedError, match=f"epoch 5: the sum of the validation logits is {bias}"):
        validate(model, data, ARGS, nullcontext, epoch=5)


def test_validation_counts_every_sample_once(model):
    data = batches([8, 8, 3])
    model.train()
    metrics, _ = validate(model, data, ARGS, nullcontext)
    images, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    logits = model(images)
    assert metrics["loss"] == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert metrics["top1"] == pytest.approx(100 * float((logits.argmax(-1) == targets).float().mean()))
    assert metrics["top5"] == pytest.approx(100)
    assert not model.training


@pytest.mark.parametrize("guess", [1, None])
def test_a_model_at_chance_is_named(guess):
    """Always the commonest class, of 75 % of the images: no better than a guess, though above 1 in 4."""
    targets = torch.tensor([1, 1, 1, 0] * 16)
    answers = functional.one_hot(targets if guess is None else torch.full_like(targets, guess), 4).float()
    _, at_chance = validate(nn.Identity(), Batches([(answers, targets)]), ARGS, nullcontext)
    assert at_chance == ("75.0 % of 64 validation images (chance 75.0 %)" if guess else "")


def test_a_device_without_float64(model, without_float64):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected, _ = validate(model, batches([2, 3]), ARGS, nullcontext)
    with without_float64():
        train_one_epoch(0, Task(model), batches([2, 3]), optimizer, ARGS, autocast=nullcontext)
        found, _ = validate(model, batches([2, 3]), ARGS, nullcontext)
    assert found == pytest.approx(expected, rel=1e-6)
