"""What a number of seeds can tell: the width of an interval, the power of its test, the seeds that it takes.

The variance of a mean difference has a part that more seeds make smaller and one that only more samples would
(see `intervals`). With ``v`` the variance of one seed's mean, ``u`` that of the samples' mean and S seeds::

    half width(S) = sqrt(t(S - 1)^2 v / S + t(N - 1)^2 u)
    power(S, d)   = P(|estimate| > half width), estimate ~ Normal(d, v / S + u)

where the half width varies with the estimate of ``v``, which has S - 1 degrees of freedom; the power is the
mean over its distribution, not that at its mean, which would promise too much at few seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from lskd_study.stats.intervals import LEVEL, Array, Part

MANY = 1000  # seeds: nobody trains more
_POINTS = 400  # of the distribution of an estimated variance


@dataclass(frozen=True)
class Variances:
    """What a difference of two arms varies by, in the squared unit of the difference.

    Attributes:
        seed: variance of the difference between single seeds' means.
        sample: variance of the mean over samples, which all seeds share.
        sample_df: degrees of freedom of ``sample``.
        seed_df: what ``seed`` was estimated with; 0 where it is assumed.
    """

    seed: float
    sample: float
    sample_df: int
    seed_df: int = 0

    @classmethod
    def of(cls, seeds: int, parts: Sequence[Part]) -> "Variances | None":
        """Return what an interval over ``seeds`` seeds was made of; None where it says nothing of them."""
        if seeds < 2 or not parts:
            return None
        by_seed, by_sample = (*parts, Part(0.0, 0))[:2]
        return cls(by_seed.variance * seeds, by_sample.variance, by_sample.df, by_seed.df)

    def half_width(self, seeds: int, level: float = LEVEL) -> float:
        """Return the half width to expect with a number of seeds: the root of its mean square."""
        return float(np.sqrt(_squared_t(seeds - 1, level) * self.seed / seeds + self._of_samples(level)))

    def power(self, seeds: int, difference: float, level: float = LEVEL) -> float:
        """Return how likely the interval of ``seeds`` seeds excludes zero if ``difference`` is true."""
        by_seed = self.seed / seeds
        half = np.sqrt(
            _squared_t(seeds - 1, level) * by_seed * _estimates(seeds - 1) + self._of_samples(level)
        )
        error = np.sqrt(by_seed + self.sample)
        if error == 0:
            return 1.0 if difference else 0.0
        tails = special.ndtr((difference - half) / error) + special.ndtr((-difference - half) / error)
        return float(tails.mean())

    def detectable(self, seeds: int, power: float = 0.8, level: float = LEVEL) -> float:
        """Return the smallest difference that ``seeds`` seeds find with that power."""
        most = 10 * (self.half_width(seeds, level) + np.sqrt(self.seed / seeds + self.sample))
        if most == 0:
            return 0.0
        return float(optimize.brentq(lambda d: self.power(seeds, d, level) - power, 0.0, most))

    def seeds_for(self, difference: float, power: float = 0.8, level: float = LEVEL) -> int | None:
        """Return how many seeds find a difference with that power; None where no number does."""
        return _fewest(lambda seeds: self.power(seeds, difference, level) >= power)

    def seeds_for_width(self, half: float, level: float = LEVEL) -> int | None:
        """Return how many seeds make the interval that narrow; None where no number does."""
        return _fewest(lambda seeds: self.half_width(seeds, level) <= half)

    def _of_samples(self, level: float) -> float:
        return _squared_t(self.sample_df, level) * self.sample if self.sample else 0.0


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of seeds, two or more, from which on it is enough."""
    if not enough(MANY):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, MANY)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _squared_t(df: int, level: float) -> float:
    return float(special.stdtrit(df, 0.5 + level / 2) ** 2)


@lru_cache(maxsize=256)
def _estimates(df: int) -> Array:
    """Return equally likely values of an estimated variance of 1."""
    return np.asarray(stats.chi2.ppf((np.arange(_POINTS) + 0.5) / _POINTS, df) / df)
