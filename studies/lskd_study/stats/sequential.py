"""Looks at growing numbers of seeds that together keep the error rate of one test.

Who adds seeds until a difference is "significant" finds one where there is none: at 3, 5, 8, 12 and 20 seeds,
each judged at 5 %, in 15 % of all studies. An alpha-spending rule (Lan & DeMets, 1983) says beforehand how
much of the error rate may be gone after each look. Of ``n_max`` seeds that there can be, after ``n`` this one
has spent (Kim & DeMets, 1987)::

    spent(n) = alpha (n / n_max) ** POWER

The level of each look follows from the joint normal distribution of the means, which are sums of the same
seeds (Armitage, McPherson & Rowe, 1969). Seeds alone are the worst case: what all looks share (the samples)
only makes them more alike. The t intervals of `intervals` then take these levels, so early looks, of few
degrees of freedom, must spend little: in simulation the whole procedure rejects a true zero in 5.3 % for a
power of 1.5, 5.2 % for 2, 5.0 % for 3, and finds as much as any other with that (docs/study.md).

A look is judged by the smallest total error rate whose level it would have passed: a p-value that may be
looked at again and again, for Holm's correction like any other.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import optimize, special

from lskd import LskdError
from lskd_study.stats.intervals import LEVEL, Array

POWER = 3.0
GROWTH = 1.5  # from one look to the next
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_TOTALS = np.unique([1 - LEVEL, (1 - LEVEL) / 2, *np.geomspace(1e-9, 1.0, 73)])


def looks(first: int, most: int) -> tuple[int, ...]:
    """Return the numbers of seeds at which a study is looked at, from its own to the most there can be.

    Raises:
        LskdError: for fewer than two seeds, or no more than the study has already.
    """
    if first < 2:
        raise LskdError("one seed says nothing about how much seeds vary; list at least two")
    if most <= first:
        raise LskdError(f"the study has {first} seeds already; let there be more than that")
    found = [first]
    while (following := int(np.ceil(found[-1] * GROWTH))) < most:
        found.append(following)
    # A last look soon after the one before would tell little more than that.
    if len(found) > 1 and most < found[-1] * (1 + GROWTH) / 2:
        found.pop()
    return (*found, most)


def levels(numbers: Sequence[int], total: float = 1 - LEVEL) -> Array:
    """Return the two-sided level of each look, ``(K,)``, so that all together have the error rate ``total``.

    ``numbers``: seeds at each look, rising; the last is the most there can be.
    """
    n = np.asarray(numbers)
    to_spend = np.diff(total * (n / n[-1]) ** POWER, prepend=0.0)
    inside, found = _Inside(), []
    for number, part in zip(n, to_spend, strict=True):
        bound = float(optimize.brentq(lambda b, k=number, p=part: inside.beyond(k, b) - p, 0.0, 40.0))
        inside.stay(number, bound)
        found.append(2 * special.ndtr(-bound))
    return np.array(found)


def error_rate(numbers: Sequence[int]) -> float:
    """Return how often a true zero is rejected at some look when each is judged at 5 %."""
    inside, bound, total = _Inside(), -special.ndtri((1 - LEVEL) / 2), 0.0
    for number in numbers:
        total += inside.beyond(number, bound)
        inside.stay(number, bound)
    return total


def sequential_p(p_value: float, numbers: Sequence[int], look: int) -> float:
    """Return the smallest total error rate at which look number ``look`` (from 0) rejects.

    Below 0.05 exactly when ``p_value`` is below the look's own level. It grows with ``p_value``.
    """
    if np.isnan(p_value):
        return p_value
    of_look = _levels(tuple(numbers))[:, look]
    return float(np.exp(np.interp(np.log(max(p_value, 1e-300)), np.log(of_look), np.log(_TOTALS))))


@lru_cache(maxsize=64)
def _levels(numbers: tuple[int, ...]) -> Array:
    """Return the levels of each look, ``(T, K)``, for the total error rates ``_TOTALS``."""
    return np.array([levels(numbers, total) for total in _TOTALS])


class _Inside:
    """The distribution of the sum of ``n`` standard normal values that never left their bounds."""

    def __init__(self) -> None:
        self._at, self._mass, self._n = np.zeros(1), np.ones(1), 0.0

    def beyond(self, n: float, bound: float) -> float:
        """Return how likely the sum of ``n`` lies beyond ``bound`` standard deviations, to either side."""
        step, edge = np.sqrt(n - self._n), bound * np.sqrt(n)
        return float(2 * self._mass @ special.ndtr((self._at - edge) / step))  # symmetric, as the bounds

    def stay(self, n: float, bound: float) -> None:
        """Go on with the sums of ``n`` that lie within."""
        step, edge = np.sqrt(n - self._n), bound * np.sqrt(n)
        at = edge * _NODES
        density = np.exp(-np.square((at[:, None] - self._at) / step) / 2) / (step * np.sqrt(2 * np.pi))
        self._at, self._mass, self._n = at, edge * _WEIGHTS * (density @ self._mass), n
