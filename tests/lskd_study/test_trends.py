"""The trend over networks by itself: spelled out, and on simulated teachers whose slope is known."""

import numpy as np
import pytest

from lskd_study.stats import trends
from lskd_study.stats.trends import METHOD, cross_product, network_trend
from simulated import World, logistic

pytestmark = pytest.mark.unit


def product(x, y):
    """The mean of the products of different seeds and samples, of one seed of different samples, summed."""
    _, seeds, samples = x.shape
    apart = [1 - np.eye(seeds) if seeds > 1 else np.ones((1, 1)), 1 - np.eye(samples)]
    pairs = [mask / mask.sum() for mask in apart]
    return np.einsum("msi,mtj,st,ij->", x, y, *pairs)


def of_samples(table, strata):
    """The samples' part of the variance of a mean, of an analysis of variance within strata."""
    seeds, samples = table.shape
    free = samples - len(set(strata))
    rest = table - [[row[strata == one].mean() for one in strata] for row in table]
    error = np.square(rest - rest.mean(0)).sum() / ((seeds - 1) * free) if seeds > 1 else 0.0
    return max(seeds * np.square(rest.mean(0)).sum() / free - error, 0.0) / (seeds * samples)


def drawn(networks, seeds, samples=12, shared=1.0, seed=43):
    """Tables whose samples show the networks' strength differently, in all networks alike if ``shared``."""
    rng = np.random.default_rng(seed)
    each = 1 + shared * rng.standard_normal((1, 1, samples))
    x = 3 * rng.standard_normal((networks, 1, 1)) + 0.3 * rng.standard_normal((networks, seeds, samples))
    y = 0.7 * x * each + rng.standard_normal((networks, 1, 1)) + 0.3 * rng.standard_normal(x.shape)
    return x.astype(np.float32), y.astype(np.float32)  # as they are stored


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_the_slope_and_its_variance_spelled_out(classes, seeds, shared):
    x, y = drawn(5, seeds, shared=shared)
    strata = np.arange(12) % classes
    found = network_trend(x, y, strata if classes > 1 else None)
    x, y = (values - values.mean(0) for values in (x.astype(np.float64), y.astype(np.float64)))
    s_xx = product(x, x)
    slope = product(x, y) / s_xx
    mean_x, mean_y = (values.mean((1, 2), keepdims=True) for values in (x, y))

    def sums(step):
        """Products of the means, one value of a network weighing more; quadratic in the weight."""
        moved_x, moved_y = mean_x + step * x, mean_y + step * y
        return moved_x * moved_y - slope * moved_x**2

    influence = (sums(1.0) - sums(-1.0)) / 2 / s_xx
    together = of_samples(influence.sum(0), strata) - sum(of_samples(one, strata) for one in influence)
    about_line = np.square(mean_y - slope * mean_x).sum() / 3 / s_xx
    assert found.estimate == pytest.approx(slope)
    np.testing.assert_allclose(found.parts, [(about_line, 3), (max(together, 0.0), 12 - classes)])
    assert (together > 0) == bool(shared)
    assert (found.seeds, found.samples, found.networks) == (seeds, 12, 5)
    assert (found.method, found.note) == (METHOD, "")


def test_the_fewest_networks_are_those_that_can_lie_off_a_line():
    freedom = [network_trend(*drawn(trends.FEWEST + more, 3)).parts[0].df for more in (0, 1)]
    assert freedom == [1, 2]


