"""Publishers' archives: found, verified, read member by member; no name in them decides where to write."""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lskd import LskdError
from lskd_study.data._layout import Tree
from lskd_study.data.published import PUBLISHED
from lskd_study.extras import needs_study_extra

_DAMAGES = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


class Member(NamedTuple):
    """A file in an archive: its name, its size in bytes, and how to read it.

    ``open`` gives a file that can seek, for archives in the archive; only until the next member is asked for.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    open: Callable[[], IO[bytes]]


def find_source(source: Path, names: tuple[str, ...], dataset: str) -> Path:
    """Return the first of ``names`` that is in the folder ``source``, or ``source`` if that is its name.

    Raises:
        LskdError: when there is none; says where to get it.
    """
    if source.name in names and source.exists():
        return source
    for name in names:
        if (source / name).exists():
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
            tar = tarfile.open(fileobj=raw, mode="r:*")  # noqa: SIM115
        except _DAMAGES as error:
            if isinstance(error, tarfile.ReadError) and "could not be opened" in str(error):
                raise LskdError(f"{archive} is no tar archive, or is cut short; get it again") from None
            raise damaged(error) from None
        try:
            while True:
                try:
                    member = tar.next()
                    if member is None:
                        _check_end(tar)
                    else:
                        _refuse_to_leave(archive, member)
                except _DAMAGES as error:
                    raise damaged(error) from None
                if member is None:
                    return
                vars(tar)[
                    "members"
                ] = []  # tarfile keeps all that it has seen: gigabytes for a million images
                if member.isfile():
                    yield _member(tar, member, damaged)
                if not hidden:
                    bar.update(raw.tell() - bar.n)
        finally:
            tar.close()
            if content is None:
                raw.close()


def check_md5(tree: Tree, file: Path, md5: str) -> None:
    """Compare a file's MD5 with its publisher's, once: a command that goes on does not do it again.

    Raises:
        LskdError: naming both, where they differ.
    """
    with needs_study_extra():
        from tqdm import tqdm
    about = file.stat()
    key = f"{file.resolve()} {about.st_size} {about.st_mtime_ns} {md5}"
    if tree.checked(key):
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
    tree.remember(key)


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse half a header, or something else, where tarfile ends in silence."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block and block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")


def _refuse_to_leave(archive: Path, member: tarfile.TarInfo) -> None:
    try:
        tarfile.data_filter(member, "/nowhere")
    except tarfile.FilterError:
        if member.isfile():
            raise LskdError(
                f"{archive} has a member that leads out of it, {member.name!r}; do not trust this file"
            ) from None


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, damaged: Callable[[Any], LskdError]) -> Member:
    def open_it() -> IO[bytes]:
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        return content

    def read() -> bytes:
        try:
            content = open_it().read()
        except _DAMAGES as error:
            raise damaged(error) from None
        if len(content) != member.size:
            raise damaged(f"{member.name} has {len(content)} of {member.size} bytes")
        return content

    return Member(member.name.removeprefix("./"), member.size, read, open_it)
