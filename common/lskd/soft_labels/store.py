"""What a teacher said, stored once and read by many students: rows of top-K, an index and a manifest."""

import os
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lskd.base.files import take_lock
from lskd.errors import LskdError, SoftLabelsError
from lskd.soft_labels.blocks import BlockReader, BlockWriter
from lskd.soft_labels.format import (
    MANIFEST,
    Manifest,
    SoftLabelsLayout,
    check_identity,
    read_content,
    read_manifest,
)

_COMMIT_SECONDS = 10.0
_LOCK = "lock"
_SCRATCH = f".{MANIFEST}*.new"  # what a writer that was killed leaves
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class SoftLabelRows(NamedTuple):
    """Rows of stored soft labels: of one sample as views of the memory map, of many as a copy.

    Attributes:
        values: ``(rows, k)`` log-probabilities at temperature 1, largest first as the teacher gave them. For
            images of which all classes are kept see :func:`lskd.soft_labels.forms.stored_form`.
        ids: ``(rows, k)`` class ids.
        seeds: ``(rows,)`` seeds of the augmentation, or None where the store has none.
    """

    values: NDArray[Any]
    ids: NDArray[Any]
    seeds: NDArray[np.uint32] | None


class SoftLabels:
    """A teacher's top-K log-probabilities on disk, by sample and epoch.

    A folder: ``rows.bin`` (fixed-width rows: seed, values, ids), ``index.bin`` (for samples of several rows:
    where each one's rows end), their checksums by block, and ``manifest.json``. The files are memory-mapped
    read-only, so any number of worker processes and ranks share one copy; pickling an instance takes its path
    only. A block is checked when it is first touched.

    Args:
        path: the folder.
        expected: what this run has (teacher, data, ...); every entry must be in the manifest's identity.
        check: check blocks when they are first touched.

    Raises:
        SoftLabelsError: missing, truncated or damaged files, or soft labels that belong to another run.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "labels"
    >>> layout = SoftLabelsLayout(num_classes=10, k=2, samples=2)
    >>> with SoftLabelsWriter(folder, layout, identity={"teacher": "a"}) as writer:
    ...     writer.append([[-0.5, -2], [-0.1, -3], [-1, -1]], ids=[[3, 7], [1, 2], [0, 9]], lengths=[2, 1])
    >>> labels = SoftLabels(folder, expected={"teacher": "a"})
    >>> labels[0].ids.tolist(), labels[1].values.tolist()
    ([[3, 7], [1, 2]], [[-1.0, -1.0]])
    """

    def __init__(
        self, path: str | Path, expected: Mapping[str, Any] | None = None, *, check: bool = True
    ) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self._manifest, self._check = manifest, check
        self.require(expected or {})
        self.layout = manifest.layout
        self._row_bytes = self.layout.row.itemsize
        self._rows_file = BlockReader(
            self.path / "rows.bin", manifest.block_bytes, manifest.files["rows"], check=check
        )
        self._rows = self._rows_file.bytes.view(self.layout.row)
        self._values, self._ids = self._rows["values"], self._rows["ids"]
        self._seeds = self._rows["seed"] if self.layout.seeds else None
        self._index_file = BlockReader(
            self.path / "index.bin", manifest.block_bytes, manifest.files["index"], check=check
        )
        self._ends = self._index_file.bytes.view("<u8")

    @property
    def identity(self) -> dict[str, Any]:
        """What the soft labels were made of."""
        return dict(self._manifest.identity)

    @property
    def complete(self) -> bool:
        """Whether every sample of every epoch is there."""
        return self._manifest.complete

    @property
    def rows(self) -> int:
        """The number of rows that are there."""
        return self._manifest.rows

    def require(self, expected: Mapping[str, Any]) -> None:
        """Compare what a run has with what the soft labels were made of.

        Raises:
            SoftLabelsError: with the first entry of ``expected`` that differs.
        """
        check_identity(self.path, self._manifest.identity, expected)

    def __len__(self) -> int:
        """Return the number of keys that are there."""
        return self._manifest.keys

    def __getitem__(self, key: int) -> SoftLabelRows:
        """Return the rows of a key, without copying.

        Raises:
            IndexError: for a key that is not there (yet).
            SoftLabelsError: for a damaged block.
        """
        start, stop = self._span(key)
        self._rows_file.check(start * self._row_bytes, stop * self._row_bytes)
        seeds = None if self._seeds is None else self._seeds[start:stop]
        return SoftLabelRows(self._values[start:stop], self._ids[start:stop], seeds)

    def take(self, keys: ArrayLike) -> SoftLabelRows:
        """Return the rows of many keys, one key's behind the other's: what a batch needs, in one copy.

        Args:
            keys: ``(n,)``, in any order.

        Raises:
            IndexError: for a key that is not there (yet).
            SoftLabelsError: for a damaged block.
        """
        keys = np.asarray(keys, np.int64)
        if keys.size and not (keys.min() >= 0 and keys.max() < self._manifest.keys):
            raise self._no_key(int(keys[(keys < 0) | (keys >= self._manifest.keys)][0]))
        starts, stops = self._spans(keys)
        self._rows_file.check_many(starts * self._row_bytes, stops * self._row_bytes)
        if self.layout.rows_per_sample == 1:
            places = starts
        else:
            lengths = stops - starts
            ends = np.cumsum(lengths)
            places = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if ends.size else 0)
        rows = self._rows.take(places)  # ten times as fast as [places] where rows are structured
        return SoftLabelRows(rows["values"], rows["ids"], rows["seed"] if self.layout.seeds else None)

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of rows of each key that is there.

        Raises:
            SoftLabelsError: for a damaged index.
        """
        if self.layout.rows_per_sample:
            return np.full(len(self), self.layout.rows_per_sample, np.int64)
        self._index_file.check(0, self._ends.nbytes)
        ends: NDArray[np.int64] = self._ends.astype(np.int64)
        ends[1:] -= ends[:-1].copy()
        return ends

    def verify(self) -> None:
        """Check every block of every file against its checksum.

        Raises:
            SoftLabelsError: naming the first block that is damaged.
        """
        for damage in self.damages():
            if damage is not None:
                raise damage

    @property
    def blocks(self) -> int:
        """How many blocks there are to check."""
        return self._index_file.blocks + self._rows_file.blocks

    def damages(self) -> Iterator[SoftLabelsError | None]:
        """Check block after block of every file: yield None for a sound one, or the error that names it."""
        yield from self._index_file.damages()
        yield from self._rows_file.damages()

    def info(self) -> dict[str, Any]:
        """Return the manifest's content, for people."""
        return read_content(self.path) | {"bytes": sum(file.bytes for file in self._manifest.files.values())}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: a process that gets it maps the same files."""
        return partial(SoftLabels, check=self._check), (str(self.path),)

    def _span(self, key: int) -> tuple[int, int]:
        if not 0 <= key < self._manifest.keys:
            raise self._no_key(key)
        if self.layout.rows_per_sample:
            return key * self.layout.rows_per_sample, (key + 1) * self.layout.rows_per_sample
        self._index_file.check(8 * max(key - 1, 0), 8 * (key + 1))
        return int(self._ends[key - 1]) if key else 0, int(self._ends[key])

    def _spans(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.layout.rows_per_sample:
            return keys * self.layout.rows_per_sample, (keys + 1) * self.layout.rows_per_sample
        self._index_file.check_many(8 * np.maximum(keys - 1, 0), 8 * (keys + 1))
        before = np.where(keys > 0, self._ends[keys - 1].astype(np.int64), 0)
        return before, self._ends[keys].astype(np.int64)

    def _no_key(self, key: int) -> IndexError:
        return IndexError(f"key {key} is not in {self.path}, which has {self._manifest.keys}")


class SoftLabelsWriter:
    """Writes soft labels in the order of their keys; goes on where an ended writer stopped.

    What is committed stays readable whatever happens later; a writer that is killed loses at most what it
    wrote in the last ten seconds. ``keys`` says where to go on. One writer at a time.

    Args:
        path: the folder, made if it is not there.
        layout: what a row is. A folder that was begun must have the same, but for ``epochs``, which may grow.
        identity: what the soft labels are made of, plain JSON. A folder that was begun must have the same.

    Raises:
        SoftLabelsError: the folder contains something else, is in use, is damaged, or cannot be written.
    """

    def __init__(self, path: str | Path, layout: SoftLabelsLayout, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._files: dict[str, BlockWriter] = {}
        self._lock: Any = None
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            handle = take_lock(self.path / _LOCK)
        if handle is None:
            raise SoftLabelsError(
                f"{self.path} is being written by another process; wait for it or choose another folder"
            )
        self._lock = os.fdopen(handle)
        _locks.add(self._lock)
        with self._writing():
            self._manifest = self._begin(layout, identity)
            for scratch in self.path.glob(_SCRATCH):
                scratch.unlink()
            for name, committed in self._manifest.files.items():
                file = self.path / f"{name}.bin"
                self._files[name] = BlockWriter(file, self._manifest.block_bytes, committed)
        self.layout = self._manifest.layout
        self.keys, self._row_count = self._manifest.keys, self._manifest.rows
        self._committed_at = time.monotonic()

    @property
    def complete(self) -> bool:
        """Whether every key is written (committed or not)."""
        return self.keys == self.layout.keys

    def append(
        self,
        values: ArrayLike,
        ids: ArrayLike,
        lengths: ArrayLike | None = None,
        seeds: ArrayLike | None = None,
    ) -> None:
        """Append the rows of the next keys.

        Args:
            values: ``(rows, k)`` log-probabilities at temperature 1.
            ids: ``(rows, k)`` class ids.
            lengths: rows of each sample; needed unless the layout says how many a sample has.
            seeds: ``(rows,)``, where the layout has them.

        Raises:
            ValueError: for shapes, ids or values that cannot be stored.
            SoftLabelsError: the disk cannot take it; what was committed before stays as it is.
        """
        layout = self.layout
        values, ids = np.asarray(values), np.asarray(ids)
        if values.shape != ids.shape or values.ndim != 2 or values.shape[1] != layout.k:
            raise ValueError(f"values {values.shape} and ids {ids.shape} must both be (rows, {layout.k})")
        if values.size and (np.isnan(values).any() or values.max() == np.inf):
            raise ValueError("values are log-probabilities: NaN and infinity cannot be stored")
        if ids.size and not (ids.min() >= 0 and ids.max() < layout.num_classes):
            raise ValueError(f"ids must be 0 to {layout.num_classes - 1}")
        counts = self._counts(len(values), lengths)
        if self.keys + len(counts) > layout.keys:
            raise ValueError(f"{layout.keys} keys are planned; these would make {self.keys + len(counts)}")
        rows = np.empty(len(values), layout.row)
        # What float16 cannot express is a probability of 0 either way; a number keeps 0 * log 0 finite.
        rows["values"] = np.maximum(values, np.finfo(layout.row["values"].base).min)
        rows["ids"] = ids
        if layout.seeds != (seeds is not None):
            raise ValueError("seeds must be given where the layout has them, and only there")
        if seeds is not None:
            rows["seed"] = seeds
        with self._writing():
            self._files["rows"].append(rows.tobytes())
            if not layout.rows_per_sample:
                ends = self._row_count + np.cumsum(counts, dtype=np.uint64)
                self._files["index"].append(ends.astype("<u8").tobytes())
        self.keys += len(counts)
        self._row_count += len(rows)
        if time.monotonic() - self._committed_at > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything that was appended count.

        Raises:
            SoftLabelsError: the disk cannot take it; what was committed before stays as it is.
        """
        with self._writing():
            files = {name: file.commit() for name, file in self._files.items()}
            self._manifest = replace(self._manifest, keys=self.keys, rows=self._row_count, files=files)
            self._manifest.write(self.path)
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Close the files and let others write; what is not committed does not count."""
        for file in self._files.values():
            file.close()
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Close where the disk fails, with one line about it."""
        try:
            yield
        except (OSError, LskdError) as error:
            self.close()
            line = str(error)
            if isinstance(error, OSError):
                line = f"{self.path} cannot be written ({error.strerror}); what was committed there stays, "
                line += "and the same command goes on from it"
            raise SoftLabelsError(line) from None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, unless the disk is the reason for the end, and close."""
        try:
            if not isinstance(error, SoftLabelsError):
                self.commit()
        finally:
            self.close()

    def _begin(self, layout: SoftLabelsLayout, identity: Mapping[str, Any]) -> Manifest:
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            # A key does not depend on the number of epochs, so that more of them can follow.
            layout = replace(layout, epochs=max(layout.epochs, manifest.layout.epochs))
            there = replace(manifest.layout, epochs=layout.epochs)
            check_identity(self.path, {"layout": vars(there)}, {"layout": vars(layout)})
            check_identity(self.path, manifest.identity, identity)
            return replace(manifest, layout=layout)
        others = {file.name for file in self.path.iterdir() if not file.match(_SCRATCH)} - {_LOCK}
        if others:
            raise SoftLabelsError(
                f"{self.path} contains something else ({min(others)}); choose another folder or remove it"
            )
        manifest = Manifest(layout, identity)
        manifest.write(self.path)
        return manifest

    def _counts(self, rows: int, lengths: ArrayLike | None) -> NDArray[np.int64]:
        per_sample = self.layout.rows_per_sample
        if lengths is None:
            if per_sample is None or rows % per_sample:
                raise ValueError("lengths are needed: how many of the rows belong to each sample")
            return np.full(rows // per_sample, per_sample, np.int64)
        counts = np.asarray(lengths, np.int64)
        if counts.ndim != 1 or (counts < 0).any() or counts.sum() != rows:
            raise ValueError(f"lengths must be a list of numbers that sum to {rows}, the number of rows")
        if per_sample is not None and (counts != per_sample).any():
            raise ValueError(f"every sample of this layout has {per_sample} row(s)")
        return counts


def _release_locks() -> None:
    """Release the locks in a forked process: one that outlives its killed parent must not keep them."""
    for lock in list(_locks):
        lock.close()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_release_locks)
