"""What becomes of a publisher's files: rows of (split, class, file), linked, unpacked or written."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd_study.data.expected import PUBLISHED
from lskd_study.data.folders.archives import check_md5, read_members
from lskd_study.data.folders.layout import Image, Tree

Place = tuple[str, str, str]  # split, class, file


@dataclass(frozen=True)
class Rows:
    """The images of a data set; called with a tree, it puts them there.

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

    def __call__(self, tree: Tree) -> dict[str, Any]:
        """Fill a tree and return what else belongs into the manifest."""
        from tqdm import tqdm

        copied = [image.source for image in self.linked if isinstance(image.source, Path) and tree.copies]
        tree.require_space(self.size + sum(path.stat().st_size for path in copied))
        for archive, md5 in self.archives.items():
            about = archive.stat()
            key = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns} {md5}"
            tree.once(key, partial(check_md5, archive, md5))
        for image in tqdm(self.linked, desc="images", unit=" images", leave=False, disable=None):
            tree.add(image)
        for image in self.unpacked():
            tree.add(image)
        for name, content in self.files.items():
            tree.write(name, content)
        return dict(self.more)


def extracted(
    found: Path,
    dataset: str,
    wanted: Mapping[str, tuple[str, str, str]],
    checksum: bool,
    size: int,
    what: str,
) -> Rows:
    """Return the rows of images that lie in a publisher's folder, or in the archive of that folder.

    Args:
        found: the folder or the archive.
        dataset: as `lskd data` calls it.
        wanted: split, class and file of each image, by its path within the folder.
        checksum: whether to check the archive's MD5.
        size: bytes of the images in the archive.
        what: names the images, for the message where one is missing.
    """
    if found.is_dir():
        return Rows([Image(*row, found / name) for name, row in wanted.items()], more={"checksums": False})
    folder = found.name.partition(".")[0]

    def unpacked() -> Iterable[Image]:
        left = dict(wanted)
        for member in read_members(found, title="images"):
            if (row := left.pop(member.name.removeprefix(f"{folder}/"), None)) is not None:
                yield Image(*row, member)
        refuse_missing(found, dataset, what, sorted(left), len(wanted))

    archives = {found: PUBLISHED[dataset].md5[found.name]} if checksum else {}
    return Rows(unpacked=unpacked, size=size, archives=archives, more={"checksums": checksum})


def refuse_missing(found: Path, dataset: str, what: str, missing: Sequence[str], total: int) -> None:
    """Refuse a source that lacks images, which ``what`` names.

    Raises:
        LskdError: naming the first.
    """
    if missing:
        raise LskdError(
            f"{found}: {what} {total:,} images, {len(missing):,} of them are missing, e.g. {missing[0]}; "
            f"get it again from {PUBLISHED[dataset].get}"
        )


def file_names(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
