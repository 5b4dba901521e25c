"""The fused loss is the plain one: same numbers, same gradient, less time and memory."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lskd import (
    LossComponents,
    TopK,
    _compiled,
    _fused_chunks,
    distillation_terms,
    fused_distillation,
    smooth_targets,
)

pytestmark = pytest.mark.unit

SHAPE = (7, 5, 23)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four samples a chunk, so that 35 samples fill eight and a part of one."""
    monkeypatch.setitem(_fused_chunks._CHUNK_ELEMENTS, "cpu", 4 * SHAPE[-1])


def inputs(kind, dtype=torch.float32, spread=2.0):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = (draw(*SHAPE) * spread).to(dtype)
    dense = (draw(*SHAPE) * spread).to(dtype)
    labels = torch.randint(SHAPE[-1], SHAPE[:-1], generator=generator)
    mask = torch.rand(SHAPE[:-1], generator=generator) < 0.7
    if kind == "dense":
        return student, dense, labels, mask
    values, ids = dense.log_softmax(-1).topk(SHAPE[-1] if kind == "all" else 4, -1)
    rest = "renormalise" if kind == "all" else kind
    return student, TopK(values, ids, rest), labels, mask


def plain_terms(
    student,
    teacher,
    labels,
    mask,
    temperature=1.0,
    temperature_squared=False,
    hard_weight=0.0,
    alpha=0.0,
    convention="paper",
):
    """Return the parts of the loss by autograd's own means."""
    kept = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask
    rows, classes = student[kept], student.shape[-1]
    if isinstance(teacher, TopK):
        given = TopK(teacher.values[kept], teacher.ids[kept], teacher.rest)
        best = given.ids.gather(-1, given.values.argmax(-1, keepdim=True)).squeeze(-1)
    else:
        given, best = teacher[kept], teacher[kept].argmax(-1)
    soft = distillation_terms(rows, given, temperature)
    hard, loss = torch.tensor(math.nan), torch.zeros(())
    if labels is not None:
        targets = labels[kept]
        if not targets.is_floating_point():
            targets = smooth_targets(targets, classes, alpha, convention, rows.dtype)
        logs = rows.log_softmax(-1)
        hard = -torch.where(targets == 0, 0.0, targets * logs).sum(-1).mean()
    if hard_weight < 1:
        factor = temperature**2 if temperature_squared else 1
        loss = loss + (1 - hard_weight) * factor * soft.cross_entropy.mean()
    if hard_weight > 0:
        loss = loss + hard_weight * hard
    agreement = (rows.argmax(-1) == best).double().mean()
    return LossComponents(loss, *(term.mean() for term in soft), hard, agreement)


def both(student, teacher, labels, mask, dtype=torch.float64, **arguments):
    """Return terms and gradient of the fused loss, and of the plain one computed in ``dtype``."""
    ours = student.clone().requires_grad_()
    fused = fused_distillation(ours, teacher, labels, mask, **arguments)
    (fused.loss * 3).backward()
    theirs = student.to(dtype).requires_grad_()
    wide = (
        TopK(teacher.values.to(dtype), teacher.ids, teacher.rest)
        if isinstance(teacher, TopK)
        else teacher.to(dtype)
    )
    plain = plain_terms(theirs, wide, labels, mask, **arguments)
    (plain.loss * 3).backward()
    return fused, ours.grad, plain, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad


@pytest.fixture(params=["compiled", "processor", "elsewhere"])
def device_path(request, monkeypatch, compiled_loss):
    """Compiled code, the passes of a processor, and on the CPU those of a GPU, which ask nothing of it."""
    monkeypatch.setattr(_compiled, "function", lambda: compiled_loss if request.param == "compiled" else None)
    if request.param == "elsewhere":
        monkeypatch.setattr(_fused_chunks, "on_processor", lambda tensor: False)
        monkeypatch.setattr(_fused_chunks, "_CHUNK_ELEMENTS_ELSEWHERE", 4 * SHAPE[-1])


SETTINGS = [
    {"temperature": t, "temperature_squared": squared, "hard_weight": w, "alpha": a, "convention": c}
    for t, squared, w, (a, c) in itertools.product(
        [1.0, 0.6, 4.0], [False, True], [0.0, 0.3, 1.0], [(0.0, "paper"), (0.1, "paper"), (0.2, "uniform")]
    )
    if not (t == 1.0 and squared)
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread", "all"])
def test_same_numbers_and_gradient_as_the_plain_loss(kind, masked, device_path):
    student, teacher, labels, mask = inputs(kind)
    for arguments in SETTINGS:
        fused, gradient, plain, expected = both(
            student, teacher, labels, mask if masked else None, **arguments
        )
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
        for name in plain._fields:
            ours, theirs = getattr(fused, name).double(), getattr(plain, name).double()
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7, msg=f"{name} with {arguments}")


