import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from lskd import LskdError
from lskd_study.claims.measures import correlate
from lskd_study.stats.intervals import crossed_interval
from lskd_study.stats.ranks import pick, rank_correlation

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
vectors = st.integers(3, 12).flatmap(
    lambda m: st.tuples(*[st.lists(st.integers(0, 6), min_size=m, max_size=m)] * 2)
)


def spelled_out(x, y):
    """Pairs in order, pairs the other way round, and tau-b from its definition."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    agree = [np.sign(x[a] - x[b]) * np.sign(y[a] - y[b]) for a, b in pairs]
    untied = [sum(v[a] != v[b] for a, b in pairs) for v in (x, y)]
    return agree.count(1), agree.count(-1), sum(agree) / math.sqrt(untied[0] * untied[1])


def with_pairs_in_order(teachers, count):
    """Ranks of which ``count`` pairs are in order: each teacher passes as many before it as are left."""
    order = []
    for position in range(teachers):
        passed = min(position, count)
        order.insert(passed, position)
        count -= passed
    return np.array(order).argsort()


# The correlation


@PROPERTY
@given(vectors)
@example(([1, 1, 1], [1, 2, 3]))
def test_tau_is_its_definition_and_scipys(values):
    x, y = (np.array(v, dtype=float) for v in values)
    found = rank_correlation(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(found.estimate)
        assert not found.known
        assert "equal" in found.note
        return
    assert found.estimate == pytest.approx(spelled_out(x, y)[2])
    assert found.estimate == pytest.approx(stats.kendalltau(x, y).statistic)
    assert -1 <= found.low <= found.estimate + 1e-9
    assert found.estimate <= found.high + 1e-9 <= 1 + 1e-9


@PROPERTY
@given(vectors, st.integers(0, 2**32 - 1))
def test_only_ranks_count_and_the_other_direction_mirrors(values, seed):
    x, y = (np.array(v, dtype=float) for v in values)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    found = rank_correlation(x, y)
    assert rank_correlation(np.exp(x), y**3 - 4) == found
    order = np.random.default_rng(seed).permutation(len(x))
    moved = rank_correlation(x[order], y[order])
    assert (moved.low, moved.high, moved.p_value) == (found.low, found.high, found.p_value)
    assert rank_correlation(y, x).low == found.low
    mirrored = rank_correlation(-x, y)
    assert mirrored.estimate == pytest.approx(-found.estimate)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=0.02)
    assert mirrored.p_value == pytest.approx(found.p_value)


@pytest.mark.parametrize("teachers", range(3, 13))
def test_p_is_scipys_exact_one_and_agrees_with_the_interval_for_every_number_of_pairs(teachers):
    for count in range(teachers * (teachers - 1) // 2 + 1):
        y = with_pairs_in_order(teachers, count)
        assert spelled_out(range(teachers), y)[0] == count
        found = rank_correlation(np.arange(teachers), y)
        reference = stats.kendalltau(np.arange(teachers), y, method="exact")
        assert found.p_value == pytest.approx(reference.pvalue)
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
    assert ("p < 0.05" in found.note) == (teachers < 5)


def test_p_is_the_share_of_permutations_spelled_out():
    x, y = np.arange(5), np.array([1, 0, 2, 4, 3])
    seen = spelled_out(x, y)[0]
    counts = [spelled_out(x, p)[0] for p in itertools.permutations(range(5))]
    share = min(np.mean([c >= seen for c in counts]), np.mean([c <= seen for c in counts]))
    assert rank_correlation(x, y).p_value == pytest.approx(2 * share)


def test_a_tie_can_be_broken_either_way_within_the_interval():
    y = [1, 2, 3, 4, 5, 6]
    tied = rank_correlation([1, 2, 2, 3, 5, 4], y)
    ways = [rank_correlation(x, y) for x in ([1, 2, 2.1, 3, 5, 4], [1, 2.1, 2, 3, 5, 4])]
    assert tied.low == min(way.low for way in ways)
    assert tied.high == max(way.high for way in ways)
    assert tied.p_value == max(way.p_value for way in ways)


@pytest.mark.parametrize("teachers", [3, 4, 6, 12])
@pytest.mark.parametrize("tau", [-0.4, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one-sided"])
def test_the_interval_covers_whatever_the_number_of_teachers(teachers, tau, kind):
    rng = np.random.default_rng(7)
    trials, covered = 600, 0
    rho = math.sin(math.pi / 2 * tau)
    for _ in range(trials):
        z = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=teachers)
        if kind == "heavy tails":
            z /= np.sqrt(rng.chisquare(3, (teachers, 1)) / 3)  # a t copula has the same tau
        elif kind == "one-sided" and tau > 0:
            theta = 2 * tau / (1 - tau)  # Clayton's: teachers agree most where both are bad
            common = rng.gamma(1 / theta, size=(teachers, 1))
            z = (1 + rng.exponential(size=(teachers, 2)) / common) ** (-1 / theta)
        found = rank_correlation(*z.T)
        covered += found.low <= tau <= found.high
    assert covered / trials >= 0.93


@pytest.mark.parametrize(("teachers", "count"), [(3, 3), (5, 8), (7, 21), (7, 9)])
def test_the_ends_are_where_so_many_pairs_in_order_become_unlikely(teachers, count):
    """Against teachers drawn at each end: 2.5 % have as many pairs in order or more, or as many or fewer."""
    rng = np.random.default_rng(5)
    found = rank_correlation(np.arange(teachers), with_pairs_in_order(teachers, count))
    first, second = np.triu_indices(teachers, 1)
    for end, tail in ((found.low, np.greater_equal), (found.high, np.less_equal)):
        if end == 1:
            continue
        rho = math.sin(math.pi / 2 * end)
        x, z = rng.standard_normal((2, 40_000, teachers))
        y = rho * x + math.sqrt(1 - rho**2) * z
        in_order = ((x[:, first] > x[:, second]) == (y[:, first] > y[:, second])).sum(1)
        assert tail(in_order, count).mean() == pytest.approx(0.025, abs=0.004)


def test_teachers_of_one_network_are_no_independent_sample():
    """Where nothing goes with anything, and a network's two teachers are nearly alike in both."""
    rng = np.random.default_rng(3)
    found, naive = [], []
    for _ in range(400):
        x, y = (np.repeat(rng.normal(size=6), 2) + 0.2 * rng.normal(size=12) for _ in range(2))
        found.append(correlate(x, y, 6).p_value < 0.05)
        naive.append(rank_correlation(x, y).p_value < 0.05)
    assert np.mean(found) < 0.05 + 0.033
    assert np.mean(naive) > 0.1


