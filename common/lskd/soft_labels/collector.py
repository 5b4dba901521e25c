"""Rows of soft labels that arrive in the order of training, from several processes."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lskd.base.files import no_link
from lskd.errors import SoftLabelsError
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.store import SoftLabelsWriter

SCRATCH = "scratch"
_CHUNK = 1 << 14  # keys that are put into order at a time


class RowCollector:
    """Keeps rows that come in any order until a run of keys (an epoch) is whole, then writes them in order.

    Every process appends what it has to a file of its own below the store's folder; one process, the one with
    the :class:`SoftLabelsWriter`, appends the whole run to the store. The files are written, not mapped: a
    full disk is an error of writing then, where a map would end the process. What an ended process left there
    counts for nothing.

    The order of calls, a barrier between the processes at each arrow: ``clear`` by one -> ``add`` by all ->
    ``missing`` by all -> ``add`` what is missing -> ``append_to`` by one -> ``restart`` by all.

    Args:
        path: the store's folder, one that all processes see.
        layout: of the store; one row for each sample.
        rank: number of this process.

    Raises:
        SoftLabelsError: the folder cannot be written.
    """

    def __init__(self, path: str | Path, layout: SoftLabelsLayout, rank: int = 0) -> None:
        if layout.rows_per_sample != 1:
            raise ValueError("rows are collected by sample; the layout must have one row for each")
        self.path, self.layout, self.rank = Path(path), layout, rank
        self._record = np.dtype([("key", "<u8"), ("row", layout.row)])
        self._folder = self.path / SCRATCH
        self._file: Any = None

    def clear(self) -> None:
        """Remove what ended processes left; for one process, before any other adds.

        Raises:
            SoftLabelsError: the folder cannot be written.
        """
        self.close()
        try:
            for file in self._folder.glob("rows-*.bin"):
                file.unlink(missing_ok=True)
            if self._folder.exists():
                self._folder.rmdir()
        except OSError as error:
            raise self._unwritable(error) from None

    def add(self, keys: ArrayLike, values: ArrayLike, ids: ArrayLike, seeds: ArrayLike | None = None) -> None:
        """Keep rows.

        Args:
            keys: ``(n,)`` in any order; where a key comes twice, one of its rows counts.
            values: ``(n, k)`` in the form of :func:`lskd.stored_form`.
            ids: ``(n, k)``.
            seeds: ``(n,)``, where the layout has them.

        Raises:
            SoftLabelsError: the disk cannot take them, or the teacher gave NaN or infinity.
        """
        keys, values = np.asarray(keys), np.asarray(values)
        if not np.isfinite(values).all():
            raise SoftLabelsError(
                "the teacher gave NaN or infinity, which cannot be stored; check its weights"
            )
        records = np.zeros(len(keys), self._record)
        records["key"] = keys
        records["row"]["values"] = values
        records["row"]["ids"] = ids
        if self.layout.seeds:
            records["row"]["seed"] = seeds
        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                path = self._folder / f"rows-{self.rank}.bin"
                self._file = open(path, "wb", opener=no_link)  # noqa: SIM115 - see close
            self._file.write(records.tobytes())
            self._file.flush()  # for the others to see, and so that no forked worker process writes it again
        except OSError as error:
            self.close()
            raise self._unwritable(error) from None

    def missing(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the keys from ``start`` to ``stop`` that no process has added."""
        there = np.zeros(stop - start, bool)
        for records in self._collected():
            keys = records["key"].astype(np.int64)
            there[keys[(keys >= start) & (keys < stop)] - start] = True
        return np.flatnonzero(~there) + start

    def append_to(self, writer: SoftLabelsWriter, stop: int) -> None:
        """Append all keys before ``stop`` that ``writer`` does not have yet, in order, and commit.

        Raises:
            SoftLabelsError: the disk cannot take them; what was committed before stays as it is.
            ValueError: some of them are missing.
        """
        files = self._collected()
        start = writer.keys
        place = np.full((stop - start, 2), -1, np.int64)  # of each key: its file and its place in there
        for number, records in enumerate(files):
            keys = records["key"].astype(np.int64)
            inside = np.flatnonzero((keys >= start) & (keys < stop))
            place[keys[inside] - start] = np.stack([np.full(len(inside), number), inside], 1)
        if (place < 0).any():
            raise ValueError(f"{(place[:, 0] < 0).sum()} keys of {start} to {stop - 1} are missing")
        for first in range(0, stop - start, _CHUNK):
            part = place[first : first + _CHUNK]
            rows = np.empty(len(part), self.layout.row)
            for number, records in enumerate(files):
                mine = part[:, 0] == number
                rows[mine] = records[part[mine, 1]]["row"]
            writer.append(rows["values"], rows["ids"], seeds=rows["seed"] if self.layout.seeds else None)
        writer.commit()

    def restart(self) -> None:
        """Forget what this process added."""
        self.close()
        (self._folder / f"rows-{self.rank}.bin").unlink(missing_ok=True)

    def close(self) -> None:
        """Close this process's file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # what is still buffered finds no room: it counts for nothing
                return

    def _collected(self) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = []
        for file in sorted(self._folder.glob("rows-*.bin")):
            whole = file.stat().st_size // self._record.itemsize
            if whole:
                found.append(np.memmap(file, self._record, mode="r", shape=(whole,)))
        return found

    def _unwritable(self, error: OSError) -> SoftLabelsError:
        return SoftLabelsError(f"{self._folder} cannot be written ({error.strerror})")
