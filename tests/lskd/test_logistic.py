import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lskd import smooth_targets
from lskd.analysis.logistic import smoothed_logistic_loss, smoothed_logistic_minimum

pytestmark = pytest.mark.unit
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
conventions = st.sampled_from(["paper", "uniform"])


@PROPERTY
@given(
    margin=st.floats(-700, 700),
    alpha=st.floats(0, 0.99),
    convention=conventions,
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_loss_is_the_cross_entropy_of_two_classes(margin, alpha, convention, dtype):
    m = np.float64(torch.tensor(margin, dtype=dtype).item())
    off = alpha if convention == "paper" else alpha / 2
    expected = (1 - off) * np.logaddexp(0, -m) + (off * np.logaddexp(0, m) if off else 0)
    loss = smoothed_logistic_loss(torch.tensor(margin, dtype=dtype), alpha, convention)
    assert loss.dtype == dtype
    rtol, smallest = (1e-12, 0) if dtype == torch.float64 else (3e-6, torch.finfo(dtype).tiny)
    np.testing.assert_allclose(loss.item(), expected, rtol=rtol, atol=smallest)


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_loss_is_torchs_of_smoothed_targets(convention):
    margins = torch.linspace(-9, 9, 31, dtype=torch.float64)
    targets = smooth_targets(torch.zeros(31, dtype=torch.long), 2, 0.2, convention, torch.float64)
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(smoothed_logistic_loss(margins, 0.2, convention), expected)


def test_no_smoothing_at_any_margin():
    far = torch.tensor([-math.inf, -1e30, 1e30, math.inf])
    assert smoothed_logistic_loss(far, 0.0).tolist() == [math.inf, pytest.approx(1e30), 0, 0]


@PROPERTY
@given(alpha=st.floats(0.001, 0.99), convention=conventions)
def test_minimum(alpha, convention):
    def loss(m):
        return float(smoothed_logistic_loss(torch.tensor(m, dtype=torch.float64), alpha, convention))

    found = minimize_scalar(loss, bounds=(-9, 9), method="bounded", options={"xatol": 1e-9})
    margin, least = smoothed_logistic_minimum(alpha, convention)
    assert margin == pytest.approx(found.x, abs=1e-4)
    assert least == pytest.approx(found.fun, rel=1e-9)
    assert least == pytest.approx(loss(margin), rel=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        smoothed_logistic_loss(torch.zeros(1), alpha)
    with pytest.raises(ValueError, match="alpha"):
        smoothed_logistic_minimum(alpha)


def test_margin_of_integers():
    with pytest.raises(ValueError, match="floating"):
        smoothed_logistic_loss(torch.zeros(1, dtype=torch.long), 0.1)
