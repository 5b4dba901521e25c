"""What a network says: the logits in its output, and its answers to chosen images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lskd.errors import LskdError

Keys = TypeVar("Keys")
Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass in training, such as ``torch.autocast``."""


def logits_of(output: Any) -> Tensor:
    """Return the logits `(B, K)` in what a classifier returned.

    A tensor is itself; of several outputs the first counts, as in timm's own validation.

    Args:
        output: a tensor, or a tuple or list that starts with one.

    Raises:
        LskdError: anything else, such as a dict, or another number of dimensions.

    >>> logits_of((torch.zeros(2, 3), torch.ones(2, 3))).sum().item()
    0.0
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or first.ndim != 2:
        found = f"a tensor {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise LskdError(f"the model returns {found}, not logits (batch, classes); use a classifier")
    return first


def whole_batch(images: Tensor, batch_size: int) -> Tensor:
    """Return ``batch_size`` images: the first of ``(n, ...)``, repeated in turn where there are fewer.

    >>> whole_batch(torch.tensor([1, 2]), 3).tolist()
    [1, 2, 1]
    """
    if len(images) == batch_size:
        return images
    return images[torch.arange(batch_size, device=images.device) % len(images)]


def answers_to(
    batches: Iterable[tuple[Keys, Tensor]],
    teacher: Callable[[Tensor], Tensor],
    batch_size: int,
    autocast: Autocast = nullcontext,
) -> Iterator[tuple[Keys, Tensor]]:
    """Ask a teacher about images: yield the keys of each batch and the logits ``(n, K)`` of its images.

    The last batch is filled up for the teacher: one of another size would be rounded otherwise.

    Args:
        batches: keys of images, in any form, and these images ``(n, C, H, W)``.
        teacher: returns logits, such as a :class:`lskd.FrozenTeacher`.
        batch_size: of training, the largest ``n``.
        autocast: makes the context of the forward pass in training.
    """
    for keys, images in batches:
        with autocast():
            logits = teacher(whole_batch(images, batch_size))
        yield keys, logits[: len(images)]
