import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lskd import LskdError
from lskd_study.stats.intervals import (
    ONE_SEED,
    Part,
    centre_within,
    crossed_interval,
    crossed_moments,
    holm,
    parts_interval,
    seed_interval,
    target_std_pseudo_values,
)
from simulated import half_width

pytestmark = pytest.mark.unit


def test_seed_interval_is_scipys_paired_t_interval():
    values = [0.1, 0.2, 0.25, 0.07]
    reference = stats.ttest_1samp(values, 0)
    low, high = reference.confidence_interval(0.95)
    found = seed_interval(values)
    assert (found.low, found.high, found.p_value) == pytest.approx((low, high, reference.pvalue), rel=1e-6)
    assert found.estimate == pytest.approx(np.mean(values))
    assert (found.seeds, found.samples) == (4, 1)


@pytest.mark.parametrize("samples", [2, 50])
def test_one_seed_gives_the_samples_interval_and_says_that_seed_variance_is_unknown(samples):
    d = np.random.default_rng(0).normal(0.2, 1, (1, samples))
    reference = stats.ttest_1samp(d[0], 0)
    found = crossed_interval(d)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-6)
    assert "seed" in found.note
    assert "unknown" in found.note


def test_one_sample_gives_the_seeds_interval():
    d = np.array([[0.1], [0.3], [0.2]])
    assert crossed_interval(d) == seed_interval(d[:, 0])


def test_moments_equal_an_analysis_of_variance_spelled_out():
    seeds, samples = 4, 7
    d = np.random.default_rng(1).normal(size=(seeds, samples)) + np.arange(samples)
    grand = d.mean()
    ss_seed = sum(samples * (d[s].mean() - grand) ** 2 for s in range(seeds))
    ss_sample = sum(seeds * (d[:, i].mean() - grand) ** 2 for i in range(samples))
    ss_error = ((d - grand) ** 2).sum() - ss_seed - ss_sample
    ms_seed, ms_sample = ss_seed / (seeds - 1), ss_sample / (samples - 1)
    ms_error = ss_error / ((seeds - 1) * (samples - 1))
    mean, seed_variance, sample_variance = crossed_moments(d)
    assert mean == pytest.approx(grand)
    assert seed_variance == pytest.approx(ms_seed / (seeds * samples))
    assert sample_variance == pytest.approx((ms_sample - ms_error) / (seeds * samples))
    found = crossed_interval(d)
    t = stats.t.ppf(0.975, [seeds - 1, samples - 1])
    assert found.high - grand == pytest.approx(
        np.sqrt(t[0] ** 2 * seed_variance + t[1] ** 2 * sample_variance)
    )


def test_memory_of_many_classes_does_not_grow_with_their_product_with_samples():
    strata = np.arange(20_000) % 2000
    d = np.random.default_rng(0).standard_normal((2, len(strata)))
    tracemalloc.start()
    crossed_interval(d, strata)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * d.nbytes


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 3, 5), (2, 3, 0)])
def test_empty_tables_have_no_residuals(shape):
    residuals, groups = centre_within(np.zeros(shape), np.arange(shape[-1]) % 2)
    assert (residuals.shape, groups) == (shape, 2 if shape[-1] else 0)


def test_strata_take_fixed_differences_between_classes_out_of_the_sampling_variance():
    rng = np.random.default_rng(2)
    strata = np.repeat([0, 1, 2], 40)
    d = rng.normal(size=(3, 120)) * 0.01 + np.array([-5.0, 0.0, 5.0])[strata]
    plain, stratified = crossed_interval(d), crossed_interval(d, strata)
    assert stratified.estimate == pytest.approx(plain.estimate)
    assert (plain.parts[1].df, stratified.parts[1].df) == (119, 117)
    assert crossed_interval(d[:1], strata).parts[0].df == 117
    together = crossed_moments(np.stack([d, d[::-1] ** 2]), strata)  # tables by themselves
    for i, one in enumerate((d, d[::-1] ** 2)):
        np.testing.assert_allclose([part[i] for part in together], crossed_moments(one, strata))
    assert (stratified.high - stratified.low) < 0.05 * (plain.high - plain.low)


