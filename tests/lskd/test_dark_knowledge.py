import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lskd.analysis.by_sample import Softmax, by_sample
from lskd.analysis.dark_knowledge import among_wrong, log_ratio_contributions

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def wrong_class_variance(logits, labels, temperature=1.0):
    return by_sample(lambda z, own: among_wrong(Softmax(z / temperature), own), logits, labels=labels)


def draw(samples, classes, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(samples, classes))
    return logits, rng.integers(classes, size=samples)


def reference(logits, labels, temperature):
    found = []
    for row, label in zip(np.asarray(logits, dtype=np.float64) / temperature, labels, strict=True):
        wrong = np.delete(special.softmax(row), label)
        found.append(np.mean((wrong - wrong.mean()) ** 2))
    return np.array(found)


@PROPERTY
@given(
    classes=st.integers(3, 12),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 64.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_the_variance_spelled_out(classes, temperature, seed):
    logits, labels = draw(20, classes, seed)
    found = wrong_class_variance(logits, labels, temperature)
    np.testing.assert_allclose(found, reference(logits, labels, temperature), rtol=1e-9)


def test_float32_and_blocks_of_rows_change_nothing_and_the_logits_stay_as_they_are(monkeypatch):
    logits, labels = draw(30, 5)
    logits = logits.astype(np.float32)
    before, found = logits.copy(), wrong_class_variance(logits, labels, 2.0)
    np.testing.assert_allclose(found, reference(logits, labels, 2.0), rtol=1e-9)
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 20)
    np.testing.assert_array_equal(wrong_class_variance(logits, labels, 2.0), found)
    np.testing.assert_array_equal(logits, before)


def test_neither_a_shift_of_the_logits_nor_the_names_of_classes_count():
    logits, labels = draw(40, 6)
    found = wrong_class_variance(logits, labels, 2.0)
    order = np.random.default_rng(1).permutation(6)
    moved = wrong_class_variance(logits[:, order] + 1e3, order.argsort()[labels], 2.0)
    np.testing.assert_allclose(moved, found, rtol=1e-9)


def test_ideal_smoothing_leaves_nothing_and_a_confident_teacher_is_not_rounded_away():
    smoothed = np.log(np.full((3, 4), 0.1 / 3) + np.eye(4)[:3] * (0.9 - 0.1 / 3))
    np.testing.assert_allclose(wrong_class_variance(smoothed, [0, 1, 2], 4.0), 0, atol=1e-18)
    sure = [[300.0, 1.0, 0.0]]
    assert 0 < wrong_class_variance(sure, [0])[0] < 1e-250


# The ratio of two teachers


@PROPERTY
@given(st.integers(1, 4), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_the_mean_of_the_contributions_is_the_logarithm_of_the_ratio(seeds, samples, seed):
    first, second = np.random.default_rng(seed).gamma(1.0, size=(2, seeds, samples))
    found = log_ratio_contributions(first, second)
    assert found.shape == (seeds, samples)
    assert found.mean() == pytest.approx(np.log(second.mean() / first.mean()))
    np.testing.assert_allclose(-log_ratio_contributions(second, first), found)
    np.testing.assert_allclose(log_ratio_contributions(5 * first, 5 * second), found)


def test_each_contribution_is_the_first_order_influence_of_its_sample():
    first, second = np.random.default_rng(0).gamma(2.0, size=(2, 12))
    value, step = np.log(second.mean() / first.mean()), 1e-6
    for i, found in enumerate(log_ratio_contributions(first, second)):
        weights = np.full(12, (1 - step) / 12) + step * (np.arange(12) == i)
        moved = np.log(weights @ second / (weights @ first))
        assert found - value == pytest.approx((moved - value) / step, abs=1e-4)


def test_its_interval_covers_the_ratio():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared = rng.gamma(1.0, size=200)
        first, second = (size * shared * rng.gamma(5.0, 1 / 5, size=200) for size in (1.0, 0.4))
        found = stats.ttest_1samp(log_ratio_contributions(first, second), 0).confidence_interval()
        covered += np.exp(found.low) <= 0.4 <= np.exp(found.high)
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wrong_class_variance([[0.0]], [0]), "1 classes; this measure needs at least 2"),
        (lambda: wrong_class_variance([[0.0, 1.0, 2.0]], [3]), r"labels\[0\] is 3"),
        (lambda: wrong_class_variance([[0.0, 1.0, 2.0]], [0.5]), "class ids are integers"),
        (lambda: wrong_class_variance([[0.0, 1.0, 2.0]], [0, 1]), r"labels have shape \(2,\)"),
        (
            lambda: wrong_class_variance([[0.0, np.nan, 2.0]], [0]),
            "the logits of sample 0 are not",
        ),
        (lambda: log_ratio_contributions([1.0], [1.0, 2.0]), "must be the same"),
        (lambda: log_ratio_contributions([1.0], [0.0]), "a ratio needs positive ones"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
