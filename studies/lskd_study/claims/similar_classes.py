"""Whether similar classes move apart: the separation of confused classes in the teachers' stored logits."""

from collections.abc import Sequence

import torch

from lskd import LskdError
from lskd.analysis.classes import class_confusion, class_mean_probabilities, class_separation, nearest_classes
from lskd_study.claims.contrasts import Measure
from lskd_study.plan.plan import Plan
from lskd_study.results.images import read_logits
from lskd_study.results.results import PerSample, Result


def separation_measure(plan: Plan, compared: Sequence[Sequence[Result]]) -> Measure:
    """Return the separation of each class from the one it is taken for most.

    ``compared`` holds, for each network, the runs of both arms. They choose the pairs together, each run with
    the same weight: a choice by one arm alone would favour the other.

    Raises:
        LskdError: for classes of fewer than 3 images, or logits that are not finite.
    """
    found = {}
    for runs in compared:
        means = []
        for result in runs:
            logits, labels = _logits(plan, result)
            try:
                means.append(class_mean_probabilities(logits, labels, plan.num_classes))
            except ValueError as error:
                raise LskdError(f"{result.run.id}: {error}") from None
        pairs = nearest_classes(class_confusion(means))
        for result in runs:
            logits, labels = _logits(plan, result)
            values = class_separation(logits, labels, pairs).contributions.numpy()
            found[result.run.id] = PerSample(values, strata=labels.numpy())
    return Measure(
        lambda result: found[result.run.id], lambda result: float(found[result.run.id].values.mean())
    )


def _logits(plan: Plan, result: Result) -> tuple[torch.Tensor, torch.Tensor]:
    _, logits, labels = read_logits(plan.folder(result.run), plan.num_classes)
    return torch.from_numpy(logits), torch.from_numpy(labels)