@given(
    st.integers(1, 5), st.integers(2, 30), st.floats(-2, 2), st.floats(0.01, 10), st.integers(0, 2**32 - 1)
)
@settings(max_examples=80, deadline=None)
def test_p_value_and_interval_never_contradict_each_other(seeds, samples, shift, scale, seed):
    d = shift + scale * np.random.default_rng(seed).normal(size=(seeds, samples))
    found = crossed_interval(d)
    assert found.low < found.estimate < found.high
    excludes = found.low > 0 or found.high < 0
    assert (found.p_value < 0.05) == excludes
    mirrored = crossed_interval(-d)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("factor", [100.0, -2.0])
def test_another_unit_level_or_value_is_what_other_differences_give(factor):
    d = np.random.default_rng(4).normal(0.2, 1, (4, 30)) + np.array([[0.1], [0.5], [0.2], [0.0]])
    found = crossed_interval(d)
    scaled, expected = found.scaled(factor), crossed_interval(factor * d)
    for name in ("estimate", "low", "high", "p_value", "by_seed"):
        assert getattr(scaled, name) == pytest.approx(getattr(expected, name)), name
    np.testing.assert_allclose(scaled.parts, expected.parts)
    assert found.p_against(0.15) == pytest.approx(crossed_interval(d - 0.15).p_value)
    t = stats.t.ppf(0.95, [3, 29])
    half = np.sqrt(t[0] ** 2 * found.parts[0].variance + t[1] ** 2 * found.parts[1].variance)
    assert found.at_level(0.9).high - found.estimate == pytest.approx(half)
    assert found.estimate - found.at_level(0.9).low == pytest.approx(half)


def test_without_a_variance_only_what_is_outside_is_excluded():
    bound = crossed_interval(np.zeros((3, 600)), bounded=True)
    assert [bound.p_against(value) for value in (-0.006, -0.005, 0.0, 0.005, 0.006)] == [0, 1, 1, 1, 0]
    assert bound.at_level(0.5) == bound
    assert np.isnan(seed_interval([0.1]).p_against(0.0))


def test_the_students_part_is_that_of_a_one_way_layout():
    means = np.random.default_rng(5).normal(size=(4, 3))
    found = seed_interval(means.mean(1)).of_students(means)
    within = np.mean([row.var(ddof=1) for row in means])  # seeds of equal size
    assert found.by_student == pytest.approx((within / (4 * 3), 4 * (3 - 1)))
    assert found.students == 3
    assert found.scaled(-10.0).by_student == pytest.approx((100 * found.by_student.variance, 8))


def test_what_is_stored_in_float32_is_computed_in_float64():
    d = np.random.default_rng(7).random((4, 9)).astype(np.float32)
    wide, classes = d.astype(np.float64), np.arange(9) % 3
    assert crossed_moments(d) == crossed_moments(wide)
    assert seed_interval(d[:, 0]) == seed_interval(wide[:, 0])
    assert seed_interval(d[:, 0]).of_students(d) == seed_interval(d[:, 0]).of_students(wide)
    np.testing.assert_array_equal(
        target_std_pseudo_values(d[0], classes), target_std_pseudo_values(wide[0], classes)
    )
    np.testing.assert_array_equal(holm(d[0]), holm(wide[0]))


def test_several_seeds_or_networks_include_what_another_training_would_change():
    found = [parts_interval(0.1, [Part(1.0, 2), Part(0.0, 0)], (1, 9), "", networks=n) for n in (0, 2, 3)]
    assert [one.includes_seeds for one in found] == [False, False, True]
    assert all(one.known for one in found)
    assert [seed_interval(values).includes_seeds for values in ([0.1], [0.1, 0.2])] == [False, True]


def test_p_values_end_at_a_million_millionth_and_at_one():
    assert seed_interval([1 - 1e-7, 1.0, 1.0, 1.0, 1.0, 1 + 1e-7]).p_value == 1e-12
    assert seed_interval([-1.0, 0.0, 1.0]).p_value == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_holm_is_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(p_values), expected, atol=1e-15)


