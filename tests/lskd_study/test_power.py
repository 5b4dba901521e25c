"""Widths, powers and seeds that are said beforehand, against simulated studies and scipy."""

import numpy as np
import pytest
from scipy import stats

from lskd_study.stats.intervals import Part, crossed_interval, seed_interval
from lskd_study.stats.power import MANY, Variances

pytestmark = pytest.mark.unit


def simulated(seed_sd, sample_sd, seeds, samples=400, difference=0.0, trials=400, noise=1.0):
    """Tables of differences ``(trials, seeds, samples)`` of a crossed design."""
    rng = np.random.default_rng(5)
    by_seed = seed_sd * rng.standard_normal((trials, seeds, 1))
    by_sample = sample_sd * rng.standard_normal((trials, 1, samples))
    return difference + by_seed + by_sample + noise * rng.standard_normal((trials, seeds, samples))


def test_power_over_seeds_alone_is_that_of_the_t_test():
    for seeds, seed, difference in ((3, 0.09, 0.4), (4, 4.0, 2.0), (5, 0.09, 0.4), (10, 900.0, 40.0)):
        variances = Variances(seed=seed, sample=0.0, sample_df=0)
        shift = difference / np.sqrt(seed / seeds)
        t = stats.t.isf(0.025, seeds - 1)
        exact = stats.nct.sf(t, seeds - 1, shift) + stats.nct.cdf(-t, seeds - 1, shift)
        assert variances.power(seeds, difference) == pytest.approx(exact, abs=2e-3)
        assert variances.detectable(seeds, exact) == pytest.approx(difference, rel=5e-3)
        assert variances.power(seeds, 0.0) == pytest.approx(0.05, abs=1e-3)


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
    assert variances.seeds_for(10.0) == 2
    most, more = (1.0001 * variances.detectable(seeds) for seeds in (MANY, MANY + 1))
    assert (variances.seeds_for(most), variances.seeds_for(more)) == (MANY, None)


def test_where_samples_are_the_limit_no_number_of_seeds_is_enough():
    variances = Variances(seed=0.01, sample=0.25, sample_df=200)
    assert variances.seeds_for(0.4) is None


def test_what_does_not_vary_is_found_whatever_its_size():
    nothing = Variances(seed=0.0, sample=0.0, sample_df=0)
    assert (nothing.power(3, 0.0), nothing.power(3, 1e-9), nothing.detectable(3)) == (0, 1, 0)
    assert nothing.seeds_for(1e-9, power=1.0) == 2


def test_the_parts_of_an_interval_are_those_of_single_seeds():
    found = Variances.of(2, [Part(0.5, 4), Part(0.1, 99)], 3, Part(0.2, 6))
    assert found == Variances(1.0, 0.1, 99, students=3, student=0.4, pooled_df=3)
    assert found.half_width(8) ** 2 == pytest.approx(
        stats.t.isf(0.025, 7 + 3) ** 2 / 8 + stats.t.isf(0.025, 99) ** 2 * 0.1
    )
    assert Variances.of(2, [(0.5, 1)]) == Variances(1.0, 0.0, 0)


@pytest.mark.parametrize(("between", "within"), [(0.7, 0.6), (0.0, 0.6), (0.7, 0.0)])
def test_more_students_make_their_own_part_smaller(between, within):
    of = {k: Variances(between + within / k, 0.1, 99, k, within / k) for k in (1, 2, 5)}
    for variances in of.values():
        for students, expected in of.items() if within else [(5, variances)]:
            found = variances.with_students(students)
            assert (found.seed, found.student) == pytest.approx((expected.seed, expected.student))
            assert found.students == expected.students
    # What students alone vary is estimated, and may be more than all.
    found = Variances(1.0, 0.1, 99, 1, 4.0).with_students(2)
    assert (found.seed, found.student) == (0.5, 0.5)


def test_one_seed_and_equal_runs_say_nothing_about_seeds():
    for found in (seed_interval([0.2]), seed_interval([0.2, 0.2, 0.2])):
        assert Variances.of(found.seeds, found.parts) is None
