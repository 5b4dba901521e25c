"""Count, mean and squared deviations per class, mergeable in any order (Chan, Golub and LeVeque, 1983)."""

import torch
from torch import Tensor


def class_moments(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the moments of one batch.

    Args:
        values: ``(N,)`` floating point.
        labels: ``(N,)`` int64.
        num_classes: number of classes ``K``.

    Returns:
        ``(3, K)``: count, mean, and sum of squared deviations from that mean; zeros for an absent class.
    """
    count = torch.bincount(labels, minlength=num_classes).to(values.dtype)
    sums = torch.zeros_like(count).index_add_(0, labels, values)
    mean = sums / count.clamp(min=1)
    squares = torch.zeros_like(count).index_add_(0, labels, (values - mean[labels]) ** 2)
    return torch.stack([count, mean, squares])


def merge_moments(first: Tensor, second: Tensor) -> Tensor:
    """Return the moments ``(3, K)`` of two disjoint sets of samples taken together."""
    count = first[0] + second[0]
    share = second[0] / count.clamp(min=1)
    difference = second[1] - first[1]
    mean = first[1] + difference * share
    squares = first[2] + second[2] + difference**2 * first[0] * share
    return torch.stack([count, mean, squares])


def reduce_moments(moments: Tensor) -> Tensor:
    """Merge moments stacked over ranks, ``(ranks, 3, K)``, as torchmetrics hands them over."""
    merged = moments[0]
    for other in moments[1:]:
        merged = merge_moments(merged, other)
    return merged
