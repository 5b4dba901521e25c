"""A folder without a split: validation images drawn by class, identical images kept on one side."""

import hashlib
import io
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from lskd import LskdError
from lskd.base.files import read_csv
from lskd.base.images import EXTENSIONS, class_folders, class_images, is_image, passed_over, pixel_checksums
from lskd_study.base.text import csv_text, storable
from lskd_study.data.arguments import Copy, OutputBeside, Seed
from lskd_study.data.folders.archives import fingerprint
from lskd_study.data.folders.derived import beside
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import Image, Rows
from lskd_study.data.manifest import Made

_CONVERTED = frozenset({".webp", ".bmp", ".tif", ".tiff"})  # to PNG
IDENTICAL_LIST = "identical.csv"
_READ = EXTENSIONS | _CONVERTED
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # others become RGB, as for a trainer that reads them
_TABLE = "name a CSV table with the columns file and label"
_CHUNK = 512  # images between two steps of the progress bar


class _Found(NamedTuple):
    """An image of the source: its class, and its path there."""

    label: str
    file: str


def converts(name: str) -> bool:
    """Return whether an image is one that the trainers pass over and `lskd data split` converts."""
    return is_image(name, _CONVERTED)


def prepare_split(
    source: Annotated[Path, typer.Argument(help="Folder with <class>/, or with the images of --labels.")],
    validation: Annotated[float, typer.Option(help="Share of each class that becomes validation.")] = 0.2,
    labels: Annotated[
        Path | None, typer.Option(help="CSV table of the classes: columns file (within SOURCE) and label.")
    ] = None,
    seed: Seed = 0,
    output: OutputBeside = None,
    copy: Copy = False,
) -> Made:
    """Split a folder of classes into training and validation images; WebP, BMP and TIFF become PNG.

    Each class is split on its own, with one image or more on either side. Images that are identical, pixel by
    pixel in RGB, stay on one side, in training if they are of several classes; ``identical.csv`` lists them.

    Raises:
        LskdError: for a source that has a split, images that cannot be used, a class that cannot be split,
            or an output that cannot be written.
    """
    if not 0 < validation < 1:
        raise LskdError(f"--validation must be above 0 and below 1, got {validation:g}")
    output = output or beside(source, "split")
    if output.resolve().is_relative_to(source.resolve()):
        raise LskdError(f"{output} lies in the source, which stays as it is; choose another --output")
    found, strangers = _listed(source, labels) if labels else _in_folders(source)
    settings = {
        "source": str(source),
        "source_listing_sha256": _checksum(source, found),
        "validation": validation,
        "seed": seed,
        **({"labels": str(labels)} if labels else {}),
    }

    def plan() -> Rows:
        groups = _identical([source / file for _, file in found])
        chosen = _validation(found, groups, validation, seed)
        images = [
            Image("val" if i in chosen else "train", label, _name(file, bool(labels)), source / file)
            for i, (label, file) in enumerate(found)
        ]
        _check_names(images)
        several = [group for group in groups if len(group) > 1]
        lines = [
            (number, *images[i][:3], found[i].file)
            for number, group in enumerate(several, start=1)
            for i in group
        ]
        identical = {
            "images": len(lines),
            "groups": len(several),
            "of_several_classes": sum(len({found[i].label for i in group}) > 1 for group in several),
        }
        listed = csv_text(("group", "split", "label", "file", "source_file"), lines)
        others = [i for i, image in enumerate(found) if converts(image.file)]
        return Rows(
            linked=[image for image, one in zip(images, found, strict=True) if not converts(one.file)],
            unpacked=lambda: (images[i]._replace(source=_as_png(source / found[i].file)) for i in others),
            files={IDENTICAL_LIST: listed.encode()} if several else {},
            more={"identical": identical, "passed_over": strangers},
        )

    sources = {labels.name: fingerprint(labels, _TABLE)} if labels else {}
    return build(output, "split", settings, plan, copy, sources)


def _in_folders(source: Path) -> tuple[list[_Found], Counter[str]]:
    """Return the images of each class folder, and how many other files there are by their names' ends."""
    if not source.is_dir():
        raise LskdError(f"{source} is no folder; the source must contain <class>/ with images")
    found, strangers = [], Counter[str]()
    try:
        labels = class_folders(source)
        for part in {"train", "training"}.intersection(labels):
            if class_folders(source / part):
                raise LskdError(
                    f"{source} has a split already; `lskd study --own {source}` takes it as it is, and this "
                    f"command its part {source / part}"
                )
        if loose := [entry.name for entry in os.scandir(source) if is_image(entry.name, _READ)]:
            raise LskdError(
                f"{source} has {len(loose)} images outside of any class, e.g. {min(loose)}; name their "
                "classes with --labels, or move them"
            )
        for label in labels:
            images, others = class_images(source / label, _READ)
            found += [_Found(label, f"{label}/{name}") for name in images]
            strangers.update(os.path.splitext(name)[1].lower() or name for name in others)
            if not images:
                raise LskdError(f"class folder {source / label} has no images; remove it, or put them there")
    except OSError as error:
        raise LskdError(f"{source} cannot be read ({error.strerror}); check its permissions") from None
    return found, strangers


