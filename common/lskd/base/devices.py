"""What devices differ in."""

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = {"mps"}  # device types that refuse such tensors


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return in what to add up many numbers on a device: float64, float32 where it has none (Apple's MPS).

    >>> accumulator_dtype(torch.device("cpu")), accumulator_dtype(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in :func:`accumulator_dtype`."""
    return tensor.to(accumulator_dtype(tensor.device))
