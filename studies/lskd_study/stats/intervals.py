"""Intervals for paired differences over few seeds and many samples.

Two arms (teachers with and without smoothing) are compared on the same seeds ``s`` and the same validation
samples ``i``. The table of differences ``D[s, i]`` is analysed as a crossed two-way random-effects design,
the analysis of variance of multi-reader studies (Dorfman, Berbaum & Metz 1992)::

    var(mean) = v_seed + v_sample
    v_seed = MS_seed / (S N)
    v_sample = max(MS_sample - MS_error, 0) / (S N)

``v_seed`` has only ``S - 1`` degrees of freedom. One effective number for both parts (Satterthwaite) loses
coverage at three seeds when the parts are alike (0.92 instead of 0.95 in simulation; 0.87 at two seeds), so
each part is widened by the t quantile of its own degrees of freedom::

    half width = sqrt(t(S - 1)^2 v_seed + t(N - 1)^2 v_sample)

which is exact when either part is alone and on the safe side between.

Where K students learn from one teacher their mean is one value of the teacher's seed, so that all of this
holds. How far they lie apart says which share of ``v_seed`` more of them would make smaller::

    v_student = MS_student / (S K),  of a one-way layout of students within teachers
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from lskd import LskdError

Array = NDArray[np.float64]
LEVEL = 0.95
CROSSED = "t interval, seeds and samples crossed"
SAMPLES_ONLY = "t interval over samples"
SEEDS_ONLY = "t interval over seeds"
RULE_OF_THREE = "rule of three"
ONE_SEED = "one seed: how much seeds vary is unknown"


class Part(NamedTuple):
    """A part of the variance of a mean, with its degrees of freedom."""

    variance: float
    df: float

    def scaled(self, factor: float) -> "Part":
        """Return it for a mean in another unit."""
        return Part(self.variance * factor**2, self.df)


@dataclass(frozen=True)
class Interval:
    """A mean paired difference with its two-sided 95 % interval, in the unit of the differences.

    ``low`` and ``high`` are NaN where no interval can be made; ``note`` then says why. ``p_value`` is
    two-sided and below 0.05 exactly when the interval excludes zero. ``parts`` is what the width is made of.
    ``networks``: how many were drawn at random, beside seeds and samples; 0 where networks are fixed.
    ``by_seed``: the difference at each seed. ``students``: of how many of each kind that is the mean, and
    ``by_student`` what of the first part is theirs; None where there is one.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    seeds: int
    samples: int
    method: str
    note: str = ""
    parts: tuple[Part, ...] = ()
    networks: int = 0
    by_seed: tuple[float, ...] = ()
    students: int = 1
    by_student: Part | None = None

    @property
    def includes_seeds(self) -> bool:
        """Whether the width includes what another training would change: of several seeds or networks."""
        return self.seeds > 1 or self.networks > 2

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def p_against(self, value: float) -> float:
        """Return the two-sided p-value of a mean of ``value``, which is in the interval's unit.

        It is below 0.05 exactly when the 95 % interval excludes the value; NaN where there is no interval.
        """
        if self.parts:
            return _p_value(self.estimate - value, self.parts)
        return float(self.low <= value <= self.high) if self.known else np.nan

    def at_level(self, level: float) -> "Interval":
        """Return it with the ends of another level than 95 %; the rule of three has one level only."""
        if not self.parts:
            return self
        half = _half_width(self.parts, 1 - level)
        return replace(self, low=self.estimate - half, high=self.estimate + half)

    def scaled(self, factor: float) -> "Interval":
        """Return the interval in another unit, e.g. ``scaled(100)`` for percentage points."""
        low, high = (end * factor for end in (self.low, self.high)[:: 1 if factor >= 0 else -1])
        parts = tuple(part.scaled(factor) for part in self.parts)
        by_student = self.by_student and self.by_student.scaled(factor)
        by_seed = tuple(value * factor for value in self.by_seed)
        moved = replace(self, estimate=self.estimate * factor, low=low, high=high)
        return replace(moved, parts=parts, by_seed=by_seed, by_student=by_student)

    def pooled(self, part: Part, settings: int) -> "Interval":
        """Return it with the variance between seeds pooled over so many settings (`moderated`)."""
        method = f"{self.method}; seed variance pooled over {settings} settings (moderated t)"
        shape = self.seeds, self.samples
        made = parts_interval(self.estimate, [part, *self.parts[1:]], shape, method, self.note)
        return replace(made, by_seed=self.by_seed, students=self.students, by_student=self.by_student)

    def of_students(self, means: ArrayLike) -> "Interval":
        """Return it with what of its seeds' part is the students'; ``means`` ``(S, K)``, in its unit."""
        values = np.asarray(means, dtype=np.float64)
        seeds, students = values.shape
        df = seeds * (students - 1)
        within = float(np.square(values - values.mean(1, keepdims=True)).sum() / df)
        return replace(self, students=students, by_student=Part(within / (seeds * students), df))


