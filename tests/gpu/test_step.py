"""A training step on a card: its numbers, that it never waits, compiled, and distributed."""

import copy
from contextlib import contextmanager
from typing import get_args

import pytest
import timm
import torch
from torch.nn import functional as F

from lskd import FrozenTeacher, TopK, fused_distillation
from lskd.teachers.frozen import Normalisation
from lskd.terms import Rest
from timm_ls_kd.task import LsKdTask

pytestmark = pytest.mark.gpu
SAMPLES, CLASSES, TEMPERATURE, WEIGHT = 64, 1000, 2.0, 0.3
HALF = Normalisation((0.5,) * 3, (0.5,) * 3)


@contextmanager
def no_waiting(device):
    """Raise where the host waits for the card."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def plain(student, teacher, labels):
    """Return the loss and its gradient as the formula says, in float64."""
    student = student.detach().double().requires_grad_()
    log_q, p = (student / TEMPERATURE).log_softmax(-1), (teacher.double() / TEMPERATURE).softmax(-1)
    loss = WEIGHT * F.cross_entropy(student, labels) - (1 - WEIGHT) * (p * log_q).sum(-1).mean()
    loss.backward()
    return loss, student.grad


@pytest.mark.parametrize("kind", ["dense", *get_args(Rest)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_against_float64(device, dtype, kind):
    student, teacher = (4 * torch.randn(2, SAMPLES, CLASSES, device=device)).to(dtype)
    labels = torch.randint(CLASSES, (SAMPLES,), device=device)
    expected, gradient = plain(student, teacher, labels)
    answer = teacher
    if kind != "dense":
        values, ids = teacher.float().log_softmax(-1).sort(descending=True)
        answer = TopK(values, ids, kind)
    student.requires_grad_()
    with no_waiting(device):
        terms = fused_distillation(student, answer, labels, temperature=TEMPERATURE, hard_weight=WEIGHT)
        terms.loss.backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=0)
    rounding = max(2 * torch.finfo(dtype).eps, 1e-4)
    # "restrict" adds the gradients of teacher and labels, each rounded.
    least = 1e-7 if kind != "restrict" else 1e-3 * rounding
    torch.testing.assert_close(student.grad.double(), gradient, rtol=rounding, atol=least)


@pytest.fixture
def work(device):
    """Return a task whose teacher has another size and normalisation, images and labels."""
    student, teacher = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
    frozen = FrozenTeacher(teacher, Normalisation((0.4,) * 3, (0.2,) * 3, rgb=False), HALF, (48, 48))
    task = LsKdTask(student.to(device), frozen.to(device), device=device, hard_weight=WEIGHT)
    images = torch.randn(16, 3, 32, 32, device=device)
    return task.train(), images, torch.randint(10, (16,), device=device)


def gradients(task, images, labels):
    task.zero_grad()
    task(images, labels)["loss"].backward()
    return [parameter.grad.clone() for parameter in task.parameters()]


def test_a_step_never_waits(device, work):
    task, images, labels = work
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        with no_waiting(device if step else torch.device("cpu")):  # the first one may choose algorithms
            with torch.autocast(device.type, torch.bfloat16):
                loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert loss.isfinite()
    assert task.epoch_metrics()["agreement"] <= 1


def test_compiled_equals_eager(work):
    task, images, labels = work
    compiled = copy.deepcopy(task)
    compiled.compile()
    for one, other in zip(gradients(task, images, labels), gradients(compiled, images, labels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_one_rank_equals_none(device, work, tmp_path):
    task, images, labels = work
    distributed = copy.deepcopy(task)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/group",
        rank=0,
        world_size=1,
    )
    try:
        distributed.prepare_distributed([0])
        for one, other in zip(
            gradients(task, images, labels), gradients(distributed, images, labels), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert distributed.epoch_metrics() == pytest.approx(task.epoch_metrics(), rel=1e-4)
    finally:
        torch.distributed.destroy_process_group()
