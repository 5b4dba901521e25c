"""Image folders as a source: what is in them, and linking it into a tree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lskd import LskdError
from lskd.base.images import class_folders, class_images
from lskd_study.base.extras import needs_study_extra
from lskd_study.data.expected import Numbers
from lskd_study.data.folders.layout import SPLITS, Tree


class Image(NamedTuple):
    """An image of the source and where it goes."""

    split: str
    label: str
    name: str
    source: Path


Folder = Mapping[str, Mapping[str, list[str]]]
"""Sorted image names by split and class."""


def read_image_folder(source: Path) -> dict[str, dict[str, list[str]]]:
    """Return the names of the images of an image folder, sorted, by split and class.

    Raises:
        LskdError: without ``train/<class>/`` and ``val/<class>/`` of the same classes, for a class without
            images or with folders of its own (timm would take those for classes).
    """
    found = {split: read_classes(source / split) for split in SPLITS}
    odd = sorted(set(found["train"]) ^ set(found["val"]))
    if odd:
        raise LskdError(f"train and val of {source} have different classes, e.g. {odd[0]}")
    return found


def read_classes(folder: Path) -> dict[str, list[str]]:
    """Return the sorted names of the images in each class folder.

    Raises:
        LskdError: for a folder that does not hold class folders of images alone.
    """
    try:
        labels = class_folders(folder)
    except OSError as error:
        raise LskdError(
            f"{folder} cannot be read ({error.strerror}); "
            "the source must hold train/<class>/ and val/<class>/"
        ) from None
    if not labels:
        raise LskdError(
            f"{folder} has no class folders; the source must hold train/<class>/ and val/<class>/"
        )
    found = {label: class_images(folder / label)[0] for label in labels}
    if empty := [label for label in labels if not found[label]]:
        raise LskdError(f"class folder {folder / empty[0]} has no images; remove it, or put them there")
    return found


def numbers_of(folder: Folder) -> Numbers:
    """Count images and classes."""
    counts = {split: sum(len(names) for names in folder[split].values()) for split in SPLITS}
    return counts | {"classes": len(folder["train"])}


def images_of(folder: Folder, source: Path, split: str) -> list[Image]:
    """Return the images of one split, to stay in their classes."""
    return [
        Image(split, label, name, source / split / label / name)
        for label, names in folder[split].items()
        for name in names
    ]


def place(tree: Tree, images: Sequence[Image]) -> None:
    """Link images into a tree, or copy them."""
    with needs_study_extra():
        from tqdm import tqdm
    if tree.copies:
        tree.require_space(sum(image.source.stat().st_size for image in images))
    for image in tqdm(images, desc="images", unit=" images", leave=False, disable=None):
        tree.add_file(image.split, image.label, image.name, image.source)