def test_fewer_than_three_teachers_have_no_interval():
    found = rank_correlation([1.0, 2.0], [3.0, 5.0])
    assert found.estimate == 1
    assert not found.known
    assert "too few" in found.note


# Seeds and samples


def noisy(rng, truth, seeds=3, samples=200, seed_noise=0.02, sample_noise=0.3, shared=0.8):
    """Teachers' and students' values, whose errors go together."""
    teachers = len(truth)
    tables = []
    common = [rng.normal(size=(teachers, seeds, 1)), rng.normal(size=(teachers, 1, samples))]
    for _ in range(2):
        own = [rng.normal(size=part.shape) for part in common]
        by_seed, by_sample = (
            shared**0.5 * c + (1 - shared) ** 0.5 * o for c, o in zip(common, own, strict=True)
        )
        tables.append(truth[:, None, None] + seed_noise * by_seed + sample_noise * by_sample)
    return tables


def test_tables_of_seeds_and_samples_count_by_their_means():
    rng = np.random.default_rng(0)
    x, y = noisy(rng, np.linspace(0, 1, 6))
    assert rank_correlation(x, y) == rank_correlation(x.mean((1, 2)), y.mean((1, 2)))
    assert rank_correlation(x, y.mean(2)) == rank_correlation(x.mean(2), y)
    assert rank_correlation(x, y).known
    right = y > 0.5
    assert pick(x, right) == pick(x, right.astype(float))


@pytest.mark.parametrize("seeds", [1, 3])
def test_errors_of_teacher_and_student_that_go_together_are_no_correlation(seeds):
    rng = np.random.default_rng(1)
    found = [rank_correlation(*noisy(rng, np.full(8, 70.0), seeds)) for _ in range(200)]
    assert np.mean([one.estimate for one in found]) > 0.4
    assert np.mean([one.p_value < 0.05 for one in found]) <= 0.05
    assert "differ by little more" in next(one.note for one in found if not one.known)


