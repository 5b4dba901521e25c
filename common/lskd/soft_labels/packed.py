"""Rows in few bytes: class ids in as many bits as their number needs, log-probabilities in eight."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a code c: -16 (c / 255)^2 nats, finest where the probability is. What is below e^-16 is e^-16.
LEVELS = (-16 * (np.arange(256) / 255) ** 2).astype(np.float16)


def packed_bytes(num_classes: int, k: int) -> int:
    """Return the bytes of k ids and k codes."""
    return k + (k * _bits(num_classes) + 7) // 8


def codes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the codes of log-probabilities, whose :data:`LEVELS` are the nearest in square roots."""
    roots: NDArray[np.float32] = np.sqrt(np.clip(values.astype(np.float32), -16, 0) / -16)
    return np.rint(roots * 255).astype(np.uint8)


def pack(values: NDArray[Any], ids: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """Return rows ``(n, packed_bytes)`` of log-probabilities and ids ``(n, k)``: first codes, then ids, whose
    bits follow one another from the lowest on."""
    bits = (ids[..., None].astype(np.uint32) >> np.arange(_bits(num_classes), dtype=np.uint32)) & 1
    flat = np.packbits(
        bits.astype(np.uint8).reshape(len(ids), ids.shape[1] * _bits(num_classes)), axis=-1, bitorder="little"
    )
    return np.concatenate([codes(values), flat], -1)


def unpack(rows: NDArray[np.uint8], num_classes: int, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return float16 values and uint32 ids ``(n, k)`` of packed rows ``(n, packed_bytes)``."""
    width = _bits(num_classes)
    bits = np.unpackbits(rows[:, k:], axis=-1, count=k * width, bitorder="little").reshape(
        len(rows), k, width
    )
    ids = (bits.astype(np.uint32) << np.arange(width, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return LEVELS[rows[:, :k]], ids


def _bits(num_classes: int) -> int:
    return max(1, (num_classes - 1).bit_length())
