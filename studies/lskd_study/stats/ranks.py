"""Which measure of a teacher goes with its student's accuracy, and which would have picked the best teacher.

A study has few teachers (3 to 12), and it is of teachers in general that one wants to know, so teachers are
the sample. Kendall's rank correlation counts pairs of teachers: it is the share of pairs that the measure
puts in the order of their students less the share that it puts the other way round. Its interval inverts the
exact test: it contains every correlation under which as many pairs in order as were seen, or more, and as
many or fewer, both have a probability above 2.5 %, where teachers are drawn from a bivariate normal
distribution or whatever increasing functions make of its two axes. So it is valid for 3 teachers as for 12
(in simulation it covers 0.95 to 1.00), excludes 0 exactly when the exact permutation test gives p < 0.05, and
does not shrink to a point where every pair is in order. An interval that redraws teachers does, and covers
0.27 to 0.98 with 3 to 6 of them; one that redraws seeds and samples is about these teachers alone, and covers
0.25 to 0.82; Fieller, Hartley and Pearson's (1957) needs 5 teachers and a pair out of order.

Seeds and samples make measured ranks differ from true ones, and those errors of teacher and student go
together (see `trends`). A correlation of such errors is no answer, so there is none where the teachers differ
by little more.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lskd import LskdError
from lskd_study.stats.intervals import LEVEL, Array, crossed_interval
from lskd_study.stats.trends import cross_product

METHOD = "Kendall's tau-b over teachers, exact test inverted"
FEWEST = 3  # teachers; two are in order or not
_SIGNIFICANT = 5  # teachers, below which not even a perfect order has p < 0.05
_RELIABLE = 0.8
_DRAWS = 40_000
_NUMBERS = 4_000_000  # pairs of all draws: of many teachers fewer are drawn


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau-b between a measure of the teachers and their students' accuracy, with a 95 % interval.

    Attributes:
        estimate: -1 (every pair the other way round) to 1 (every pair in order); NaN where all are equal.
        low, high: NaN where no interval can be made; ``note`` then says why.
        p_value: of the exact permutation test, two-sided; below 0.05 exactly where the interval excludes 0.
        teachers: how many.
        note: what a reader must know beside it.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    teachers: int
    note: str = ""

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite(self.low))


@dataclass(frozen=True)
class Pick:
    """The teacher that a measure would have picked, and what that costs.

    Attributes:
        teacher: position of the one picked; of equal measures the first.
        regret: how much more accurate the best one's student is, in the unit of the accuracy.
        low, high: the 95 % interval of the regret over seeds and samples, never below 0, for these teachers;
            NaN where no interval can be made.
        note: what a reader must know beside it.
    """

    teacher: int
    regret: float
    low: float
    high: float
    note: str = ""


def rank_correlation(measure: ArrayLike, accuracy: ArrayLike) -> RankCorrelation:
    """Return the rank correlation over teachers of a measure with their students' accuracy.

    Args:
        measure: of the teachers, ``(M,)``, ``(M, S)`` of seeds or ``(M, S, N)`` of seeds and samples; the
            means are ranked.
        accuracy: of their students, likewise; seeds and samples may be others.

    Without an interval for fewer than 3 teachers, and where teachers or students differ by little more than
    what seeds and samples vary: at least 0.8 of the variance of their means must be their own. That cannot be
    told from single values ``(M,)``, and goes unchecked for them.

    A pair that is equal in either counts against both ends of the interval, so that it contains the intervals
    of every way to break the ties.

    Raises:
        LskdError: for values that are not finite, or numbers of teachers that differ.
    """
    of_teachers, of_students = _tables(measure, accuracy)
    x, y = _means(of_teachers, of_students)
    teachers = len(x)
    first, second = np.triu_indices(teachers, 1)
    signs = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
    untied = [np.count_nonzero(sign) for sign in signs]
    estimate = float(signs[0] @ signs[1]) / (untied[0] * untied[1]) ** 0.5 if all(untied) else np.nan
    note = ""
    if not all(untied):
        note = "all teachers, or all students, are equal"
    elif teachers < FEWEST:
        note = f"fewer than {FEWEST}: too few to rank"
    elif not _reliable(of_teachers):
        note = "the teachers differ by little more than what seeds and samples vary"
    elif not _reliable(of_students):
        note = "the students differ by little more than what seeds and samples vary"
    if note:
        return RankCorrelation(estimate, np.nan, np.nan, np.nan, teachers, note)
    agree = signs[0] * signs[1]
    fewest, most = int((agree > 0).sum()), int((agree >= 0).sum())
    low, high = _limits(teachers)
    below = _null_distribution(teachers)
    tails = 1 - (below[fewest - 1] if fewest else 0.0), below[most]
    p_value = float(min(2 * min(tails), 1.0))
    if teachers < _SIGNIFICANT:
        note = f"{teachers} networks are too few: no order of them has p < 0.05"
    return RankCorrelation(estimate, float(low[fewest]), float(high[most]), p_value, teachers, note)


def pick(measure: ArrayLike, accuracy: ArrayLike) -> Pick:
    """Return the teacher for which a measure is largest, and the regret of picking it.

    The interval is for the largest of the differences between another teacher's student and the picked one's,
    each with seeds and samples crossed, at 95 % for all of them together (Bonferroni): the multiple
    comparisons with the best of Hsu (1984), with one arm fixed.

    Args:
        measure: of the teachers, shapes as for :func:`rank_correlation`.
        accuracy: of their students, likewise; paired, so that seeds and samples are the same for all.

    Raises:
        LskdError: for values that are not finite, or numbers of teachers that differ.
    """
    of_teachers, of_students = _tables(measure, accuracy)
    x, y = _means(of_teachers, of_students)
    picked = int(x.argmax())
    regret = float(y.max() - y[picked])
    if len(y) == 1:
        return Pick(picked, regret, np.nan, np.nan, "one teacher: nothing to pick from")
    level = 1 - (1 - LEVEL) / (len(y) - 1)
    others = np.delete(of_students, picked, axis=0) - of_students[picked]
    found = [crossed_interval(difference).at_level(level) for difference in others]
    if unknown := [one.note for one in found if not one.parts]:
        return Pick(picked, regret, np.nan, np.nan, unknown[0])
    low, high = (max(0.0, *ends) for ends in zip(*((one.low, one.high) for one in found), strict=True))
    return Pick(picked, regret, low, high, found[0].note)


def _tables(measure: ArrayLike, accuracy: ArrayLike) -> tuple[Array, Array]:
    """Return both as ``(M, S, N)``."""
    both = [np.asarray(values, dtype=np.float64) for values in (measure, accuracy)]
    for name, values in zip(("the measure", "the accuracy"), both, strict=True):
        if not 1 <= values.ndim <= 3 or not values.size:
            raise LskdError(f"{name} has shape {values.shape}; need (teachers, seeds, samples), none empty")
        if not np.isfinite(values).all():
            raise LskdError(f"{name} contains NaN or infinity; leave out the run that diverged")
    x, y = (values.reshape(*values.shape, *[1] * (3 - values.ndim)) for values in both)
    if len(x) != len(y):
        raise LskdError(f"a measure of {len(x)} teachers and the students of {len(y)} do not belong together")
    return x, y


def _means(of_teachers: Array, of_students: Array) -> tuple[Array, Array]:
    """Return both by teacher; accuracies that differ by rounding only, as means over students, are equal."""
    return of_teachers.mean((1, 2)), of_students.mean((1, 2)).round(9)


def _reliable(table: Array) -> bool:
    """Whether most of the variance of the teachers' means is their own; True where that cannot be told."""
    _, seeds, samples = table.shape
    if seeds == samples == 1:
        return True
    centred = table - table.mean(0)
    if samples == 1:
        centred = centred.swapaxes(1, 2)  # products of different seeds
    measured = float(np.square(centred.mean((1, 2))).sum())
    return cross_product(centred, centred) > _RELIABLE * measured


