"""Paired bootstrap intervals for what teachers measure on the same samples.

Samples are redrawn, the same for every teacher and quantity, so a difference is paired. Each quantity comes
as one contribution per sample whose mean is the quantity (`lskd.TeacherMeasures.contributions`): exact for
means, first order for the stabilities. A bootstrap of the stabilities themselves would be off by their
small-sample bias: a class redrawn from its own ``n`` samples has a deviation smaller by ``sqrt((n-1)/n)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lskd_study.stats.intervals import LEVEL, Array

METHOD = "paired bootstrap over samples, percentiles"
_BLOCK = 1 << 22  # weights drawn at once


@dataclass(frozen=True)
class Estimate:
    """A value or difference with its 95 % interval; ``p_value`` is two-sided, against zero."""

    value: float
    low: float
    high: float
    p_value: float
    note: str = ""

    def scaled(self, factor: float) -> "Estimate":
        """Return it in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.p_value, self.note)


def resampled_means(
    contributions: Array, replicates: int, seed: int, progress: Callable[[int], object] | None = None
) -> Array:
    """Return the means ``(replicates, M)`` of contributions ``(N, M)`` over redrawn samples.

    All columns see the same draws. ``progress`` gets the number of replicates just made.
    """
    samples = len(contributions)
    generator = np.random.default_rng(seed)
    # Around their means, so that large means cost no digits.
    centre = contributions.mean(0)
    centred = contributions - centre
    means = np.empty((replicates, contributions.shape[1]))
    step = max(_BLOCK // samples, 1)
    for start in range(0, replicates, step):
        count = min(step, replicates - start)
        weights = np.empty((count, samples))
        for row in weights:
            row[:] = np.bincount(generator.integers(samples, size=samples), minlength=samples)
        means[start : start + count] = weights @ centred / samples
        if progress:
            progress(count)
    return np.asarray(means + centre)


def percentiles(draws: Array) -> tuple[float, float]:
    """Return the two ends of the 95 % percentile interval of redrawn values ``(replicates,)``."""
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def of_draws(value: float, draws: Array) -> Estimate:
    """Return a difference with percentile interval and p-value of its redrawn values ``(replicates,)``.

    The p-value is two-sided: twice the share of draws on the other side of zero (the value itself counted
    among them), so that it is below 0.05 only where the interval excludes zero.
    """
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Estimate(value, *percentiles(draws), min(2 * (beyond + 1) / (len(draws) + 1), 1.0))


def difference(first: Array, second: Array, draws: Array, bounded: bool = False) -> Estimate:
    """Return the interval of ``mean(second) - mean(first)``.

    Args:
        first: contributions ``(N,)`` of the first teacher.
        second: of the second.
        draws: redrawn means of ``second`` less those of ``first``, ``(replicates,)``.
        bounded: the contributions are 0 or 1. If the two agree on every sample, a bootstrap sees no variance;
            the interval is then the rule of three's, ``3 / N`` to either side.
    """
    gaps = second - first
    value = float(gaps.mean())
    if not np.isfinite(value):
        return Estimate(value, np.nan, np.nan, np.nan, "no value to take an interval of")
    if np.ptp(gaps) == 0:
        note = "the same on every sample"
        if bounded and value == 0:
            half = min(3 / len(gaps), 1.0)
            return Estimate(value, -half, half, 1.0, f"{note}; the rule of three bounds what was not seen")
        return Estimate(value, value, value, 1.0 if value == 0 else 0.0, note)
    return of_draws(value, draws)


def paired_differences(
    teachers: Sequence[Array],
    replicates: int,
    seed: int,
    bounded: Sequence[bool],
    progress: Callable[[int], object] | None = None,
) -> dict[tuple[int, int], list[Estimate]]:
    """Return every later teacher's differences from every earlier one, by their positions (earlier, later).

    ``teachers``: contributions ``(N, Q)`` of each on the same samples. ``bounded``: for each of the ``Q``
    quantities, see :func:`difference`. ``progress``: see :func:`resampled_means`.
    """
    draws = resampled_means(np.concatenate(teachers, axis=1), replicates, seed, progress)
    by_teacher = np.split(draws, len(teachers), axis=1)
    return {
        (i, j): [*map(difference, teachers[i].T, teachers[j].T, (by_teacher[j] - by_teacher[i]).T, bounded)]
        for i, j in combinations(range(len(teachers)), 2)
    }