@pytest.mark.parametrize("shape", ["per seed", "per sample"])
def test_a_measure_with_one_value_per_run_is_checked_by_its_seeds(shape):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 4)) * 0.01 + np.arange(6)[:, None]
    y = noisy(rng, np.arange(6.0), 4)[0]
    assert rank_correlation(x, y).known
    alike = x - np.arange(6)[:, None]
    noise = rank_correlation(alike, y) if shape == "per seed" else rank_correlation(y, alike[..., None])
    assert not noise.known
    assert ("teachers" in noise.note) == (shape == "per seed")


# The pick


def test_the_pick_and_its_regret():
    accuracy = [70.0, 72.5, 71.0, 72.0]
    good = pick([0.1, 0.4, 0.2, 0.3], accuracy)
    assert (good.teacher, good.regret) == (1, 0.0)
    bad = pick([-0.1, -0.4, -0.2, -0.3], accuracy)
    assert (bad.teacher, bad.regret) == (0, 2.5)
    assert np.isnan(bad.high)
    assert "seed" in bad.note


def test_two_students_that_are_equally_good_are_both_best():
    found = pick([1.0, 3.0, 2.0], [5.0, 5.0, 4.0])
    assert (found.teacher, found.regret) == (1, 0.0)


def test_accuracies_that_differ_by_rounding_are_equal():
    """Means over three students: 0, 1/3, 2/3 or 1 of a hundred, by sample."""
    rng = np.random.default_rng(1)
    answers = rng.integers(0, 2, (3, 2, 40))
    table = 100 * np.array([np.mean(rng.permuted(answers, axis=2), axis=0) for _ in range(6)])
    assert len(set(table.mean((1, 2)))) > 1  # the number of right answers is the same
    assert all(pick(order, table).regret == 0 for order in np.eye(6))
    assert np.isnan(rank_correlation(np.arange(6.0), table).estimate)


def test_many_teachers_take_no_more_memory_than_few():
    tracemalloc.start()
    found = rank_correlation(np.arange(60), np.arange(60))
    assert tracemalloc.get_traced_memory()[1] < 2e8
    tracemalloc.stop()
    assert 0.8 < found.low < found.estimate == 1


def test_of_two_teachers_the_interval_is_that_of_their_difference():
    x, y = noisy(np.random.default_rng(0), np.array([0.0, 0.3]))
    found = pick(-x, y)
    reference = crossed_interval(y[1] - y[0])
    assert found.regret == pytest.approx(reference.estimate)
    assert (found.low, found.high) == pytest.approx((max(reference.low, 0), reference.high))
    right = pick(x, y)
    assert (right.regret, right.low) == (0.0, 0.0)


@pytest.mark.parametrize("teachers", [3, 8])
def test_the_interval_covers_the_regret(teachers):
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        truth = rng.normal(scale=0.05, size=teachers)
        found = pick(*noisy(rng, truth))
        covered.append(found.low <= truth.max() - truth[found.teacher] <= found.high)
        assert found.low <= found.regret <= found.high
    assert np.mean(covered) >= 0.94


def test_one_seed_and_one_teacher_say_what_is_missing():
    x, y = noisy(np.random.default_rng(0), np.array([0.0, 0.3]), seeds=1)
    found = pick(x, y)
    assert found.high >= 0
    assert "one seed" in found.note
    assert "one seed" in pick([1.0, 2.0], [70.0, 71.0]).note
    alone = pick(x[:1], y[:1])
    assert (alone.teacher, alone.regret) == (0, 0.0)
    assert "one teacher" in alone.note


@pytest.mark.parametrize("call", [rank_correlation, pick])
@pytest.mark.parametrize(
    ("measure", "accuracy", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "2 teachers and the students of 3"),
        ([1.0, np.nan], [1.0, 2.0], "the measure contains NaN"),
        ([1.0, 2.0], [], "the accuracy has shape"),
        (3.0, [1.0], "the measure has shape"),
        (np.ones((2, 1, 1, 1)), [1.0, 2.0], "the measure has shape"),
    ],
)
def test_bad_input_is_refused(call, measure, accuracy, message):
    with pytest.raises(LskdError, match=message):
        call(measure, accuracy)
