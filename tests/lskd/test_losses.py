import copy
import math
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch.nn import functional as F

from draws import PROPERTY, draw, top_k
from lskd import DistillationLoss, TopK, distillation_terms
from lskd.kernel import native
from lskd.terms import Rest

pytestmark = pytest.mark.unit


def draw_labels(*shape, num_classes, seed=0):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


# The loss


def test_paper_mode_is_soft_labels_alone():
    student, teacher = draw(6, 5), draw(6, 5, seed=1)
    loss = DistillationLoss()
    torch.testing.assert_close(loss(student, teacher), F.cross_entropy(student, teacher.softmax(-1)))
    labels = draw_labels(6, num_classes=5)
    assert torch.equal(loss(student, teacher, labels), loss(student, teacher))


@PROPERTY
@given(
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    squared=st.booleans(),
    hard_weight=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.sampled_from([0.0, 0.1, 0.6]),
    convention=st.sampled_from(["paper", "uniform"]),
    num_classes=st.integers(2, 8),
    probabilities=st.booleans(),
    masked=st.booleans(),
    impl=st.sampled_from(["auto", "reference"]),
    seed=st.integers(0, 20),
)
def test_loss_is_the_weighted_sum(
    reference,
    temperature,
    squared,
    hard_weight,
    alpha,
    convention,
    num_classes,
    probabilities,
    masked,
    impl,
    seed,
):
    student = draw(3, 4, num_classes, seed=seed)
    teacher = draw(3, 4, num_classes, seed=seed + 1)
    ids = draw_labels(3, 4, num_classes=num_classes, seed=seed)
    labels = draw(3, 4, num_classes, seed=seed + 2).softmax(-1) if probabilities else ids.int()
    mask = draw(3, 4, seed=seed) > 0 if masked else None
    rows = labels.numpy() if probabilities else reference.targets(ids.numpy(), num_classes, alpha, convention)
    weights = np.ones((3, 4)) if mask is None else mask.numpy().astype(float)
    total = max(weights.sum(), 1)

    def mean(terms):
        return (terms * weights).sum() / total

    soft = [mean(term) for term in reference.terms(student.numpy(), teacher.numpy(), temperature)]
    hard = mean(-(rows * reference.log_probabilities(student.numpy())).sum(-1))
    scale = temperature**2 if squared else 1
    loss = DistillationLoss(temperature, squared, hard_weight, alpha, convention, impl)
    parts = loss.components(student, teacher, labels, mask)
    expected = {
        "loss": (1 - hard_weight) * scale * soft[0] + hard_weight * hard,
        "cross_entropy": soft[0],
        "kl": soft[1],
        "teacher_entropy": soft[2],
        "hard_cross_entropy": hard,
        "agreement": mean(student.numpy().argmax(-1) == teacher.numpy().argmax(-1)),
    }
    for name, value in expected.items():
        part = getattr(parts, name)
        assert part.shape == (), name
        assert part.item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert torch.equal(loss(student, teacher, labels, mask), parts.loss)


def test_only_the_loss_carries_a_graph():
    student = draw(4, 5).requires_grad_()
    for hard_weight in (0.0, 0.5):
        loss = DistillationLoss(hard_weight=hard_weight)
        parts = loss.components(student, draw(4, 5, seed=1), draw_labels(4, num_classes=5))
        assert [part.requires_grad for part in parts] == [True, *[False] * 6]
    assert not math.isnan(parts.hard_cross_entropy.item())
    assert DistillationLoss().components(student, student).hard_cross_entropy.isnan()


def test_agreement_of_a_top_k_teacher():
    student = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    teacher = TopK(
        torch.tensor([[1.0, 2], [2, 1], [1, 2], [2, 1]]), torch.tensor([[2, 0], [1, 0], [2, 1], [1, 0]])
    )
    assert DistillationLoss().components(student, teacher).agreement.item() == 0.5


def test_one_class_costs_nothing():
    parts = DistillationLoss(2.0, True, 0.5).components(draw(4, 1), draw(4, 1, seed=1), torch.zeros(4).long())
    assert [part.item() for part in parts] == [0, 0, 0, 0, 0, 0, 1]


# Against timm