def _listed(source: Path, table: Path) -> tuple[list[_Found], Counter[str]]:
    """Return the images that a CSV table names; nothing in it leads out of the source, or of a class."""
    found: dict[str, _Found] = {}
    root = source.resolve()
    for number, row in enumerate(read_csv(table, ("file", "label")), start=1):
        file, label = row["file"].strip(), row["label"].strip()
        path = os.path.normpath(file)
        if not label or "/" in label or "\0" in label or passed_over(label) or not storable(label):
            problem = f"label {label!r} can be no folder's name"
        elif not file or "\0" in file or not (root / path).resolve().is_relative_to(root):
            problem = f"file {file!r} leads out of {source}"
        elif not is_image(path, _READ) or any(map(passed_over, Path(path).parts)):
            problem = f"file {file!r} has no name of an image ({', '.join(sorted(_READ))})"
        elif not os.path.isfile(root / path):  # of a name too long, too
            problem = f"file {file!r} is not in {source}"
        elif path in found:
            problem = f"file {file!r} stands there twice"
        else:
            found[path] = _Found(label, path)
            continue
        raise LskdError(f"{table}: row {number}: {problem}; fix the table")
    if not found:
        raise LskdError(f"{table} names no image; {_TABLE}")
    return list(found.values()), Counter()


def _name(file: str, listed: bool) -> str:
    """Return what an image is called in its class, where those of a list may come from several folders."""
    name = file.replace("/", "-") if listed else os.path.basename(file)
    return f"{name}.png" if converts(name) else name


def _check_names(images: Sequence[Image]) -> None:
    """Refuse names that no table can have, and one that two images would have."""
    for image in images:
        if not storable(image.label + image.name):
            raise LskdError(f"{str(image.source)!r} has a name that is no UTF-8 text in one line; rename it")
    ((name, times),) = Counter((image.label, image.name) for image in images).most_common(1)
    if times > 1:
        raise LskdError(f"{times} images of class {name[0]} would be called {name[1]}; rename all but one")


def _checksum(source: Path, found: Sequence[_Found]) -> str:
    """Return the sha256 of the images' classes, names and sizes."""
    digest = hashlib.sha256()
    for label, file in sorted(found):
        path = source / file
        if not path.is_file():
            raise LskdError(f"image {path} cannot be read (a link to nowhere, or no file); remove it")
        digest.update(f"{label} {file} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _identical(paths: Sequence[Path]) -> list[list[int]]:
    """Return the places of the images, those with the same pixels together."""
    from tqdm import trange

    groups: dict[str, list[int]] = defaultdict(list)
    title = f"looking at {len(paths):,} images"
    for begin in trange(0, len(paths), _CHUNK, desc=title, leave=False, disable=None):
        for i, checksum in enumerate(pixel_checksums(paths[begin : begin + _CHUNK]), start=begin):
            groups[checksum].append(i)
    return list(groups.values())


def _validation(
    found: Sequence[_Found], groups: Sequence[Sequence[int]], share: float, seed: int
) -> set[int]:
    """Draw the validation images of each class; a class is drawn alike whatever others there are."""
    counts = Counter(image.label for image in found)
    if len(counts) < 2:
        raise LskdError(
            f"there is one class only, {next(iter(counts), '')!r}; a classifier needs two or more"
        )
    of_class: dict[str, list[Sequence[int]]] = defaultdict(list)
    for group in groups:
        if len(labels := {found[i].label for i in group}) == 1:
            of_class[labels.pop()].append(group)
    chosen: set[int] = set()
    for label, count in sorted(counts.items()):
        wanted = min(max(1, round(share * count)), count - 1)
        drawn = sorted(of_class[label], key=lambda group: min(found[i].file for i in group))
        random.Random(f"{seed} {label}").shuffle(drawn)
        taken: list[int] = []
        for group in drawn:
            if len(taken) + len(group) <= wanted:
                taken += group
        if not taken and drawn:
            taken += sorted(drawn, key=len)[0]
        if not 0 < len(taken) < count:
            raise LskdError(
                f"class {label} has not two different images that are its own, one to train on and one to "
                "validate on; add some or remove the class"
            )
        chosen.update(taken)
    return chosen


def _as_png(path: Path) -> bytes:
    """Return an image as PNG with the same pixels; of several the first."""
    import PIL.Image

    content = io.BytesIO()
    with PIL.Image.open(path) as image:
        kept = image if image.mode in _KEPT_MODES else image.convert("RGB")
        kept.save(content, "PNG")
    return content.getvalue()
