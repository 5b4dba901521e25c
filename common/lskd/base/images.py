"""Folders of images: what in them is an image, the same for all who look, and what is wrong with one.

Pillow, which every trainer of images brings, is needed where an image is opened.
"""

import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lskd.errors import LskdError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"})  # what timm's reader takes, in lower case
MOST_DECODED = 2_000
MOST_OPENED = 20_000
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # with what begins with a dot
_NAMED = 3


def passed_over(name: str) -> bool:
    """Return whether a file or folder is no part of a data set: hidden, or left by a file manager.

    >>> [passed_over(name) for name in ("cat", "._cat.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db")]
    [False, True, True, True, True]
    """
    return name.startswith(".") or name.lower() in _LITTER


def is_image(name: str, extensions: Collection[str] = EXTENSIONS) -> bool:
    """Return whether a file is an image of a data set, by its name."""
    return os.path.splitext(name)[1].lower() in extensions and not passed_over(name)


def class_folders(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders in a folder, one for each class.

    Raises:
        OSError: it cannot be read.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not passed_over(entry.name))


def class_images(folder: str | Path, extensions: Collection[str] = EXTENSIONS) -> tuple[list[str], list[str]]:
    """Return the sorted names of the images in a class folder, and of the other files.

    Raises:
        LskdError: for a folder in it, which timm would take for a class, and mmcls for more of this one.
        OSError: it cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if passed_over(entry.name):
                continue
            if entry.is_dir():
                raise LskdError(
                    f"class folder {folder} has a folder in it, {entry.name}; it must contain images only"
                )
            (images if is_image(entry.name, extensions) else others).append(entry.name)
    return sorted(images), sorted(others)


def check_images(paths: Sequence[Path]) -> None:
    """Decode up to 2,000 images and open up to 20,000, evenly spread; raise one error about all.

    Raises:
        LskdError: one line with the number of bad images and the first of them.
    """
    decoded = set(_spread(paths, MOST_DECODED))

    def look(path: Path, image: "Image") -> str:
        if path in decoded:
            image.load()
        return ""

    _look_into(sorted(decoded | set(_spread(paths, MOST_OPENED))), look)


def pixel_checksums(paths: Sequence[Path]) -> list[str]:
    """Decode all images and return the sha256 of each one's size and pixels, in RGB as trainers see them."""

    def checksum(path: Path, image: "Image") -> str:
        seen = image if image.mode == "RGB" else image.convert("RGB")
        return hashlib.sha256(f"{seen.width} ".encode() + seen.tobytes()).hexdigest()

    return _look_into(paths, checksum)


def _look_into(paths: Sequence[Path], look: Callable[[Path, "Image"], str]) -> list[str]:
    """Open images, refuse bad ones in one error about all, and return what ``look`` says of each."""
    from PIL import Image

    def one(path: Path) -> tuple[str, str]:
        try:
            with Image.open(path) as image:
                problem = unsuited(image)
                return "" if problem else look(path, image), problem
        except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
            return "", f"cannot be read ({' '.join(str(error).split())}); repair or remove it"

    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see unsuited
        found = list(pool.map(one, paths))
    bad = [(path, problem) for path, (_, problem) in zip(paths, found, strict=True) if problem]
    if len(bad) == 1:
        raise LskdError(f"image {bad[0][0]} {bad[0][1]}")
    if bad:
        named = ", ".join(str(path) for path, _ in bad[1:_NAMED])
        more = " ..." if len(bad) > _NAMED else ""
        raise LskdError(
            f"{len(bad):,} of {len(paths):,} images looked at cannot be used: {bad[0][0]} {bad[0][1]}; "
            f"also {named}{more}"
        )
    return [seen for seen, _ in found]


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    count = min(most, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def unsuited(image: "Image") -> str:
    """Return why an opened image would silently become another one in 8 bits, or would fill the memory.

    Pillow keeps 0 to 255 of grey values with 16 or 32 bits, so that whole pictures turn white. How they are
    to be scaled, by the largest possible value or by the largest that occurs, only their owner knows.

    Returns:
        What to say after the file's name; empty: nothing is wrong.
    """
    from PIL import Image

    if image.mode.partition(";")[0] in ("I", "F"):
        return (
            f"has grey values of more than 8 bits (mode {image.mode}), of which only 0 to 255 would be seen; "
            "convert it to 8 bits"
        )
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        return f"has {image.width} x {image.height} pixels, more than {most:,}; make it smaller or remove it"
    return ""
