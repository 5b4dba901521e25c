"""Weights: read without running anything that is in the file, and loaded whole or not at all."""

import argparse
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lskd.base.files import read_yaml
from lskd.base.tensors import require_finite_weights
from lskd.errors import CheckpointError, LskdError, one_line

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel, ModelEma and torch.compile
_EMA_CONTAINERS = ("state_dict_ema", "model_ema")
_CONTAINERS = ("state_dict", "model", "model_state_dict")
_AVERAGED_COUNT = "n_averaged"  # what torch's AveragedModel, which EMA is made of, has beside the weights
_UNCOUNTED, _MOST_TIMES = 1 << 24, 10  # bytes, and times its size, that a file may become
_LIGHTNING, _LIGHTNING_MODEL = "pytorch-lightning_version", "model."  # its mark; its name for the model

_UNSAFE = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed global|whose module)")  # in torch's message

# What train.py scripts store beside the weights: the command line, and a metric that numpy computed. Neither
# can run code when it is loaded.
_HARMLESS: list[Any] = [argparse.Namespace, np.dtype, multiarray.scalar]
_HARMLESS += [(multiarray.scalar, "numpy.core.multiarray.scalar")]  # as numpy 1 wrote it
_HARMLESS += [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]


class _Inert:
    """Stands in for what a file names: takes whatever it is called with, or given as state; does nothing."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


# mmengine stores its training log beside the weights: arrays, and methods looked up by getattr. Nothing of
# these is needed, so nothing of them runs: the names mean the stand-in while a file is read.
_HARMLESS.append(_Inert)
_HARMLESS += [
    (_Inert, name)
    for name in (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "builtins.getattr",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
    )
]


def load_teacher_weights(path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, on the CPU.

    Understands bare state dicts, the layouts of timm's, mmengine's, torchvision's, Lightning's and most
    ``train.py`` scripts (``state_dict``, ``state_dict_ema``, ``model``, ``model_ema``), the prefixes of
    DataParallel, ``torch.compile``, ``AveragedModel`` and Lightning, and safetensors. Pickled files are read
    by torch's ``weights_only`` loader.

    Args:
        path: safetensors, or anything that ``torch.save`` wrote; the content says which, not the name.
        use_ema: take the averaged weights where the file has them, as timm does.

    Raises:
        CheckpointError: for a file that is missing, damaged, without weights or of their shapes alone, or
            that would run code.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "teacher.pth"
    >>> torch.save({"epoch": 3, "state_dict": {"module.fc.bias": torch.zeros(2)}}, file)
    >>> load_teacher_weights(file)
    {'fc.bias': tensor([0., 0.])}
    """
    weights = _find_weights(read_checkpoint(path), use_ema)
    if not weights:
        raise CheckpointError(
            f"checkpoint {path} contains no weights by name; "
            "save model.state_dict(), alone or as 'state_dict'"
        )
    require_content(weights, path)
    return _without_wrappers(weights)


def read_checkpoint(
    path: str | Path, fix: str = "save the weights alone (model.state_dict()) or as safetensors"
) -> Any:
    """Return what is in a file of weights, on the CPU, as it was saved; nothing that is in it runs.

    Args:
        path: safetensors, or anything that ``torch.save`` wrote.
        fix: what to do about a file that would run code.

    Raises:
        CheckpointError: for a file that is missing, damaged, or that would run code.
    """
    path = Path(path)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    if not is_file:
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file; check the path")
    if is_safetensors(path):
        return _read_safetensors(path)
    refuse_bomb(path)
    return _read_torch(path, fix)


