import numpy as np
import pytest
import torch
from scipy import stats

from lskd import measure_teacher
from lskd_study.stats.bootstrap import Estimate, difference, of_draws, paired_differences, resampled_means

pytestmark = pytest.mark.unit

QUANTITIES = (
    "top1",
    "top5",
    "nll",
    "entropy",
    "ece",
    "calibrated_nll",
    "target_std",
    "vector_l2",
    "between_vector_l2",
    "between_target_std",
)


def test_draws_have_the_mean_and_the_standard_error_of_the_samples():
    values = np.random.default_rng(0).gamma(2.0, size=(400, 2)) + np.array([0.0, 1e6])
    draws = resampled_means(values, 4000, seed=1)
    assert draws.shape == (4000, 2)
    np.testing.assert_allclose(draws.mean(0), values.mean(0), rtol=0, atol=0.01)
    np.testing.assert_allclose(draws.std(0), values.std(0) / 20, rtol=0.05)


def test_draws_are_the_bootstrap_of_scipy():
    values = np.random.default_rng(0).gamma(1.0, size=200)
    ours = np.quantile(resampled_means(values[:, None], 5000, 0)[:, 0], [0.025, 0.975])
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.006)


def test_large_means_cost_no_digits():
    large = 1e9 + np.random.default_rng(0).normal(size=(400, 1))
    expected = resampled_means(large - 1e9, 50, seed=1)
    np.testing.assert_allclose(resampled_means(large, 50, seed=1) - 1e9, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("block", "expected"), [(20, [1] * 31), (170, [3] * 10 + [1])])
def test_the_same_draws_whatever_the_block(monkeypatch, block, expected):
    values = np.random.default_rng(0).normal(size=(50, 3))
    whole = resampled_means(values, 31, seed=5)
    monkeypatch.setattr("lskd_study.stats.bootstrap._BLOCK", block)
    steps = []
    np.testing.assert_allclose(resampled_means(values, 31, seed=5, progress=steps.append), whole)
    assert steps == expected
    assert not np.allclose(resampled_means(values, 31, seed=6), whole)


def test_differences_are_paired():
    """What two teachers share must cancel: their difference is known far better than either."""
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(500, 1))
    first, second = shared, shared + 0.1 + 0.001 * generator.normal(size=(500, 1))
    estimate = paired_differences([first, second], 500, 0, [False])[0, 1][0]
    assert estimate.value == pytest.approx(0.1, abs=0.001)
    assert 0 < estimate.high - estimate.low < 0.001
    assert estimate.p_value < 0.01


def test_every_pair_later_less_earlier():
    columns = [np.random.default_rng(i).normal(i, 1, size=(100, 2)) for i in range(3)]
    found = paired_differences(columns, 200, 0, [False, False])
    assert list(found) == [(0, 1), (0, 2), (1, 2)]
    for (i, j), estimates in found.items():
        for q, estimate in enumerate(estimates):
            assert estimate.value == pytest.approx(columns[j][:, q].mean() - columns[i][:, q].mean())
            assert estimate.low < estimate.value < estimate.high


def test_p_value_and_interval_agree():
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.2, 0.4):
        first, second = generator.normal(size=(2, 100))
        second += shift
        draws = resampled_means((second - first)[:, None], 2000, 0)[:, 0]
        e = difference(first, second, draws)
        assert (e.p_value < 0.049) <= (e.low > 0 or e.high < 0) <= (e.p_value < 0.052)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_p_value_counts_draws_on_the_other_side_and_the_value(sign):
    found = of_draws(2.0, sign * np.array([-1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert found.p_value == pytest.approx(2 * (3 + 1) / (9 + 1))
    assert of_draws(0.0, np.zeros(9)).p_value == 1


def test_another_unit():
    assert Estimate(1.0, -2.0, 3.0, 0.5, "why").scaled(100) == Estimate(100, -200, 300, 0.5, "why")


def test_teachers_that_agree_everywhere():
    ones = np.ones(300)
    draws = np.zeros(100)
    known = difference(ones, ones, draws)
    assert (known.low, known.high, known.p_value) == (0, 0, 1)
    unseen = difference(ones, ones, draws, bounded=True)
    assert (unseen.low, unseen.high, unseen.p_value) == (-0.01, 0.01, 1)
    few = difference(ones[:2], ones[:2], draws, bounded=True)
    assert (few.low, few.high) == (-1, 1)  # as far apart as shares can be
    assert "rule of three" in unseen.note
    moved = difference(ones, ones + 1, draws)
    assert (moved.low, moved.high, moved.p_value) == (1, 1, 0)


CLASSES, IMAGES = 20, 25
EASE = np.random.default_rng(5).normal(3.5, 1.0, CLASSES)


def simulate(generator, per_class):
    """Two teachers on the same images: families of five similar classes, the second teacher softer."""
    labels = np.repeat(np.arange(CLASSES), per_class)
    samples = np.arange(len(labels))
    image = generator.normal(size=(len(labels), CLASSES))
    ease = EASE[labels] + 1.2 * generator.normal(size=len(labels))
    family = np.zeros_like(image)
    family[samples[:, None], labels[:, None] // 5 * 5 + np.arange(5)] = 1.5
    teachers = []
    for sharpness, width in ((1.0, 1.3), (0.9, 1.0)):
        logits = sharpness * (width * image + family) + 0.5 * generator.normal(size=image.shape)
        logits[samples, labels] += sharpness * ease
        measures = measure_teacher(
            torch.from_numpy(logits), torch.from_numpy(labels), influence=True, small_class_correction=True
        )
        teachers.append(np.stack([measures.contributions(name).numpy() for name in QUANTITIES], axis=1))
    return teachers


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """The 95 % interval of a difference covers the difference of very large data sets in 92 to 98 of 100."""
    generator = np.random.default_rng(1)
    large = [simulate(generator, 4000) for _ in range(3)]
    truth = np.mean([second.mean(0) - first.mean(0) for first, second in large], axis=0)
    covered = np.zeros(len(QUANTITIES))
    data_sets = 500
    for data_set in range(data_sets):
        teachers = simulate(generator, IMAGES)
        bounded = [name.startswith("top") for name in QUANTITIES]
        found = paired_differences(teachers, 800, data_set, bounded)[0, 1]
        covered += [e.low <= value <= e.high for e, value in zip(found, truth, strict=True)]
    share = dict(zip(QUANTITIES, covered / data_sets, strict=True))
    assert all(0.92 <= value <= 0.98 for value in share.values()), share
