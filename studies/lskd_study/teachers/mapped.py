"""Tensors that lie in files: of a large one only the pages that are being read are in memory."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd import LskdError

# Linux counts a private writable mapping against memory and swap, and refuses one that is larger than both;
# this flag says that nothing will be written. Python knows it from 3.12 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
CHUNK = 1 << 20  # numbers that are converted at a time


def map_array(file: IO[bytes], offset: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Map ``count`` numbers of a file, from ``offset`` bytes on; writing to them does not reach the file."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * dtype.itemsize
    mapped = mmap.mmap(
        file.fileno(),
        length,
        flags=mmap.MAP_PRIVATE | _NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,  # torch has no tensors that cannot be written
        offset=start,
    )
    return np.frombuffer(mapped, dtype, count, offset - start)


def scratch(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array in an unnamed temporary file, which goes with the array.

    Raises:
        LskdError: no room for it.
    """
    length = int(np.prod(shape)) * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                # A disk that fills up while a mapping is written kills the process; this says it at once.
                os.posix_fallocate(file.fileno(), 0, length)
            else:
                file.truncate(length)
            mapped = mmap.mmap(file.fileno(), length)
    except OSError as error:
        raise LskdError(
            f"no room for {length / 1e9:.1f} GB of temporary files in {tempfile.gettempdir()} "
            f"({error.strerror}); name a folder on a larger disk in the environment variable TMPDIR"
        ) from None
    return np.frombuffer(mapped, dtype).reshape(shape)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return a floating-point array as a tensor: itself where torch can hold it, a copy on disk elsewhere.

    torch takes numbers in this machine's byte order, at addresses that are multiples of their size, in row
    order, of 2, 4 or 8 bytes; wider ones become float64.
    """
    dtype = array.dtype.newbyteorder("=")
    if dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    if array.dtype == dtype and array.flags.aligned and array.flags.c_contiguous:
        return torch.from_numpy(array)
    copy = scratch(array.shape, dtype)
    step = max(CHUNK // array[0].size, 1)
    for start in range(0, len(array), step):
        copy[start : start + step] = array[start : start + step]
    return torch.from_numpy(copy)
