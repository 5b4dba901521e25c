"""A trend over teacher networks: networks, seeds and samples all random.

For each network ``m``, seed ``s`` and sample ``i`` there is a teacher's value ``x`` and what it should
explain, ``y`` (a student's value, or another of the teacher's). The slope is that of the networks' means::

    b = S_xy / S_xx,   S_xy = sum over m of (X_m - mean X)(Y_m - mean Y)

Teacher and student are measured on the same samples and come from the same seed, so their errors go together
(a student copies what its teacher happens to get right), and sums of the measured means would find a slope
where there is none. ``S_xy`` and ``S_xx`` are therefore U-statistics: products of two *different* seeds and
two *different* samples only, whose errors do not go together.

The paper speaks of teachers, not of the four that it trained, so networks are a sample, and how far they lie
from the line decides how well it is known: with M networks, M - 2 degrees of freedom. That scatter contains
what seeds and samples vary in single networks: a seed is another training in each. What it cannot show is
what samples do to all networks alike, such as telling strong from weak ones better than other samples would.
So the variance of the slope has two parts, each widened by the t quantile of its own degrees of freedom (see
`intervals`): the scatter about the line, and by how much the variance over samples is larger than that of
networks which vary independently.
"""

import numpy as np
from numpy.typing import ArrayLike

from lskd_study.stats.intervals import (
    Array,
    Interval,
    Part,
    centre_within,
    crossed_moments,
    no_interval,
    parts_interval,
)

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
    # What one seed and one sample of each network add to the slope (its first-order influence).
    influence = (means_x[:, None, None] * (y - slope * x) + rest[:, None, None] * x) / s_xx
    together, alone = _sample_variance(influence.sum(0), strata), _sample_variance(influence, strata).sum()
    sample_df = samples - (1 if strata is None else len(np.unique(np.asarray(strata))))
    parts = [Part(about_line, networks - 2), Part(max(float(together - alone), 0.0), sample_df)]
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


def _sample_variance(values: Array, strata: ArrayLike | None) -> Array:
    """Return the variance that samples give the mean of ``(..., S, N)``."""
    if values.shape[-2] > 1:
        return crossed_moments(values, strata).sample_variance
    centred, groups = centre_within(values[..., 0, :], strata)
    return np.asarray(np.square(centred).sum(-1) / (values.shape[-1] - groups) / values.shape[-1])
