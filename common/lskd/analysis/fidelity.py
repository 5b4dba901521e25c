"""Fidelity: how closely a student follows its teacher on samples that neither was trained on.

The two measures of Stanton et al. (NeurIPS 2021, "Does Knowledge Distillation Really Work?"), sample by
sample: the measure is the mean. Neither needs labels, and a faithful student need not be an accurate one.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike

from lskd.analysis.by_sample import Array, Softmax, by_sample
from lskd.targets import check_temperature


def agreement(teacher: ArrayLike, student: ArrayLike) -> Array:
    """Return 1 where teacher and student give the same class, else 0; of equal logits the first class.

    Args:
        teacher: logits ``(N, K)``.
        student: logits ``(N, K)`` on the same samples.

    Returns:
        ``(N,)`` float64.

    Raises:
        ValueError: for shapes that differ, or logits that are not finite (naming the sample).

    >>> agreement([[2.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    array([1., 0.])
    """
    return by_sample(lambda z, other: z.argmax(1) == other.argmax(1), teacher, student)


def divergence(teacher: ArrayLike, student: ArrayLike, temperature: float = 1.0) -> Array:
    """Return ``KL(teacher || student)`` in nats, as the distillation loss has it (Eq. 3), without ``T^2``.

    Args:
        teacher: logits ``(N, K)``.
        student: logits ``(N, K)`` on the same samples.
        temperature: divides both logits; 1 in Stanton et al.

    Returns:
        ``(N,)`` float64, not negative.

    Raises:
        ValueError: for shapes that differ, a temperature that is not positive, or logits that are not finite
            (naming the sample).

    >>> divergence([[0.0, 0.0]], [[2.0, 0.0]]).round(4)
    array([0.4338])
    """
    check_temperature(temperature)

    def measure(z: Array, other: Array) -> Array:
        return between(Softmax(z / temperature), Softmax(other / temperature))

    return by_sample(measure, teacher, student)


def between(teacher: Softmax, student: Softmax) -> Array:
    """Return :func:`divergence` of a block."""
    further = torch.linalg.vecdot(teacher.probabilities, teacher.logits - student.logits)
    kl = further + (teacher.log_largest - student.log_largest)
    return np.asarray(kl.clamp_(min=0))  # equal rows differ by rounding