class Logits(torch.nn.Module):
    """A model whose weights are its answer."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())
        self.num_classes, self.in_chans = logits.shape[-1], 3
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_distillation_task_of_timm(temperature, hard_weight):
    """Equal gradients; the values differ by the teacher's entropy, because timm's soft part is the KL."""
    task_module = pytest.importorskip("timm.task", reason="timm is not installed")
    student = Logits(draw(6, 10, dtype=torch.float32))
    teacher = Logits(draw(6, 10, seed=1, dtype=torch.float32))
    labels = draw_labels(6, num_classes=10)
    task = task_module.LogitDistillationTask(
        student,
        teacher,
        criterion=torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        task_loss_weight=hard_weight,
        temperature=temperature,
        verbose=False,
    )
    theirs = task(torch.zeros(6, 3, 2, 2), labels)["loss"]
    theirs.backward()
    logits = student.logits.detach().requires_grad_()
    loss = DistillationLoss(temperature, True, hard_weight, alpha=0.1, convention="uniform")
    parts = loss.components(logits, teacher.logits, labels)
    parts.loss.backward()
    torch.testing.assert_close(logits.grad, student.logits.grad)
    constant = (1 - hard_weight) * temperature**2 * parts.teacher_entropy
    torch.testing.assert_close(parts.loss - constant, theirs)


# Gradients


@pytest.mark.parametrize("rest", [None, *get_args(Rest)])
def test_teacher_and_labels_receive_no_gradient(rest):
    student, teacher = draw(3, 6).requires_grad_(), draw(3, 6, seed=1).requires_grad_()
    given_teacher = teacher if rest is None else top_k(teacher, 3, rest)
    mask = torch.tensor([True, True, False])
    loss = DistillationLoss(2.0, hard_weight=0.5)
    loss(student, given_teacher, torch.tensor([0, 1, 2]), mask).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert not loss(student.detach(), given_teacher, torch.tensor([0, 1, 2]), mask).requires_grad
    assert not any(term.requires_grad for term in distillation_terms(student.detach(), given_teacher))
    rows = draw(3, 6).softmax(-1).requires_grad_()
    loss(student, given_teacher, rows).backward()
    assert rows.grad is None
    assert teacher.grad is None


@pytest.mark.parametrize("rest", [None, *get_args(Rest)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_of_both_terms_is_the_difference_of_probabilities(reference, rest, temperature):
    """Property 1 of the paper: cross-entropy and KL have equal gradients, (q - p) / T."""
    student, dense = draw(4, 6), draw(4, 6, seed=1)
    teacher = dense if rest is None else top_k(dense, 3, rest)
    if rest is None:
        p = special.softmax(dense.numpy() / temperature, axis=-1)
    else:
        p = reference.completed(
            teacher.values.numpy(), teacher.ids.numpy(), 6, "spread" if rest == "lump" else rest, temperature
        )
    q = special.softmax(student.numpy() / temperature, axis=-1)
    known = np.zeros(q.shape, bool)
    if rest in ("lump", "restrict"):
        np.put_along_axis(known, teacher.ids.numpy(), True, -1)
        others, rest_mass = np.where(known, 0, q), (p * ~known).sum(-1, keepdims=True)
        shares = others / others.sum(-1, keepdims=True)
        if rest == "lump":  # what is asked of the others together, they share as the student has it
            p = np.where(known, p, rest_mass * shares)
        else:
            q = np.where(known, q, 0) / np.where(known, q, 0).sum(-1, keepdims=True)
    expected = (q - p) / temperature
    for name in ("cross_entropy", "kl"):
        leaf = student.clone().requires_grad_()
        getattr(distillation_terms(leaf, teacher, temperature), name).sum().backward()
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-12, err_msg=name)


# What does not fit is refused


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"hard_weight": -0.1}, "hard_weight"),
        ({"hard_weight": 1.1}, "hard_weight"),
        ({"hard_weight": math.nan}, "hard_weight"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"convention": "torch"}, "convention"),
    ],
)
def test_settings_out_of_range(arguments, name):
    with pytest.raises(ValueError, match=name):
        DistillationLoss(**arguments)
    if name == "temperature":
        with pytest.raises(ValueError, match=name):
            distillation_terms(draw(2, 3), draw(2, 3), **arguments)


def test_settings_are_shown():
    assert repr(DistillationLoss(2.0, True, 0.3, 0.1, "uniform")) == (
        "DistillationLoss(temperature=2.0, temperature_squared=True, hard_weight=0.3, alpha=0.1, "
        "convention='uniform')"
    )
    assert not list(DistillationLoss().parameters())
    assert not DistillationLoss().state_dict()


def test_a_soft_part_of_weight_0_cannot_spoil_the_loss() -> None:
    student = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    loss = DistillationLoss(hard_weight=1.0)(student, torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert float(loss) == 0.0
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_module_is_copied_and_pickled():
    loss = DistillationLoss(2.0, True, 0.3, 0.1, "uniform")
    arguments = draw(3, 4), draw(3, 4, seed=1), torch.tensor([0, 1, 2])
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):  # noqa: S301 - our own bytes
        assert torch.equal(other(*arguments), loss(*arguments))


def test_what_is_not_asked_for_is_not_done_and_what_is_asked_for_is(monkeypatch):
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    expected = distillation_terms(student, teacher, 2.0).cross_entropy.mean()
    torch.testing.assert_close(DistillationLoss(temperature=2.0)(student, teacher), expected)
    monkeypatch.setattr(native, "function", lambda: None)
    with pytest.raises(RuntimeError, match="no compiled code"):
        DistillationLoss(impl="native")(student.float(), teacher.float())
