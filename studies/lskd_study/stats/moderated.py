"""The variance between seeds pooled over the settings of a study: a moderated t (Smyth, 2004).

Few seeds say little about how much a setting's difference varies, but the settings of one study are alike.
Their variances are taken as draws of one distribution, ``d0 s0^2 / chi^2(d0)``, which is fitted by the
moments of their logarithms (Smyth's, as limma's ``fitFDist``). Each is then moved towards it::

    s~^2 = (d0 s0^2 + d s^2) / (d0 + d),   with d0 + d degrees of freedom, d = seeds - 1

Two things differ from genes, of which there are thousands that know nothing of each other. A study has few
settings, so ``d0`` is hardly known: it counts for no more than ``WEIGHT`` of ``d``, which keeps the coverage
of a setting that varies unlike the others. And settings share teachers and seeds, so their estimates go
together: J of them with a squared correlation of ``r^2`` are worth ``J / (1 + (J - 1) r^2)``, and no more
than that times ``d`` degrees of freedom are there to be pooled.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from lskd_study.stats.intervals import Array, Part

WEIGHT = 0.5
FEWEST = 3  # settings and seeds: of two seeds any two settings seem to share everything
_MANY = 1e6  # degrees of freedom: variances that differ by no more than their estimates do


def prior(variances: ArrayLike, df: float) -> tuple[float, float]:
    """Return ``d0`` (infinite where they are all alike) and ``s0^2`` of variances ``(J,)``, J >= 2.

    ``df``: degrees of freedom of each; none may be 0.
    """
    found = np.asarray(variances, dtype=np.float64)
    logs = np.log(found) - special.digamma(df / 2) + math.log(df / 2)
    spread = float(logs.var(ddof=1)) - _trigamma(df / 2)
    if spread <= _trigamma(_MANY / 2):
        return math.inf, float(found.mean())
    half = optimize.brentq(lambda at: _trigamma(at) - spread, 1e-9, _MANY)
    return 2 * half, float(np.exp(logs.mean() + special.digamma(half) - math.log(half)))


def moderated(by_seed: ArrayLike) -> list[Part]:
    """Return the variance of each setting's mean over seeds, pooled over the settings.

    ``by_seed`` ``(J, S)``, J, S >= 2: the difference of each setting at each seed, none the same at all.
    """
    values = np.asarray(by_seed, dtype=np.float64)
    settings, seeds = values.shape
    df, own = seeds - 1, values.var(-1, ddof=1)
    d0, common = prior(own, df)
    d0 = min(d0, WEIGHT * df)
    total = min(d0 + df, df * settings / (1 + (settings - 1) * _squared_correlation(values)))
    return [Part(float((d0 * common + df * one) / (d0 + df) / seeds), total) for one in own]


def _trigamma(value: float) -> float:
    return float(special.zeta(2, value))  # as scipy's polygamma(1, value), and faster


def _squared_correlation(values: Array) -> float:
    """Return the mean square of the correlations between rows."""
    squares = np.square(np.corrcoef(values))
    rows = len(values)
    return float((squares.sum() - rows) / (rows * (rows - 1)))
