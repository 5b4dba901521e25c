"""Files of logits and labels: NumPy's ``.npz``, safetensors and Parquet, each read by its own library.

What they contain is checked in one way for all three. A safetensors file is mapped and may be larger than the
memory; the others are read into it, after what they will become has been compared with it.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lskd import LskdError
from lskd.base.files import parse_json, whole_file
from lskd.errors import one_line
from lskd_study.base.text import storable

if TYPE_CHECKING:
    import pyarrow as pa

MATRICES = {
    "logits": "(samples, classes)",
    "features": "(samples, width)",
    "weight": "(classes, width)",
}
TEXTS = ("keys", "class_names")
PARTS = ("labels", *MATRICES, *TEXTS)
# Others, such as float8, are storage formats that torch does not compute with.
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNCOUNTED = 1 << 30  # bytes that any part of a file may become
_MOST_TIMES = 100  # logits of one and the same number in each row shrink by more; no network's do
_ROWS = 1024  # of Parquet at a time: Arrow takes some 20 times the size of what it makes lists of


def read_file(path: Path) -> dict[str, Any]:
    """Return what is in a file, by its name in :data:`PARTS`: tensors, and lists of texts.

    ``labels`` are int64 ``(samples,)``, the matrices of floating point in the file's precision, at most
    float64; numbers may not be finite. Lengths are not compared.

    Raises:
        LskdError: one line: a file that is missing, damaged or too large, or what it should not contain.
    """
    if path.suffix.lower() not in _READERS:
        raise LskdError(f"{path} is of no known kind; logits are read from {', '.join(_READERS)} files")
    kind, reader = _READERS[path.suffix.lower()]
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise LskdError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if not there:
        raise LskdError(f"{path} does not exist or is not a file; check the path")
    try:
        found = reader(path)
    except (LskdError, ModuleNotFoundError):  # the latter is said at the command's door
        raise
    except PermissionError as error:
        raise LskdError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except Exception as error:  # what a damaged file makes of zlib, NumPy's parser of headers, Arrow ...
        raise LskdError(
            f"{path} is damaged or no {kind} file ({one_line(error)}); store or copy it again"
        ) from None
    parts = {"labels": _labels(path, found["labels"])}
    parts |= {name: _matrix(path, name, found[name]) for name in MATRICES if name in found}
    return parts | {name: found[name] for name in TEXTS if name in found}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | None], texts: Mapping[str, Sequence[str] | None]
) -> None:
    """Write a file whole or not at all, without what is None.

    Raises:
        LskdError: a folder that cannot be written, or a name that is no UTF-8 text in one line.
    """
    stored = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    for name, lines in texts.items():
        if lines is None:
            continue
        if broken := [line for line in lines if not storable(line)]:
            raise LskdError(f"cannot store {broken[0]!r} in {path}: a line break, or no UTF-8; rename it")
        stored[name] = torch.frombuffer(bytearray("\n".join(lines).encode()), dtype=torch.uint8)
    try:
        with whole_file(path) as scratch:
            save_file(stored, scratch)
    except SafetensorError as error:  # an OSError of the disk, as safetensors puts it
        raise LskdError(f"cannot write {path} ({one_line(error)}); choose another folder") from None


# What may be in a file


def _check_present(path: Path, present: Iterable[str]) -> None:
    names = sorted(present)
    there = f"it contains {', '.join(names) or 'nothing'}"
    if "labels" not in names:
        raise LskdError(f"{path} has no 'labels' ({there}); store the samples' class ids under that name")
    if "logits" not in names and "features" not in names:
        raise LskdError(
            f"{path} has no 'logits' ({there}); store the numbers before softmax, {MATRICES['logits']}, "
            "under that name"
        )


def _check_sizes(path: Path, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse, before anything is read, parts that would fill the memory; ``sizes``: in memory, in the file.

    A part may become 1 GiB or 100 times as much; all together, of which two copies are in memory at times,
    half of the memory.
    """
    for name, (unpacked, packed) in sizes.items():
        if unpacked > max(_UNCOUNTED, _MOST_TIMES * packed):
            raise LskdError(
                f"{path}: '{name}' would become {unpacked / 1e9:.1f} GB out of {packed / 1e6:.2f} MB, so it "
                "is damaged or made to fill the memory; if it is yours, store it without compression"
            )
    total = sum(unpacked for unpacked, _ in sizes.values())
    if hasattr(os, "sysconf") and total > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        raise LskdError(
            f"{path} takes {total / 1e9:.1f} GB, more than half of the memory here; store it as "
            ".safetensors, which stays on the disk"
        )


