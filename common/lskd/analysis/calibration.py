"""Calibration: its expected error, the temperature that fits, and the smoothing it looks trained with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lskd.analysis.by_sample import Array, Softmax, by_sample
from lskd.base.tensors import row_blocks
from lskd.targets import check_samples
from lskd.terms import centred

BINS = 15
"""Bins of equal width, as Guo et al. (ICML 2017) and Mueller et al. (NeurIPS 2019) use."""

LIMITS = (0.01, 100.0)
"""Temperatures among which the best is looked for."""

Progress = Callable[[int], object]
"""Is told how many samples were just looked at."""

_LOWEST, _HIGHEST = 1 / LIMITS[1], 1 / LIMITS[0]  # of 1 / T
_SUBSAMPLES = (512, 4096)  # samples on which the search begins
_NEAR = 0.01  # relative step within which the second-order expansion is exact to about 1e-6


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature at which the cross-entropy with the labels is smallest, and what a teacher says at it.

    Attributes:
        temperature: divides the logits.
        at_limit: whether the search ended at one of :data:`LIMITS`: the cross-entropy of a teacher that is
            never wrong keeps falling towards temperature 0, that of one worse than chance towards infinity.
        nll: ``(N,)`` float64, cross-entropy with the label at that temperature, nats.
        confidence: ``(N,)`` float64, largest probability at that temperature.
    """

    temperature: float
    at_limit: bool
    nll: Tensor
    confidence: Tensor


def fit_temperature(logits: Tensor, labels: Tensor, progress: Progress | None = None) -> TemperatureFit:
    """Fit the temperature of a classifier on labelled samples (temperature scaling, Guo et al., ICML 2017).

    Minimises the mean cross-entropy over ``1 / T``, in which it is convex: Newton's method on every n-th
    sample first, then on all of them. Each look at the data also gives the derivatives of what is reported,
    so the last small step needs no further look. Memory is a block of rows and a few numbers per sample.

    Args:
        logits: ``(N, K)`` before softmax, finite, on the CPU; may be mapped from a file.
        labels: integer class ids ``(N,)``.
        progress: called with the number of samples just looked at.

    Raises:
        ValueError: for labels out of range, no samples or logits that are not finite.

    >>> logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    >>> labels = torch.tensor([0, 0, 1, 1])  # 3 of 4 right, so log(3) between the two is right
    >>> round(fit_temperature(logits, labels).temperature, 4) == round(3 / math.log(3), 4)
    True
    """
    check_samples(logits, labels, least=1)
    logits, labels = logits.detach(), labels.long()
    inverse, bend = 1.0, None
    for size in _SUBSAMPLES:
        if len(labels) > 2 * size:
            every = len(labels) // size
            inverse, looked = _search(partial(_Expansion, logits[::every], labels[::every]), inverse)
            bend = looked.bend
    if len(labels) <= 2 * _SUBSAMPLES[-1]:
        bend = None
    look = partial(_Expansion, logits, labels, bend=bend, progress=progress)
    inverse, looked = _search(look, inverse)
    nll, confidence = looked.at(inverse)
    at_limit = inverse <= _LOWEST * (1 + 1e-9) or inverse >= _HIGHEST * (1 - 1e-9)
    return TemperatureFit(1 / inverse, at_limit, nll, confidence)


