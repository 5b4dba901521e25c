"""What a step does on a GPU as far as it shows without one: devices, dtypes, and no value read by the host.

On tensors without values, called "cuda" or of torch's device "meta", every `.item()`, `bool(tensor)` or copy
to the host raises an error.
"""

from contextlib import nullcontext
from typing import get_args

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lskd import FrozenTeacher, TopK, fused_distillation
from lskd.teachers.frozen import Normalisation
from lskd.terms import Rest
from timm_ls_kd.task import LsKdTask

pytestmark = pytest.mark.unit
SAMPLES, CLASSES = 8, 100


def arguments(device, dtype, kind, labels):
    """Return student, teacher, labels and mask."""
    teacher = torch.zeros(SAMPLES, CLASSES, device=device, dtype=dtype)
    if kind != "dense":
        ids = torch.zeros(SAMPLES, 10, device=device, dtype=torch.int64)
        teacher = TopK(teacher.log_softmax(-1)[:, :10], ids, kind)
    hard = {
        "none": None,
        "ids": torch.zeros(SAMPLES, device=device, dtype=torch.int64),
        "probabilities": torch.zeros(SAMPLES, CLASSES, device=device),
    }[labels]
    student = torch.zeros(SAMPLES, CLASSES, device=device, dtype=dtype, requires_grad=True)
    return student, teacher, hard, torch.ones(SAMPLES, device=device, dtype=torch.bool)


@pytest.mark.parametrize("labels", ["none", "ids", "probabilities"])
@pytest.mark.parametrize("kind", ["dense", *get_args(Rest)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_stays_on_the_card(dtype, kind, labels):
    with FakeTensorMode():
        student, teacher, hard, mask = arguments("cuda", dtype, kind, labels)
        weight = 0.0 if hard is None else 0.3
        terms = fused_distillation(student, teacher, hard, mask, hard_weight=weight, temperature=2.0)
        assert {(value.device.type, value.dtype) for value in terms} == {("cuda", torch.float32)}
        if kind == "restrict":  # made of many functions of torch's own
            return
        # Autograd's engine would look for the card; this is what it calls.
        with torch.no_grad():
            gradient, *_ = terms.loss.grad_fn.apply(torch.ones((), device="cuda"), None)
        assert (gradient.device.type, gradient.dtype, gradient.shape) == ("cuda", dtype, student.shape)


def test_a_host_read_would_show():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.zeros(3, device="cuda").sum())


def test_a_step_of_timm_reads_nothing(monkeypatch):
    """Teacher with another normalisation and size, student, loss, both backward passes, optimiser, means."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for "meta"
    with torch.device("meta"):
        models = [timm.create_model("test_resnet", num_classes=CLASSES) for _ in range(2)]
    batches = Normalisation((0.5,) * 3, (0.5,) * 3)
    teacher = FrozenTeacher(models[0], Normalisation((0.4,) * 3, (0.2,) * 3, rgb=False), batches, (48, 48))
    task = LsKdTask(models[1], teacher, device=torch.device("meta"), hard_weight=0.5, alpha=0.1).train()
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)
    images = torch.empty(SAMPLES, 3, 32, 32, device="meta")
    for _ in range(2):
        parts = task(images, torch.empty(SAMPLES, dtype=torch.int64, device="meta"))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(value.device.type == "meta" for value in parts.values())
