"""A data-bin that is damaged, or cut while it is read, is one line that names the file.

Of `--dataset-impl mmap`, which `fairseq-preprocess` makes. It has no checksums: of a word that became another
one nobody can tell. But an index tells all lengths, and a dictionary how many words there are. Files are
mapped into memory: of one that was cut a place would be read that is not there, which ends the process
without a word.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import LanguagePairDataset, indexed_dataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype

from fairseq_kd.safe_loading import wrap
from lskd import LskdError

_HEADER = 26  # bytes: the format's name, its version (8), the kind of number (1), and how many sentences (8)
_AGAIN = "copy it again, or make the data-bin again"


def install() -> None:
    """Check what fairseq maps: when it is opened, before each sentence, and the words of each batch."""
    wrap(indexed_dataset, "infer_dataset_impl", _infer)
    wrap(MMapIndexedDataset, "_do_init", _open)
    wrap(MMapIndexedDataset, "__del__", _close)
    wrap(MMapIndexedDataset, "__getitem__", _item)
    wrap(LanguagePairDataset, "collater", _batch)


def _infer(infer: Callable[..., Any], path: str) -> Any:
    """Of an index whose beginning says nothing fairseq would take another format, and fail in that."""
    if (found := infer(path)) is None and all(Path(f"{path}.{end}").is_file() for end in ("idx", "bin")):
        raise LskdError(f"{path}.idx is no index of fairseq's, or is cut or damaged; {_AGAIN}")
    return found


def _open(begin: Callable[..., None], self: Any, path: str) -> None:
    index, data = f"{path}.idx", f"{path}.bin"
    try:
        expected = _length(Path(index))
        self.kd_files = {file: os.stat(file) for file in (index, data)}
    except OSError as error:
        raise LskdError(f"{error.filename} cannot be read ({error.strerror}); {_AGAIN}") from None
    if (size := self.kd_files[data].st_size) != expected:
        raise LskdError(
            f"{data} has {size:,} bytes, and by its index {expected:,}; one is cut or damaged; {_AGAIN}"
        )
    begin(self, path)


def _close(close: Callable[..., None], self: Any) -> None:
    if hasattr(self, "_bin_buffer_mmap"):  # or nothing was opened, and Python would print a traceback
        close(self)


def _length(index: Path) -> int:
    """Return how many bytes an index says that its sentences have."""
    with index.open("rb") as file:
        header = file.read(_HEADER).ljust(_HEADER, b"\0")
    kind, count = _code_to_dtype.get(header[17]), int.from_bytes(header[18:], "little")
    begins = MMapIndexedDataset.Index._HDR_MAGIC + (1).to_bytes(8, "little")
    if header[:17] != begins or kind is None or index.stat().st_size != _HEADER + 12 * count:
        raise LskdError(f"{index} is no index of fairseq's, or is cut or damaged; {_AGAIN}")
    if not count:
        return 0
    sizes = np.memmap(index, np.int32, "r", _HEADER, count)
    places = np.memmap(index, np.int64, "r", _HEADER + 4 * count, count)
    end = 0
    for first in range(0, count, 1 << 20):
        some = sizes[first : first + (1 << 20)].astype(np.int64) * np.dtype(kind).itemsize
        ends = end + np.cumsum(some)
        if some.min() < 0 or (places[first : first + (1 << 20)] != ends - some).any():
            raise LskdError(f"{index} is damaged: its places do not follow from its lengths; {_AGAIN}")
        end = int(ends[-1])
    return end


def _item(get: Callable[..., Any], self: Any, number: int) -> Any:
    for file, opened in self.kd_files.items():
        with contextlib.suppress(OSError):  # what is mapped stays, also where another file takes its name
            now = os.stat(file)
            if now.st_size < opened.st_size and os.path.samestat(now, opened):
                raise LskdError(f"{file} was cut while it was read; {_AGAIN}")
    return get(self, number)


def _batch(collate: Callable[..., Any], self: Any, samples: list[Any], *args: Any, **kwargs: Any) -> Any:
    for side, dictionary, data in (
        ("source", self.src_dict, self.src),
        ("target", self.tgt_dict, self.tgt),
    ):
        sentences = {sample["id"]: sample[side] for sample in samples if sample.get(side) is not None}
        if dictionary is None or not sum(map(len, sentences.values())):
            continue
        low, high = torch.cat([*sentences.values()]).aminmax()
        if low < 0 or high >= len(dictionary):
            wrong = next(
                n for n, words in sentences.items() if ((words < 0) | (words >= len(dictionary))).any()
            )
            while data is not None and not hasattr(data, "kd_files"):  # what shortens sentences is around it
                data = getattr(data, "dataset", None)
            file = list(data.kd_files)[1] if data is not None else "a file of the data-bin"
            raise LskdError(
                f"sentence {wrong} of {file} has words that its dictionary of {len(dictionary)} has not; it "
                f"is damaged, or was made with another one; {_AGAIN}"
            )
    return collate(self, samples, *args, **kwargs)
