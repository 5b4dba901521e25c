"""Publishers' files: found, verified, read member by member; no name in an archive decides where to write."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, NoReturn

from lskd import LskdError
from lskd.base.files import parse_json, read_bytes
from lskd_study.data.expected import PUBLISHED

MEMBER_LIMIT = 128 << 20  # bytes; the largest text of a publisher has 20 MB, the largest image 16
JSON_LIMIT = 512 << 20  # bytes; the list of the million images of iMaterialist has about 200 MB
# Bytes of long names and the like before a member: tarfile keeps them all, and in Python before 3.11.10 and
# 3.12.6 takes time that grows with the square of their size.
_HEADER_LIMIT = 1 << 17
_MOST_KEYS = 1000  # of extended headers for all members, which tarfile keeps
_READ_WHOLE = {
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
}
_PADDING_LIMIT = 64 << 20  # bytes after an archive's end: tar fills up its last block
_SAMPLED = 64 << 20  # bytes up to which a fingerprint is of the whole file


def find_source(source: Path, names: tuple[str, ...], dataset: str) -> Path:
    """Return the first of ``names`` that is in the folder ``source``, or ``source`` if that is its name.

    Raises:
        LskdError: when there is none; says where to get it.
    """
    for file in (source, *(source / name for name in names)):
        if file.name in names and os.path.exists(file):
            return file
    raise LskdError(
        f"{source} has no {' or '.join(names)}; get it from {PUBLISHED[dataset].get} and put it into {source}"
    )


class Member:
    """A file in an archive, to be read until the next one is asked for.

    Attributes:
        name: its path there.
        size: bytes.
    """

    def __init__(self, archive: Path, tar: tarfile.TarFile, header: tarfile.TarInfo) -> None:
        self.name, self.size = header.name.removeprefix("./"), header.size
        self._archive, self._tar, self._header = archive, tar, header

    def open(self) -> IO[bytes]:
        """Return a file that can seek, for archives in the archive."""
        content = self._tar.extractfile(self._header)
        assert content is not None  # it is a regular file
        return content

    def read(self, limit: int = MEMBER_LIMIT) -> bytes:
        """Return its content, of at most ``limit`` bytes.

        Raises:
            LskdError: it has more, or is cut short.
        """
        if self.size > limit:
            raise LskdError(
                f"{self._archive}: {self.name} has {self.size:,} bytes, far too many; get it again"
            )
        with _one_line_errors(self._archive):
            content = self.open().read()
            if len(content) != self.size:
                raise EOFError(f"{self.name} has {len(content)} of {self.size} bytes")
        return content


def read_members(archive: Path, content: IO[bytes] | None = None, title: str = "") -> Iterator[Member]:
    """Yield the regular files of a tar archive, compressed or not, in its order.

    Args:
        archive: the file, for messages also if ``content`` is given.
        content: an archive within the archive.
        title: of a progress bar over the archive's bytes; none without.

    Raises:
        LskdError: for a file that is no such archive, is cut short, or has names that lead out of it.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        try:
            raw = content or stack.enter_context(archive.open("rb"))
        except OSError as error:
            raise LskdError(f"{archive} cannot be read ({error.strerror})") from None
        size = 0 if content is not None else archive.stat().st_size
        bar = stack.enter_context(
            tqdm(total=size, desc=title, unit="B", unit_scale=True, leave=False, disable=not title or None)
        )
        stack.enter_context(_one_line_errors(archive))
        tar = stack.enter_context(tarfile.open(fileobj=raw, mode="r:*", tarinfo=_Header))
        end = 0
        while (header := tar.next()) is not None:
            if header.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"{header.name} has a negative size")
            _check_size(header)
            _refuse_to_leave(archive, header)
            end = tar.offset
            vars(tar)["members"] = []  # tarfile keeps all that it has seen: gigabytes for a million images
            if header.isfile():
                yield Member(archive, tar, header)
            bar.update(raw.tell() - bar.n)
        _check_end(tar)


@contextmanager
def _one_line_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except _PackedOtherwiseError as error:
        raise LskdError(f"{archive} has {error}; pack it again, without them") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError, ValueError, RecursionError) as error:
        if isinstance(error, tarfile.ReadError) and "could not be opened" in str(error):
            raise LskdError(f"{archive} is no tar archive, or is cut short; get it again") from None
        raise LskdError(f"{archive} is damaged or cut short ({error}); get it again") from None


class _PackedOtherwiseError(Exception):
    """What no publisher's archive has, and tarfile reads without a bound."""


