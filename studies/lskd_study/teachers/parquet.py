"""Parquet: columns of numbers, copied in chunks to an unnamed temporary file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lskd import LskdError
from lskd.base.files import parse_json
from lskd.errors import one_line
from lskd_study.base.extras import needs_study_extra
from lskd_study.teachers.checks import check_numbers, check_present, check_size, labels_of
from lskd_study.teachers.mapped import scratch

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CHUNK = 1 << 18  # numbers of a batch; Arrow takes some 20 times their size to make it


def read_parquet(path: Path) -> dict[str, Any]:
    """Return the parts of a file, by name: tensors, and lists of texts.

    Raises:
        LskdError: a damaged file, or columns that are not what they should be.
    """
    with needs_study_extra():
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            return _read(path, file)
    except (pa.ArrowException, OSError) as error:
        raise LskdError(
            f"{path} is damaged or no Parquet file ({one_line(error)}); store or copy it again"
        ) from None


def _read(path: Path, file: "pq.ParquetFile") -> dict[str, Any]:
    schema = file.schema_arrow
    check_present(path, schema.names)
    if len(set(schema.names)) < len(schema.names):
        raise LskdError(f"{path} has two columns of one name; give each its own")
    samples = file.metadata.num_rows
    if samples == 0:
        raise LskdError(f"{path} has no rows; store at least one sample")
    packed = path.stat().st_size
    check_size(path, "labels", samples * 8, packed)
    found: dict[str, Any] = {"labels": labels_of(path, _labels(path, file))}
    if "keys" in schema.names:
        found["keys"] = _texts(path)
    for name in ("logits", "features"):
        if name in schema.names:
            found[name] = torch.from_numpy(_rows(path, name, file, samples))
    names = _class_names(path, schema.metadata or {})
    return found if names is None else {**found, "class_names": names}


def _rows(path: Path, name: str, file: "pq.ParquetFile", samples: int) -> NDArray[Any]:
    import pyarrow as pa
    from pyarrow.compute import list_value_length

    kind = file.schema_arrow.field(name).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not listed:
        raise LskdError(
            f"{path}: column '{name}' has type {kind}; it must be a list of floating-point numbers"
        )
    width = _width(path, name, file, samples)
    floating = pa.types.is_floating(kind.value_type)
    check_numbers(path, name, (samples, width), floating, kind.value_type)
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    check_size(path, name, samples * width * dtype.itemsize, path.stat().st_size)
    rows = scratch((samples, width), dtype)
    done = 0
    for batch in file.iter_batches(max(_CHUNK // width, 1), columns=[name], use_threads=False):
        column = batch.column(0)
        values = column.flatten()
        ragged = list_value_length(column).fill_null(0).to_numpy() != width
        if ragged.any():
            row = done + int(ragged.argmax())
            raise LskdError(
                f"{path}: '{name}' of sample {row} is not {width} numbers long; make all rows alike"
            )
        if values.null_count:
            raise LskdError(
                f"{path}: '{name}' has missing numbers between samples {done} and "
                f"{done + len(column) - 1}; store all of them"
            )
        if done + len(column) > samples:
            break
        rows[done : done + len(column)] = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        done += len(column)
    if done != samples:
        raise LskdError(f"{path}: '{name}' has not the {samples:,} rows that the file names; store it again")
    return rows


def _width(path: Path, name: str, file: "pq.ParquetFile", samples: int) -> int:
    """Return the numbers of the first row."""
    first = next(file.iter_batches(1, columns=[name])).column(0)[0]
    if not first.is_valid:
        raise LskdError(f"{path}: '{name}' of sample 0 is missing; store all of them")
    return len(first)


def _labels(path: Path, file: "pq.ParquetFile") -> NDArray[Any]:
    import pyarrow as pa

    column = file.read(columns=["labels"]).column(0)
    if not pa.types.is_integer(column.type):
        raise LskdError(f"{path}: 'labels' has type {column.type}; store class ids as whole numbers from 0")
    if column.null_count:
        raise LskdError(f"{path}: the label of sample {_first_null(column)} is missing; store all of them")
    return np.asarray(column.to_numpy())


def _texts(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Each distinct key once in memory, however often it stands there.
    with pq.ParquetFile(path, memory_map=True, read_dictionary=["keys"]) as file:
        column = file.read(columns=["keys"]).column(0)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise LskdError(f"{path}: 'keys' has type {column.type}; store texts")
    if column.null_count:
        raise LskdError(f"{path}: the key of sample {_first_null(column)} is missing; store all of them")
    if len(column.unique()) < len(column):
        raise LskdError(f"{path}: keys has a name twice; each needs a name of its own")
    return [str(key) for key in column.to_pylist()]


def _first_null(column: "pa.ChunkedArray") -> int:
    return int(column.is_null().to_numpy().argmax())


def _class_names(path: Path, metadata: dict[bytes, bytes]) -> list[str] | None:
    text = metadata.get(b"class_names")
    if text is None:
        return None
    try:
        names = parse_json(text.decode())
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LskdError(
            f"{path}: class_names in the schema's metadata is no list of texts in JSON; repair it"
        )
    return names
