"""What small classes add to the stabilities, and the correction."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import special

from draws import draw_samples, every_definition
from lskd import measure_teacher
from lskd.stability import small_class_factor

pytestmark = pytest.mark.unit

draw = partial(draw_samples, lead=0.3)


def c4(n):
    return math.sqrt(2 / (n - 1)) * math.exp(special.gammaln(n / 2) - special.gammaln((n - 1) / 2))


def test_small_class_factor():
    counts = torch.tensor([0, 1, 2, 3, 5, 50, 1000, 100_000])
    expected = [1, 1, *(1 / c4(n) for n in counts[2:].tolist())]
    factor = small_class_factor(counts, "target_std")
    assert factor.dtype == torch.float64
    np.testing.assert_allclose(factor.numpy(), expected, rtol=1e-8)
    expected = [1, 1, *(math.sqrt(n / (n - 1)) for n in counts[2:].tolist())]
    np.testing.assert_allclose(small_class_factor(counts, "vector_l2").numpy(), expected, rtol=1e-12)
    for definition in ("between_vector_l2", "between_target_std"):
        assert small_class_factor(counts, definition).tolist() == [1] * 8
    assert c4(3) == pytest.approx(0.886, abs=5e-4)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_small_class_factor_takes_the_bias_away(size):
    values = np.random.default_rng(0).normal(size=(40_000, size, 3))
    deviation = values[..., 0].std(1, ddof=1).mean() * float(
        small_class_factor(torch.tensor([size]), "target_std")
    )
    assert deviation == pytest.approx(1, abs=0.01)
    distance = np.linalg.norm(values - values.mean(1, keepdims=True), axis=2).mean()
    distance *= float(small_class_factor(torch.tensor([size]), "vector_l2"))
    assert distance == pytest.approx(math.sqrt(8 / math.pi), rel=0.01)  # mean length in three dimensions


def corrected_between(logits, labels, num_classes, definition):
    """Squares less the variance of a class mean; a class of one sample varies as the others do on average."""
    p, labels = special.softmax(logits.double().numpy(), axis=1), labels.numpy()
    present = [c for c in range(num_classes) if (labels == c).any()]
    rows = {c: p[labels == c] if definition == "between_vector_l2" else p[labels == c, c] for c in present}
    variances = {c: np.var(rows[c], axis=0, ddof=1).sum() for c in present if len(rows[c]) > 1}
    others = np.mean(list(variances.values())) if variances else 0.0
    noise = np.array([variances.get(c, others) / len(rows[c]) for c in present])
    means = np.array([rows[c].mean(0) for c in present])
    if definition == "between_target_std":
        return math.sqrt(max(means.var(ddof=1) - noise.mean(), 0))
    squares = ((means - p.mean(0)) ** 2).sum(1)
    return np.sqrt((squares - noise).clip(min=0)).mean()


@every_definition
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_small_class_correction(reference, definition, scale):
    logits, labels = draw(60, 9, scale=scale)
    labels[(labels == 8) | (labels == 7)] = 0
    labels[3] = 8
    plain = reference.every_class(logits, labels, 9, definition)
    sizes = np.bincount(labels.numpy(), minlength=9)
    factor = np.ones(9)
    if definition == "target_std":
        factor = np.array([1 / c4(n) if n > 1 else 1 for n in sizes])
    elif definition == "vector_l2":
        factor = np.array([math.sqrt(n / (n - 1)) if n > 1 else 1 for n in sizes])
    raw = measure_teacher(logits, labels)
    measures = measure_teacher(logits, labels, small_class_correction=True)
    assert not raw.small_class_correction
    np.testing.assert_allclose(measures.class_values(definition).numpy(), plain * factor, atol=1e-6)
    expected = (
        corrected_between(logits, labels, 9, definition)
        if definition.startswith("between")
        else np.nanmean(plain * factor)
    )
    assert measures.one_minus_stability(definition) == pytest.approx(expected, abs=1e-6)
    bias = raw.one_minus_stability(definition) - expected
    assert bias < 0 if definition in ("target_std", "vector_l2") else bias > 0


@pytest.mark.parametrize("definition", ["between_vector_l2", "between_target_std"])
def test_correction_of_what_is_all_noise_stops_at_zero(definition):
    """Classes that differ by less than their means vary by chance."""
    logits = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.1, -1.0], [-1.0, 1.1]])
    measures = measure_teacher(logits, torch.tensor([0, 0, 1, 1]), small_class_correction=True)
    assert measures.one_minus_stability(definition) == pytest.approx(0, abs=1e-12)
    raw = measure_teacher(logits, torch.tensor([0, 0, 1, 1]))
    assert raw.one_minus_stability(definition) > 0
    lone = measure_teacher(logits, torch.tensor([0, 1, 1, 1]) * 0, small_class_correction=True)
    assert math.isnan(lone.one_minus_stability("between_target_std"))


def test_no_correction_where_no_class_has_two_samples(reference):
    logits, labels = draw(6, 6)[0], torch.arange(6)
    measures = measure_teacher(logits, labels, small_class_correction=True)
    for definition in ("between_vector_l2", "between_target_std"):
        expected = 1 - reference.stability(logits.double().numpy(), labels.numpy(), 6, definition)
        assert measures.one_minus_stability(definition) == pytest.approx(expected, abs=1e-6)
