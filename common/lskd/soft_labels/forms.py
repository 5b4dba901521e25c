"""What a store keeps of a teacher's logits, and what a student reads there."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd.soft_labels.format import SoftLabelsLayout
from lskd.teacher_terms import centred, top_k_log_probabilities
from lskd.terms import Rest, TopK

_LEAST = -15.0  # log-probabilities below are as good as none


def stored_form(logits: Tensor, layout: SoftLabelsLayout) -> tuple[Tensor, Tensor]:
    """Return logits in the form in which soft labels are stored.

    With ``k < num_classes``: the ``k`` largest log-probabilities, largest first. With all classes they are in
    the classes' order: in float32 the logits as they came (float64 ones less their largest), so that a
    student's arithmetic is that of training online, number for number, at any temperature; in float16
    log-probabilities, of which half precision keeps the large ones best.

    Args:
        logits: ``(rows, num_classes)``.
        layout: of the store.

    Returns:
        values ``(rows, k)`` in the layout's dtype, finite, and int64 ids ``(rows, k)``.

    >>> layout = SoftLabelsLayout(num_classes=3, k=3, samples=1, values="float32")
    >>> [part.tolist() for part in stored_form(torch.tensor([[2.0, 0.0, 1.0]]), layout)]
    [[[2.0, 0.0, 1.0]], [[0, 1, 2]]]
    """
    logits = logits.detach()
    # float64 alone has something to lose.
    logits = centred(logits).float() if logits.dtype == torch.float64 else logits.float()
    if layout.k < layout.num_classes:
        values, ids = top_k_log_probabilities(logits, layout.k)
    else:
        values = logits if layout.values == "float32" else logits.log_softmax(-1)
        ids = torch.arange(layout.k, device=logits.device).expand(values.shape)
    dtype = torch.float16 if layout.values == "float16" else torch.float32
    return values.clamp(min=float(np.finfo(layout.row["values"].base).min)).to(dtype), ids


def teacher_form(values: Tensor, ids: Tensor, num_classes: int, rest: Rest = "spread") -> Tensor | TopK:
    """Return stored values as what :class:`lskd.DistillationLoss` takes.

    Args:
        values: ``(..., k)`` as stored.
        ids: ``(..., k)``.
        num_classes: how many classes there are.
        rest: what becomes of the classes that are not stored.

    Returns:
        Logits ``(..., num_classes)`` in float32 where all classes are stored, a :class:`TopK` elsewhere.
    """
    values = values.float()
    if values.shape[-1] == num_classes:
        return values
    return TopK(values, ids.long(), rest)


def stored_difference(values: NDArray[Any], ids: NDArray[Any], logits: Tensor) -> Tensor:
    """Return how far a teacher's answers are from stored ones: the largest difference of log-probabilities.

    In units of ``1 + |log-probability|``: the rounding of stored values and of logits grows with it.

    Args:
        values: ``(n, k)`` as stored.
        ids: ``(n, k)``.
        logits: ``(n, num_classes)`` of the teacher now.

    Returns:
        ``(n,)`` in float64; infinity where a number is NaN.

    >>> stored_difference(np.log([[0.5]]), np.array([[1]]), torch.tensor([[0.0, 0.0]])).tolist()
    [0.0]
    """
    stored, places = torch.from_numpy(values.astype(np.float64)), torch.from_numpy(ids.astype(np.int64))
    if places.shape[-1] == logits.shape[-1]:
        stored = stored.log_softmax(-1)
    said = logits.cpu().double().log_softmax(-1).gather(-1, places).clamp(min=_LEAST)
    stored = stored.clamp(min=_LEAST)
    apart: Tensor = ((said - stored).abs() / (1 + stored.abs())).nan_to_num(nan=torch.inf).amax(-1)
    return apart
