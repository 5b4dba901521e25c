"""NumPy's ``.npz``: arrays that are stored as they are are mapped, compressed ones unpacked to disk first."""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lskd import LskdError
from lskd.errors import one_line
from lskd_study.teachers.checks import check_numbers, check_present, check_size, labels_of
from lskd_study.teachers.mapped import as_tensor, map_array, scratch

_BLOCK = 1 << 22
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of the name and the extra field after it


def read_npz(path: Path) -> dict[str, Any]:
    """Return the parts of a file, by name: tensors, and lists of texts.

    Raises:
        LskdError: a damaged file, or arrays that are not what they should be.
    """
    found: dict[str, Any] = {}
    with _one_line_errors(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        check_present(path, members)
        for name in ("labels", "logits", "features", "weight", "keys", "class_names"):
            if name not in members:
                continue
            if name in ("labels", "keys", "class_names"):
                array = _small_array(path, name, archive, members[name])
                found[name] = labels_of(path, array) if name == "labels" else _texts(path, name, array)
            else:
                found[name] = as_tensor(_large_array(path, name, file, archive, members[name]))
    return found


def _small_array(path: Path, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    check_size(path, name, member.file_size, member.compress_size)
    with archive.open(member) as content:
        shape, _, dtype = _header(path, name, content)
        _check_length(path, name, member, content.tell() + prod(shape) * dtype.itemsize)
    with archive.open(member) as content:
        return np.asarray(npy.read_array(content, allow_pickle=False))


def _large_array(
    path: Path, name: str, file: IO[bytes], archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> NDArray[Any]:
    with archive.open(member) as content:
        shape, fortran, dtype = _header(path, name, content)
        check_numbers(path, name, shape, dtype.kind == "f", dtype)
        start = content.tell()
        _check_length(path, name, member, start + prod(shape) * dtype.itemsize)
        check_size(path, name, member.file_size, member.compress_size)
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
            file.seek(member.header_offset)
            lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            offset = member.header_offset + _LOCAL_HEADER.size + sum(lengths) + start
            array = map_array(file, offset, dtype, prod(shape))
        else:
            array = scratch((prod(shape),), dtype)
            _unpack(content, array.view(np.uint8).data)
    return array.reshape(shape, order="F" if fortran else "C")


def _check_length(path: Path, name: str, member: zipfile.ZipInfo, expected: int) -> None:
    if member.file_size != expected:
        raise LskdError(_damaged(path, f"'{name}' is not as long as its header says"))


def _unpack(content: IO[bytes], target: memoryview) -> None:
    done = 0
    while done < len(target):
        block = content.read(min(_BLOCK, len(target) - done))
        if not block:
            raise EOFError("the file ends too early")
        target[done : done + len(block)] = block
        done += len(block)
    content.read(1)  # at the end the checksum is compared


def _header(path: Path, name: str, content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(content)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(content)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(content)
    else:
        raise LskdError(f"{path}: '{name}' has fields with names; store plain arrays")
    if dtype.hasobject:
        raise LskdError(
            f"{path}: '{name}' holds Python objects, and loading those would run code that is in the file; "
            "store numbers, and names as text (dtype str)"
        )
    return shape, fortran, dtype


def _texts(path: Path, name: str, array: NDArray[Any]) -> list[str]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise LskdError(
            f"{path}: '{name}' has shape {array.shape} and dtype {array.dtype}; "
            "store a row of texts (dtype str)"
        )
    return [str(text) for text in array.tolist()]


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LskdError:
        raise
    except zipfile.BadZipFile:
        raise LskdError(_damaged(path, "no zip archive, or not all of one")) from None
    except OSError as error:
        raise LskdError(f"{path} cannot be read ({error.strerror or error}); check the file") from None
    except Exception as error:  # what a damaged file makes of zlib, zipfile and NumPy's parser of headers
        raise LskdError(_damaged(path, one_line(error))) from None


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged or no .npz file ({reason}); store or copy it again"
