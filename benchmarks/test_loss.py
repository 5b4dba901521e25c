"""The distillation loss, forward and backward, against the formula as people write it."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lskd import DistillationLoss, TopK, fused_distillation

sizes = pytest.mark.parametrize(("samples", "classes", "rounds"), [(256, 1000, 101), (4096, 10000, 5)])


def _naive(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def _step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Callable[[], None]:
    def run() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return run


LOSSES = {
    "fused_distillation": lambda student, teacher: fused_distillation(student, teacher).loss,
    "DistillationLoss": DistillationLoss(),  # what the plugins call
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("samples", "classes", "rounds", "bar"), [(256, 1000, 101, 0.45), (4096, 10000, 9, 0.25)]
)
def test_loss_against_kl_div(ratio, device, name, samples, classes, rounds, bar):
    student = torch.randn(samples, classes, device=device, requires_grad=True)
    teacher = torch.randn(samples, classes, device=device)
    ratio(
        f"{name} {samples} x {classes}, forward + backward / F.kl_div(log_softmax, log_softmax)",
        _step(LOSSES[name], student, teacher),
        _step(_naive, student, teacher),
        bar=bar,
        rounds=rounds,
    )


@sizes
def test_passes_over_chunks_against_kl_div(ratio, samples, classes, rounds):
    """What a machine without compiled code has."""
    student, teacher = torch.randn(samples, classes, requires_grad=True), torch.randn(samples, classes)
    ratio(
        f"fused_distillation {samples} x {classes}, impl='chunks' / F.kl_div(log_softmax, log_softmax)",
        _step(lambda x, z: fused_distillation(x, z, impl="chunks").loss, student, teacher),
        _step(_naive, student, teacher),
        rounds=rounds,
    )


class _Logits(nn.Module):
    """A model whose weights are its answer."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.num_classes, self.in_chans = logits.shape[-1], 3
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@sizes
def test_loss_against_the_task_of_timm(ratio, samples, classes, rounds):
    """Half soft, half hard, on the same logits; timm's task also passes an image to its two models."""
    task_module = pytest.importorskip("timm.task", reason="this timm has no tasks")
    student, teacher = _Logits(torch.randn(samples, classes)), _Logits(torch.randn(samples, classes))
    labels, images = torch.randint(classes, (samples,)), torch.zeros(1, 3, 1, 1)
    weights = {"task_loss_weight": 0.5, "temperature": 4.0, "verbose": False}
    task = task_module.LogitDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss(), **weights)
    loss = DistillationLoss(4.0, True, 0.5)

    def peer() -> None:
        student.logits.grad = None
        task(images, labels)["loss"].backward()

    ratio(
        f"DistillationLoss {samples} x {classes}, T = 4, with labels / timm's LogitDistillationTask",
        _step(lambda logits, given: loss(logits, given, labels), student.logits, teacher.logits.detach()),
        peer,
        rounds=rounds,
    )


@sizes
def test_loss_against_torchdistill(ratio, samples, classes, rounds):
    """Half soft, half hard, T^2 on the soft half; torchdistill leaves T^2 out where alpha is 0 or None."""
    module = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")
    student = torch.randn(samples, classes, requires_grad=True)
    teacher, labels = torch.randn(samples, classes), torch.randint(classes, (samples,))
    loss = DistillationLoss(4.0, True, 0.5)
    kd = module.KDLoss("fc", "output", "fc", "output", temperature=4.0, alpha=0.5)

    def peer(logits: Tensor, given: Tensor) -> Tensor:
        value: Tensor = kd({"fc": {"output": logits}}, {"fc": {"output": given}}, labels)
        return value

    def ours(logits: Tensor, given: Tensor) -> Tensor:
        return loss(logits, given, labels)

    # The peer has the divergence alone, without the teacher's entropy.
    constant = 0.5 * 16 * loss.components(student, teacher, labels).teacher_entropy
    losses = [ours(student, teacher), peer(student, teacher)]
    torch.testing.assert_close(losses[0] - constant, losses[1], rtol=1e-4, atol=1e-4)
    # Of a sample: the mean's gradients are too small to compare.
    gradients = [torch.autograd.grad(value, student)[0] * samples for value in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    ratio(
        f"DistillationLoss {samples} x {classes}, T = 4, with labels / torchdistill's KDLoss",
        _step(ours, student, teacher),
        _step(peer, student, teacher),
        rounds=rounds,
    )


_PEAK = """
import sys, torch
from torch.nn import functional as F
from lskd import DistillationLoss
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
loss = DistillationLoss()
student = torch.randn(4096, 10_000).requires_grad_()
teacher = torch.randn(4096, 10_000)
def naive(student, teacher):
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(*logs, log_target=True, reduction="batchmean")
run = loss if sys.argv[1] == "ours" else naive
run(torch.randn(2, 10).requires_grad_(), torch.randn(2, 10)).backward()
before = memory("VmRSS")
run(student, teacher).backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_against_kl_div(quantity):
    """What a process needs at most above its inputs, each in a process of its own."""

    def peak(which: str) -> float:
        command = [sys.executable, "-c", _PEAK, which]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    quantity(
        "peak memory of DistillationLoss 4096 x 10000 beyond the inputs / F.kl_div",
        [peak("ours") / peak("naive") for _ in range(3)],
        bar=0.40,
    )


def test_fused_top_8_against_cross_entropy(ratio):
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
