"""safetensors: its own reader maps the file; names are newline-joined UTF-8 in uint8."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lskd import LskdError
from lskd.base.files import whole_file
from lskd.errors import one_line
from lskd_study.base.text import storable
from lskd_study.teachers.checks import check_numbers, check_present, labels_of

# Others, such as float8, are storage formats that torch does not compute with.
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the parts of a file, by name: tensors, and lists of texts.

    Raises:
        LskdError: a damaged file, or tensors that are not what they should be.
    """
    found: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            check_present(path, present)
            for name in ("logits", "features", "weight"):
                if name in present:
                    tensor = file.get_tensor(name)
                    check_numbers(path, name, tensor.shape, tensor.dtype in _FLOATING, tensor.dtype)
                    found[name] = tensor
            labels = file.get_tensor("labels")
            # NumPy has no bfloat16; whatever is floating point is refused anyway.
            array = (labels.float() if labels.is_floating_point() else labels).numpy()
            found["labels"] = labels_of(path, array)
            for name in ("keys", "class_names"):
                if name in present:
                    found[name] = _texts(path, name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise LskdError(
            f"{path} is damaged or no safetensors file ({one_line(error)}); store or copy it again"
        ) from None
    return found


def _texts(path: Path, name: str, tensor: Tensor) -> list[str]:
    if tensor.dtype is torch.uint8 and tensor.ndim == 1:
        try:
            return tensor.numpy().tobytes().decode().split("\n")
        except UnicodeDecodeError:
            pass
    raise LskdError(f"{path}: '{name}' is no UTF-8 text in uint8; store the names joined by newlines")


def write_safetensors(path: Path, tensors: dict[str, Tensor], texts: dict[str, Sequence[str]]) -> None:
    """Write a file whole or not at all.

    Raises:
        LskdError: a folder that cannot be written, or a name that is no UTF-8 text in one line.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, words in texts.items():
        broken = [word for word in words if not storable(word)]
        if broken:
            raise LskdError(f"cannot store {broken[0]!r} in {path}: a line break, or no UTF-8; rename it")
        stored[name] = torch.frombuffer(bytearray("\n".join(words).encode()), dtype=torch.uint8)
    try:
        with whole_file(path) as scratch:
            save_file(stored, scratch)
    except SafetensorError as error:  # an OSError of the disk, in its own words
        raise LskdError(f"cannot write {path} ({one_line(error)}); choose another folder") from None
