"""What smoothing does to the binary logistic loss (Fig. 3)."""

import math

from torch import Tensor
from torch.nn import functional as F

from lskd.targets import Convention, target_values


def smoothed_logistic_loss(margin: Tensor, alpha: float, convention: Convention = "paper") -> Tensor:
    """Return the cross-entropy of two classes with smoothed targets, by the margin.

    ``on * log(1 + exp(-m)) + off * log(1 + exp(m))``. For ``alpha = 0`` it is the logistic loss, which
    vanishes for large margins; with smoothing it grows again, ``off`` per unit of margin.

    Args:
        margin: the label's logit less the other's, any shape, floating point.
        alpha: smoothing, ``0 <= alpha < 1``.
        convention: ``"paper"``: ``on, off = 1 - alpha, alpha`` (Eq. 1 with K = 2); ``"uniform"``:
            ``1 - alpha / 2, alpha / 2``.

    Returns:
        Nats, of the margin's shape and dtype.

    Raises:
        ValueError: for an alpha or convention out of range, or a margin that is not floating point.

    >>> import torch
    >>> smoothed_logistic_loss(torch.tensor([-10.0, 0.0, 10.0]), 0.1)
    tensor([9.0000, 0.6931, 1.0000])
    """
    on, off = target_values(2, alpha, convention)
    if not margin.is_floating_point():
        raise ValueError(f"margin has dtype {margin.dtype}; it must be floating point")
    # softplus' own threshold is exact to 1e-9 only; logsigmoid has none.
    loss = -on * F.logsigmoid(margin)
    return loss - off * F.logsigmoid(-margin) if off else loss


def smoothed_logistic_minimum(alpha: float, convention: Convention = "paper") -> tuple[float, float]:
    """Return the margin at which the smoothed logistic loss is least, and the loss there (nats).

    ``log(on / off)``, where the predictions equal the targets, and the targets' entropy. Without smoothing
    the margin is infinite and the loss 0.

    Raises:
        ValueError: for an alpha or convention out of range.

    >>> [round(value, 4) for value in smoothed_logistic_minimum(0.1)]
    [2.1972, 0.3251]
    >>> smoothed_logistic_minimum(0.0)
    (inf, 0.0)
    """
    on, off = target_values(2, alpha, convention)
    if off == 0:
        return math.inf, 0.0
    return math.log(on / off), -on * math.log(on) - off * math.log(off)