@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype, device_path):
    student, teacher, labels, mask = inputs(kind, dtype)
    arguments = {"hard_weight": 0.4, "alpha": 0.1, "temperature": 2.0}
    fused, gradient, plain, expected = both(student, teacher, labels, mask, torch.float64, **arguments)
    assert fused.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(fused.loss.double(), plain.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.kl.double(), plain.kl.double(), rtol=1e-5, atol=1e-6)
    # Rounded once, at the end; the factor 3 of the outer loss rounds it a second time.
    torch.testing.assert_close(gradient.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_label_probabilities_as_of_mixup(device_path):
    student, teacher, _, mask = inputs("dense")
    labels = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for t in (1.0, 3.0):
        fused, gradient, plain, expected = both(
            student, teacher, labels, mask, hard_weight=0.5, temperature=t
        )
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(fused.hard_cross_entropy.double(), plain.hard_cross_entropy.double())
        assert math.isnan(fused.nll)


def test_sum_is_mean_times_samples_and_nll_is_unsmoothed(device_path):
    student, teacher, labels, mask = inputs("dense")
    mean = fused_distillation(student, teacher, labels, mask, hard_weight=0.5, alpha=0.1)
    total = fused_distillation(student, teacher, labels, mask, hard_weight=0.5, alpha=0.1, reduction="sum")
    for one, other in zip(mean, total, strict=True):
        torch.testing.assert_close(one * mask.sum(), other)
    expected = torch.nn.functional.cross_entropy(student[mask], labels[mask], reduction="sum")
    torch.testing.assert_close(total.nll, expected)
    assert float(total.hard_cross_entropy) > float(total.nll)


@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread"])
def test_padding_may_hold_anything(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    clean = both(student, teacher, labels, mask, hard_weight=0.5)
    student[~mask] = math.nan
    labels[~mask] = -100
    if isinstance(teacher, TopK):
        teacher.values[~mask] = math.nan
        teacher.ids[~mask] = 10**6
    else:
        teacher[~mask] = math.inf
    dirty = both(student, teacher, labels, mask, hard_weight=0.5)
    torch.testing.assert_close(dirty[0], clean[0])
    torch.testing.assert_close(dirty[1], clean[1])
    assert not dirty[1][~mask].any()


@pytest.mark.parametrize("kind", ["dense", "spread"])
def test_masked_classes_of_minus_infinity(kind, device_path):
    student, teacher, labels, _ = inputs("dense")
    student[:, :, 20:] = -math.inf
    teacher[:, :, 20:] = -math.inf
    labels.clamp_(max=19)
    if kind == "spread":
        values, ids = teacher.log_softmax(-1).topk(20, -1)
        teacher = TopK(values, ids, "renormalise")
    fused, gradient, plain, expected = both(student, teacher, labels, None, hard_weight=0.5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused.loss.double(), plain.loss.double())
    assert math.isfinite(fused.kl)


def test_a_student_that_is_its_teacher(device_path):
    student, *_ = inputs("dense", spread=30.0)
    ours = student.clone().requires_grad_()
    fused = fused_distillation(ours, student)
    fused.loss.backward()
    assert float(fused.kl) == 0
    assert float(fused.agreement) == 1
    assert float(ours.grad.abs().max()) < 1e-8  # of 1/35: what a fused multiplication rounds


def test_large_logits_do_not_overflow(device_path):
    student, teacher, labels, _ = inputs("dense", spread=3e4)
    fused, gradient, plain, expected = both(student, teacher, labels, None, hard_weight=0.5)
    torch.testing.assert_close(fused.loss.double(), plain.loss.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_nan_is_not_hidden(device_path):
    student, teacher, labels, _ = inputs("dense")
    student[0, 0, 0] = math.nan
    assert math.isnan(fused_distillation(student, teacher, labels, hard_weight=0.5).loss)


def test_no_sample_and_no_gradient(device_path):
    student, teacher, labels, mask = inputs("dense")
    student.requires_grad_()
    fused = fused_distillation(student, teacher, labels, torch.zeros_like(mask), hard_weight=0.5)
    fused.loss.backward()
    assert float(fused.loss.detach()) == 0
    assert not student.grad.any()
    with torch.no_grad():
        assert fused_distillation(student, teacher).loss.grad_fn is None
    assert math.isnan(fused_distillation(student, teacher).nll)


def test_a_teacher_under_inference_mode(device_path):
    student, teacher, *_ = inputs("dense")
    with torch.inference_mode():
        spoken = teacher * 1
    student.requires_grad_()
    fused_distillation(student, spoken).loss.backward()
    assert student.grad.abs().sum() > 0


def test_double_backward_is_refused(device_path):
    student, teacher, *_ = inputs("dense")
    student.requires_grad_()
    loss = fused_distillation(student, teacher).loss
    with pytest.raises(RuntimeError, match=r"no second derivative; .* lskd\.distillation_terms"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("kind", ["dense", "spread"])
def test_a_retained_graph_gives_its_gradient_again_and_another_does_not(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    student.requires_grad_()
    loss = fused_distillation(student, teacher, labels, mask, hard_weight=0.3).loss
    (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(1.0))
    torch.testing.assert_close(first, 3 * second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_a_teacher_less_its_largest_logit_is_the_same_bit_for_bit_in_the_gradient(device_path):
    """What lets a student of a stored teacher be equal to one of an online teacher."""
    student, teacher, labels, _ = inputs("dense")
    for t in (1.0, 3.0):
        found = []
        for given in (teacher, teacher - teacher.amax(-1, keepdim=True), teacher.clone()):
            ours = student.clone().requires_grad_()
            terms = fused_distillation(ours, given, labels, hard_weight=0.2, temperature=t)
            terms.loss.backward()
            found.append((ours.grad, terms))
        for gradient, terms in found[1:]:
            assert torch.equal(gradient, found[0][0])
            torch.testing.assert_close(terms, found[0][1], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[2][0], found[0][0])
        assert all(torch.equal(one, other) for one, other in zip(found[2][1], found[0][1], strict=True))


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
def test_a_constant_on_a_row_costs_no_digits(offset, device_path):
    """Logits far from 0 are shifted first; the reference sees the float32 numbers too."""
    student, teacher, *_ = inputs("dense")
    fused, gradient, plain, expected = both(student + offset, teacher - offset, None, None)
    torch.testing.assert_close(fused.kl.double(), plain.kl, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(fused.teacher_entropy.double(), plain.teacher_entropy, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_under_compile_it_is_one_operator_with_the_same_numbers(device_path):
    student, teacher, labels, mask = inputs("dense")
    torch.compiler.reset()

    def step(logits):
        terms = fused_distillation(logits * 2, teacher, labels, mask, hard_weight=0.3, alpha=0.1)
        return terms.loss * 3, terms.kl

    plain, compiled = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected, found = step(plain), torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    expected[0].backward()
    found[0].backward()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-6, atol=0)


def test_accumulated_gradients_do_not_share_memory(device_path):
    student, teacher, *_ = inputs("dense")
    student.requires_grad_()
    fused_distillation(student, teacher).loss.backward()
    once = student.grad.clone()
    fused_distillation(student, teacher).loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"hard_weight": 1.1}, "hard_weight is 1.1"),
        ({"hard_weight": 0.5, "labels": None}, "no labels were given"),
        ({"alpha": 1.5}, "alpha"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"mask": torch.ones(7, 5)}, "mask has dtype"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "shape of mask"),
        ({"labels": torch.zeros(7, dtype=torch.long)}, "shape of labels"),
        ({"labels": torch.full((7, 5), 23)}, "labels"),
        ({"labels": torch.zeros(7, 5)}, "label probabilities have shape"),
        ({"teacher": torch.zeros(7, 5, 22)}, "teacher logits have shape"),
        (
            {"teacher": TopK(torch.zeros(7, 5, 24), torch.zeros(7, 5, 24, dtype=torch.long))},
            "1 to all classes",
        ),
        ({"teacher": TopK(torch.zeros(7, 5, 2), torch.full((7, 5, 2), 23))}, "top-K ids"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    student, teacher, labels, mask = inputs("dense")
    arguments = {"student_logits": student, "teacher": teacher, "labels": labels, "mask": mask} | change
    with pytest.raises(ValueError, match=message):
        fused_distillation(**arguments)


def test_vocabulary_sized_input_with_the_chunks_of_every_day(monkeypatch):
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(96, 10_000, generator=generator)
    teacher = torch.randn(96, 10_000, generator=generator)
    fused, gradient, plain, expected = both(student, teacher, None, None)
    np.testing.assert_allclose(float(fused.loss), float(plain.loss), rtol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-9)


def test_gradient_is_the_only_tensor_of_its_size():
    """In a process of its own: its peak beside that of the naive formula, above what the inputs need."""
    code = """
import sys, torch
from torch.nn import functional as F
from lskd import fused_distillation
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
student = torch.randn(2048, 10_000).requires_grad_()
teacher = torch.randn(2048, 10_000)
small = torch.randn(2, 10).requires_grad_()
fused_distillation(small, torch.randn(2, 10)).loss.backward()
before = memory("VmRSS")
if sys.argv[1] == "fused":
    fused_distillation(student, teacher).loss.backward()
else:
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    F.kl_div(*logs, log_target=True, reduction="batchmean").backward()
print(memory("VmHWM") - before)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, which], capture_output=True, text=True, check=True
            ).stdout
        )
        for which in ("fused", "naive")
    ]
    print(f"\npeak above the inputs: {peaks[0] / 1024:.0f} against {peaks[1] / 1024:.0f} MiB")
    assert peaks[0] <= 0.40 * peaks[1]