class _Header(tarfile.TarInfo):
    """A header that is bounded, with those before it, before tarfile reads what it announces."""

    # tarfile's own names in every version of Python.
    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        # Where tarfile is stays, up to the member itself, where the first of its headers begins.
        if self.type in _READ_WHOLE and self.offset + self.size - tar.offset > _HEADER_LIMIT:
            raise _PackedOtherwiseError(f"extended attributes of more than {_HEADER_LIMIT >> 10} kB")
        of_all = tar.pax_headers
        if len(of_all) > _MOST_KEYS or sum(map(len, of_all.values())) > _HEADER_LIMIT:
            raise tarfile.ReadError("too many extended headers for all members")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]

    def _refuse_map(self, *_: object) -> NoReturn:
        raise _PackedOtherwiseError("sparse files (tar's --sparse, -S)")

    # Of GNU's old form, and of three in extended headers.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_map


def _check_size(header: tarfile.TarInfo) -> None:
    """Refuse a size in an extended header that is no number: tarfile reads 0."""
    said = header.pax_headers.get("size", "0")
    try:
        int(said)
    except ValueError:  # or of more digits than Python reads
        raise tarfile.ReadError(f"{header.name} has a size of {said[:20]}") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse what tarfile passes over in silence: half a header, something else, a cut end of gzip."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block and block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    if len(tar.fileobj.read(_PADDING_LIMIT)) == _PADDING_LIMIT:
        raise tarfile.ReadError("something else after its end")


def _refuse_to_leave(archive: Path, header: tarfile.TarInfo) -> None:
    first, *parts = header.name.removeprefix("./").split("/")
    leaves = ".." in (first, *parts) or (not first and bool(parts))  # tarfile takes "/x" for "x"
    try:
        tarfile.data_filter(header, "/nowhere")
    except tarfile.FilterError:
        leaves = True
    if leaves and header.isfile():
        raise LskdError(
            f"{archive} has a member that leads out of it, {header.name!r}; do not trust this file"
        )


def fingerprint(file: Path, fix: str = "check the path") -> str:
    """Return the sha256 of a file's size and content; above 64 MiB of 1,024 of its blocks, evenly spread.

    By it a second command knows whether a data set was made of this file, without an hour of reading.

    Raises:
        LskdError: the file cannot be read; ``fix`` says what to do.
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
        raise LskdError(f"{file} cannot be read ({error.strerror}); {fix}") from None
    return digest.hexdigest()


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """Return the fingerprints of those of the files that are there and no folders, by their names."""
    return {file.name: fingerprint(file) for file in files if file.is_file()}


def check_md5(file: Path, md5: str) -> None:
    """Compare a file's MD5 with its publisher's.

    Raises:
        LskdError: naming both, where they differ.
    """
    from tqdm import tqdm

    digest, size = hashlib.md5(usedforsecurity=False), file.stat().st_size
    with (
        file.open("rb") as raw,
        tqdm.wrapattr(raw, "read", size, desc=f"md5 of {file.name}", leave=False, disable=None) as content,
    ):
        while block := content.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise LskdError(
            f"{file}: expected md5 {md5}, found {digest.hexdigest()}; it is another or a damaged file, "
            "get it again (or --no-checksum)"
        )


def read_annotations(source: Path, name: str, dataset: str, checksum: bool = True) -> dict[str, Any]:
    """Return what the JSON file ``name`` contains; it may lie in ``name.tar.gz``, whose MD5 comes first.

    Raises:
        LskdError: for a file that is missing, too large, another than the publisher's or no JSON object.
    """
    file = find_source(source, (name, f"{name}.tar.gz"), dataset)
    if file.name == name:
        text = read_bytes(file, JSON_LIMIT, "a list of annotations", "get it again")
    else:
        if checksum and file.name in PUBLISHED[dataset].md5:
            check_md5(file, PUBLISHED[dataset].md5[file.name])
        found = (m.read(JSON_LIMIT) for m in read_members(file) if m.name.rpartition("/")[2] == name)
        text = next(found, b"")
        if not text:
            raise LskdError(f"{file} has no {name}; get it again")
    try:
        content = parse_json(text.decode())
    except ValueError as error:
        raise LskdError(f"{file} is no JSON, or is cut short ({error}); get it again") from None
    if not isinstance(content, dict):
        raise LskdError(f"{file} is not a list of annotations; get it again")
    return content


def only_name(text: Any, where: Path | str) -> str:
    """Return a file name that is nothing else: no folder, nothing that leads elsewhere.

    Raises:
        LskdError: for anything else.
    """
    if not isinstance(text, str) or not text or "/" in text or "\0" in text or text[0] == ".":
        raise LskdError(f"{where} names an image {text!r}; that is no file name")
    return text
