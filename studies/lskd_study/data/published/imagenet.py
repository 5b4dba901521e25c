"""ImageNet-1K from the archives of ILSVRC2012, or from folders."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lskd import LskdError
from lskd.base.images import class_folders
from lskd_study.base.extras import needs_study_extra
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.archives import check_md5, find_source, fingerprints, read_members
from lskd_study.data.folders.folders import Image, place, read_classes
from lskd_study.data.folders.layout import Fill, Tree, build

META = "meta.bin"
_CLASS_ARCHIVE = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_TRAINING = re.compile(r"(?:.*/)?([^/]+\.JPEG)")
_VALIDATION = re.compile(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)")


class _Devkit(NamedTuple):
    meta: bytes
    val_wnids: Sequence[str]

    def label(self, name: str, number: str, where: Path) -> str:
        """Return the class of a validation image by the number in its name, from 1."""
        if not 1 <= int(number) <= len(self.val_wnids):
            raise LskdError(f"{where} has {name}, but the devkit labels {len(self.val_wnids):,} images")
        return self.val_wnids[int(number) - 1]


def prepare_imagenet(
    source: Path, output: Path, *, copy: bool = False, checksum: bool = True, expected: Numbers | None = None
) -> tuple[dict[str, Any], bool]:
    """Write ImageNet-1K as ``train/<wnid>/`` and ``val/<wnid>/``.

    Each split comes from a folder if there is one (``train/<wnid>/``; ``val/<wnid>/``, or the images flat in
    ``val/`` and the devkit), else from its archive. The class archives within the training archive are read
    where they are, so no room for a second copy is needed. The validation labels are what torchvision reads
    in the devkit archive, whose MD5 is always checked. Where there is a devkit,
    `torchvision.datasets.ImageNet` reads the result too.

    Args:
        source: folder with the archives, or with ``train`` and ``val``.
        output: folder to write.
        copy: copy files where links would do.
        checksum: check the MD5 of the two archives of images.
        expected: numbers of images instead of the published ones.

    Raises:
        LskdError: for sources that are missing, damaged or not whole, or an output that cannot be written.
    """

    archives = _archive_names()

    def plan() -> Fill:
        folders = {split: source / split for split in ("train", "val") if (source / split).is_dir()}
        nested = "val" in folders and bool(class_folders(folders["val"]))
        devkit = None
        if not nested or (source / archives["devkit"][0]).exists():
            devkit = _read_devkit(find_source(source, archives["devkit"][:1], "imagenet"))
        files = {
            split: find_source(source, archives[split][:1], "imagenet")
            for split in ("train", "val")
            if split not in folders
        }
        images: list[Image] = []
        counts: dict[str, dict[str, int]] = {"train": {}, "val": {}}
        for split, folder in folders.items():
            if split == "train" or nested:
                labels = read_classes(folder)
                found = [Image(split, k, name, folder / k / name) for k in labels for name in labels[k]]
            else:
                assert devkit is not None
                found = _flat_validation(folder, devkit)
            images += found
            for image in found:
                counts[split][image.label] = counts[split].get(image.label, 0) + 1
        size = 0
        if "train" in files:
            size += _scan_training(files["train"], counts["train"])
        if "val" in files:
            assert devkit is not None
            size += _scan_validation(files["val"], devkit, counts["val"])
        _check(counts, source, expected)

        def fill(tree: Tree) -> dict[str, Any]:
            tree.require_space(size)
            for split, file in files.items():
                if checksum:
                    check_md5(tree, file, archives[split][1])
            if images:
                place(tree, images)
            if "train" in files:
                _write_training(tree, files["train"])
            if "val" in files:
                assert devkit is not None
                _write_validation(tree, files["val"], devkit)
            if devkit is not None:
                tree.write(META, devkit.meta)
            return {"checksums": checksum and bool(files)}

        return fill

    if not source.is_dir():
        raise LskdError(f"{source} is no folder; name that with the archives, or with train and val")
    sources = fingerprints(source / name for name, _ in archives.values())
    return build(output, "imagenet", origin("imagenet", expected), plan, copy, sources)


def _archive_names() -> Mapping[str, tuple[str, str]]:
    """Return the names and MD5 of the archives, as torchvision knows them."""
    with needs_study_extra():
        from torchvision.datasets.imagenet import ARCHIVE_META
    return dict(ARCHIVE_META)


def _read_devkit(file: Path) -> _Devkit:
    with needs_study_extra():
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


def _flat_validation(folder: Path, devkit: _Devkit) -> list[Image]:
    images = []
    for path in sorted(folder.iterdir()):
        if match := _VALIDATION.fullmatch(path.name):
            images.append(Image("val", devkit.label(path.name, match[2], folder), path.name, path))
    return images


def _scan_training(file: Path, counts: dict[str, int]) -> int:
    size = 0
    for member in read_members(file, title=f"reading {file.name}"):
        if not (label := _CLASS_ARCHIVE.fullmatch(member.name)):
            raise LskdError(
                f"{file} has {member.name}, which is no class archive; get the training archive again"
            )
        for image in read_members(file, member.open()):
            _training_name(file, image.name)
            counts[label[1]] = counts.get(label[1], 0) + 1
            size += image.size
    return size


def _scan_validation(file: Path, devkit: _Devkit, counts: dict[str, int]) -> int:
    size = 0
    for member in read_members(file, title=f"reading {file.name}"):
        _, label = _validation_name(file, member.name, devkit)
        counts[label] = counts.get(label, 0) + 1
        size += member.size
    return size


def _write_training(tree: Tree, file: Path) -> None:
    for member in read_members(file, title="training images"):
        label = member.name.rpartition("/")[2].removesuffix(".tar")
        for image in read_members(file, member.open()):
            name = _training_name(file, image.name)
            if not tree.holds("train", label, name, image.size):
                tree.add_bytes("train", label, name, image.read())


def _write_validation(tree: Tree, file: Path, devkit: _Devkit) -> None:
    for member in read_members(file, title="validation images"):
        name, label = _validation_name(file, member.name, devkit)
        if not tree.holds("val", label, name, member.size):
            tree.add_bytes("val", label, name, member.read())


def _training_name(file: Path, name: str) -> str:
    if not (match := _TRAINING.fullmatch(name)):
        raise LskdError(f"{file} has {name}, which is no image of ImageNet; get the training archive again")
    return match[1]


def _validation_name(file: Path, name: str, devkit: _Devkit) -> tuple[str, str]:
    if not (match := _VALIDATION.fullmatch(name)):
        raise LskdError(f"{file} has {name}, which is no validation image; get the validation archive again")
    return match[1], devkit.label(match[1], match[2], file)


def _check(counts: Mapping[str, Mapping[str, int]], source: Path, expected: Numbers | None) -> None:
    odd = sorted(set(counts["train"]) ^ set(counts["val"]))
    totals = {split: sum(counts[split].values()) for split in counts}
    check_numbers("imagenet", totals | {"classes": len(counts["train"])}, expected)
    if odd:
        raise LskdError(f"training and validation images of {source} have different classes, e.g. {odd[0]}")