def refuse_bomb(path: str | Path) -> None:
    """Refuse a file of `torch.save` whose parts would become far more in memory than they are in the file.

    torch packs nothing, and reads each part at once, however large it becomes.

    Raises:
        CheckpointError: they would be over ten times as large as the file, or it is damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return  # torch's older formats, in which nothing is packed
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
    except OSError:
        return  # of which whoever reads it says so
    except Exception:  # zipfile has many, also for what torch would read
        raise _damaged(path) from None
    if unpacked > max(_UNCOUNTED, _MOST_TIMES * size):
        raise CheckpointError(
            f"checkpoint {path} would become {unpacked / 1e6:,.0f} MB out of {size / 1e6:,.2f} MB, so it is "
            "damaged or made to fill the memory; save it again"
        )


def require_content(weights: Mapping[str, Any], path: str | Path) -> None:
    """Refuse tensors of shapes alone, of torch's device `meta`: they would count as weights of any size.

    Args:
        weights: what was read of a file, by name; what is no tensor is passed over.
        path: the file, for the message.

    Raises:
        CheckpointError: a tensor has no numbers in the file.
    """
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise CheckpointError(
                f"checkpoint {path} has the shape of '{name}' and none of its numbers (device "
                f"{value.device}); save it again when the model has its weights"
            )


def load_strictly(
    model: nn.Module, weights: Mapping[str, Tensor], name: str, path: str | Path, fix: str
) -> None:
    """Load weights into a network: all of them, and nothing else.

    Args:
        name: what the network is called in messages.
        path: the file that they come from, for messages.
        fix: what to do where they do not fit.

    Raises:
        CheckpointError: weights of another architecture, or of other shapes.
        DivergedError: a weight is not a finite number.
    """
    wanted = model.state_dict()
    # Files older than torch 0.4.1 lack these counts of batches, which nothing here reads.
    counts = {key: value for key, value in wanted.items() if key.endswith(".num_batches_tracked")}
    weights = {**counts, **weights}
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unexpected:
        example = f"no '{missing[0]}'" if missing else f"'{unexpected[0]}', which {name} has not"
        raise CheckpointError(
            f"{path} contains weights of another architecture than {name}: it has {example} "
            f"({len(missing)} missing, {len(unexpected)} unexpected); {fix}."
        )
    for key, tensor in weights.items():
        if tensor.shape != wanted[key].shape:
            raise CheckpointError(
                f"{path} does not fit {name}: '{key}' is {list(tensor.shape)}, the model's is "
                f"{list(wanted[key].shape)}; {fix}."
            )
    require_finite_weights((f"{key} in {path}", tensor) for key, tensor in weights.items())
    model.load_state_dict(weights)


def is_safetensors(path: str | Path) -> bool:
    """Return whether a file begins as safetensors do: with the length of a JSON object, and the object.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            header = int.from_bytes(start[:8], "little")
            return start[8:] == b"{" and 8 + header <= os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def is_whole(path: str | Path) -> bool:
    """Whether a file is what torch saves, to its end and with all of its checksums right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None  # compares checksums
    except Exception:  # a damaged one has many, and so has a damaged name
        return False


def has_end(path: str | Path) -> bool:
    """Whether a file ends as what torch saves does, so that it was not cut while it was written."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of disks; a name that cannot be opened is no error to it
        return False


def file_checksum(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        CheckpointError: for a file that cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "empty"
    >>> file.touch()
    >>> file_checksum(file)[:16]
    'e3b0c44298fc1c14'
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def settings_beside(checkpoint: str | Path, model: str) -> dict[str, Any]:
    """Return the args.yaml that timm's trainers leave beside a checkpoint; {} where it is not of this model.

    Args:
        model: timm's name, with or without a tag.
    """
    try:
        content = read_yaml(Path(checkpoint).parent / "args.yaml")
    except LskdError:
        return {}
    own = isinstance(content, dict) and str(content.get("model")).partition(".")[0] == model.partition(".")[0]
    return content if own else {}


@contextmanager
def _harmless_allowed() -> Iterator[None]:
    """Allow what is harmless for a while, and what the process had allowed before ever after.

    torch's own context manager takes back what it was given, even what was allowed before it; and of two
    entries of one name (a stand-in, and what a trainer's plugin allowed) chance says which one counts.
    """
    before = torch.serialization.get_safe_globals()
    ours = {_global_name(entry) for entry in _HARMLESS}
    try:
        torch.serialization.clear_safe_globals()
        others = [entry for entry in before if _global_name(entry) not in ours]
        torch.serialization.add_safe_globals(others + _HARMLESS)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _global_name(entry: Any) -> str:
    """Return what a file calls an entry of torch's list."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read as safetensors: {one_line(error)}") from None


def _read_torch(path: Path, fix: str) -> Any:
    try:
        # A file and not its name, of which torch would ask the suffix.
        with open(path, "rb") as file, warnings.catch_warnings(), _harmless_allowed():
            warnings.simplefilter("ignore")  # torch's remarks on a file that is refused or read anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := _UNSAFE.search(str(error)):
            raise CheckpointError(
                f"checkpoint {path} is refused: it contains {refused[1]}, and loading that would run code "
                f"that is in the file; {fix}"
            ) from None
    except Exception as error:  # what a damaged file makes of the unpickler: struct.error, LookupError, ...
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"checkpoint {path} is a TorchScript archive, which contains code; {fix}"
            ) from None
    # torch's own text advises weights_only=False, which is no advice for a file that is damaged.
    raise _damaged(path)


def _damaged(path: str | Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged or no checkpoint; copy or save it again")


def _find_weights(content: Any, use_ema: bool) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for key in (*_EMA_CONTAINERS, *_CONTAINERS) if use_ema else _CONTAINERS:
        if isinstance(content.get(key), Mapping) and content[key]:
            weights = _tensors(content[key])
            if _LIGHTNING in content:  # a module may contain more than its model: its loss, a teacher
                ours = {name: value for name, value in weights.items() if name.startswith(_LIGHTNING_MODEL)}
                return {name.removeprefix(_LIGHTNING_MODEL): value for name, value in ours.items()} or weights
            return weights
    return _tensors(content)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    # A dictionary of other things with a tensor among them is no state dict.
    return tensors if len(tensors) == len(content) else {}


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = weights.keys() - {_AVERAGED_COUNT}
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            inner = {name.removeprefix(prefix): weights[name] for name in weights if name in names}
            return _without_wrappers(inner)
    return weights
