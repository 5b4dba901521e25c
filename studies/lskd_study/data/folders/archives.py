"""Publishers' archives: found, verified, read member by member; no name in them decides where to write."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lskd import LskdError
from lskd_study.base.extras import needs_study_extra
from lskd_study.data.expected import PUBLISHED
from lskd_study.data.folders.layout import Tree

MEMBER_LIMIT = 128 << 20  # bytes; the largest text of a publisher has 20 MB, the largest image 16
_HEADER_LIMIT = 1 << 20  # bytes of a long name and the like, which tarfile reads whole
_PADDING_LIMIT = 64 << 20  # bytes after an archive's end: tar fills up its last block
_SAMPLED = 64 << 20  # bytes up to which a fingerprint is of the whole file
_DAMAGES = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


class Member(NamedTuple):
    """A file in an archive: its name, its size in bytes, and how to read it, up to a number of bytes.

    ``open`` gives a file that can seek, for archives in the archive; only until the next member is asked for.
    """

    name: str
    size: int
    read: Callable[..., bytes]
    open: Callable[[], IO[bytes]]


def find_source(source: Path, names: tuple[str, ...], dataset: str) -> Path:
    """Return the first of ``names`` that is in the folder ``source``, or ``source`` if that is its name.

    Raises:
        LskdError: when there is none; says where to get it.
    """
    if source.name in names and os.path.exists(source):
        return source
    for name in names:
        if os.path.exists(source / name):
            return source / name
    raise LskdError(
        f"{source} has no {' or '.join(names)}; get it from {PUBLISHED[dataset].get} and put it into {source}"
    )


def read_members(archive: Path, content: IO[bytes] | None = None, title: str = "") -> Iterator[Member]:
    """Yield the regular files of a tar archive, compressed or not, in its order.

    Args:
        archive: the file, for messages also if ``content`` is given.
        content: an archive within the archive.
        title: of a progress bar over the archive's bytes; none without.

    Raises:
        LskdError: for a file that is no such archive, is cut short, or has names that lead out of it.
    """
    with needs_study_extra():
        from tqdm import tqdm

    def damaged(error: BaseException) -> LskdError:
        return LskdError(f"{archive} is damaged or cut short ({error}); get it again")

    try:
        raw = content if content is not None else archive.open("rb")
    except OSError as error:
        raise LskdError(f"{archive} cannot be read ({error.strerror})") from None
    hidden = None if title else True
    size = 0 if content is not None else archive.stat().st_size
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        try:
            tar = tarfile.open(fileobj=raw, mode="r:*", tarinfo=_Header)  # noqa: SIM115
        except _DAMAGES as error:
            if isinstance(error, tarfile.ReadError) and "could not be opened" in str(error):
                raise LskdError(f"{archive} is no tar archive, or is cut short; get it again") from None
            raise damaged(error) from None
        try:
            end = 0
            while True:
                try:
                    member = tar.next()
                    if member is None:
                        _check_end(tar)
                    elif member.size < 0 or tar.offset <= end:
                        raise tarfile.ReadError(f"{member.name} has a negative size")
                    else:
                        _refuse_to_leave(archive, member)
                except _DAMAGES as error:
                    raise damaged(error) from None
                if member is None:
                    return
                end = tar.offset
                vars(tar)[
                    "members"
                ] = []  # tarfile keeps all that it has seen: gigabytes for a million images
                if member.isfile():
                    yield _member(archive, tar, member, damaged)
                if not hidden:
                    bar.update(raw.tell() - bar.n)
        finally:
            tar.close()
            if content is None:
                raw.close()


def fingerprint(file: Path, mend: str = "check the path") -> str:
    """Return the sha256 of a file's size and content; above 64 MiB of 1,024 of its blocks, evenly spread.

    By it a second command knows whether a data set was made of this file, without an hour of reading.

    Raises:
        LskdError: the file cannot be read.
    """
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            digest = hashlib.sha256(f"{size}\n".encode())
            blocks = 1024 if size > _SAMPLED else 1
            for number in range(blocks):
                content.seek(number * size // blocks)
                digest.update(content.read(1 << 16 if blocks > 1 else _SAMPLED))
    except OSError as error:
        raise LskdError(f"{file} cannot be read ({error.strerror}); {mend}") from None
    return digest.hexdigest()


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """Return the fingerprints of those of the files that are there and no folders, by their names."""
    return {file.name: fingerprint(file) for file in files if file.is_file()}


def check_md5(tree: Tree | None, file: Path, md5: str) -> None:
    """Compare a file's MD5 with its publisher's, once: a command that goes on with a tree trusts it.

    Raises:
        LskdError: naming both, where they differ.
    """
    with needs_study_extra():
        from tqdm import tqdm
    about = file.stat()
    key = f"{file.resolve()} {about.st_size} {about.st_mtime_ns} {md5}"
    if tree is not None and tree.checked(key):
        return
    digest = hashlib.md5(usedforsecurity=False)
    with (
        file.open("rb") as content,
        tqdm(
            total=about.st_size,
            desc=f"md5 of {file.name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
        ) as bar,
    ):
        while block := content.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != md5:
        raise LskdError(
            f"{file}: expected md5 {md5}, found {digest.hexdigest()}; it is another or a damaged file, "
            "get it again (or --no-checksum)"
        )
    if tree is not None:
        tree.remember(key)


class _Header(tarfile.TarInfo):
    """A header whose size is bounded before tarfile reads that much of a long name or of extended headers."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (not header.isfile() and header.size > _HEADER_LIMIT):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse what tarfile passes over in silence: half a header, something else, a cut end of gzip."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block and block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    if len(tar.fileobj.read(_PADDING_LIMIT)) == _PADDING_LIMIT:
        raise tarfile.ReadError("something else after its end")


def _refuse_to_leave(archive: Path, member: tarfile.TarInfo) -> None:
    try:
        tarfile.data_filter(member, "/nowhere")
    except tarfile.FilterError:
        if member.isfile():
            raise LskdError(
                f"{archive} has a member that leads out of it, {member.name!r}; do not trust this file"
            ) from None


def _member(
    archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, damaged: Callable[[Any], LskdError]
) -> Member:
    def open_it() -> IO[bytes]:
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        return content

    def read(limit: int = MEMBER_LIMIT) -> bytes:
        if member.size > limit:
            raise LskdError(f"{archive}: {member.name} has {member.size:,} bytes, far too many; get it again")
        try:
            content = open_it().read()
        except _DAMAGES as error:
            raise damaged(error) from None
        if len(content) != member.size:
            raise damaged(f"{member.name} has {len(content)} of {member.size} bytes")
        return content

    return Member(member.name.removeprefix("./"), member.size, read, open_it)
