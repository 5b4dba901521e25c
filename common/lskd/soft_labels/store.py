"""What a teacher said, stored once and read by many students: rows of top-K, an index and a manifest."""

import os
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

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
    check_merged,
    check_own,
    read_content,
    read_manifest,
)
from lskd.soft_labels.packed import pack, unpack

if TYPE_CHECKING:  # torch takes a while, and reading does without
    from torch import Tensor

    from lskd.soft_labels.own_error import OwnError, OwnErrorMeter

_COMMIT_SECONDS = 10.0
_COPIED = 1 << 14  # keys that are copied at a time
_LOCK = "lock"
_SCRATCH = f".{MANIFEST}*.new"  # what a writer that was killed leaves
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class SoftLabelRows(NamedTuple):
    """Rows of stored soft labels: of one sample as views of the memory map, of many (or packed) as a copy.

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
        expected: what this run has (teacher, data, ...); every entry must be in the manifest's identity.
        shard: "I/N", where the folder is a shard's, whose first row is then that of key 0; "": it is none.

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
        self, path: str | Path, expected: Mapping[str, Any] | None = None, *, shard: str = ""
    ) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self._manifest = manifest
        self.require(expected or {})
        self.layout = manifest.layout
        if self.layout.shard != shard:
            raise SoftLabelsError(
                f"{self.path} is shard {self.layout.shard or '1/1'} of soft labels, not "
                f"{shard or 'all of them'}; name the folder that the shards are in, and merge them first: "
                "lskd soft-labels merge DIR"
            )
        self._row_bytes = self.layout.row.itemsize
        self._rows_file = BlockReader(self.path / "rows.bin", manifest.block_bytes, manifest.files["rows"])
        self._rows = self._rows_file.bytes.view(self.layout.row)
        self._seeds = self._rows["seed"] if self.layout.seeds else None
        self._index_file = BlockReader(self.path / "index.bin", manifest.block_bytes, manifest.files["index"])
        self._ends = self._index_file.bytes.view("<u8")

    @property
    def identity(self) -> dict[str, Any]:
        """What the soft labels were made of."""
        return dict(self._manifest.identity)

    @property
    def own_error(self) -> "OwnError | None":
        """What was lost by storing, as measured when they were written; None: it was not.

        Raises:
            SoftLabelsError: the manifest says something else.
        """
        from lskd.soft_labels.own_error import OwnError

        try:
            found = self._manifest.own_error
            return None if found is None else OwnError.of_json(found)
        except (AttributeError, TypeError, ValueError):  # a manifest made by hand
            raise SoftLabelsError(f"{self.path} is damaged; write the soft labels again") from None

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
        """Return the rows of a key, without copying unless they are packed.

        Raises:
            IndexError: for a key that is not there (yet).
            SoftLabelsError: for a damaged block.
        """
        start, stop = self._span(key)
        self._rows_file.check(start * self._row_bytes, stop * self._row_bytes)
        seeds = None if self._seeds is None else self._seeds[start:stop]
        return SoftLabelRows(*self._decoded(self._rows[start:stop]), seeds)

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
        return SoftLabelRows(*self._decoded(rows), rows["seed"] if self.layout.seeds else None)

    def raw(self, start: int, stop: int) -> tuple[bytes, NDArray[np.int64]]:
        """Return the rows of keys ``start`` to ``stop`` as they lie on the disk, and how many each key has.

        Raises:
            SoftLabelsError: for a damaged block.
        """
        starts, stops = self._spans(np.arange(start, stop))
        self._rows_file.check(starts[0] * self._row_bytes, stops[-1] * self._row_bytes)
        return self._rows[starts[0] : stops[-1]].tobytes(), stops - starts

    def _decoded(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        if self.layout.values == "packed":
            return unpack(rows["packed"], self.layout.num_classes, self.layout.k)
        return rows["values"], rows["ids"]

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
        return partial(SoftLabels, shard=self.layout.shard), (str(self.path),)

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
        merging: the folder has shards, of which this becomes the store.

    Raises:
        SoftLabelsError: the folder contains something else, is in use, is damaged, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        layout: SoftLabelsLayout,
        identity: Mapping[str, Any],
        *,
        merging: bool = False,
    ) -> None:
        self.path, self._merging = Path(path), merging
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
        self._committed: Manifest | None = None  # by this writer
        self.layout = self._manifest.layout
        self.keys, self._row_count = self._manifest.keys, self._manifest.rows
        self._committed_at = time.monotonic()
        self._meter: OwnErrorMeter | None = None
        self._measured = 0

    def measure(
        self,
        keys: ArrayLike,
        logits: "Tensor",
        values: "Tensor",
        ids: "Tensor",
        counts: "Tensor | None" = None,
    ) -> None:
        """Measure the store's own error on some of the rows that go into it, spread over an epoch of keys.

        Args:
            keys: ``(n,)``.
            logits: ``(n, ..., num_classes)``, the teacher's.
            values: ``(n, ..., k)`` log-probabilities as for :meth:`append`.
            ids: ``(n, ..., k)``.
            counts: bool ``(n, ...)``, which of these are rows; None: all.
        """
        if self._manifest.own_error is not None:
            return
        import torch

        from lskd.soft_labels.forms import as_stored
        from lskd.soft_labels.own_error import ROWS, OwnErrorMeter

        samples = max(self.layout.samples, 1)
        step = max(samples // (ROWS if self.layout.rows_per_sample == 1 else ROWS // 16), 1)
        chosen = np.flatnonzero(np.asarray(keys) % samples % step == 0)
        if not len(chosen):
            return
        at = torch.from_numpy(chosen).to(logits.device)
        parts = [part[at] for part in (logits, as_stored(values, self.layout), ids)]
        if counts is not None:
            parts = [part[counts[at]] for part in parts]
        if self._meter is None:
            self._meter = OwnErrorMeter(self.layout)
            self._measured = (self.keys // samples + 1) * samples  # all keys of the epoch that it is in
        self._meter.add(*parts)

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
        if layout.values == "packed":
            rows["packed"] = pack(values, ids, layout.num_classes)
        else:
            # What float16 cannot express is a probability of 0 either way; a number keeps 0 * log 0 finite.
            rows["values"] = np.maximum(values, np.finfo(layout.row["values"].base).min)
            rows["ids"] = ids
        if layout.seeds != (seeds is not None):
            raise ValueError("seeds must be given where the layout has them, and only there")
        if seeds is not None:
            rows["seed"] = seeds
        self._append(rows.tobytes(), counts)

    def copy(self, labels: SoftLabels, start: int) -> None:
        """Append all rows of ``labels`` from key ``start`` on as they are, and take over its own error.

        Raises:
            SoftLabelsError: they are damaged, or the disk cannot take it.
        """
        if self._manifest.own_error is None:
            self._manifest = replace(self._manifest, own_error=labels.info().get("own_error"))
        for first in range(start, len(labels), _COPIED):
            self._append(*labels.raw(first, min(first + _COPIED, len(labels))))

    def _append(self, rows: bytes, counts: NDArray[np.int64]) -> None:
        with self._writing():
            self._files["rows"].append(rows)
            if not self.layout.rows_per_sample:
                ends = self._row_count + np.cumsum(counts, dtype=np.uint64)
                self._files["index"].append(ends.astype("<u8").tobytes())
        self.keys += len(counts)
        self._row_count += int(counts.sum())
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
            if self._meter is not None and self.keys >= self._measured and (found := self._meter.read()):
                self._manifest, self._meter = replace(self._manifest, own_error=found.as_json()), None
            # A kill in a needless one leaves a file beside a whole store.
            if self._manifest != self._committed:
                self._manifest.write(self.path)
                self._committed = self._manifest
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

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Commit, unless the disk is the reason for the end, and close."""
        try:
            if not isinstance(error, SoftLabelsError):
                self.commit()
        finally:
            self.close()

    def _begin(self, layout: SoftLabelsLayout, identity: Mapping[str, Any]) -> Manifest:
        if layout.shard and (self.path.parent / MANIFEST).exists():
            raise SoftLabelsError(
                f"{self.path.parent} has soft labels that are not in shards; go on without shards, or use "
                "another folder"
            )
        check_own(self.path)
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            # A key does not depend on the number of epochs, so that more of them can follow; a shard's do.
            epochs = layout.epochs if layout.shard else max(layout.epochs, manifest.layout.epochs)
            # Nor on whether they serve as views: epochs that are there may.
            layout = replace(layout, epochs=epochs, views=manifest.layout.views)
            there = manifest.layout if layout.shard else replace(manifest.layout, epochs=layout.epochs)
            check_identity(self.path, {"layout": vars(there)}, {"layout": vars(layout)})
            check_identity(self.path, manifest.identity, identity)
            return replace(manifest, layout=layout)
        if not self._merging:
            check_merged(self.path)
        others = {file.name for file in self.path.iterdir() if not file.match(_SCRATCH)} - {_LOCK}
        if others and not self._merging:
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
