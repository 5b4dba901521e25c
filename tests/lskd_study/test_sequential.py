"""The error rate of repeated looks, by simulation; the levels against published boundaries."""

import numpy as np
import pytest
from scipy import stats

from lskd import LskdError
from lskd_study.stats.intervals import crossed_interval
from lskd_study.stats.sequential import error_rate, levels, looks, sequential_p

pytestmark = pytest.mark.unit


def test_repeated_looks_at_five_percent_are_armitages_error_rates():
    # Armitage, McPherson & Rowe (1969), Table 2: equal steps, each judged at 5 %.
    for count, rate in ((1, 0.05), (2, 0.083), (3, 0.107), (5, 0.142), (10, 0.193)):
        assert error_rate(range(1, count + 1)) == pytest.approx(rate, abs=6e-4)


def test_levels_together_are_the_total():
    assert levels((5, 20))[0] == pytest.approx(0.05 / 4**3)  # as the spending rule says
    for numbers in ((3, 5, 8, 12, 20), (5, 20), (2, 3, 5, 8, 12, 18, 30)):
        rng = np.random.default_rng(1)
        sums = rng.standard_normal((200_000, numbers[-1])).cumsum(1)[:, np.array(numbers) - 1]
        p = 2 * stats.norm.sf(np.abs(sums) / np.sqrt(numbers))
        assert (p < levels(numbers)).any(1).mean() == pytest.approx(0.05, abs=2e-3)
        assert (p < levels(numbers, 0.3)).any(1).mean() == pytest.approx(0.3, abs=4e-3)


@pytest.mark.parametrize("numbers", [(3, 5, 8, 12, 20), (5, 8, 12, 20), (3, 5, 8, 12, 18, 30)])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])  # of the samples' standard error to the seeds' at the end
def test_the_whole_procedure_keeps_its_error_rate_with_t_intervals(numbers, share):
    rng, trials = np.random.default_rng(3), 40_000
    shared = share / np.sqrt(numbers[-1]) * rng.standard_normal((trials, 1))
    values = shared + rng.standard_normal((trials, numbers[-1]))
    rejected = np.zeros(trials, bool)
    for n, level in zip(numbers, levels(numbers), strict=True):
        seen = values[:, :n]
        of_seeds = stats.t.isf(level / 2, n - 1) ** 2 * seen.var(1, ddof=1) / n
        of_samples = stats.norm.isf(level / 2) ** 2 * share**2 / numbers[-1]
        rejected |= np.abs(seen.mean(1)) > np.sqrt(of_seeds + of_samples)
    print(f"{numbers}, samples' share {share}: {rejected.mean():.4f} rejected")
    assert rejected.mean() < 0.053  # its standard error is 0.001


def test_a_sequential_p_value_is_below_five_percent_exactly_below_the_looks_level():
    numbers = (5, 8, 12, 20)
    for look, (level, half) in enumerate(zip(levels(numbers), levels(numbers, 0.025), strict=True)):
        assert sequential_p(level, numbers, look) == pytest.approx(0.05)
        assert sequential_p(half, numbers, look) == pytest.approx(0.025)  # a page's headline
        assert sequential_p(0.999 * level, numbers, look) < 0.05 < sequential_p(1.001 * level, numbers, look)
        p = np.geomspace(1e-8, 1, 30)
        found = [sequential_p(value, numbers, look) for value in p]
        assert (np.diff(found) >= 0).all()
        assert all(found >= p - 1e-12)
    assert np.isnan(sequential_p(np.nan, numbers, 0))


def test_looks_grow_by_half_and_end_with_the_most():
    assert looks(5, 20) == (5, 8, 12, 20)
    assert looks(3, 20) == (3, 5, 8, 12, 20)
    assert looks(2, 5) == (2, 3, 5)
    assert looks(5, 6) == (5, 6)
    assert looks(4, 7) == (4, 7)  # not 6 before 7
    assert looks(8, 15) == (8, 12, 15)
    for first, most in ((1, 20), (5, 5), (9, 4)):
        with pytest.raises(LskdError):
            looks(first, most)


@pytest.mark.parametrize(("difference", "least", "most"), [(0.4, 0.8, 1.0), (0.0, 0.0, 0.035)])
def test_the_papers_difference_is_decided_and_none_rarely_is(difference, least, most):
    """500 studies of accuracy in points: seeds vary by 0.15, and arms differ on 5 % of 50,000 images."""
    rng, numbers, samples, right, wrong = np.random.default_rng(8), (5, 8, 12, 20), 300, 0, 0
    bounds = levels(numbers, 0.025)  # what a page gives its headline
    for _ in range(500):
        d = difference + 0.15 * np.sqrt(2) * rng.standard_normal((numbers[-1], 1))
        d = d + np.sqrt(samples * 0.05 / 50_000) * 100 * rng.standard_normal((1, samples))
        d = d + 0.5 * rng.standard_normal((numbers[-1], samples))
        for n, level in zip(numbers, bounds, strict=True):
            found = crossed_interval(d[:n]).at_level(1 - level)
            if not found.low <= 0 <= found.high:
                right, wrong = right + (found.estimate > 0), wrong + (found.estimate < 0)
                break
    decided = (right + wrong if difference == 0 else right) / 500
    print(f"a difference of {difference}: {decided:.3f} decided")
    assert least <= decided <= most  # 0.025 has a standard error of 0.007
    assert wrong / 500 <= 0.035
