"""A network's size, counted without memory for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Network:
    """A model's size.

    Attributes:
        parameters: how many.
        flops: operations of one image's forward pass, an addition and a multiplication as two.
    """

    parameters: int
    flops: float


def network_size(create: Callable[[], nn.Module], example: Callable[[], Any]) -> Network:
    """Count a model that is created without memory, on torch's meta device.

    Args:
        create: makes the model.
        example: makes its input, of one image.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create().eval()
        model(example())
    return Network(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())


def tensor_size(channels: int, height: int, width: int) -> Callable[[], Tensor]:
    """Return what makes one empty image."""
    return lambda: torch.zeros(1, channels, height, width)
