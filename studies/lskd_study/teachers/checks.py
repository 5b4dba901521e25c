"""One clear line for whatever is wrong with what a teacher's file holds."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd import LskdError

SHAPES = {
    "logits": "(samples, classes)",
    "features": "(samples, width)",
    "weight": "(classes, width)",
    "labels": "(samples,)",
}


_UNCOUNTED = 1 << 30  # bytes that any file may become
_MOST_TIMES = 100  # logits of one and the same number in each row shrink by more; no network's do


def check_size(path: Path, name: str, unpacked: int, packed: int) -> None:
    """Refuse what would become more than 1 GiB and 100 times what it takes in the file, before it does."""
    if unpacked > max(_UNCOUNTED, _MOST_TIMES * packed):
        raise LskdError(
            f"{path}: '{name}' would become {unpacked / 1e9:.1f} GB out of {packed / 1e6:.1f} MB, so it is "
            "damaged or made to fill the disk; if it is yours, store it without compression"
        )


def check_present(path: Path, present: Iterable[str]) -> None:
    """Refuse a file without labels, or with neither logits nor features."""
    names = sorted(present)
    there = f"it holds {', '.join(names)}" if names else "it holds nothing"
    if "labels" not in names:
        raise LskdError(f"{path} has no 'labels' ({there}); store the samples' class ids under that name")
    if "logits" not in names and "features" not in names:
        raise LskdError(
            f"{path} has no 'logits' ({there}); store the numbers before softmax, {SHAPES['logits']}, "
            "under that name"
        )


def check_numbers(path: Path, name: str, shape: Sequence[int], floating: bool, dtype: object) -> None:
    """Refuse logits, features or a classifier's weight that are no matrix of floating-point numbers."""
    if len(shape) != 2:
        raise LskdError(f"{path}: '{name}' has shape {tuple(shape)}; it must be {SHAPES[name]}")
    if not floating:
        raise LskdError(
            f"{path}: '{name}' has dtype {dtype}; store floating-point numbers, as the network gave them"
        )
    if shape[0] == 0:
        raise LskdError(f"{path}: '{name}' has no rows; store at least one sample")
    if shape[1] == 0:
        raise LskdError(f"{path}: '{name}' has no columns; it must be {SHAPES[name]}")


def labels_of(path: Path, array: NDArray[Any]) -> Tensor:
    """Return class ids of any integer type as int64."""
    if array.ndim != 1:
        raise LskdError(
            f"{path}: 'labels' has shape {array.shape}; it must be {SHAPES['labels']}, one class id a sample"
        )
    if array.dtype.kind not in "iu":
        raise LskdError(f"{path}: 'labels' has dtype {array.dtype}; store class ids as whole numbers from 0")
    if not array.size:
        raise LskdError(f"{path}: 'labels' is empty; store at least one sample")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        index = int((array > np.iinfo(np.int64).max).argmax())
        raise LskdError(
            f"{path}: the label of sample {index} is {array[index]}; class ids are counted from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


def check_consistent(
    path: Path | str,
    labels: Tensor,
    logits: Tensor | None,
    features: Tensor | None,
    weight: Tensor | None,
    keys: Sequence[str] | None,
    class_names: Sequence[str] | None,
) -> None:
    """Refuse what does not belong together; numbers that are not finite are left to who reads them.

    Raises:
        LskdError: lengths or widths that differ, labels that are no class, fewer than two classes, or a name
            that occurs twice.
    """
    for name, rows in (("logits", logits), ("features", features), ("keys", keys)):
        if rows is not None and len(rows) != len(labels):
            raise LskdError(
                f"{path}: {name} have {len(rows):,} rows, labels {len(labels):,}; store one of each a sample"
            )
    if features is not None and weight is not None and features.shape[1] != weight.shape[1]:
        raise LskdError(
            f"{path}: features have {features.shape[1]} columns, weight {weight.shape[1]}; "
            "store the features that go into this classifier"
        )
    counts = {
        name: count
        for name, count in (
            ("logits", None if logits is None else logits.shape[1]),
            ("weight", None if weight is None else len(weight)),
            ("class_names", None if class_names is None else len(class_names)),
        )
        if count is not None
    }
    (first, classes), *others = counts.items() or [("labels", int(labels.max()) + 1)]
    for name, count in others:
        if count != classes:
            raise LskdError(f"{path}: {first} have {classes:,} classes, {name} {count:,}; store all of them")
    if classes < 2:
        raise LskdError(f"{path}: {first} have {classes} class; at least two are needed")
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise LskdError(
            f"{path}: the label of sample {index} is {int(labels[index])}; "
            f"with {classes:,} classes labels are 0 to {classes - 1}"
        )
    for name, texts in (("keys", keys), ("class_names", class_names)):
        if texts is not None and len(set(texts)) < len(texts):
            raise LskdError(f"{path}: {name} has {_twice(texts)!r} twice; each needs a name of its own")


def _twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""
