"""ImageNet-LT and Places-LT: the lists of Liu et al. (2019) over ImageNet and Places365."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import typer

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Copy, EvaluateOn, Expect, Lists, Output, Source
from lskd_study.data.expected import PUBLISHED, check_numbers, count, origin
from lskd_study.data.folders.archives import MEMBER_LIMIT, fingerprint
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import Image, Rows, file_names
from lskd_study.data.manifest import Made

LISTS = {"imagenet-lt": "ImageNet_LT", "places-lt": "Places_LT"}
# The folders of Places365 by what the lists call them: easy layout, small images, large images.
_PLACES = {
    "train": ("train", "data_256", "data_256_standard", "data_large", "data_large_standard"),
    "val": ("val", "val_256", "val_large"),
}


class _Entry(NamedTuple):
    path: PurePosixPath
    label: int


def _over_lists(name: str, about: str) -> Callable[..., Made]:
    """Return what writes a data set: ``train`` by the training list, ``val`` by that of validation or test.

    The paper's "testing sets" of 20,000 and 7,300 images are the validation lists, which come from the
    training images. Classes go by the numbers in the lists. It raises ``LskdError`` for lists that are
    missing, damaged, contradict each other or name images that are not there, and for an output that cannot
    be written.
    """
    folder = Path("data", name.replace("-", "_"))

    def prepare(
        source: Source,
        output: Output = folder,
        lists: Lists = None,
        evaluate_on: EvaluateOn = "val",
        copy: Copy = False,
        expect: Expect = None,
    ) -> Made:
        if evaluate_on not in ("val", "test"):
            raise typer.BadParameter(f"--evaluate-on must be val or test, got {evaluate_on!r}")
        files = {
            split: (lists or source) / f"{LISTS[name]}_{part}.txt"
            for split, part in (("train", "train"), ("val", evaluate_on))
        }
        sources = {file.name: fingerprint(file, _how_to_get(name)) for file in files.values()}
        settings = origin(name, expect) | {"evaluate_on": evaluate_on}
        return build(output, name, settings, partial(_rows, name, source, files, expect), copy, sources)

    prepare.__name__, prepare.__doc__ = f"prepare_{folder.name}", about
    return prepare


prepare_imagenet_lt = _over_lists(
    "imagenet-lt", "Write ImageNet-LT: the published lists over an ImageNet folder."
)
# Five of its classes are not numbered as the official ones of Places365. Nested classes (bus_station/indoor)
# become one folder. There are two published training sets, 62,500 images in the list of today and 184,500 in
# the papers; either is taken.
prepare_places_lt = _over_lists(
    "places-lt", "Write Places-LT: the published lists over a folder of Places365."
)


def _rows(name: str, source: Path, files: Mapping[str, Path], expect: str | None) -> Rows:
    entries = {split: _read(file, name) for split, file in files.items()}
    folders = _class_folders(entries, files)
    numbers = count((split, folders[entry.label]) for split in entries for entry in entries[split])
    check_numbers(name, numbers, expect)
    images, missing = [], []
    names = cache(file_names)
    for split, part in entries.items():
        for entry in part:
            image = entry.path.name
            where = (folder for folder in _folders(source, name, entry.path) if image in names(folder))
            if (folder := next(where, None)) is None:
                missing.append(str(entry.path))
            else:
                images.append(Image(split, folders[entry.label], image, folder / image))
    if missing:
        raise LskdError(
            f"{source}: {len(missing):,} of the {len(missing) + len(images):,} images that the lists "
            f"name are missing, e.g. {missing[0]}"
        )
    digests = {
        file.name: hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        for file in files.values()
    }
    same = [file for file, digest in digests.items() if PUBLISHED[name].md5.get(file) == digest]
    return Rows(images, more={"lists_md5": digests, "lists_known": same})


def _how_to_get(name: str) -> str:
    return f"get it from {PUBLISHED[name].get} and name its folder with --lists"


def _read(file: Path, name: str) -> list[_Entry]:
    try:
        lines = read_bytes(file, MEMBER_LIMIT, "one of the lists", _how_to_get(name)).decode().splitlines()
    except UnicodeDecodeError:
        raise LskdError(f"{file} is no text; {_how_to_get(name)}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        text, _, label = line.strip().rpartition(" ")
        path = PurePosixPath(text.strip().lstrip("/"))
        if not label.isdecimal() or len(path.parts) < 3 or ".." in path.parts:
            raise LskdError(f"{file}:{number}: expected `train/<class>/<image> <label>`, got {line[:80]!r}")
        entries.append(_Entry(path, int(label)))
    if len(set(entries)) != len(entries):
        raise LskdError(f"{file} names {len(entries) - len(set(entries)):,} images twice; get it again")
    return entries


def _class_folders(entries: Mapping[str, Sequence[_Entry]], files: Mapping[str, Path]) -> dict[int, str]:
    """Return the folder of each number in the lists: its class, so named that folders sort by the numbers."""
    labels: dict[int, str] = {}
    for split, part in entries.items():
        for entry in part:
            label = _class_of(entry.path)
            if labels.setdefault(entry.label, label) != label:
                raise LskdError(
                    f"{files[split]} gives the number {entry.label} to {labels[entry.label]} and to {label}; "
                    "the two lists must be of one version"
                )
    if sorted(labels) != list(range(len(labels))) or len(set(labels.values())) != len(labels):
        raise LskdError(
            f"{files['train']}: the numbers of the classes are not 0 to {len(labels) - 1}, each once"
        )
    only_one = {split: {entry.label for entry in part} for split, part in entries.items()}
    if odd := only_one["train"] ^ only_one["val"]:
        raise LskdError(f"class {labels[min(odd)]} is in one of {files['train']} and {files['val']} only")
    names = [labels[number] for number in range(len(labels))]
    if names == sorted(names):
        return labels
    width = len(str(len(names) - 1))
    return {number: f"{number:0{width}d}_{name}" for number, name in enumerate(names)}


def _class_of(path: PurePosixPath) -> str:
    """Return the class in one word, as the easy layout of Places365 names it.

    >>> _class_of(PurePosixPath("data_256/b/bus_station/indoor/00000001.jpg"))
    'bus_station-indoor'
    >>> _class_of(PurePosixPath("train/n01440764/n01440764_190.JPEG"))
    'n01440764'
    """
    parts = path.parts[1:-1]
    if len(parts) > 1 and len(parts[0]) == 1 and parts[1].startswith(parts[0]):
        parts = parts[1:]
    return "-".join(parts)


def _folders(source: Path, name: str, path: PurePosixPath) -> Iterator[Path]:
    """Yield where an image of the lists may lie, whichever of the publisher's layouts the source has."""
    yield source / path.parent
    if name == "places-lt":
        label = _class_of(path)
        for root in _PLACES["val" if path.parts[0] in _PLACES["val"] else "train"]:
            yield source / root / label
            yield source / root / label[0] / label.replace("-", "/")
