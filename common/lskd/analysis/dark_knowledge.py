"""Dark knowledge: how much a teacher's probabilities tell the wrong classes apart, which smoothing erases.

Li et al. (NeurIPS 2022, "Asymmetric Temperature Scaling") measure it by the variance of the wrong classes'
probabilities of each sample at a temperature, averaged over samples: a teacher of which it is larger teaches
better, they find. (Their figures show its square root, the standard deviation.) Wrong classes are all but the
label, whatever the teacher answers.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lskd.analysis.by_sample import Array, Softmax


def among_wrong(softmax: Softmax, labels: NDArray[np.int64]) -> Array:
    """Return the variance of the wrong classes' probabilities of each sample; the measure is their mean.

    Of the probabilities as the student sees them, the "derived variance" that Li et al. compare teachers by;
    it falls with the mass that is left to the wrong classes too.

    Args:
        softmax: of a block's logits over the temperature, ``K >= 3``: one wrong class has no variance. Its
            probabilities are overwritten.
        labels: class ids ``(n,)``.

    Returns:
        ``(n,)`` float64, of all ``K - 1`` wrong classes, divided by their number.

    >>> among_wrong(Softmax(np.log([[0.5, 0.4, 0.1]])), np.array([0])).round(4)
    array([0.0225])
    """
    p, own = softmax.probabilities, torch.from_numpy(labels).unsqueeze(1)
    wrong = p.shape[1] - 1
    p.scatter_(1, own, 0.0)
    p.sub_(p.sum(1, keepdim=True) / wrong).scatter_(1, own, 0.0)
    return p.square_().sum(1).div_(wrong).numpy()


def log_ratio_contributions(first: ArrayLike, second: ArrayLike) -> Array:
    """Return numbers whose mean is ``log(mean(second) / mean(first))``, for its sampling error.

    For positive quantities such as the variances of a plain and a smoothed teacher: take the interval of
    these numbers and the exponentials of its ends. Each is the first-order influence of a sample,
    ``second / mean(second) - first / mean(first)``, shifted by the logarithm.

    Args:
        first: the quantity's contributions of one teacher, ``(N,)``, or ``(S, N)`` of several seeds.
        second: of the other, the same shape and samples.

    Returns:
        Array of that shape, float64.

    Raises:
        ValueError: for shapes that differ, or a mean that is not positive.

    >>> float(np.exp(log_ratio_contributions([1.0, 3.0], [0.5, 0.5]).mean()).round(4))
    0.25
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or not one.size:
        raise ValueError(f"shapes {one.shape} and {other.shape} must be the same, with samples")
    means = one.mean(), other.mean()
    if not min(means) > 0:
        raise ValueError(f"the means are {means[0]:.3g} and {means[1]:.3g}; a ratio needs positive ones")
    return np.asarray(other / means[1] - one / means[0] + np.log(means[1] / means[0]))
