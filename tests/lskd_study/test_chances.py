"""P(better), P(within the margin), P(worse) beside the headline's interval."""

import numpy as np
import pytest
from scipy import stats

from lskd_study.stats.chances import chances
from lskd_study.stats.intervals import Part, crossed_interval, parts_interval, seed_interval

pytestmark = pytest.mark.unit


def interval(estimate, seed, sample, seeds=3, samples=600):
    parts = [Part(seed, seeds - 1), Part(sample, samples - 1)]
    return parts_interval(estimate, parts, (seeds, samples), "")


def three(found):
    return found.better, found.within, found.worse


def test_of_seeds_alone_they_are_students_t():
    found = chances(seed_interval([0.1, 0.5, 0.3, 0.9]), 0.2)
    t = stats.t(3, loc=0.45, scale=np.std([0.1, 0.5, 0.3, 0.9], ddof=1) / 2)
    assert three(found) == pytest.approx((t.sf(0.2), t.cdf(0.2) - t.cdf(-0.2), t.cdf(-0.2)))


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_they_are_draws_of_the_two_parts_counted(seeds, share):
    found = chances(interval(0.3, share, 1 - share, seeds), 0.2)
    rng = np.random.default_rng(1)
    draws = 0.3 + share**0.5 * rng.standard_t(seeds - 1, 10**6)
    draws += (1 - share) ** 0.5 * rng.standard_t(599, 10**6)
    counted = (draws > 0.2).mean(), (abs(draws) <= 0.2).mean(), (draws < -0.2).mean()
    assert three(found) == pytest.approx(counted, abs=0.002)
    assert sum(three(found)) == pytest.approx(1)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("samples", [30, 240, 50_000])
def test_beyond_an_end_of_the_interval_lies_a_fortieth(seeds, samples):
    for share in np.linspace(0, 1, 11):
        one = interval(0.0, share, 1 - share, seeds, samples)
        beyond = chances(interval(one.high, share, 1 - share, seeds, samples), 0.0)
        assert beyond.worse == pytest.approx(0.025, abs=0.0016)
        mirrored = chances(interval(one.low, share, 1 - share, seeds, samples), 0.0)
        assert (mirrored.better, mirrored.within) == pytest.approx((beyond.worse, 0))


def test_nothing_is_said_of_one_seed_or_no_variance():
    for table in (np.random.default_rng(0).normal(size=(1, 30)), np.full((3, 30), 0.5)):
        assert chances(crossed_interval(table), 0.2) is None


def test_nothing_is_said_of_more_parts_than_two():
    assert chances(parts_interval(0.0, [Part(1.0, 2)] * 3, (3, 3), ""), 0.2) is None


def test_far_out_the_part_of_fewer_seeds_decides():
    """Its tails are heavy: of 2,000 points of it one alone would lie there."""
    found = chances(interval(0.0, 0.9, 0.1, seeds=2), 1000.0)
    assert found.worse == pytest.approx(stats.t(1).cdf(-1000 / 0.9**0.5), rel=0.01)


def test_of_studies_with_nothing_to_find_few_are_sure():
    """Calibrated: a sign that is called 97.5 % sure is wrong as often as the interval is."""
    rng = np.random.default_rng(2)
    sure = 0
    for _ in range(400):
        table = 0.05 * rng.standard_normal((3, 1)) + rng.standard_normal((1, 200))
        table = table + rng.standard_normal((3, 200))
        found = chances(crossed_interval(table), 0.0)
        sure += max(found.better, found.worse) > 0.975
    assert 0.01 <= sure / 400 <= 0.08
