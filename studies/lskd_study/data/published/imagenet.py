"""ImageNet-1K from the archives of ILSVRC2012, or from folders."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lskd import LskdError
from lskd.base.images import class_folders
from lskd_study.data.arguments import Copy, Expect, NoChecksum, Output, Source
from lskd_study.data.expected import PUBLISHED, check_numbers, count, origin
from lskd_study.data.folders.archives import Member, find_source, fingerprints, read_members
from lskd_study.data.folders.image_folder import read_classes
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import SPLITS, Image, Rows
from lskd_study.data.manifest import Made

META = "meta.bin"
_CLASS_ARCHIVE = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_TRAINING = re.compile(r"(?:.*/)?([^/]+\.JPEG)")
_VALIDATION = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)")


class _Devkit(NamedTuple):
    meta: bytes
    val_wnids: Sequence[str]

    def image(self, match: re.Match[str], source: Path | Member, where: Path) -> Image:
        """Return a validation image in its class, which goes by the number in its name, from 1."""
        name, number = match[1], int(match[2])
        if not 1 <= number <= len(self.val_wnids):
            raise LskdError(f"{where} has {name}, but the devkit labels {len(self.val_wnids):,} images")
        return Image("val", self.val_wnids[number - 1], name, source)


def prepare_imagenet(
    source: Source,
    output: Output = Path("data/imagenet"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> Made:
    """Write ImageNet-1K from the ILSVRC2012 archives, or from train/ and val/ folders.

    Each split comes from a folder if there is one (``train/<wnid>/``; ``val/<wnid>/``, or the images flat in
    ``val/`` and the devkit), else from its archive. The class archives within the training archive are read
    where they are, so no room for a second copy is needed. The validation labels are what torchvision reads
    in the devkit archive, whose MD5 is always checked. Where there is a devkit,
    `torchvision.datasets.ImageNet` reads the result too.

    Raises:
        LskdError: for sources that are missing, damaged or not whole, or an output that cannot be written.
    """
    archives = _archive_names()

    def plan() -> Rows:
        folders = {split: source / split for split in SPLITS if (source / split).is_dir()}
        nested = "val" in folders and bool(class_folders(folders["val"]))
        devkit = None
        if not nested or (source / archives["devkit"][0]).exists():
            devkit = _read_devkit(find_source(source, archives["devkit"][:1], "imagenet"))
        files = {
            split: find_source(source, archives[split][:1], "imagenet")
            for split in SPLITS
            if split not in folders
        }
        linked: list[Image] = []
        for split, folder in folders.items():
            if split == "train" or nested:
                labels = read_classes(folder)
                linked += [Image(split, k, name, folder / k / name) for k in labels for name in labels[k]]
            else:
                assert devkit is not None
                matches = {path: _VALIDATION.fullmatch(path.name) for path in sorted(folder.iterdir())}
                linked += [devkit.image(match, path, folder) for path, match in matches.items() if match]

        def unpacked() -> Iterator[Image]:
            if "train" in files:
                yield from _training(files["train"])
            if "val" in files:
                assert devkit is not None
                yield from _validation(files["val"], devkit)

        places = [image[:2] for image in linked]
        size = 0
        for image in unpacked():
            assert isinstance(image.source, Member)
            places.append(image[:2])
            size += image.source.size
        classes = {split: {label for one, label in places if one == split} for split in SPLITS}
        check_numbers("imagenet", count(places) | {"classes": len(classes["train"])}, expect)
        if odd := classes["train"] ^ classes["val"]:
            raise LskdError(
                f"training and validation images of {source} have different classes, e.g. {min(odd)}"
            )
        return Rows(
            linked,
            unpacked,
            size,
            {} if no_checksum else {file: archives[split][1] for split, file in files.items()},
            {} if devkit is None else {META: devkit.meta},
            {"checksums": bool(files) and not no_checksum},
        )

    if not source.is_dir():
        raise LskdError(f"{source} is no folder; name that with the archives, or with train and val")
    sources = fingerprints(source / name for name, _ in archives.values())
    return build(output, "imagenet", origin("imagenet", expect), plan, copy, sources)


def _archive_names() -> Mapping[str, tuple[str, str]]:
    """Return the names and MD5 of the archives, as torchvision knows them."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    return dict(ARCHIVE_META)


def _read_devkit(file: Path) -> _Devkit:
    from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

    with tempfile.TemporaryDirectory() as scratch:
        try:
            parse_devkit_archive(scratch, str(file.absolute()))
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            expected = _archive_names()["devkit"][1]
            raise LskdError(
                f"{file} is damaged or not the devkit of ILSVRC2012, whose md5 is {expected}; "
                f"get it again from {PUBLISHED['imagenet'].get}"
            ) from error
        return _Devkit((Path(scratch) / META).read_bytes(), load_meta_file(scratch)[1])


def _training(file: Path) -> Iterator[Image]:
    archives = read_members(file, title=f"reading {file.name}")
    for label, archive in _named(file, archives, _CLASS_ARCHIVE, "class archive", "training"):
        images = read_members(file, archive.open())
        for match, image in _named(file, images, _TRAINING, "image of ImageNet", "training"):
            yield Image("train", label[1], match[1], image)


def _validation(file: Path, devkit: _Devkit) -> Iterator[Image]:
    images = read_members(file, title=f"reading {file.name}")
    for match, image in _named(file, images, _VALIDATION, "validation image", "validation"):
        yield devkit.image(match, image, file)


def _named(
    file: Path, members: Iterable[Member], form: re.Pattern[str], what: str, split: str
) -> Iterator[tuple[re.Match[str], Member]]:
    """Yield what an archive has with the match of its name; anything of another name is refused."""
    for member in members:
        if not (match := form.fullmatch(member.name)):
            raise LskdError(f"{file} has {member.name}, which is no {what}; get the {split} archive again")
        yield match, member
