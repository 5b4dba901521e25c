"""What a store keeps of a teacher's logits, and what a student reads there."""

import numpy as np
import torch
from torch import Tensor

from lskd._soft_labels_manifest import SoftLabelsLayout
from lskd._teachers import top_k_log_probabilities
from lskd._terms import Rest, TopK


def stored_form(logits: Tensor, layout: SoftLabelsLayout) -> tuple[Tensor, Tensor]:
    """Return logits in the form in which soft labels are stored.

    With ``k < num_classes``: the ``k`` largest log-probabilities, largest first. With all classes they are in
    the classes' order: in float32 the logits as they came, so that a student's arithmetic is that of training
    online, number for number, at any temperature; in float16 log-probabilities, of which half precision keeps
    the large ones best.

    Args:
        logits: ``(rows, num_classes)``.
        layout: of the store.

    Returns:
        values ``(rows, k)`` in the layout's dtype, finite, and int64 ids ``(rows, k)``.

    >>> layout = SoftLabelsLayout(num_classes=3, k=3, samples=1, values="float32")
    >>> [part.tolist() for part in stored_form(torch.tensor([[2.0, 0.0, 1.0]]), layout)]
    [[[2.0, 0.0, 1.0]], [[0, 1, 2]]]
    """
    logits = logits.detach().float()
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
