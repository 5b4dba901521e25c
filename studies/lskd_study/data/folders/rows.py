"""What becomes of a publisher's files: images in splits and classes, to be linked, unpacked or written."""

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lskd import LskdError
from lskd_study.data.expected import PUBLISHED, check_numbers, count
from lskd_study.data.folders.archives import Member, read_members

SPLITS = ("train", "val")

Place = tuple[str, str, str]  # split, class, file


class Image(NamedTuple):
    """An image and where it goes: ``source`` is a file, a member of an archive, or what is to be written."""

    split: str
    label: str
    name: str
    source: Path | Member | bytes


@dataclass(frozen=True)
class Rows:
    """The images of a data set.

    Attributes:
        linked: those that are files, which are linked or copied.
        unpacked: yields those that are not, in the order of their archives.
        size: bytes of the latter.
        archives: the MD5 of archives to be checked first.
        files: what else belongs into the folder, by name.
        more: what else belongs into the manifest.
    """

    linked: Sequence[Image] = ()
    unpacked: Callable[[], Iterable[Image]] = tuple
    size: int = 0
    archives: Mapping[Path, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


def extracted(
    found: Path,
    dataset: str,
    wanted: Mapping[str, Place],
    what: str,
    expect: str | None,
    checksum: bool,
    folder: str,
    present: Container[str] | None = None,
) -> Rows:
    """Return the rows of images that lie in a publisher's folder, or in the archive of that folder.

    Args:
        found: the folder or the archive.
        dataset: as `lskd data` calls it.
        wanted: where each image goes, by its path within ``folder``.
        what: names the images, for the message where one is missing.
        expect: numbers of images instead of the published ones.
        checksum: whether to check the archive's MD5.
        folder: of the images, as the archive has it.
        present: the images in the archive, if that has been read.

    Raises:
        LskdError: for other numbers of images than expected, and for images that are missing.
    """
    check_numbers(dataset, count((split, label) for split, label, _ in wanted.values()), expect)

    def refuse_missing(missing: Sequence[str]) -> None:
        if missing:
            raise LskdError(
                f"{found}: {what} {len(wanted):,} images, {len(missing):,} of them are missing, e.g. "
                f"{missing[0]}; get it again from {PUBLISHED[dataset].get}"
            )

    if found.is_dir():
        files = {name: found.parent / folder / name for name in wanted}
        refuse_missing([name for name, file in files.items() if not file.is_file()])
        return Rows([Image(*wanted[name], file) for name, file in files.items()], more={"checksums": False})
    if present is not None:
        refuse_missing([name for name in wanted if name not in present])

    def unpacked() -> Iterable[Image]:
        left = dict(wanted)
        for member in read_members(found, title="images"):
            if (place := left.pop(member.name.removeprefix(f"{folder}/"), None)) is not None:
                yield Image(*place, member)
        refuse_missing(sorted(left))

    archives = {found: PUBLISHED[dataset].md5[found.name]} if checksum else {}
    size = found.stat().st_size  # images are packed already
    return Rows(unpacked=unpacked, size=size, archives=archives, more={"checksums": checksum})


def file_names(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
