"""ImageNet-LT and Places-LT: the lists of Liu et al. (2019) over ImageNet and Places365."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.archives import MEMBER_LIMIT, fingerprint
from lskd_study.data.folders.folders import Image, place
from lskd_study.data.folders.layout import Fill, Tree, build

LISTS = {"imagenet-lt": "ImageNet_LT", "places-lt": "Places_LT"}
# The folders of Places365 by what the lists call them: easy layout, small images, large images.
_PLACES = {
    "train": ("train", "data_256", "data_256_standard", "data_large", "data_large_standard"),
    "val": ("val", "val_256", "val_large"),
}


class _Entry(NamedTuple):
    path: PurePosixPath
    label: int


def prepare_long_tailed(
    name: str,
    source: Path,
    output: Path,
    *,
    lists: Path | None = None,
    evaluate_on: str = "val",
    copy: bool = False,
    expected: Numbers | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write ``train`` from the training list, ``val`` from the list of validation or test.

    The paper's "testing sets" of 20,000 and 7,300 images are the validation lists, which come from the
    training images. Classes go by the numbers in the lists (five of Places-LT are not the official ones of
    Places365). Nested classes (``bus_station/indoor``) become one folder. Places-LT has two published
    training sets, 62,500 images in the list of today and 184,500 in the papers; either is taken.

    Args:
        name: ``imagenet-lt`` or ``places-lt``.
        source: folder of ImageNet (``train/<wnid>/``) or Places365 (``train/`` or ``data_256/`` ...).
        output: folder to write.
        lists: folder with the lists under their published names; ``source`` by default.
        evaluate_on: ``val`` or ``test``, the list that becomes ``val``.
        copy: copy files where links would do.
        expected: numbers of images instead of the published ones.

    Raises:
        LskdError: for lists that are missing, damaged, contradict each other or name images that are not
            there, or an output that cannot be written.
    """
    files = {
        split: (lists or source) / f"{LISTS[name]}_{part}.txt"
        for split, part in (("train", "train"), ("val", evaluate_on))
    }

    def plan() -> Fill:
        entries = {split: _read(file, name) for split, file in files.items()}
        labels = _labels(entries, files)
        folders = _folder_names(labels)
        check_numbers(
            name, {split: len(part) for split, part in entries.items()} | {"classes": len(labels)}, expected
        )
        images = []
        missing: list[str] = []
        for split, part in entries.items():
            where = _Finder(source, name)
            for entry in part:
                path = where(entry.path)
                if path is None:
                    missing.append(str(entry.path))
                else:
                    images.append(Image(split, folders[entry.label], entry.path.name, path))
        if missing:
            total = sum(len(part) for part in entries.values())
            raise LskdError(
                f"{source}: {len(missing):,} of the {total:,} images that the lists name are missing, "
                f"e.g. {missing[0]}"
            )

        def fill(tree: Tree) -> dict[str, Any]:
            place(tree, images)
            known = PUBLISHED[name].md5
            digests = {
                file.name: hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
                for file in files.values()
            }
            return {
                "lists_md5": digests,
                "lists_known": [file for file, digest in digests.items() if known.get(file) == digest],
            }

        return fill

    sources = {file.name: fingerprint(file, _mend(name)) for file in files.values()}
    return build(output, name, origin(name, expected) | {"evaluate_on": evaluate_on}, plan, copy, sources)


def _mend(name: str) -> str:
    return f"get it from {PUBLISHED[name].get} and name its folder with --lists"


def _read(file: Path, name: str) -> list[_Entry]:
    try:
        lines = read_bytes(file, MEMBER_LIMIT, "one of the lists", _mend(name)).decode().splitlines()
    except UnicodeDecodeError:
        raise LskdError(f"{file} is no text; {_mend(name)}") from None
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


def _labels(entries: Mapping[str, Sequence[_Entry]], files: Mapping[str, Path]) -> dict[int, str]:
    """Return the class of each number in the lists."""
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
    return labels


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


def _folder_names(labels: Mapping[int, str]) -> dict[int, str]:
    """Name the folders so that they sort by the numbers of the lists."""
    names = [labels[number] for number in range(len(labels))]
    if names == sorted(names):
        return dict(labels)
    width = len(str(len(names) - 1))
    return {number: f"{number:0{width}d}_{name}" for number, name in enumerate(names)}


class _Finder:
    """Finds an image of the lists in the source, whichever of the publisher's layouts that has."""

    def __init__(self, source: Path, name: str) -> None:
        self._source = source
        self._places = name == "places-lt"
        self._contents: dict[Path, frozenset[str]] = {}

    def __call__(self, path: PurePosixPath) -> Path | None:
        for folder in self._folders(path):
            if path.name in self._names(folder):
                return folder / path.name
        return None

    def _folders(self, path: PurePosixPath) -> Iterator[Path]:
        yield self._source / path.parent
        if self._places:
            label = _class_of(path)
            split = "val" if path.parts[0] in _PLACES["val"] else "train"
            for root in _PLACES[split]:
                yield self._source / root / label
                yield self._source / root / label[0] / label.replace("-", "/")

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self._contents:
            try:
                self._contents[folder] = frozenset(entry.name for entry in folder.iterdir())
            except OSError:
                self._contents[folder] = frozenset()
        return self._contents[folder]
