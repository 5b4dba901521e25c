"""An image folder as a source: its splits, classes and images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lskd import LskdError
from lskd.base.images import class_folders, class_images
from lskd_study.data.folders.rows import SPLITS, Image

_CONTAINS = "the source must contain train/<class>/ and val/<class>/"


@dataclass(frozen=True)
class ImageFolder:
    """An image folder: ``splits`` has the sorted names of its images by split and class."""

    path: Path
    splits: Mapping[str, Mapping[str, list[str]]]

    @classmethod
    def read(cls, path: Path) -> "ImageFolder":
        """Read the names of all images.

        Raises:
            LskdError: without ``train/<class>/`` and ``val/<class>/`` of the same classes, for a class
                without images or with folders of its own (timm would take those for classes).
        """
        splits = {split: read_classes(path / split) for split in SPLITS}
        if odd := sorted(set(splits["train"]) ^ set(splits["val"])):
            raise LskdError(f"train and val of {path} have different classes, e.g. {odd[0]}")
        return cls(path, splits)

    @property
    def classes(self) -> list[str]:
        """The sorted names of the classes."""
        return list(self.splits["train"])

    def images(self, *splits: str) -> list[Image]:
        """Return the images of some splits, or of both, to stay in their classes."""
        return [
            Image(split, label, name, self.path / split / label / name)
            for split in splits or SPLITS
            for label, names in self.splits[split].items()
            for name in names
        ]


def read_classes(folder: Path) -> dict[str, list[str]]:
    """Return the sorted names of the images in each class folder, sorted by class.

    Raises:
        LskdError: for a folder that does not contain class folders of images alone.
    """
    try:
        labels = class_folders(folder)
    except OSError as error:
        raise LskdError(f"{folder} cannot be read ({error.strerror}); {_CONTAINS}") from None
    if not labels:
        raise LskdError(f"{folder} has no class folders; {_CONTAINS}")
    found = {label: class_images(folder / label)[0] for label in labels}
    if empty := [label for label in labels if not found[label]]:
        raise LskdError(f"class folder {folder / empty[0]} has no images; remove it, or put them there")
    return found
