"""Files that only grow, checksummed block by block: what stored soft labels are made of."""

import hashlib
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lskd.base.files import no_link
from lskd.errors import SoftLabelsError

DIGEST_BYTES = 16
_PENDING_BYTES = 1 << 20


@dataclass(frozen=True)
class Committed:
    """How far a file counts: its bytes, and what vouches for them.

    Attributes:
        bytes: length of the file that counts; anything beyond is left over from an ended writer.
        sums: digest of the digests of the full blocks.
        tail: digest of the bytes after the last full block.
    """

    bytes: int
    sums: str
    tail: str


def _digest(data: Any = b"") -> Any:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES)


EMPTY = Committed(0, _digest().hexdigest(), _digest().hexdigest())


class BlockWriter:
    """Appends to ``path``; the digests of its blocks of ``block_bytes`` go to a file beside it, ``.sums``.

    Raises:
        SoftLabelsError: the file is shorter than ``committed`` says, or its last block is damaged.
        OSError: the disk's own errors (full, read-only, gone).
    """

    def __init__(self, path: Path, block_bytes: int, committed: Committed) -> None:
        self._block_bytes = block_bytes
        full, rest = divmod(committed.bytes, block_bytes)
        self._bytes = committed.bytes
        self._file = _Appended(path, committed.bytes)
        try:
            self._sums_file = _Appended(_sums_path(path), full * DIGEST_BYTES)
        except BaseException:
            self._file.close()
            raise
        self._sums = _digest(self._sums_file.read(0))
        self._tail = _digest(self._file.read(committed.bytes - rest))
        if (self._sums.hexdigest(), self._tail.hexdigest()) != (committed.sums, committed.tail):
            self.close()
            raise SoftLabelsError(f"{path} is damaged at its end; remove the folder and write it again")

    def append(self, data: bytes) -> None:
        """Write ``data`` behind the rest."""
        self._file.append(data)
        view = memoryview(data)
        while view:
            room = self._block_bytes - self._bytes % self._block_bytes
            part, view = view[:room], view[room:]
            self._tail.update(part)
            self._bytes += len(part)
            if self._bytes % self._block_bytes == 0:
                block = self._tail.digest()
                self._sums_file.append(block)
                self._sums.update(block)
                self._tail = _digest()

    def commit(self) -> Committed:
        """Bring everything to the disk, and return what may be relied on from now on."""
        for file in (self._file, self._sums_file):
            file.sync()
        return Committed(self._bytes, self._sums.hexdigest(), self._tail.hexdigest())

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in (self._file, self._sums_file):
            file.close()