def test_identical_samples_are_bounded_by_the_rule_of_three_not_by_a_zero_variance():
    found = crossed_interval(np.zeros((3, 600)), bounded=True)
    assert (found.low, found.high, found.p_value) == (-0.005, 0.005, 1.0)
    assert "rule of three" in found.method
    everything = crossed_interval(np.ones((3, 600)), bounded=True)
    assert everything.low == pytest.approx(0.99)  # what was not seen may be the opposite
    assert everything.high == 1.0
    for seeds in (1, 2):
        assert (ONE_SEED in crossed_interval(np.zeros((seeds, 9)), bounded=True).note) == (seeds == 1)
    lone = crossed_interval([[0.0]], bounded=True)
    assert (lone.low, lone.high) == (-1, 1)


@pytest.mark.parametrize("samples", [1, 2, 4, 5, 7, 16])
@pytest.mark.parametrize("gained", [1.0, -1.0])
def test_few_samples_that_all_gain_are_no_certainty(samples, gained):
    """Each gains or loses with probability 1/2 where nothing is true: all do the same in 2 of 2^N tables.

    And where one of 1 - 0.05^(1/N) loses, all gain in 5 %.
    """
    found = crossed_interval(np.full((3, samples), gained), bounded=True)
    assert found.p_value >= 2 / 2**samples
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0) == (samples > 5)
    far, near = sorted((found.low * gained, found.high * gained))
    assert -1 <= far <= 2 * 0.05 ** (1 / samples) - 1
    assert near == 1


def test_identical_seeds_have_no_interval():
    for found in (seed_interval([0.1, 0.1, 0.1]), crossed_interval(np.full((3, 20), 0.3))):
        assert not found.known
        assert np.isnan(found.p_value)
        assert found.note.startswith("the difference is the same in every run")
    assert crossed_interval(np.full((1, 20), 0.3)).note == f"{ONE_SEED}; {found.note}"
    alone = seed_interval([0.3])
    assert (alone.seeds, alone.samples, alone.networks, alone.note) == (1, 1, 0, ONE_SEED)


def test_seeds_that_agree_by_chance_do_not_make_a_zero_width():
    d = np.zeros((3, 100))
    d[[0, 1, 2], [5, 17, 60]] = 1.0  # one other sample for each seed: same mean, no shared sample
    found = crossed_interval(d, bounded=True)
    assert found.high - found.low > 0.01


def test_not_finite_or_empty_differences_are_refused():
    for bad in (np.full((3, 4), np.nan), np.zeros((3, 0)), np.zeros(3)):
        with pytest.raises(LskdError):
            crossed_interval(bad)
    with pytest.raises(LskdError):
        seed_interval([0.1, np.inf])


def test_pseudo_values_equal_the_jackknife_done_by_leaving_out():
    rng = np.random.default_rng(3)
    labels = np.array([0] * 5 + [1] * 8 + [2] * 3)
    p = rng.random(len(labels))
    instability = np.mean([p[labels == c].std(ddof=1) for c in range(3)])
    found = target_std_pseudo_values(p, labels)
    assert found.mean() == pytest.approx(instability)
    for c in range(3):
        own = p[labels == c]
        n = len(own)
        pseudo = np.array([n * own.std(ddof=1) - (n - 1) * np.delete(own, i).std(ddof=1) for i in range(n)])
        expected = instability + (pseudo - pseudo.mean()) * len(p) / (3 * n)
        np.testing.assert_allclose(found[labels == c], expected, rtol=1e-10)


def test_pseudo_values_need_three_samples_per_class():
    with pytest.raises(LskdError, match="class 1"):
        target_std_pseudo_values([0.1, 0.2, 0.3, 0.4, 0.5], [0, 0, 0, 1, 1])


def test_holm_by_hand():
    # Sorted .01 .03 .04: times 3, 2, 1 and never falling: .03 .06 .06; NaN is no test.
    np.testing.assert_allclose(holm([0.01, 0.04, np.nan, 0.03]), [0.03, 0.06, np.nan, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])


def test_hypotheses_about_one_parameter_count_once():
    # Two parameters left: times 2; "a" is done with only when both of its tests are.
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03], ["a", "a", "b"]), [0.02, 0.04, 0.04])
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03], ["a", "b", "a"]), [0.02, 0.04, 0.04])
    np.testing.assert_allclose(holm([0.01, 0.03, 0.02], ["a", "b", "a"]), [0.02, 0.04, 0.04])
    # A weight of 2 of 4: times 4 / 2, then, without it, times 2 and 1.
    np.testing.assert_allclose(holm([0.01, 0.012, 0.03], None, {0: 2.0}), [0.02, 0.024, 0.03])
    p = np.random.default_rng(0).random(20)
    np.testing.assert_array_equal(holm(p, list(range(20))), holm(p))


