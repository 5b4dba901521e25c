"""What a number of seeds can tell: the width of an interval, the power of its test, the seeds that it takes.

The variance of a mean difference has a part that more seeds make smaller and one that only more samples would
(see `intervals`). With ``v`` the variance of one seed's mean, ``u`` that of the samples' mean and S seeds::

    half width(S) = sqrt(t(S - 1)^2 v / S + t(N - 1)^2 u)
    power(S, d)   = P(|estimate| > half width), estimate ~ Normal(d, v / S + u)

where the half width varies with the estimate of ``v``, which has S - 1 degrees of freedom; the power is the
mean over its distribution, not that at its mean, which would promise too much at few seeds.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from lskd_study.stats.intervals import LEVEL, Array, Part

_Part = tuple[float, float]  # a `Part`, or what a file has of it
MANY = 1000  # seeds: nobody trains more
_POINTS = 400  # of the distribution of an estimated variance


@dataclass(frozen=True)
class Variances:
    """What a difference of two arms varies by, in the squared unit of the difference.

    Attributes:
        seed: variance of the difference between single seeds' means.
        sample: variance of the mean over samples, which all seeds share.
        sample_df: degrees of freedom of ``sample``.
        students: of each kind for one seed of their teacher.
        student: the part of ``seed`` that these students make, their mean; 0 where that is unknown.
        pooled_df: what other settings add to the degrees of freedom of seeds (`moderated`).
    """

    seed: float
    sample: float
    sample_df: float
    students: int = 1
    student: float = 0.0
    pooled_df: float = 0.0

    @classmethod
    def of(
        cls, seeds: int, parts: Sequence[_Part], students: int = 1, by_student: _Part | None = None
    ) -> "Variances | None":
        """Return what an `Interval` over ``seeds`` seeds was made of; None where it says nothing of them."""
        if seeds < 2 or not parts:
            return None
        by_seed, by_sample = (Part(*part) for part in (*parts, Part(0.0, 0))[:2])
        student = by_student[0] * seeds if by_student else 0.0
        return cls(
            seed=by_seed.variance * seeds,
            sample=by_sample.variance,
            sample_df=by_sample.df,
            students=students,
            student=student,
            pooled_df=by_seed.df - (seeds - 1),
        )

    def with_students(self, students: int) -> "Variances":
        """Return what it would be with another number of students; the same where their part is unknown."""
        if not self.student:
            return self
        now = min(self.student, self.seed)
        own = now * self.students / students
        return replace(self, seed=self.seed - now + own, students=students, student=own)

    def half_width(self, seeds: int, level: float = LEVEL) -> float:
        """Return the half width to expect with a number of seeds: the root of its mean square."""
        by_seed = _squared_t(self._df(seeds), level) * self.seed / seeds
        return float(np.sqrt(by_seed + self._of_samples(level)))

    def power(self, seeds: int, difference: float, level: float = LEVEL) -> float:
        """Return how likely the interval of ``seeds`` seeds excludes zero if ``difference`` is true."""
        by_seed = self.seed / seeds
        df = self._df(seeds)
        half = np.sqrt(_squared_t(df, level) * by_seed * _estimates(df) + self._of_samples(level))
        error = np.sqrt(by_seed + self.sample)
        if error == 0:
            return 1.0 if difference else 0.0
        tails = special.ndtr((difference - half) / error) + special.ndtr((-difference - half) / error)
        return float(tails.mean())

    def detectable(self, seeds: int, power: float = 0.8, level: float = LEVEL) -> float:
        """Return the smallest difference that ``seeds`` seeds find with that power."""
        most = 10 * self.half_width(seeds, level)
        if most == 0:
            return 0.0
        return float(optimize.brentq(lambda d: self.power(seeds, d, level) - power, 0.0, most))

    def seeds_for(self, difference: float, power: float = 0.8, level: float = LEVEL) -> int | None:
        """Return how many seeds find a difference with that power; None where no number does."""
        numbers = range(2, MANY + 1)
        place = bisect_left(numbers, True, key=lambda seeds: self.power(seeds, difference, level) >= power)
        return numbers[place] if place < len(numbers) else None

    def _df(self, seeds: int) -> float:
        return seeds - 1 + self.pooled_df

    def _of_samples(self, level: float) -> float:
        return _squared_t(self.sample_df, level) * self.sample if self.sample else 0.0


def _squared_t(df: float, level: float) -> float:
    return float(special.stdtrit(df, 0.5 + level / 2) ** 2)


@lru_cache(maxsize=256)
def _estimates(df: float) -> Array:
    """Return equally likely values of an estimated variance of 1."""
    return np.asarray(stats.chi2.ppf((np.arange(_POINTS) + 0.5) / _POINTS, df) / df)