def confidence_and_correct(logits: ArrayLike, labels: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return how sure a classifier is of its answer, and whether that is the label.

    Args:
        logits: ``(N, K)`` before softmax, finite, on the CPU; may be mapped from a file.
        labels: integer class ids ``(N,)``.

    Returns:
        ``(N,)`` float64, the largest probability; and 1 where it is the label's (of equal logits the lower
        class has it), else 0.

    Raises:
        ValueError: for labels out of range, no samples or logits that are not finite.
    """

    def measure(block: Array, classes: Array) -> Array:
        found = Softmax(block)
        return np.stack([found.log_largest.exp().numpy(), found.answer.squeeze(1).numpy() == classes])

    confidence, correct = by_sample(measure, logits, labels=labels)
    return torch.from_numpy(confidence), torch.from_numpy(correct)


def calibration_contributions(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return one number per sample whose mean is the expected calibration error.

    The error is the mean over bins of ``|accuracy - confidence|``, weighted by their samples; each sample's
    part is ``correct - confidence`` with the sign of its bin.

    Args:
        confidence: ``(N,)`` largest probabilities.
        correct: ``(N,)`` 1 where the prediction is right, else 0.

    Returns:
        ``(N,)`` float64.
    """
    edges = torch.linspace(0, 1, BINS + 1)
    bins = (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp(0, BINS)
    gap = correct.double() - confidence.double()
    sums = torch.zeros(BINS + 1, dtype=torch.float64).index_add_(0, bins, gap)
    return gap * sums.sign()[bins]


def _search(look: Callable[[float], "_Expansion"], inverse: float) -> tuple[float, "_Expansion"]:
    """Return the best ``1 / T`` and an expansion that is valid there."""
    low, high = _LOWEST, _HIGHEST
    untried = [low, high]
    looked = look(inverse)
    for _ in range(100):
        slope = looked.slope
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        best = inverse + looked.step()
        if abs(best - inverse) <= _NEAR * inverse:
            return min(max(best, _LOWEST), _HIGHEST), looked
        if high <= low * (1 + 1e-12):
            return inverse, looked
        limit = low if best <= low else high
        if low < best < high:
            inverse = best
        elif limit in untried:
            inverse = limit
            untried.remove(limit)
        else:
            # Newton's method has lost its way: halve the bracket, on the scale of T.
            inverse = math.sqrt(low * high)
        looked = look(inverse)
    return inverse, looked


class _Expansion:
    """Every sample's cross-entropy and confidence at ``1 / T``, with two derivatives in it.

    ``bend`` is the third derivative of the mean cross-entropy over the second. It moves the answer by little,
    so that of a subsample does where it is known; None: from the samples themselves.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        inverse: float,
        bend: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.inverse = inverse
        # Rows: logarithm of the sum of exponentials over the largest, and its derivatives; the label's logit.
        self.values = torch.empty(4, len(labels), dtype=torch.float64)
        thirds = 0.0
        for rows in row_blocks(len(labels), logits.shape[1]):
            z = centred(logits[rows])
            weights = (z * inverse).exp_()
            sums = weights.sum(1)
            first = (torch.linalg.vecdot(weights, z) / sums).double()
            weights.mul_(z)
            second = (torch.linalg.vecdot(weights, z) / sums).double()
            own = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
            self.values[0, rows] = sums.double().log()
            self.values[1, rows] = first
            self.values[2, rows] = (second - first**2).clamp(min=0)
            self.values[3, rows] = own.double()
            if bend is None:
                third = (torch.linalg.vecdot(weights.mul_(z), z) / sums).double()
                thirds += float((third - 3 * first * second + 2 * first**3).sum())
            if progress:
                progress(len(sums))
        sums, slopes, curves, own = self.values
        self.slope, self.curve = float((slopes - own).mean()), float(curves.mean())
        if not math.isfinite(self.slope):
            raise ValueError("the logits are not all finite; leave such samples out or fix the teacher")
        # Then the best is at the limit, which Newton's method would come to in many small steps.
        self.never_wrong = not bool(own.any()) and float(sums.min()) < math.log(logits.shape[1]) - 1e-6
        if bend is None:
            bend = thirds / len(labels) / self.curve if self.curve > 0 else 0.0
        self.bend = bend

    def step(self) -> float:
        """Return the change of ``1 / T`` that takes the slope to zero, to second order."""
        if self.never_wrong:
            return math.inf
        if self.curve <= 0:
            return math.copysign(math.inf, -self.slope) if self.slope else 0.0
        newton = -self.slope / self.curve
        # Halley's method: its correction makes a small step exact, and may be anything in a large one.
        shrink = 1 + newton * self.bend / 2
        return newton / shrink if 0.5 < shrink < 2 else newton

    def at(self, inverse: float) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and largest probability of each sample at a nearby ``1 / T``."""
        step = inverse - self.inverse
        total, first, second, own = self.values
        total = total + step * (first + step * second / 2)
        return total - inverse * own, (-total).exp().clamp(max=1)
