"""What every trainer does with numbers: in which dtype they are added up, over which processes, and whether
they are still finite."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lskd.errors import DivergedError

BLOCK = 1 << 18  # numbers of a block of logits: it, and what is made of it, stay in a CPU's cache
_WITHOUT_FLOAT64 = {"mps"}  # device types that refuse such tensors
_WITH_BOUNDS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # dtypes of torch.aminmax
_ADVICE = "the run diverged: lower the learning rate, or clip the gradients"


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return in what to add up many numbers on a device: float64, float32 where it has none (Apple's MPS).

    >>> accumulator_dtype(torch.device("cpu")), accumulator_dtype(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in :func:`accumulator_dtype`."""
    return tensor.to(accumulator_dtype(tensor.device))


def row_blocks(stop: int, classes: int, start: int = 0) -> Iterator[slice]:
    """Yield the rows from ``start`` to ``stop`` of logits of so many classes, in blocks of :data:`BLOCK`."""
    step = max(BLOCK // classes, 1)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def summed_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes of torch.distributed; without these the tensor itself.

    Every process must call it. A tensor on the CPU goes over the GPU where the processes speak NCCL alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else values.device
    total = values.to(device)
    torch.distributed.all_reduce(total)
    return total.to(values.device)


class SampleMeans:
    """Means over samples, by name, of what each batch has a mean of, kept on the device.

    Reading a number at every step would wait for the device at every step.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None

    def __bool__(self) -> bool:
        """Return whether there was a batch since the last :meth:`read`."""
        return self._sums is not None

    def add(self, means: Iterable[Tensor], samples: int) -> None:
        """Add a batch of so many samples by its means, a number for each name."""
        row = widened(torch.stack([*means]).detach().flatten()) * samples
        row = torch.cat([row, row.new_full((1,), samples)])
        self._sums = row if self._sums is None else self._sums + row

    def read(self, device: torch.device) -> dict[str, float]:
        """Return the means over all processes since the last call, NaN without a sample, and start anew.

        Every process must call it.

        Args:
            device: where they are added up in a process that has seen no batch.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            sums = torch.zeros(len(self.names) + 1, dtype=accumulator_dtype(device), device=device)
        *totals, samples = summed_over_processes(sums).tolist()
        means = (total / samples if samples else math.nan for total in totals)
        return dict(zip(self.names, means, strict=True))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity, by its smallest and largest number.

    That is one look at it. `torch.isfinite` writes tensors of its size, which takes five times as long.

    >>> all_finite(torch.tensor([1.0, -2.0])), all_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    if tensor.dtype not in _WITH_BOUNDS:
        wide = tensor.float() if tensor.is_floating_point() else tensor  # some of 8 bits have no isfinite
        return bool(wide.isfinite().all())
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def require_finite(name: str, value: Tensor | float, epoch: int | None = None) -> None:
    """Refuse a value that has a NaN or an infinity.

    Raises:
        DivergedError: it is not finite.
    """
    if all_finite(value) if isinstance(value, Tensor) else math.isfinite(value):
        return
    one = not isinstance(value, Tensor) or value.numel() == 1
    what = f"{name} is {float(value)}" if one else f"{name} are not all finite numbers"
    when = "" if epoch is None else f"epoch {epoch}: "
    raise DivergedError(f"{when}{what}; {_ADVICE}")


def require_finite_weights(tensors: Iterable[tuple[str, Tensor]], epoch: int | None = None) -> None:
    """Refuse a network with a weight, or a buffer, that is not finite, and name the first.

    Args:
        tensors: names and tensors, as ``model.state_dict().items()`` gives them.

    Raises:
        DivergedError: one is not finite.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point():
            require_finite(f"the weights {name}", tensor.detach(), epoch)