def _null_distribution(teachers: int) -> Array:
    """Return the probability of so many pairs in order or fewer, without a correlation, by their number."""
    ways = np.ones(1)
    for count in range(2, teachers + 1):
        ways = np.convolve(ways, np.ones(count))  # the next one passes 0 to count - 1 of those before
    return np.asarray(np.cumsum(ways) / ways.sum())


@lru_cache(maxsize=16)
def _limits(teachers: int) -> tuple[Array, Array]:
    """Return the lower and upper limits of tau by the number of pairs in order, 0 to all of them.

    Of normal teachers at correlation ``rho = sin(pi tau / 2)``, which gives Kendall's ``tau``, a pair that
    differs by ``d`` in the one and by ``rho d + sqrt(1 - rho^2) e`` in the other is in order where ``tau`` is
    above ``-2/pi atan(e / d)``. So each draw of ``d`` and ``e`` gives the number of pairs in order at every
    ``tau`` at once, and the limit for ``k`` pairs is a quantile of the k-th smallest of these thresholds.
    """
    generator = np.random.default_rng(teachers)
    first, second = np.triu_indices(teachers, 1)
    draws = min(_DRAWS, _NUMBERS // len(first))
    d, e = (z[:, first] - z[:, second] for z in generator.standard_normal((2, draws, teachers)))
    thresholds: NDArray[np.float64] = np.sort(-2 / np.pi * np.arctan(e / d), axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(thresholds, [tail, 1 - tail], axis=0)
    return np.append(-1.0, low), np.append(high, 1.0)