class CrossedMoments(NamedTuple):
    """Mean of the differences and the two parts of the variance of that mean, each ``(...,)``."""

    mean: Array
    seed_variance: Array
    sample_variance: Array


def crossed_moments(differences: ArrayLike, strata: ArrayLike | None = None) -> CrossedMoments:
    """Return the mean of differences ``(..., S, N)``, S, N >= 2, and the two parts of its variance.

    ``strata`` ``(N,)`` int: samples drawn within fixed classes; variance between the classes' means is then
    no sampling variance and does not count. Leading axes are independent tables (used by simulations).
    """
    d = np.asarray(differences, dtype=np.float64)
    seeds, samples = d.shape[-2:]
    by_seed = d.mean(-1)
    ms_seed = samples * by_seed.var(-1, ddof=1)
    centred, groups = centre_within(d, strata)
    by_sample = centred.mean(-2)
    ms_sample = seeds * np.square(by_sample).sum(-1) / (samples - groups)
    ms_error = np.square(centred - by_sample[..., None, :]).sum((-2, -1)) / ((seeds - 1) * (samples - groups))
    excess = np.maximum(ms_sample - ms_error, 0.0)
    # Few samples that differ can give every seed the same mean by chance; that is no proof of no variance.
    ms_seed = np.where(ms_seed + excess > 0, ms_seed, ms_error)
    scale = seeds * samples
    return CrossedMoments(by_seed.mean(-1), ms_seed / scale, excess / scale)


def centre_within(d: Array, strata: ArrayLike | None) -> tuple[Array, int]:
    """Subtract each stratum's own mean, per seed; return the residuals and the number of strata."""
    if strata is None:
        return d - d.mean(-1, keepdims=True), 1
    classes, index = np.unique(np.asarray(strata), return_inverse=True)
    rows = d.reshape(math.prod(d.shape[:-1]), d.shape[-1])
    sums = np.array([np.bincount(index, row) for row in rows]).reshape(len(rows), len(classes))
    means = sums / np.bincount(index)
    return d - means[:, index].reshape(d.shape), len(classes)


def crossed_interval(
    differences: ArrayLike, strata: ArrayLike | None = None, *, bounded: bool = False
) -> Interval:
    """Return the mean of paired differences ``(S, N)`` (seeds, samples) with its 95 % interval.

    One seed gives the samples' interval only, one sample the seeds' only; the note says so. ``bounded`` is
    for differences within -1 .. 1 that are mostly 0 (correct or not): if all samples agree, the variance says
    nothing and the interval is the rule of three's, ``3 / N`` to either side, ``6 / N`` from -1 or 1.

    Raises:
        LskdError: for differences that are not finite or not a non-empty ``(S, N)`` table.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 2 or d.size == 0:
        raise LskdError(
            f"paired differences have shape {d.shape}; need (seeds, samples), neither of them empty"
        )
    if not np.isfinite(d).all():
        raise LskdError("paired differences contain NaN or infinity; leave out the run that diverged")
    seeds, samples = d.shape
    if bounded and np.ptp(d) == 0 and abs(d.flat[0]) in (0.0, 1.0):
        return rule_of_three(float(d.flat[0]), seeds, samples)
    if samples == 1:
        return seed_interval(d[:, 0])
    sample_df = samples - (1 if strata is None else len(np.unique(np.asarray(strata))))
    if seeds == 1:
        centred, _ = centre_within(d, strata)
        variance = float(np.square(centred).sum()) / max(sample_df, 1) / samples
        return parts_interval(
            float(d.mean()), [Part(variance, sample_df)], (1, samples), SAMPLES_ONLY, ONE_SEED
        )
    mean, by_seed, by_sample = (float(value) for value in crossed_moments(d, strata))
    parts = [Part(by_seed, seeds - 1), Part(by_sample, sample_df)]
    found = parts_interval(mean, parts, (seeds, samples), CROSSED)
    return replace(found, by_seed=tuple(map(float, d.mean(1))))


def seed_interval(differences: ArrayLike) -> Interval:
    """Return the mean of per-seed paired differences ``(S,)`` with its t interval.

    For quantities that have no value per sample (a training loss). One seed has no interval.

    Raises:
        LskdError: for differences that are not finite or not a non-empty vector.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0 or not np.isfinite(d).all():
        raise LskdError("paired differences must be finite, one per seed; leave out the run that diverged")
    seeds = len(d)
    if seeds == 1:
        return no_interval(float(d[0]), 1, 1, SEEDS_ONLY, ONE_SEED)
    variance = float(d.var(ddof=1)) / seeds
    found = parts_interval(float(d.mean()), [Part(variance, seeds - 1)], (seeds, 1), SEEDS_ONLY)
    return replace(found, by_seed=tuple(map(float, d)))