class _Appended:
    """A file that is written at its end; what an ended writer left behind ``size`` is cut off.

    What waits to be written lies in this object and not in Python's buffer of the file: a process that was
    forked meanwhile (a loading worker) would write its copy of such a buffer when it ends.
    """

    def __init__(self, path: Path, size: int) -> None:
        there = path.exists()
        self._file = open(path, "r+b" if there else "w+b", buffering=0, opener=no_link)  # noqa: SIM115 - see close
        self._pending = bytearray()
        found = self._file.seek(0, os.SEEK_END)
        if found < size:
            self.close()
            raise _truncated(path, found, size)
        self._file.truncate(size)

    def read(self, start: int) -> bytes:
        """Return what the file contains from ``start`` on, and stand at its end."""
        self._file.seek(start)
        return self._file.readall() or b""

    def append(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= _PENDING_BYTES:
            self._flush()

    def sync(self) -> None:
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        while self._pending:
            written = self._file.write(self._pending)  # fewer bytes than asked for, as a disk fills up
            del self._pending[:written]


class BlockReader:
    """A read-only memory map of the committed part of a file; a block is checked when first touched.

    Processes that are forked from this one share what was checked, so that each block is checked once, and
    once more where the file was written to meanwhile. A file that has grown since the last look is taken for
    one whose writer goes on: what was checked stays so, and a byte that was rewritten between the same two
    looks is not noticed.

    Raises:
        SoftLabelsError: the file or its digests are missing, shorter than committed, or altered.
    """

    def __init__(self, path: Path, block_bytes: int, committed: Committed) -> None:
        self._path, self._block_bytes, self._committed = path, block_bytes, committed
        # A copy: what was checked once stays as it was.
        self._sums = _Map(_sums_path(path), committed.bytes // block_bytes * DIGEST_BYTES).bytes.tobytes()
        if _digest(self._sums).hexdigest() != committed.sums:
            raise SoftLabelsError(f"{_sums_path(path)} is damaged; write the soft labels again")
        self.blocks = -(-committed.bytes // block_bytes)
        self._file = _Map(path, committed.bytes)
        self.bytes = self._file.bytes
        shared = np.frombuffer(mmap.mmap(-1, 8 * (4 + self.blocks)), np.int64)  # anonymous, shared by forks
        # How often the file was found changed (counted from 1), and its size and time at the last look.
        self._seen = shared[:3]
        self._seen[:] = 1, *self._file.size_and_time()
        # What the first of these was as a block's check began: one before a change does not count.
        self._checked = shared[3:]

    def check(self, start: int, stop: int) -> None:
        """Check the blocks under bytes ``start`` to ``stop`` that were not checked before.

        Raises:
            SoftLabelsError: naming the block that is damaged.
        """
        if stop <= start:
            return
        now = self._look()
        for block in range(start // self._block_bytes, (stop - 1) // self._block_bytes + 1):
            if self._checked[block] != now:
                self._check_block(block, now)

    def check_many(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Check the blocks under many such ranges.

        Raises:
            SoftLabelsError: naming the block that is damaged.
        """
        now = self._look()
        # An empty range at either end of the file meets the spare entry, and no block.
        first, last = starts // self._block_bytes, (stops - 1) // self._block_bytes
        near = (last - first).max(initial=0) < 2
        if near and (self._checked[first] == now).all() and (self._checked[last] == now).all():
            return
        if near:
            touched = np.unique(np.concatenate([first, last]))
            # Processes that begin together begin at different blocks, and share the work of the first pass.
            for block in np.roll(touched, os.getpid() * 7).tolist():
                if 0 <= block < self.blocks and self._checked[block] != now:
                    self._check_block(block, now)
            return
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.check(start, stop)

    def damages(self) -> Iterator[SoftLabelsError | None]:
        """Check every block, whatever was checked before: yield None for a sound one, or what is wrong."""
        for block in range(self.blocks):
            try:
                self._check_block(block, self._look())
            except SoftLabelsError as error:
                yield error
            else:
                yield None

    def _look(self) -> int:
        """Return the mark of a block that counts as checked; another one if the file was written to.

        Reading where it was cut ends a process, so this comes first.
        """
        size, time = self._file.size_and_time()
        if time != self._seen[2]:
            if size <= self._seen[1]:
                self._seen[0] += 1  # first: who sees the new time must not believe the old marks
            self._seen[1:] = size, time
        return int(self._seen[0])

    def _check_block(self, block: int, now: int) -> None:
        start = block * self._block_bytes
        stop = min(start + self._block_bytes, self._committed.bytes)
        expected = self._sums[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
        if len(expected) < DIGEST_BYTES:  # the last block, not full yet
            expected = bytes.fromhex(self._committed.tail)
        if _digest(self.bytes[start:stop]).digest() != expected:
            raise SoftLabelsError(
                f"{self._path} is damaged in block {block} (bytes {start} to {stop}); "
                "write the soft labels again"
            )
        self._checked[block] = now


def _sums_path(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


class _Map:
    """A read-only memory map of the first ``size`` bytes of a file, which is open as long as this lives."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._descriptor: int | None = None
        self.bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        if size == 0:  # a writer that ended before it made the file
            return
        try:
            with open(path, "rb") as file:
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self.size_and_time()
            self.bytes = np.frombuffer(mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise SoftLabelsError(
                f"{path} cannot be read ({error.strerror}); write the soft labels again"
            ) from None

    def size_and_time(self) -> tuple[int, int]:
        """Return the file's size and the time of its last change; raise where it is too short."""
        if self._descriptor is None:
            return 0, 0
        about = os.fstat(self._descriptor)
        if about.st_size < self._size:
            raise _truncated(self._path, about.st_size, self._size)
        return about.st_size, about.st_ctime_ns  # the time of writing can be set back


def _truncated(path: Path, found: int, size: int) -> SoftLabelsError:
    return SoftLabelsError(
        f"{path} is truncated: {found} bytes of {size} are there; remove the folder and write it again"
    )