# Simulations with a known truth, S = 3 seeds and N = 600 samples as in the digits study.

SEEDS, SAMPLES, TABLES = 3, 600, 1500


def gaussian(rng, seed, sample, error):
    d = seed * rng.standard_normal((TABLES, SEEDS, 1)) + sample * rng.standard_normal((TABLES, 1, SAMPLES))
    return d + error * rng.standard_normal((TABLES, SEEDS, SAMPLES))


def accuracy_differences(rng, difficulty, spread, seed_noise, effect=0.0):
    """Correct minus correct, as two arms of real students give: samples of shared difficulty, mostly easy."""
    shared = difficulty + spread * rng.standard_normal((TABLES, 1, SAMPLES))
    arms = []
    for shift in (0.0, effect):
        own = 0.7 * rng.standard_normal((TABLES, 1, SAMPLES)) + seed_noise * rng.standard_normal(
            (TABLES, SEEDS, 1)
        )
        arms.append(rng.random((TABLES, SEEDS, SAMPLES)) < 1 / (1 + np.exp(-(shared + own + shift))))
    return arms[1].astype(np.float64) - arms[0]


def excludes_zero(d):
    mean, seed_variance, sample_variance = crossed_moments(d)
    return np.abs(mean) > half_width(seed_variance, sample_variance, SEEDS - 1, SAMPLES - 1)


@pytest.mark.parametrize(
    ("seed", "sample", "error"),
    [
        (1, 0, 0.001),
        (0, 1, 0.001),
        (0, 0, 1),
        (0.03, 1, 1),
        (0.1, 1, 3),
        (0.02, 0.3, 1),
        (0.2, 1, 1),
        (0.1, 0, 1),
    ],
)
def test_intervals_keep_their_coverage_whatever_varies(seed, sample, error):
    missed = excludes_zero(gaussian(np.random.default_rng(10), seed, sample, error)).mean()
    assert 0.01 <= missed <= 0.08


@pytest.mark.parametrize(
    ("difficulty", "spread", "seed_noise"), [(5, 2, 0), (5, 2, 0.3), (6, 3, 0.5), (4, 0, 0), (9, 4, 0.2)]
)
def test_intervals_of_accuracy_differences_keep_their_coverage(difficulty, spread, seed_noise):
    d = accuracy_differences(np.random.default_rng(11), difficulty, spread, seed_noise)
    assert np.mean(d != 0) < 0.1
    # 5 % are expected; 1,500 tables have a standard error of 0.6 points.
    assert 0.01 <= excludes_zero(d).mean() <= 0.07


def test_a_real_difference_is_found():
    d = accuracy_differences(np.random.default_rng(12), 5, 2, 0.1, effect=2.0)
    assert d.mean() > 0.01
    assert excludes_zero(d).mean() > 0.8


def test_instability_intervals_keep_their_coverage():
    """1-S of two arms: new samples and new seeds each time; the truth is the mean over very many of both."""
    rng = np.random.default_rng(13)
    labels = np.repeat(np.arange(10), 60)
    tables = 400

    def draw(count):
        easy = rng.normal(3.0, 1.5, (count, 1, len(labels)))
        arms = []
        for shift, scale in ((0.0, 1.0), (0.5, 0.8)):
            own = shift + scale * easy + 0.5 * rng.standard_normal((count, SEEDS, len(labels)))
            own = own + 0.2 * rng.standard_normal((count, SEEDS, 1))
            arms.append(1 / (1 + np.exp(-own)))
        return arms

    before, after = draw(3000)
    by_class = [p.reshape(*p.shape[:2], 10, 60).std(-1, ddof=1).mean() for p in (before, after)]
    truth = by_class[1] - by_class[0]
    missed = 0
    for p0, p1 in zip(*draw(tables), strict=True):
        d = [
            target_std_pseudo_values(b, labels) - target_std_pseudo_values(a, labels)
            for a, b in zip(p0, p1, strict=True)
        ]
        found = crossed_interval(np.array(d), strata=labels)
        missed += not found.low <= truth <= found.high
    assert 0.01 <= missed / tables <= 0.08