def target_std_pseudo_values(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """Return one value per sample ``(N,)`` whose mean is ``1 - S`` (Algorithm 1), for its interval.

    ``probabilities`` ``(N,)``: what the teacher gives each sample's own label; ``labels`` ``(N,)`` int.
    ``1 - S`` is a mean over classes of standard deviations, not a mean over samples; the jackknife makes it
    one: within a class of ``n`` samples the pseudo-value ``n std - (n - 1) std_without_i``, in closed form.
    Each class's values are shifted to the overall ``1 - S`` (classes are fixed, they are not drawn).

    Raises:
        LskdError: for a class of fewer than three samples, whose standard deviation has no jackknife.
    """
    from lskd.analysis.measures import deviation_pseudo_values

    p = np.asarray(probabilities, dtype=np.float64)
    classes, index = np.unique(np.asarray(labels), return_inverse=True)
    n = np.bincount(index)
    if n.min() < 3:
        raise LskdError(
            f"class {classes[n.argmin()]} has fewer than 3 validation samples; 1-S needs 3 per class"
        )
    std, pseudo = deviation_pseudo_values(p, index, len(classes))
    return np.asarray(std.mean() + pseudo * len(p) / (len(classes) * n[index]))


def holm(
    p_values: ArrayLike,
    parameters: Sequence[Hashable] | None = None,
    weights: Mapping[Hashable, float] | None = None,
) -> Array:
    """Return Holm's adjusted p-values for a family of tests; a NaN (nothing tested) stays out of it.

    Args:
        p_values: ``(J,)``.
        parameters: for each test, the parameter that it is about. Hypotheses about one parameter exclude each
            other (a mean is 0, or it is -0.2), so at most one of them is true, and together they count once:
            Shaffer's (1986) first modification of Holm's method. Without it each test has one of its own.
        weights: how much of the error rate a parameter gets, relative to the others' 1 (Holm, 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    names: Sequence[Hashable] = range(len(p)) if parameters is None else parameters
    weight = np.array([(weights or {}).get(name, 1.0) for name in names])
    adjusted = np.full_like(p, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested] / weight[tested], kind="stable")]
    # Of each parameter that has a hypothesis left one may be true.
    total, left, possible = 0.0, set(), {}
    for test in order[::-1]:
        if names[test] not in left:
            left.add(names[test])
            total += weight[test]
        possible[test] = total
    largest = 0.0
    for test in order:
        largest = max(largest, min(float(p[test] * possible[test] / weight[test]), 1.0))
        adjusted[test] = largest
    return adjusted


def parts_interval(
    mean: float,
    parts: Sequence[Part],
    shape: tuple[int, int],
    method: str,
    note: str = "",
    networks: int = 0,
) -> Interval:
    """Return an interval whose variance has several parts, each widened by the t quantile of its own df.

    ``shape``: numbers of seeds and of samples.
    """
    variance = sum(part.variance for part in parts)
    # Identical values leave a variance of rounding errors: compare with the mean, not with zero.
    if not variance > (1e-12 * abs(mean)) ** 2 or not any(part.df for part in parts):
        same = "the difference is the same in every run, so its variance cannot be estimated"
        return no_interval(mean, *shape, method, f"{note}; {same}" if note else same)
    half = _half_width(parts, 1 - LEVEL)
    p_value = _p_value(mean, parts)
    return Interval(mean, mean - half, mean + half, p_value, *shape, method, note, tuple(parts), networks)


def _half_width(parts: Sequence[Part], alpha: float) -> float:
    quantiles = ((special.stdtrit(part.df, alpha / 2) if part.df else 0.0) for part in parts)
    return float(sum(t**2 * part.variance for t, part in zip(quantiles, parts, strict=True)) ** 0.5)


def _p_value(mean: float, parts: Sequence[Part]) -> float:
    """Return the level whose interval has zero on its edge, so that p and interval never disagree."""

    def beyond(log_p: float) -> float:
        return _half_width(parts, 10**log_p) - abs(mean)

    smallest = -12.0
    if beyond(smallest) < 0:
        return float(10**smallest)
    return float(10 ** optimize.brentq(beyond, smallest, 0.0))


def rule_of_three(value: float, seeds: int, samples: int) -> Interval:
    """Return the interval of differences that are all 0, or all 1 or -1, see ``crossed_interval``."""
    # Of samples that all gain one could lose instead, which is twice as far away; and so many that gain by
    # chance have the probability of the sign test.
    half = (6.0 if value else 3.0) / samples
    note = "every sample gives the same difference; the rule of three bounds what was not seen"
    if seeds == 1:
        note += f"; {ONE_SEED}"
    p_value = 2 * 0.5**samples if abs(value) > half else 1.0
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    return Interval(value, low, high, p_value, seeds, samples, RULE_OF_THREE, note)


def no_interval(mean: float, seeds: int, samples: int, method: str, note: str, networks: int = 0) -> Interval:
    """Return a mean difference for which no interval can be made; ``note`` says why."""
    return Interval(mean, np.nan, np.nan, np.nan, seeds, samples, method, note, (), networks)
