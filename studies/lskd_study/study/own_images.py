"""What is in a folder of images: splits, classes, sizes, colours; what is wrong with it, in one line."""

import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lskd import LskdError
from lskd.base.images import EXTENSIONS, check_images, class_folders, class_images, is_image
from lskd_study.data.folders.split import converts

# The names that timm takes for a split, the usual one first. Nobody trains on a folder called test.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}
_LOOKED_AT = 200
_NEEDS = "it must contain train/<class>/ and val/<class>/ with images"
PNG = "convert WebP, BMP and TIFF to PNG, as `lskd data split` does"


@dataclass(frozen=True)
class OwnImages:
    """A folder of images, as far as a study's settings depend on it.

    Attributes:
        folder: as the user named it.
        splits: the folder of ``train`` and of ``val``.
        classes: names of the classes.
        train: number of training images.
        validation: number of validation images.
        smallest_class: training images in the smallest class.
        width: median of the images looked at, in pixels.
        height: likewise.
        grey: whether all images looked at have a single channel.
        strangers: files that are no images, which the trainer passes over.
    """

    folder: str
    splits: dict[str, Path]
    classes: list[str]
    train: int
    validation: int
    smallest_class: int
    width: int
    height: int
    grey: bool
    strangers: list[Path]

    @property
    def usual_names(self) -> bool:
        """Whether the splits are called ``train`` and ``val``."""
        return all(path.name == split for split, path in self.splits.items())

    def describe(self) -> str:
        """Return it in one line."""
        colour = "grey" if self.grey else "colour"
        return (
            f"{self.folder}: {len(self.classes)} classes, {self.train:,} training and {self.validation:,} "
            f"validation images, {self.width} x {self.height} pixels (median), {colour}"
        )


def look_at(folder: str) -> OwnImages:
    """Find splits and classes, and look into some of the images.

    Raises:
        LskdError: for a folder that no study can be made of.
    """
    root = Path(folder)
    if not root.is_dir():
        raise LskdError(f"{folder} is {'no folder' if root.exists() else 'not there'}; {_NEEDS}")
    splits = {split: _split(root, split, names) for split, names in SPLITS.items()}
    strangers: list[Path] = []
    found = {split: _classes(path, strangers) for split, path in splits.items()}
    odd = sorted(found["train"].keys() ^ found["val"].keys())
    if odd:
        having, lacking = ("train", "val") if odd[0] in found["train"] else ("val", "train")
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise LskdError(
            f"class {odd[0]}{more} is in {splits[having]} and not in {splits[lacking]}; "
            "both need the same class folders"
        )
    if len(found["train"]) < 2:
        only = next(iter(found["train"]))
        raise LskdError(f"{splits['train']} has one class only, {only}; a classifier needs two or more")
    everything = [path for split in found for paths in found[split].values() for path in paths]
    width, height, grey = _sizes(everything)
    counts = {split: sum(len(paths) for paths in classes.values()) for split, classes in found.items()}
    return OwnImages(
        folder=folder,
        splits=splits,
        classes=sorted(found["train"]),
        train=counts["train"],
        validation=counts["val"],
        smallest_class=min(len(paths) for paths in found["train"].values()),
        width=width,
        height=height,
        grey=grey,
        strangers=strangers,
    )


def _split(root: Path, split: str, names: Sequence[str]) -> Path:
    there = [root / name for name in names if (root / name).is_dir()]
    if split == "val" and len(there) > 1:
        there = [path for path in there if path.name != "test"]
    if len(there) > 1:
        keep = "keep one, the training images" if split == "train" else "keep one to validate on"
        raise LskdError(f"{root} has {' and '.join(path.name for path in there)}; {keep}")
    if not there:
        here = class_folders(root)
        seen = f"it has {', '.join(here[:3])}{', ...' * (len(here) > 3)}" if here else "it has no folders"
        raise LskdError(
            f"{root} has no {split} folder ({seen}; looked for {', '.join(names)}); {_fix(root, split, here)}"
        )
    return there[0]


def _fix(root: Path, split: str, here: Sequence[str]) -> str:
    """Return what to do about a missing split: where there are classes of images, the commands to give."""
    undivided = root
    if split == "val":
        undivided = _split(root, "train", SPLITS["train"])
        here = class_folders(undivided)
    if len(here) < 2 or any(class_folders(undivided / name) for name in here):
        return _NEEDS
    made = f"{root}_split"
    if root.name in ("", ".."):  # the folder one is in, or one above
        made = os.path.relpath(f"{root.resolve()}_split")
    commands = [["data", "split", str(undivided), "--output", made], ["study", "--own", made]]
    return "make one: " + " && ".join(shlex.join(["lskd", *words]) for words in commands)


def _classes(folder: Path, strangers: list[Path]) -> dict[str, list[Path]]:
    """Return the images of each class folder; other files are added to ``strangers``."""
    labels = class_folders(folder)
    loose = sorted(entry.path for entry in os.scandir(folder) if is_image(entry.name))
    if not labels:
        seen = f"{len(loose)} images outside of any class" if loose else "no class folders"
        raise LskdError(f"{folder} has {seen}; {_NEEDS}")
    classes = {}
    for label in labels:
        images, others = class_images(folder / label)
        if not images:
            seen = f"{len(others)} files, none with a name of an image" if others else "no images"
            kinds = f"; images end in {', '.join(sorted(EXTENSIONS))}" if others else ""
            fix = PNG if any(map(converts, others)) else "fix or remove it"
            raise LskdError(f"class folder {folder / label} has {seen}{kinds}; {fix}")
        classes[label] = [folder / label / name for name in images]
        strangers += [folder / label / name for name in others]
    if loose:
        raise LskdError(f"image {loose[0]} lies outside of any class; move it into the folder of its class")
    return classes


def _sizes(paths: Sequence[Path]) -> tuple[int, int, bool]:
    """Return median width and height, and whether all are grey, of images spread over the whole."""
    from PIL import Image

    check_images(paths)
    count = min(_LOOKED_AT, len(paths))
    widths, heights, modes = [], [], set()
    for path in (paths[number * len(paths) // count] for number in range(count)):
        with Image.open(path) as image:
            widths.append(image.width)
            heights.append(image.height)
            modes.add(image.mode)
    return round(statistics.median(widths)), round(statistics.median(heights)), modes <= {"1", "L"}