def _matrix(path: Path, name: str, array: NDArray[Any] | Tensor) -> Tensor:
    """Return logits, features or a classifier's weight as a tensor that torch computes with."""
    if len(array.shape) != 2:
        raise LskdError(f"{path}: '{name}' has shape {tuple(array.shape)}; it must be {MATRICES[name]}")
    floating = array.dtype in _FLOATING if isinstance(array, Tensor) else array.dtype.kind == "f"
    if not floating:
        raise LskdError(
            f"{path}: '{name}' has dtype {array.dtype}; store floating-point numbers, as the network gave "
            "them"
        )
    if array.shape[0] == 0:
        raise LskdError(f"{path}: '{name}' has no rows; store at least one sample")
    if array.shape[1] == 0:
        raise LskdError(f"{path}: '{name}' has no columns; it must be {MATRICES[name]}")
    if isinstance(array, Tensor):
        return array
    # torch takes numbers in this machine's byte order, in row order, of at most 8 bytes.
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    return torch.from_numpy(np.require(array, dtype, ["C", "W", "E"]))


def _labels(path: Path, array: NDArray[Any]) -> Tensor:
    """Return class ids of any integer type as int64."""
    if array.ndim != 1:
        raise LskdError(
            f"{path}: 'labels' has shape {array.shape}; it must be (samples,), one class id a sample"
        )
    if array.dtype.kind not in "iu":
        raise LskdError(f"{path}: 'labels' has dtype {array.dtype}; store class ids as whole numbers from 0")
    if not array.size:
        raise LskdError(f"{path}: 'labels' is empty; store at least one sample")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        index = int(array.argmax())
        raise LskdError(
            f"{path}: the label of sample {index} is {array[index]}; class ids are counted from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


# NumPy


def _read_npz(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        _check_present(path, members)
        used = [name for name in PARTS if name in members]
        _check_sizes(path, {name: (members[name].file_size, members[name].compress_size) for name in used})
        for name in used:
            with archive.open(members[name]) as content:
                try:
                    array = np.lib.format.read_array(content, allow_pickle=False)
                except ValueError as error:
                    if "Object arrays" not in str(error):
                        raise
                    raise LskdError(
                        f"{path}: '{name}' contains Python objects, and loading those would run code that "
                        "is in the file; store numbers, and names as text (dtype str)"
                    ) from None
                if content.read(1):  # at its end the checksum is compared
                    raise ValueError(f"'{name}' is longer than its header says")
            if name in TEXTS and (array.ndim != 1 or array.dtype.kind != "U" or not array.dtype.itemsize):
                raise LskdError(
                    f"{path}: '{name}' has shape {array.shape} and dtype {array.dtype}; "
                    "store a row of texts (dtype str)"
                )
            found[name] = array.tolist() if name in TEXTS else array
    return found


# safetensors: texts are UTF-8 in uint8, joined by newlines


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        _check_present(path, file.keys())
        found = {name: file.get_tensor(name) for name in PARTS if name in file.keys()}  # noqa: SIM118
    labels = found["labels"]
    # NumPy has no bfloat16; whatever is floating point is refused anyway.
    texts = {name: _safetensors_texts(path, name, found[name]) for name in TEXTS if name in found}
    return found | texts | {"labels": (labels.float() if labels.is_floating_point() else labels).numpy()}


def _safetensors_texts(path: Path, name: str, tensor: Tensor) -> list[str]:
    if tensor.dtype is torch.uint8 and tensor.ndim == 1:
        try:
            return tensor.numpy().tobytes().decode().split("\n")
        except UnicodeDecodeError:
            pass
    raise LskdError(f"{path}: '{name}' is no UTF-8 text in uint8; store the names joined by newlines")


# Parquet: a row of a matrix is a list, class names are JSON in the schema's metadata


def _read_parquet(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        schema = file.schema_arrow
        _check_present(path, schema.names)
        if len(set(schema.names)) < len(schema.names):
            raise LskdError(f"{path} has two columns of one name; give each its own")
        if file.metadata.num_rows == 0:
            raise LskdError(f"{path} has no rows; store at least one sample")
        used = [name for name in ("labels", "logits", "features", "keys") if name in schema.names]
        numbers: Counter[str] = Counter()  # in each column, with those in its lists
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                numbers[column.path_in_schema.partition(".")[0]] += column.num_values
        bytes_of = {name: _bytes_each(schema.field(name).type) * numbers[name] for name in used}
        _check_sizes(path, {name: (size, path.stat().st_size) for name, size in bytes_of.items()})
    # Each distinct key once in memory, however often it stands there.
    coded = [name for name in used if name == "keys"]
    with pq.ParquetFile(path, memory_map=True, read_dictionary=coded) as file:
        table = pa.Table.from_batches(file.iter_batches(_ROWS, columns=used, use_threads=False))
    _refuse_missing(path, {name: table[name] for name in used})
    found: dict[str, Any] = {name: _rows(path, name, table[name]) for name in used if name in MATRICES}
    found["labels"] = table["labels"].to_numpy()
    if coded:
        found["keys"] = _parquet_keys(path, table["keys"])
    if (text := (schema.metadata or {}).get(b"class_names")) is not None:
        try:
            names = parse_json(text.decode())
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LskdError(
                f"{path}: class_names in the schema's metadata is no list of texts in JSON; repair it"
            )
        found["class_names"] = names
    return found


def _bytes_each(kind: "pa.DataType") -> int:
    value = getattr(kind, "value_type", kind)
    try:
        return int(value.bit_width) // 8
    except ValueError:  # of any length: a text, which is read once, and a reference to it each time
        return 8


def _refuse_missing(path: Path, columns: "Mapping[str, pa.ChunkedArray]", width: int = 1) -> None:
    for name, column in columns.items():
        if column.null_count:
            sample = int(column.is_null().to_numpy().argmax()) // width
            raise LskdError(f"{path}: '{name}' of sample {sample} has missing values; store all of them")


def _rows(path: Path, name: str, column: "pa.ChunkedArray") -> NDArray[Any]:
    from pyarrow import compute, types

    kind = column.type
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        raise LskdError(
            f"{path}: column '{name}' has type {kind}; it must be a list of floating-point numbers"
        )
    width = len(column[0])
    ragged = compute.list_value_length(column).to_numpy() != width
    if ragged.any():
        row = int(ragged.argmax())
        raise LskdError(f"{path}: '{name}' of sample {row} is not {width} numbers long; make all rows alike")
    values = compute.list_flatten(column)
    _refuse_missing(path, {name: values}, width)
    return np.asarray(values.to_numpy()).reshape(len(column), width)


def _parquet_keys(path: Path, column: "pa.ChunkedArray") -> list[str]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise LskdError(f"{path}: 'keys' has type {column.type}; store texts")
    if len(column.unique()) < len(column):
        raise LskdError(f"{path}: keys has a name twice; each needs a name of its own")
    return [str(key) for key in column.to_pylist()]


_READERS: Mapping[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    ".npz": (".npz", _read_npz),
    ".safetensors": ("safetensors", _read_safetensors),
    ".parquet": ("Parquet", _read_parquet),
}
