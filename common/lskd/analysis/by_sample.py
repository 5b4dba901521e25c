"""Logits as NumPy arrays, measured sample by sample: checked, and in blocks so that memory stays small.

And a block's softmax in the parts that measures are made of.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lskd.base.tensors import row_blocks
from lskd.targets import check_finite, check_labels

Array = NDArray[np.float64]

_LOWEST = float(np.finfo(np.float64).min) / 2


def by_sample(measure: Callable[..., Array], *logits: ArrayLike, labels: ArrayLike | None = None) -> Array:
    """Return ``measure(*blocks)`` of blocks of rows in float64, put together.

    Args:
        measure: gets ``(n, K)`` float64 of each of ``logits``, which it may overwrite, then ``(n,)`` labels
            where there are some, and returns ``(n,)``, or ``(rows, n)`` of several measures at once.
        logits: arrays, or tensors on the CPU, ``(N, K)`` before softmax, all of one shape; may be mapped
            from a file.
        labels: integer class ids ``(N,)``.

    Raises:
        ValueError: for shapes that do not fit, fewer than two classes, no samples, labels out of range, or
            logits that are not finite (naming the sample).
    """
    # A tensor is read block by block: NumPy has no bfloat16, and what is mapped from a file stays there.
    tables = [table if isinstance(table, torch.Tensor) else np.asarray(table) for table in logits]
    shapes_found = [tuple(table.shape) for table in tables]
    shape = shapes_found[0]
    if len(shape) != 2 or not shape[0] or len(set(shapes_found)) > 1:
        shapes = " and ".join(map(str, shapes_found))
        raise ValueError(f"logits have shape {shapes}; they must be (N, K), with samples, and of one shape")
    if shape[1] < 2:
        raise ValueError(f"logits have {shape[1]} classes; this measure needs at least 2")
    columns: list[NDArray[Any]] = []
    if labels is not None:
        classes = np.asarray(labels)
        if classes.shape != shape[:1]:
            raise ValueError(f"labels have shape {classes.shape}; with these logits it must be {shape[:1]}")
        check_labels(torch.from_numpy(classes), shape[1])
        columns.append(classes)
    found: list[Array] = []
    for rows in row_blocks(shape[0], shape[1]):
        blocks = [
            # From half precision by way of float32, which takes half the time.
            (block.float() if block.dtype.itemsize == 2 else block).to(torch.float64, copy=True).numpy()
            if isinstance(block, torch.Tensor)
            else np.array(block, np.float64)
            for block in (table[rows] for table in tables)
        ]
        for block in blocks:
            check_finite(torch.from_numpy(block), rows.start)
        found.append(np.asarray(measure(*blocks, *(column[rows] for column in columns)), np.float64))
    return np.concatenate(found, axis=-1)


def row_sums(values: Tensor, largest: Tensor | float) -> Tensor:
    """Return the sum of each row ``(n, 1)``, the same to the last bit in whatever order it has its values.

    They are rounded first to steps of which no sum of theirs needs more than a float64 has, some 1e-16 times
    the largest sum that they could have.

    Args:
        values: ``(n, K)`` float64.
        largest: of each row, ``(n, 1)``, or of all, what no absolute value of it exceeds.
    """
    grid = 2 * values.shape[1] * largest
    return (values + grid).sub_(grid).sum(1, keepdim=True)


class Softmax:
    """The softmax of a block of finite logits ``(n, K)`` float64, which it overwrites, of one exponential.

    Attributes:
        answer: ``(n, 1)``, the class of the largest logit, of equal ones the first.
        logits: ``(n, K)``, less the largest of their row.
        log_largest: ``(n,)``, logarithm of the largest probability; it keeps samples apart whose
            probabilities all round to 1, and is the same in whatever order a row has its logits.
        probabilities: ``(n, K)``.
    """

    def __init__(self, logits: Array) -> None:
        z = torch.from_numpy(logits)
        # NumPy's argmax and exp take a sixth and half of the time of PyTorch's in float64.
        self.answer = torch.from_numpy(logits.argmax(1, keepdims=True))
        # Those further apart than the largest number would leave differences of infinities.
        self.logits = z.sub_(z.gather(1, self.answer)).clamp_(min=_LOWEST)
        others = torch.from_numpy(np.exp(self.logits.numpy())).scatter_(1, self.answer, 0.0)
        self.log_largest = -row_sums(others, others.amax(1, keepdim=True)).squeeze(1).log1p_()
        largest = self.log_largest.exp().unsqueeze(1)
        self.probabilities = others.mul_(largest).scatter_(1, self.answer, largest)

    def divergence(self, student: "Softmax") -> Array:
        """Return ``KL(self || student)`` of each sample in nats, ``(n,)``, not negative.

        One of the two measures of a student's fidelity on samples that neither was trained on (Stanton et
        al., NeurIPS 2021, Eq. 3); the other is how often both give the same class.
        """
        further = torch.linalg.vecdot(self.probabilities, self.logits - student.logits)
        # Equal rows differ by rounding.
        return np.asarray((further + (self.log_largest - student.log_largest)).clamp_(min=0))

    def of(self, classes: NDArray[np.int64]) -> Tensor:
        """Return the logarithm of the probability of one class of each sample."""
        return self.logits.gather(1, torch.from_numpy(classes).unsqueeze(1)).squeeze(1) + self.log_largest
