"""A trend over teacher networks: networks, seeds and samples all random.

For each network ``m``, seed ``s`` and sample ``i`` there is a teacher's value ``x`` and what it should
explain, ``y`` (a student's value, or another of the teacher's). The slope is that of the networks' means::

    b = S_xy / S_xx,   S_xy = sum over m of (X_m - mean X)(Y_m - mean Y)

Teacher and student are measured on the same samples and come from the same seed, so their errors go together
(a student copies what its teacher happens to get right), and sums of the measured means would find a slope
where there is none. ``S_xy`` and ``S_xx`` are therefore U-statistics: products of two *different* seeds and
two *different* samples only, whose errors do not go together.

The paper speaks of teachers, not of the four that it trained, so networks are a sample, and how far they lie
from the line decides how well it is known: with M networks, M - 2 degrees of freedom. The variance of the
slope has three parts, each widened by the t quantile of its own degrees of freedom (see `statistics`): what
networks leave about the line, what seeds vary and what samples vary. The first contains already what seeds
and samples vary in single networks, so that the interval is on the safe side.
"""

import numpy as np
from numpy.typing import ArrayLike

from lskd_study.stats.intervals import Array, Interval, Part, crossed_moments, no_interval, parts_interval

METHOD = "slope, networks, seeds and samples crossed"
FEWEST = 3  # networks; two lie on a line whatever they are
_RELIABLE = 0.8


def network_trend(x: ArrayLike, y: ArrayLike, strata: ArrayLike | None = None) -> Interval:
    """Return the slope of ``y`` on ``x`` over networks with its 95 % interval.

    Args:
        x: of the teachers, ``(M, S, N)``: networks, seeds, samples.
        y: what is explained, ``(M, S, N)``.
        strata: ``(N,)`` int, where the samples are drawn within fixed classes.

    NaN, without an interval, where the networks' ``x`` differ by little more than what seeds and samples
    vary: at least 0.8 of the variance of their means must be their own.
    """
    x, y = _centred(x), _centred(y)
    networks, seeds, samples = x.shape
    means_x, means_y = x.mean((1, 2)), y.mean((1, 2))
    measured = float(np.square(means_x).sum())
    s_xx, s_xy = cross_product(x, x), cross_product(x, y)
    if not (measured > 0 and s_xx > _RELIABLE * measured):
        note = "the teachers differ by little more than what seeds and samples vary"
        return no_interval(np.nan, seeds, samples, METHOD, note, networks)
    slope = s_xy / s_xx
    rest = means_y - slope * means_x
    about_line = float(np.square(rest).sum()) / (networks - 2) / s_xx
    # What one seed and one sample add to the slope (its first-order influence).
    influence = np.einsum("m,msi->si", means_x, y - slope * x) + np.einsum("m,msi->si", rest, x)
    parts = [Part(about_line, networks - 2), *_crossed_parts(influence / s_xx, strata)]
    found = parts_interval(slope, parts, (seeds, samples), METHOD, networks=networks)
    if not found.known:
        return no_interval(slope, seeds, samples, METHOD, "all networks lie on one line exactly", networks)
    return found


def cross_product(x: Array, y: Array) -> float:
    """Return an unbiased ``sum over m of X_m Y_m`` from ``(M, S, N)``, of different seeds and samples only.

    With one seed, of different samples only.
    """
    _, seeds, samples = x.shape
    all_pairs = float((x.sum((1, 2)) * y.sum((1, 2))).sum())
    same_sample = float((x.sum(1) * y.sum(1)).sum())
    if seeds == 1:
        return (all_pairs - same_sample) / float(samples * (samples - 1))
    same_seed = float((x.sum(2) * y.sum(2)).sum())
    same_both = float((x * y).sum())
    pairs = float(seeds * (seeds - 1) * samples * (samples - 1))
    return (all_pairs - same_seed - same_sample + same_both) / pairs


def _centred(values: ArrayLike) -> Array:
    table = np.asarray(values, dtype=np.float64)
    return np.asarray(table - table.mean(0))


def _crossed_parts(influence: Array, strata: ArrayLike | None) -> list[Part]:
    seeds, samples = influence.shape
    sample_df = samples - (1 if strata is None else len(np.unique(np.asarray(strata))))
    if seeds == 1:
        # What samples and seed vary together, networks being few; the seed's own part is about the line.
        centred = influence[0] - influence[0].mean()
        return [Part(float(np.square(centred).sum()) / sample_df / samples, sample_df)]
    _, by_seed, by_sample = crossed_moments(influence, strata)
    return [Part(float(by_seed), seeds - 1), Part(float(by_sample), sample_df)]
