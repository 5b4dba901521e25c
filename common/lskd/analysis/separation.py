"""How far similar classes lie apart, from logits alone (Fig. 1, Dc)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lskd.errors import LskdError
from lskd.targets import check_labels

_SMALLEST = 3  # examples of a class: fewer leave no deviation without each one of them


@dataclass(frozen=True)
class ClassSeparation:
    """The distance between classes, in pairs.

    Attributes:
        pairs: ``(P,)`` float64, the separation of each pair.
        contributions: ``(N,)`` float64, one value per sample whose mean is the mean over pairs, to first
            order (the sample's influence), for an interval.
    """

    pairs: Tensor
    contributions: Tensor

    @property
    def mean(self) -> float:
        """The mean over pairs."""
        return float(self.pairs.mean())


def class_separation(logits: Tensor, labels: Tensor, pairs: Sequence[tuple[int, int]]) -> ClassSeparation:
    """Measure how far apart the examples of similar classes lie, free of the scale of the logits.

    For a pair ``(a, b)`` the difference of the two logits, ``z_a - z_b``, is the coordinate of an example on
    the line between the two classes' templates, the first axis of Fig. 1, up to scale and origin:
    ``z = W h + bias``. The separation is the distance between the two classes' means there, Dc, in units of
    the spread about them: the pooled unbiased standard deviation within the classes. Smoothing shrinks all
    logits, so a distance with a scale would say nothing. In small classes it is too large, by about
    ``3 / (4 df)`` of itself.

    Args:
        logits: ``(N, K)`` before softmax, floating point.
        labels: ``(N,)`` int64.
        pairs: ids of two different classes each, at least one pair.

    Raises:
        ValueError: for shapes or dtypes that do not fit, no pair, or classes out of range.
        LskdError: for a class of fewer than 3 examples or without spread, or logits that are not finite.

    >>> logits = torch.tensor([[3.0, 0, 0], [4.0, 0, 0], [5.0, 0, 0], [0, 1.0, 0], [0, 2.0, 0], [0, 3.0, 0]])
    >>> class_separation(logits, torch.tensor([0, 0, 0, 1, 1, 1]), [(0, 1)]).mean
    6.0
    """
    if logits.ndim != 2 or len(logits) != len(labels) or not logits.is_floating_point():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}; "
            f"{len(labels)} labels go with floating ({len(labels)}, K)"
        )
    check_labels(labels, logits.shape[1])
    if not pairs or any(a == b for a, b in pairs):
        raise ValueError("pairs are two different classes each, and there must be one")
    check_labels(torch.tensor(list(pairs)).flatten(), logits.shape[1], "pairs")
    rows = _rows_of_classes(labels, {c for pair in pairs for c in pair})
    samples = len(labels)
    contributions = torch.zeros(samples, dtype=torch.float64)
    separations = []
    for a, b in pairs:
        first, second = ((logits[rows[c], a].double() - logits[rows[c], b].double()) for c in (a, b))
        df = len(first) + len(second) - 2
        deviations = [side - side.mean() for side in (first, second)]
        variance = float(sum(d.square().sum() for d in deviations)) / df
        distance = float(first.mean() - second.mean())
        if not 0 < variance < float("inf"):
            what = "do not differ" if variance == 0 else "are not all finite"
            raise LskdError(f"the logits of classes {a} and {b} {what}; they have no separation")
        separation = distance / variance**0.5
        separations.append(separation)
        for c, sign, deviation in ((a, 1, deviations[0]), (b, -1, deviations[1])):
            size = len(deviation)
            spread = (deviation.square() - deviation.square().mean()) * size / df
            moved = sign * deviation / variance**0.5 - separation / (2 * variance) * spread
            contributions[rows[c]] += moved * samples / size
    found = torch.tensor(separations, dtype=torch.float64)
    return ClassSeparation(found, found.mean() + contributions / len(pairs))


def nearest_classes(confusion: Tensor) -> list[tuple[int, int]]:
    """Return each class with the one it is taken for most, without repeating a pair.

    Args:
        confusion: ``(K, K)`` as from :func:`class_confusion`; a class of NaN, without examples, has none.

    >>> nearest_classes(torch.tensor([[torch.nan, 0.3, 0.1], [0.3, torch.nan, 0.2], [0.1, 0.2, torch.nan]]))
    [(0, 1), (1, 2)]
    """
    known = (~confusion.isnan()).any(1).nonzero().flatten().tolist()
    nearest = confusion.nan_to_num(nan=-1.0).argmax(1).tolist()
    return list(dict.fromkeys((min(c, nearest[c]), max(c, nearest[c])) for c in known))


def _rows_of_classes(labels: Tensor, classes: set[int]) -> dict[int, Tensor]:
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    ends = counts.cumsum(0)
    found = {}
    for c in sorted(classes):
        size = int(counts[c]) if c < len(counts) else 0
        if size < _SMALLEST:
            raise LskdError(f"class {c} has {size} examples; its separation from another needs {_SMALLEST}")
        end = int(ends[c])
        found[c] = order[end - size : end]
    return found
