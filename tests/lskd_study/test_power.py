"""Widths, powers and seeds that are said beforehand, against simulated studies and scipy."""

import numpy as np
import pytest
from scipy import stats

from lskd_study.stats.intervals import crossed_interval, seed_interval
from lskd_study.stats.power import Variances

pytestmark = pytest.mark.unit


def simulated(seed_sd, sample_sd, seeds, samples=400, difference=0.0, trials=400, noise=1.0):
    """Tables of differences ``(trials, seeds, samples)`` of a crossed design."""
    rng = np.random.default_rng(5)
    by_seed = seed_sd * rng.standard_normal((trials, seeds, 1))
    by_sample = sample_sd * rng.standard_normal((trials, 1, samples))
    return difference + by_seed + by_sample + noise * rng.standard_normal((trials, seeds, samples))


def test_power_over_seeds_alone_is_that_of_the_t_test():
    variances = Variances(seed=0.09, sample=0.0, sample_df=0)
    for seeds in (3, 5, 10):
        shift = 0.4 / np.sqrt(0.09 / seeds)
        t = stats.t.isf(0.025, seeds - 1)
        exact = stats.nct.sf(t, seeds - 1, shift) + stats.nct.cdf(-t, seeds - 1, shift)
        assert variances.power(seeds, 0.4) == pytest.approx(exact, abs=2e-3)
    assert variances.power(5, 0.0) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(("seed_sd", "sample_sd"), [(0.15, 0.0), (0.1, 2.0), (0.02, 3.0)])
def test_the_power_promised_is_the_power_that_comes(seed_sd, sample_sd):
    samples, noise = 400, 1.0
    variances = Variances(seed_sd**2 + noise**2 / samples, sample_sd**2 / samples, samples - 1)
    for seeds in (3, 5, 10):
        difference = variances.detectable(seeds)
        found = [crossed_interval(d) for d in simulated(seed_sd, sample_sd, seeds, difference=difference)]
        came = np.mean([interval.p_value < 0.05 for interval in found])
        # 400 trials: the standard error of 0.8 is 0.02; the estimate of the samples' part adds a little.
        assert came == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize(("seed_sd", "sample_sd"), [(0.15, 0.0), (0.1, 2.0)])
def test_the_width_predicted_from_few_seeds_is_the_width_of_more(seed_sd, sample_sd):
    few = [crossed_interval(d) for d in simulated(seed_sd, sample_sd, 5)]
    more = [crossed_interval(d) for d in simulated(seed_sd, sample_sd, 12)]
    predicted = [Variances.of(interval.seeds, interval.parts).half_width(12) for interval in few]
    came = [(interval.high - interval.low) / 2 for interval in more]
    assert np.sqrt(np.mean(np.square(predicted))) == pytest.approx(
        np.sqrt(np.mean(np.square(came))), rel=0.06
    )


def test_the_half_width_of_the_seeds_at_hand_is_the_intervals_own():
    found = crossed_interval(simulated(0.2, 1.0, 4, trials=1)[0])
    assert Variances.of(found.seeds, found.parts).half_width(4) == pytest.approx((found.high - found.low) / 2)
    found = seed_interval([0.1, 0.3, 0.2])
    assert Variances.of(found.seeds, found.parts).half_width(3) == pytest.approx((found.high - found.low) / 2)


def test_seeds_for_a_difference_are_the_fewest_with_that_power():
    variances = Variances(seed=0.25, sample=0.001, sample_df=999)
    seeds = variances.seeds_for(0.4)
    assert variances.power(seeds, 0.4) >= 0.8 > variances.power(seeds - 1, 0.4)
    assert variances.detectable(seeds) <= 0.4 < variances.detectable(seeds - 1)


def test_where_samples_are_the_limit_no_number_of_seeds_is_enough():
    variances = Variances(seed=0.01, sample=0.25, sample_df=200)
    assert variances.seeds_for(0.4) is None


def test_one_seed_and_equal_runs_say_nothing_about_seeds():
    for found in (seed_interval([0.2]), seed_interval([0.2, 0.2, 0.2])):
        assert Variances.of(found.seeds, found.parts) is None
