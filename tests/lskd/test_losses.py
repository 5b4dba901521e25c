import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch.nn import functional as F

from lskd import DistillationLoss, TopK, distillation_terms, smooth_targets

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=80, derandomize=True, database=None)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return logits.clamp(-1e4, 1e4).to(dtype)


def draw_labels(*shape, num_classes, seed=0):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def top_k(teacher, k, rest, dtype=torch.float64):
    values = teacher.log_softmax(-1) if rest == "spread" else teacher
    values, ids = values.topk(k, dim=-1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the order must not matter
    return TopK(values[..., order].to(dtype), ids[..., order], rest)


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
    labels = draw(3, 4, num_classes, seed=seed + 2).softmax(-1) if probabilities else ids
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


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_hard_term_is_cross_entropy_of_torch(alpha, num_classes):
    student, labels = draw(6, num_classes), draw_labels(6, num_classes=num_classes)
    ours = DistillationLoss(7.0, hard_weight=1.0, alpha=alpha, convention="uniform")
    theirs = F.cross_entropy(student, labels, label_smoothing=alpha)
    torch.testing.assert_close(ours(student, draw(6, num_classes), labels), theirs)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_smoothing_is_cross_entropy_plus_a_pull_on_the_logits(alpha):
    student, labels = draw(6, 10), draw_labels(6, num_classes=10)
    own = student.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = F.cross_entropy(student, labels) + (alpha * (own - student.mean(-1))).mean()
    loss = DistillationLoss(hard_weight=1.0, alpha=alpha, convention="uniform")
    torch.testing.assert_close(loss(student, student, labels), expected)


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_integer_labels_are_their_smoothed_rows(convention):
    student, teacher = draw(3, 4, 6), draw(3, 4, 6, seed=1)
    labels = draw_labels(3, 4, num_classes=6)
    rows = smooth_targets(labels, 6, 0.3, convention, torch.float64)
    smoothed = DistillationLoss(hard_weight=0.4, alpha=0.3, convention=convention)
    as_given = DistillationLoss(hard_weight=0.4, alpha=0.9)  # rows are used as they are
    expected = as_given(student, teacher, rows)
    torch.testing.assert_close(smoothed(student, teacher, labels), expected)
    torch.testing.assert_close(smoothed(student, teacher, labels.int()), expected)


def test_hard_term_with_a_masked_class():
    student = draw(4, 5)
    student[:, 4] = -math.inf
    student.requires_grad_()
    loss = DistillationLoss(hard_weight=1.0)(student, student.detach(), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_one_class_costs_nothing():
    parts = DistillationLoss(2.0, True, 0.5).components(draw(4, 1), draw(4, 1, seed=1), torch.zeros(4).long())
    assert [part.item() for part in parts] == [0, 0, 0, 0, 0, 0, 1]


def test_nan_in_the_labels_is_not_hidden():
    labels = smooth_targets(torch.tensor([0, 1]), 4, 0.1)
    labels[0] = math.nan
    assert DistillationLoss(hard_weight=1.0)(draw(2, 4), draw(2, 4), labels).isnan()


# Against timm


@pytest.fixture
def timm_loss():
    return pytest.importorskip("timm.loss", reason="timm is not installed")


def test_label_smoothing_of_timm(timm_loss):
    student, labels = draw(6, 10), draw_labels(6, num_classes=10)
    ours = DistillationLoss(hard_weight=1.0, alpha=0.1, convention="uniform")
    torch.testing.assert_close(
        ours(student, student, labels), timm_loss.LabelSmoothingCrossEntropy(0.1)(student, labels)
    )


def test_soft_targets_of_timm(timm_loss):
    student, rows = draw(6, 10), draw(6, 10, seed=1).softmax(-1)
    ours = DistillationLoss(hard_weight=1.0)(student, student, rows)
    torch.testing.assert_close(ours, timm_loss.SoftTargetCrossEntropy()(student, rows))


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


# Masks


def test_masked_mean_is_over_what_counts():
    student, teacher = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    labels = draw_labels(3, 4, num_classes=5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    loss = DistillationLoss(2.0, True, 0.3, 0.1)
    parts = loss.components(student, teacher, labels, mask)
    kept = loss.components(student[mask], teacher[mask], labels[mask])
    for ours, theirs in zip(parts, kept, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_chunks_weighted_by_their_counts_are_the_whole():
    student, teacher, labels = draw(20, 5), draw(20, 5, seed=1), draw_labels(20, num_classes=5)
    mask = draw(20, seed=3) > -0.5
    loss = DistillationLoss(3.0, hard_weight=0.2)
    whole = loss(student, teacher, labels, mask)
    chunked = sum(
        loss(student[part], teacher[part], labels[part], mask[part]) * mask[part].sum()
        for part in torch.arange(20).split(7)
    )
    torch.testing.assert_close(chunked / mask.sum(), whole)


def test_padding_in_label_rows_may_hold_anything():
    rows = torch.tensor([[0.5, 0.5], [math.nan, math.nan]])
    student = draw(2, 2, dtype=torch.float32).requires_grad_()
    mask = torch.tensor([True, False])
    loss = DistillationLoss(hard_weight=1.0)(student, student.detach(), rows, mask)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(student[:1], rows[:1]))
    assert student.grad.isfinite().all()


# Gradients


@pytest.mark.parametrize("rest", [None, "renormalise", "spread"])
def test_teacher_receives_no_gradient(rest):
    student, teacher = draw(3, 6).requires_grad_(), draw(3, 6, seed=1).requires_grad_()
    given_teacher = teacher if rest is None else top_k(teacher, 3, rest)
    mask = torch.tensor([True, True, False])
    loss = DistillationLoss(2.0, hard_weight=0.5)
    loss(student, given_teacher, torch.tensor([0, 1, 2]), mask).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert not loss(student.detach(), given_teacher, torch.tensor([0, 1, 2]), mask).requires_grad
    assert not any(term.requires_grad for term in distillation_terms(student.detach(), given_teacher))


def test_label_rows_receive_no_gradient():
    rows = draw(3, 6).softmax(-1).requires_grad_()
    DistillationLoss(hard_weight=0.5)(draw(3, 6).requires_grad_(), draw(3, 6), rows).backward()
    assert rows.grad is None


@pytest.mark.parametrize("rest", [None, "renormalise", "spread"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_of_both_terms_is_the_difference_of_probabilities(reference, rest, temperature):
    """Property 1 of the paper: cross-entropy and KL have equal gradients, (q - p) / T."""
    student, dense = draw(4, 6), draw(4, 6, seed=1)
    teacher = dense if rest is None else top_k(dense, 3, rest)
    if rest is None:
        p = special.softmax(dense.numpy() / temperature, axis=-1)
    else:
        p = reference.completed(teacher.values.numpy(), teacher.ids.numpy(), 6, rest, temperature)
    expected = (special.softmax(student.numpy() / temperature, axis=-1) - p) / temperature
    for name in ("cross_entropy", "kl"):
        leaf = student.clone().requires_grad_()
        getattr(distillation_terms(leaf, teacher, temperature), name).sum().backward()
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("rest", [None, "renormalise", "spread"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 3, -100]), draw(3, 4, seed=5).softmax(-1)])
def test_gradcheck(rest, labels):
    dense = draw(3, 4, seed=1)
    teacher = dense if rest is None else top_k(dense, 2, rest)
    loss = DistillationLoss(2.0, True, 0.4, 0.1)
    mask = torch.tensor([True, True, False])
    student = draw(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher, labels, mask), (student,))
    assert torch.autograd.gradcheck(lambda logits: distillation_terms(logits, teacher, 2.0)[:2], (student,))


def test_temperature_squared_keeps_the_size_of_the_gradient():
    """At a high temperature the gradient nears (z - v) / K without its mean (Hinton et al., 2015)."""
    student, teacher = draw(1, 10).requires_grad_(), draw(1, 10, seed=1)
    DistillationLoss(1e4, temperature_squared=True)(student, teacher).backward()
    difference = student.detach() - teacher
    torch.testing.assert_close(student.grad, (difference - difference.mean()) / 10, rtol=1e-2, atol=1e-4)


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


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_temperature_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature"):
        distillation_terms(draw(2, 3), draw(2, 3), temperature)


def test_settings_are_shown():
    shown = repr(DistillationLoss(2.0, True, 0.3, 0.1, "uniform"))
    for setting in (
        "temperature=2.0",
        "temperature_squared=True",
        "hard_weight=0.3",
        "alpha=0.1",
        "convention='uniform'",
    ):
        assert setting in shown
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
