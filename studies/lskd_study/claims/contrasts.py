"""Weighted sums of paired runs, with their interval: what all claims within one study are estimated as.

A contrast gives every kind of run a weight fixed in advance. At each seed and sample the weighted sum of the
runs' values is one number, so whatever the weights are (a difference, a difference of differences, a slope),
the table of these numbers goes through one analysis, seeds and samples both random.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lskd_study.results.results import PerSample, Result
from lskd_study.stats.intervals import CROSSED, Interval, crossed_interval, no_interval, seed_interval

# The kinds of run of one network: a weight, and its results by seed. The weights sum to 0.
Cells = Sequence[tuple[float, Mapping[int, Result]]]


@dataclass(frozen=True)
class Measure:
    """How a run's quantity is read: one value per sample, or (where that is None) one per run."""

    per_sample: Callable[[Result], PerSample | None]
    value: Callable[[Result], float]


def measure_of(quantity: str) -> Measure:
    """Return how a quantity that a `Result` knows by name is read."""
    return Measure(lambda result: result.per_sample(quantity), lambda result: result.value(quantity))


def estimate_contrast(
    measure: Measure, networks: Sequence[Cells], seeds: Sequence[int], null: float = 0.0
) -> tuple[Interval, float]:
    """Return a contrast averaged over networks with its interval, and its p-value against ``null``.

    The p-value is below 0.05 exactly when the interval excludes ``null``, which is in the interval's unit.

    Raises:
        LskdError: when the quantity is missing or not finite in some run.
    """
    if measure.per_sample(networks[0][0][1][seeds[0]]) is None:
        by_seed = np.array(
            [
                np.mean([sum(w * measure.value(runs[seed]) for w, runs in cells) for cells in networks])
                for seed in seeds
            ]
        )
        found = seed_interval(by_seed)
        return found, (found if not null else seed_interval(by_seed - null)).p_value
    samples = [
        [[_per_sample(measure, runs[seed]) for seed in seeds] for _, runs in cells] for cells in networks
    ]
    weights = [[w for w, _ in cells] for cells in networks]
    one = samples[0][0][0]
    # (networks, kinds of run, seeds, samples), summed over kinds, averaged over networks
    values = np.array([[[sample.values for sample in runs] for runs in cells] for cells in samples])
    table = np.einsum("nk,nksi->si", np.array(weights), values) / len(networks)
    problems = [sample.problem for cells in samples for runs in cells for sample in runs if sample.problem]
    if problems:
        nothing = no_interval(float(table.mean()), len(seeds), table.shape[1], CROSSED, problems[0])
        return nothing.scaled(one.scale), np.nan
    # The rule of three is about differences of two values that are 0 or 1.
    bounded = one.bounded and all(of_network == [-1, 1] for of_network in weights)
    found = crossed_interval(table, one.strata, bounded=bounded)
    p_value = found.p_value
    if null:
        p_value = crossed_interval(table - null / one.scale, one.strata, bounded=bounded).p_value
    return found.scaled(one.scale), p_value


def difference(pair: tuple[Mapping[int, Result], Mapping[int, Result]]) -> Cells:
    """Return the contrast of two arms, (without, with smoothing)."""
    return [(-1.0, pair[0]), (1.0, pair[1])]


def fitted_change(points: Sequence[float]) -> list[float]:
    """Return weights whose sum with the values at ``points`` is the change from the smallest to the largest.

    The change is that of the straight line fitted by least squares.
    """
    x = np.asarray(points, dtype=np.float64)
    centred = x - x.mean()
    return [float(weight) for weight in centred / np.square(centred).sum() * np.ptp(x)]


def _per_sample(measure: Measure, result: Result) -> PerSample:
    found = measure.per_sample(result)
    assert found is not None  # the same for every run of a study
    return found
