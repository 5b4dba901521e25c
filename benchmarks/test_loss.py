"""The distillation loss, forward and backward, against the formula as people write it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lskd import DistillationLoss


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
