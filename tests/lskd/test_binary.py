"""Distilling sigmoids, class by class: the loss of two classes against the definitions in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import entr, expit, log_expit

from draws import PROPERTY, draw
from lskd import DistillationLoss, distillation_terms
from lskd.targets import binary_targets
from lskd.terms import binary_logits

pytestmark = pytest.mark.unit


@PROPERTY
@given(
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    squared=st.booleans(),
    hard_weight=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.sampled_from([0.0, 0.1, 0.4]),
    convention=st.sampled_from(["uniform", "paper"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    soft=st.booleans(),
    seed=st.integers(0, 50),
)
def test_binary_distillation_is_the_definition(
    temperature, squared, hard_weight, alpha, convention, scale, soft, seed
):
    student, teacher = (draw(6, 5, seed=seed + i, scale=scale, dtype=torch.float64) for i in (0, 100))
    labels = draw(6, 5, seed=seed + 200, dtype=torch.float64).sigmoid()
    labels = labels if soft else labels.round()
    student.requires_grad_()
    loss = DistillationLoss(temperature, squared, hard_weight, alpha, convention)
    targets = binary_targets(labels, alpha, convention)
    parts = loss.components(binary_logits(student), binary_logits(teacher), targets)
    parts.loss.backward()

    z, t, y = (each.detach().numpy() for each in (student, teacher, labels))
    p = expit(t / temperature)
    cross_entropy = -(p * log_expit(z / temperature) + (1 - p) * log_expit(-z / temperature))
    entropy = entr(p) + entr(1 - p)
    # timm moves a label towards 1/2; the paper's Eq. 1 gives alpha to the K - 1 = 1 other answer.
    smoothed = y * (1 - alpha) + alpha / 2 if convention == "uniform" else y * (1 - alpha) + (1 - y) * alpha
    hard = -(smoothed * log_expit(z) + (1 - smoothed) * log_expit(-z))
    factor = temperature**2 if squared else 1.0
    total = (1 - hard_weight) * factor * cross_entropy + hard_weight * hard
    gradient = (1 - hard_weight) * factor * (expit(z / temperature) - p) / temperature
    gradient += hard_weight * (expit(z) - smoothed)
    for ours, theirs in (
        (parts.loss, total),
        (parts.cross_entropy, cross_entropy),
        (parts.kl, cross_entropy - entropy),
        (parts.teacher_entropy, entropy),
        (parts.hard_cross_entropy, hard),
        (parts.agreement, (z > 0) == (t > 0)),
    ):
        assert float(ours.detach()) == pytest.approx(theirs.mean(), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(student.grad.numpy(), gradient / z.size, rtol=1e-9, atol=1e-12)


def test_half_precision_and_masked_classes_stay_finite():
    """A class that a teacher rules out has a logit of -inf; bfloat16 is computed in float32."""
    teacher = torch.tensor([[-torch.inf, 2.0]])
    terms = distillation_terms(binary_logits(torch.ones(1, 2).bfloat16()), binary_logits(teacher))
    assert terms.kl.dtype == torch.float32
    assert float(terms.kl[0, 0]) == pytest.approx(-log_expit(-1.0), rel=1e-5)
