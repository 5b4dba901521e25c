"""Whether a run is still finite: what every trainer asks of its losses, weights and outputs."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lskd.errors import DivergedError

_ADVICE = "the run diverged: lower the learning rate, or clip the gradients"


def require_finite(name: str, value: Tensor | float, epoch: int | None = None) -> None:
    """Refuse a value that has a NaN or an infinity.

    Args:
        name: what it is, for the message.
        value: a number, or a tensor of any shape.
        epoch: the epoch in which it came about, where there is one.

    Raises:
        DivergedError: it is not finite.
    """
    finite = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
    if not finite:
        what = f"{name} is {float(value)}" if _is_number(value) else f"{name} are not all finite numbers"
        when = "" if epoch is None else f"epoch {epoch}: "
        raise DivergedError(f"{when}{what}; {_ADVICE}")


def require_finite_weights(tensors: Iterable[tuple[str, Tensor]], epoch: int | None = None) -> None:
    """Refuse a network with a weight, or a buffer, that is not finite, and name the first.

    Args:
        tensors: names and tensors, as ``model.state_dict().items()`` gives them.
        epoch: the epoch after which they were looked at.

    Raises:
        DivergedError: one is not finite.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point():
            require_finite(f"the weights {name}", tensor.detach(), epoch)


def _is_number(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1
