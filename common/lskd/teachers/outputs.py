"""What a network's output says: one rule for all trainers."""

from typing import Any

from torch import Tensor

from lskd.errors import LskdError


def logits_of(output: Any) -> Tensor:
    """Return the logits `(B, K)` in what a classifier returned.

    A tensor is itself; of several outputs the first counts, as in timm's own validation.

    Args:
        output: a tensor, or a tuple or list that starts with one.

    Raises:
        LskdError: anything else, such as a dict, or another number of dimensions.

    >>> import torch
    >>> logits_of((torch.zeros(2, 3), torch.ones(2, 3))).sum().item()
    0.0
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or first.ndim != 2:
        found = f"a tensor {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise LskdError(f"the model returns {found}, not logits (batch, classes); use a classifier")
    return first
