"""The teacher's answers to validation images, which are the same images in every epoch."""

from typing import Any

import torch
from torch import Tensor

LIMIT = 256 << 20  # bytes; ImageNet's 50,000 images and 1,000 classes take 200 million
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class RememberedAnswers:
    """Asks a teacher about a batch, unless all of its images have been asked about before.

    An image is known by all of its pixels: where validation is augmented, the teacher is asked again.

    Args:
        limit: bytes of logits that are kept; beyond them the teacher is asked.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        """Remember nothing."""
        self._room = limit
        self._rows: dict[int, Tensor] = {}
        self._factors = torch.empty(0, dtype=torch.int64)

    def __call__(self, teacher: Any, inputs: Tensor) -> Tensor:
        """Return the teacher's logits `(B, K)` for a batch `(B, C, H, W)`."""
        keys = self._keys(inputs)
        if all(key in self._rows for key in keys):
            return torch.stack([self._rows[key] for key in keys]).to(inputs.device)
        logits: Tensor = teacher(inputs)
        size = logits.numel() * logits.element_size()
        if size <= self._room:
            self._room -= size
            self._rows.update(zip(keys, logits.cpu(), strict=True))
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "RememberedAnswers":
        """Be the memory of a student's copy (an averaged model, say) too."""
        return self

    def _keys(self, inputs: Tensor) -> list[int]:
        # Sums of the pixels, as bits, times fixed random numbers, modulo 2 ** 64: exact on any device.
        images = [image.flatten().view(_WORDS[image.element_size()]) for image in inputs.contiguous()]
        if len(self._factors) != len(images[0]) or self._factors.device != inputs.device:
            factors = torch.empty(len(images[0]), dtype=torch.int64)
            factors.random_(generator=torch.Generator().manual_seed(0))
            self._factors = (2 * factors + 1).to(inputs.device)
        keys: list[int] = torch.stack([(image * self._factors).sum() for image in images]).tolist()
        return keys
