"""In which classes accuracy changed: exploration, apart from the claims and their correction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lskd_study.claims.contrasts import class_of_key
from lskd_study.claims.judging import groups
from lskd_study.claims.statements import Claim, Setting
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results, common_seeds, failures_of
from lskd_study.stats.intervals import LEVEL, Interval, crossed_interval, holm

MOST = 10  # are shown
FEWEST = 2  # images of a class


@dataclass(frozen=True)
class ClassChange:
    """What smoothing changed in one class: accuracies in percent, the interval of the difference in points.

    ``adjusted_p``: corrected for the classes by Holm's method, for nothing else on the page.
    """

    name: str
    images: int
    before: float
    after: float
    interval: Interval
    adjusted_p: float = 1.0


@dataclass(frozen=True)
class ClassChanges:
    """The largest changes, the clearest first; how many classes were looked at, and changed for certain."""

    setting: Setting
    classes: int
    clear: int
    largest: Sequence[ClassChange]


def class_changes(results: Results[ImageResult], claim: Claim, setting: Setting) -> ClassChanges | None:
    """Return in which classes the accuracy of a claim's networks, their mean, changed by smoothing.

    None with fewer than two seeds, or where a run failed or is missing in all seeds.
    """
    pairs = list(groups(results, claim, setting).values())
    arms = [arm for pair in pairs for arm in pair]
    seeds = common_seeds(arms)
    if len(seeds) < 2 or failures_of(arms):
        return None
    # (arms, seeds, samples), the mean over networks
    correct = np.mean([[[arm[seed].correct for seed in seeds] for arm in pair] for pair in pairs], axis=0)
    first = arms[0][seeds[0]]
    found = []
    counts = np.bincount(first.labels)
    for own in np.split(np.argsort(first.labels, kind="stable"), np.cumsum(counts)[:-1]):
        if len(own) >= FEWEST:
            before, after = correct[:, :, own]
            interval = crossed_interval(after - before, bounded=len(pairs) == 1).scaled(100)
            name = class_of_key(first.keys[own[0]]) or str(first.labels[own[0]])
            found.append(ClassChange(name, len(own), 100 * before.mean(), 100 * after.mean(), interval))
    adjusted = holm([change.interval.p_value for change in found])
    found = [replace(change, adjusted_p=float(p)) for p, change in zip(adjusted, found, strict=True)]
    found.sort(key=lambda one: (np.nan_to_num(one.adjusted_p, nan=1), -abs(one.interval.estimate)))
    largest = [change for change in found[:MOST] if change.interval.estimate]
    clear = int((adjusted < 1 - LEVEL).sum())
    return ClassChanges(setting, len(found), clear, largest) if largest else None