def test_why_there_is_no_interval():
    x, y = drawn(5, 3)
    alike = y - y.mean((1, 2), keepdims=True)  # its means are 0 to rounding
    checked = np.array([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for of_teachers in (alike, checked):  # of that the products of other seeds and samples are positive
        found = network_trend(of_teachers, of_teachers)
        assert np.isnan([found.estimate, found.low]).all()
        assert "differ by little more than what seeds and samples vary" in found.note
    found = network_trend(x, 2 * x)
    assert found.estimate == pytest.approx(2)
    assert not found.known
    assert "all networks lie on one line" in found.note
    assert (found.seeds, found.samples, found.networks, found.method) == (3, 12, 5, METHOD)


def networks_of(rng, world, networks, seeds, samples):
    easy = world.level + 1.5 * rng.standard_normal((1, 1, samples))
    strength = world.network_spread * rng.standard_normal((networks, 1, 1))
    ways = world.own_ways * rng.standard_normal((networks, 1, 1))
    error = 0.7 * rng.standard_normal((networks, 1, samples))
    error = error + world.luck * rng.standard_normal((networks, seeds, 1))
    odds = easy + strength + error, easy + world.slope * strength + ways + world.copied * error
    return [(rng.random(one.shape) < logistic(one + 0 * error)).astype(float) for one in odds]


@pytest.mark.parametrize(
    ("networks", "seeds", "samples", "world"),
    [
        (3, 3, 400, World()),
        (4, 3, 400, World(luck=0.2, copied=1.0)),
        (4, 3, 400, World(network_spread=0.1, copied=1.0)),  # hardly any difference between teachers
        (8, 3, 400, World(network_spread=0.3, copied=1.0)),
        (6, 3, 400, World(own_ways=0.5)),
        (8, 2, 400, World(own_ways=0.2, network_spread=1.0)),
        (8, 1, 400, World(own_ways=0.3, network_spread=1.0)),
    ],
)
def test_a_trend_over_networks_is_rarely_seen_where_there_is_none(networks, seeds, samples, world):
    rng = np.random.default_rng(20)
    found = [network_trend(*networks_of(rng, world, networks, seeds, samples)) for _ in range(300)]
    # 5 % are nominal; 300 draws have a standard error of 0.013.
    assert np.mean([interval.known and interval.p_value < 0.05 for interval in found]) <= 0.075


@pytest.mark.parametrize(
    ("networks", "seeds", "own_ways"), [(3, 3, 0.3), (4, 3, 0.3), (8, 3, 0.5), (8, 3, 0.0), (6, 1, 0.3)]
)
def test_the_slopes_interval_keeps_its_coverage(networks, seeds, own_ways):
    """Numbers without the ceiling of probabilities, so that the true slope is known."""
    rng = np.random.default_rng(21)
    missed, known, slope, samples = 0, 0, 0.7, 200
    for _ in range(2000):
        strength = rng.standard_normal((networks, 1, 1))
        ways = own_ways * rng.standard_normal((networks, 1, 1))
        each = 1 + 0.5 * rng.standard_normal((1, 1, samples))  # samples differ in how strength shows
        error = 2 * rng.standard_normal((networks, 1, samples)) + 0.1 * rng.standard_normal(
            (networks, seeds, 1)
        )
        x = strength * each + error + rng.standard_normal((networks, seeds, samples))
        y = slope * strength * each + ways + 0.8 * error + rng.standard_normal((networks, seeds, samples))
        found = network_trend(x, y)
        known += found.known
        missed += found.known and not found.low <= slope <= found.high
    assert known > 1500
    print(f"{networks} networks, {seeds} seeds: contained in {1 - missed / known:.3f}")
    # 5 % are nominal; 2000 draws have a standard error of 0.005; no misses is too wide.
    assert 0.025 <= missed / known <= 0.065


@pytest.mark.parametrize(("networks", "spread"), [(8, 0.1), (12, 0.05), (8, 0.8)])
def test_a_student_that_copies_its_teachers_luck_with_samples_is_no_trend(networks, spread):
    """Networks get other samples right; students copy that. Slopes of the measured means are then "found"
    in up to 97 % of such studies, though no network teaches better than another.
    """
    rng = np.random.default_rng(26)
    alarms = 0
    for _ in range(200):
        easy = 1.5 + 1.5 * rng.standard_normal((1, 1, 200))
        taste = 1.5 * rng.standard_normal((networks, 1, 200)) + 0.3 * rng.standard_normal((networks, 3, 200))
        x = easy + spread * rng.standard_normal((networks, 1, 1)) + taste > 0
        y = easy + taste + 0.3 * rng.standard_normal((networks, 3, 200)) > 0
        found = network_trend(x.astype(float), y.astype(float))
        alarms += found.known and found.p_value < 0.05
    assert alarms / 200 <= 0.075


def test_errors_in_common_make_no_slope():
    """Sums of the measured means would find one: this is what the U-statistic is for."""
    rng = np.random.default_rng(22)
    fair, naive = [], []
    for _ in range(200):
        error = rng.standard_normal((4, 3, 50))
        error -= error.mean(0)
        fair.append(cross_product(error, error))
        naive.append(float(np.square(error.mean((1, 2))).sum()))
    assert abs(np.mean(fair)) < 3 * np.std(fair) / np.sqrt(200)
    assert np.mean(naive) > 10 * np.std(naive) / np.sqrt(200)


def test_the_cross_product_is_the_sum_over_different_seeds_and_samples():
    rng = np.random.default_rng(23)
    x, y = rng.normal(size=(2, 3, 2, 4))
    expected = np.mean(
        [
            (x[:, s, i] * y[:, t, j]).sum()
            for s in range(2)
            for t in range(2)
            for i in range(4)
            for j in range(4)
            if s != t and i != j
        ]
    )
    assert cross_product(x, y) == pytest.approx(expected)
