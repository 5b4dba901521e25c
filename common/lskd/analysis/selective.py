"""Selective risk: how well a classifier's confidence tells its right answers from its wrong ones.

A classifier that may abstain answers those samples only of which it is most confident. Its error among the
``k`` most confident of ``N``, averaged over ``k``, is the area under the risk-coverage curve (AURC; Geifman,
Uziel and El-Yaniv, ICLR 2019)::

    AURC = 1/N sum over k of 1/k sum over i <= k of wrong(i)
         = 1/N sum over i of wrong(i) w(i),   w(i) = 1/i + 1/(i + 1) + ... + 1/N

with the samples in falling order of confidence. The second form, a risk with weights (Zhou et al., ICML
2025), is what is computed: samples of equal confidence share the mean of their weights, which gives the mean
of the area over all orders in which they can be put.

Label smoothing raises it by more than the error rate explains, and the largest of the normalised logits as
confidence repairs that (Xia et al., ICLR 2025; Cattelan and Silva, UAI 2024).
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lskd.analysis.by_sample import Array, row_sums


def aurc_pseudo_values(confidence: ArrayLike, correct: ArrayLike) -> Array:
    """Return one number per sample ``(N,)`` whose mean is the area under the risk-coverage curve.

    The area, 0 (best) to 1, is no mean over samples; the jackknife makes it one, for its sampling error:
    ``N a - (N - 1) a_without_i``, in closed form after one sort, because leaving a sample out moves those
    behind it one place to the front. The values are shifted so that their mean is the area itself.

    Args:
        confidence: ``(N,)``, of which only the order counts; equal values in any order, averaged.
        correct: ``(N,)`` 1 where the answer is right, else 0.

    Raises:
        ValueError: for shapes that differ, fewer than 2 samples, values of ``correct`` other than 0 and 1, or
            a confidence that is NaN.

    >>> float(aurc_pseudo_values([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]).mean().round(4))  # (1/3 + 1/4) / 4
    0.1458
    """
    confidence, correct = _checked(confidence, correct)
    samples = len(correct)
    if samples < 2:
        raise ValueError("one sample has no sampling error; the area needs at least 2")
    total, pseudo = _curve(confidence, correct)
    return np.asarray(pseudo - pseudo.mean() + total / samples)


def _curve(confidence: Array, correct: Array) -> tuple[float, Array]:
    """Return ``N`` times the area, and what leaving out each sample takes from it, ``(N,)``.

    The samples' weights are summed in groups of equal confidence, the most confident first.
    """
    samples = len(correct)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    first = np.cumsum(sizes) - sizes
    places = np.arange(1, samples + 1)
    weights = np.cumsum((1 / places)[::-1])[::-1]
    mean_weight = np.add.reduceat(weights, first) / sizes
    wrong = 1 - correct
    wrong_in = np.bincount(group, wrong)
    total = float(wrong_in @ mean_weight)
    # With one sample fewer every weight loses its last term, and a sample that moves from place j to j - 1
    # gains 1 / (j - 1). Of a sample's own group the last place goes.
    gain = np.add.reduceat(np.divide(1, places - 1, where=places > 1, out=np.zeros(samples)), first) / sizes
    before = wrong_in * (mean_weight - 1 / samples)
    behind = wrong_in * (mean_weight - 1 / samples + gain)
    others = np.cumsum(before) - before + behind.sum() - np.cumsum(behind)
    last = weights[first + sizes - 1]
    own = (mean_weight * sizes - last) / np.maximum(sizes - 1, 1) - 1 / samples
    without = others[group] + (wrong_in[group] - wrong) * own[group]
    return total, total - without


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[Array, Array]:
    order, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if order.ndim != 1 or order.shape != right.shape or not len(order):
        raise ValueError(
            f"confidence has shape {order.shape} and correct {right.shape}; both must be (N,), with samples"
        )
    if np.isnan(order).any():
        raise ValueError(f"the confidence of sample {int(np.isnan(order).argmax())} is not a number")
    if not np.isin(right, (0, 1)).all():
        raise ValueError("correct must be 1 where the answer is right and 0 elsewhere")
    return order, right


def largest_normalised(logits: Tensor) -> Array:
    """Return the largest of the logits less their mean, over their 5-norm; of use for its order only.

    So Cattelan and Silva (2024) and Xia et al. (2025, Sec. 5). Of the fixed norms 0 to 9 of Cattelan and
    Silva's ablation (84 networks, ImageNet), 5 and 6 gain most, as much as one fitted to each network; the
    Euclidean norm gains less than a quarter of it.

    Args:
        logits: a block ``(n, K)`` float64 before softmax, finite. With two classes every sample has the same
            value.

    Returns:
        ``(n,)`` float64, 0 where all logits are equal; the same for the same logits in another order, so that
        ties are ties.

    >>> same_but_for_scale = torch.tensor([[2.0, 0.0, 1.0], [4.0, 0.0, 2.0]], dtype=torch.float64)
    >>> largest_normalised(same_but_for_scale).round(4)
    array([0.8706, 0.8706])
    """
    # What becomes of the ends of a row becomes of its other numbers, which need no second look for them.
    ends = torch.cat([logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)], 1)
    scale = _scale(ends)
    z = logits / scale  # so that no sum or power overflows
    mean = row_sums(z, 1.0) / z.shape[1]
    z -= mean
    ends = ends / scale - mean
    scale = _scale(ends)
    z /= scale
    largest, size = ends[:, 1:] / scale, z.abs_()
    fourth = size.square()  # products take a quarter of the time of powers
    length = row_sums(fourth.mul_(fourth).mul_(size), 1.0) ** (1 / 5)
    return (largest / torch.where(length > 0, length, 1.0)).squeeze(1).numpy()


def _scale(values: Tensor) -> Tensor:
    largest = values.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)
