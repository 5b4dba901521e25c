"""Files that only grow, checksummed block by block: what stored soft labels are made of."""

import hashlib
import mmap
import os
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

    Processes that are forked from this one share what was checked, so that each block is checked once; again
    where the file was written to meanwhile.

    Args:
        path: the file.
        block_bytes: as it was written.
        committed: what its manifest says.
        check: whether blocks are checked when they are first read; :meth:`verify` checks all in any case.

    Raises:
        SoftLabelsError: the file or its digests are missing, shorter than committed, or altered.
    """

    def __init__(self, path: Path, block_bytes: int, committed: Committed, *, check: bool = True) -> None:
        self._path, self._block_bytes, self._committed = path, block_bytes, committed
        # A copy: what was checked once stays as it was.
        self._sums = _map(_sums_path(path), committed.bytes // block_bytes * DIGEST_BYTES).tobytes()
        if _digest(self._sums).hexdigest() != committed.sums:
            raise SoftLabelsError(f"{_sums_path(path)} is damaged; write the soft labels again")
        self.blocks = -(-committed.bytes // block_bytes)
        self._checked = np.frombuffer(mmap.mmap(-1, self.blocks + 1), bool)  # anonymous, shared by forks
        self._check = check
        self._checked[:] = not check
        self.bytes = _map(path, committed.bytes)
        self._file = open(path, "rb") if committed.bytes else None  # noqa: SIM115 - open as long as the map
        self._changed = self._about()

    def check(self, start: int, stop: int) -> None:
        """Check the blocks under bytes ``start`` to ``stop`` that were not checked before.

        Raises:
            SoftLabelsError: naming the block that is damaged.
        """
        if stop <= start:
            return
        self._look()
        for block in range(start // self._block_bytes, (stop - 1) // self._block_bytes + 1):
            if not self._checked[block]:
                self._check_block(block)

    def check_many(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Check the blocks under many such ranges.

        Raises:
            SoftLabelsError: naming the block that is damaged.
        """
        self._look()
        # An empty range at either end of the file meets the spare entry, and no block.
        first, last = starts // self._block_bytes, (stops - 1) // self._block_bytes
        near = (last - first).max(initial=0) < 2
        if near and self._checked[first].all() and self._checked[last].all():
            return
        if near:
            touched = np.unique(np.concatenate([first, last]))
            # Processes that begin together begin at different blocks, and share the work of the first pass.
            for block in np.roll(touched, os.getpid() * 7).tolist():
                if 0 <= block < self.blocks and not self._checked[block]:
                    self._check_block(block)
            return
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self.check(start, stop)

    def damages(self) -> Iterator[SoftLabelsError | None]:
        """Check every block, whatever was checked before: yield None for a sound one, or what is wrong."""
        for block in range(self.blocks):
            try:
                self._look()
                self._check_block(block)
            except SoftLabelsError as error:
                yield error
            else:
                yield None

    def _look(self) -> None:
        """Have all checked again if the file was written to; reading where it was cut ends a process."""
        if (changed := self._about()) != self._changed:
            self._checked[:] = not self._check
            self._changed = changed

    def _about(self) -> int:
        if self._file is None:
            return 0
        about = os.fstat(self._file.fileno())
        if about.st_size < self._committed.bytes:
            raise _truncated(self._path, about.st_size, self._committed.bytes)
        return about.st_ctime_ns  # the time of writing can be set back

    def _check_block(self, block: int) -> None:
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
        self._checked[block] = True


def _sums_path(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


def _map(path: Path, size: int) -> NDArray[np.uint8]:
    if size == 0:  # a writer that ended before it made the file
        return np.empty(0, np.uint8)
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found < size:
                raise _truncated(path, found, size)
            return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise SoftLabelsError(
            f"{path} cannot be read ({error.strerror}); write the soft labels again"
        ) from None


def _truncated(path: Path, found: int, size: int) -> SoftLabelsError:
    return SoftLabelsError(
        f"{path} is truncated: {found} bytes of {size} are there; remove the folder and write it again"
    )
