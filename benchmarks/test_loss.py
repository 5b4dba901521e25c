"""The distillation loss, forward and backward, against the formula as people write it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lskd import DistillationLoss, TopK, fused_distillation


def _naive(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


@pytest.mark.parametrize(("samples", "classes", "rounds"), [(256, 1000, 41), (4096, 10000, 7)])
def test_loss_against_kl_div(ratio: Callable[..., None], samples: int, classes: int, rounds: int) -> None:
    student = torch.randn(samples, classes, requires_grad=True)
    teacher = torch.randn(samples, classes)
    loss = DistillationLoss()

    def ours() -> None:
        student.grad = None
        loss(student, teacher).backward()

    def peer() -> None:
        student.grad = None
        _naive(student, teacher).backward()

    ratio(
        f"loss {samples} x {classes}, forward + backward / F.kl_div(log_softmax, log_softmax)",
        ours,
        peer,
        rounds=rounds,
    )


def test_fused_loss_against_kl_div(ratio: Callable[..., None]) -> None:
    student = torch.randn(4096, 10000, requires_grad=True)
    teacher = torch.randn(4096, 10000)

    def ours() -> None:
        student.grad = None
        fused_distillation(student, teacher).loss.backward()

    def peer() -> None:
        student.grad = None
        _naive(student, teacher).backward()

    ratio("fused loss 4096 x 10000 / F.kl_div(log_softmax, log_softmax)", ours, peer, bar=0.30, rounds=9)


def test_fused_top_8_against_cross_entropy(ratio: Callable[..., None]) -> None:
    student = torch.randn(4096, 10000, requires_grad=True)
    values, ids = torch.randn(4096, 10000).log_softmax(-1).topk(8)
    labels = torch.randint(10000, (4096,))

    def ours() -> None:
        student.grad = None
        fused_distillation(student, TopK(values, ids), labels, hard_weight=0.1, alpha=0.1).loss.backward()

    def peer() -> None:
        student.grad = None
        F.cross_entropy(student, labels, label_smoothing=0.1).backward()

    ratio("fused top-8 loss with hard labels 4096 x 10000 / F.cross_entropy", ours, peer, bar=1.0, rounds=9)
