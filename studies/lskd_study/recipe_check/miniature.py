"""Miniatures of the data sets: every class folder of the real one, an image or two in each."""

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lskd_study.base.extras import needs_study_extra

with needs_study_extra():
    from PIL import Image

SPLITS = ("train", "val")
FASHION = "raw"  # data/FashionMNIST/raw
_POOL = 4  # different images; every class has a link to one of them


@dataclass(frozen=True)
class DataSet:
    """What a recipe's data folder holds when it is the real one.

    Attributes:
        classes: number of classes, which a recipe must state.
        train: number of training images, for the estimate of cost.
        validation: number of validation images.
        name: class folder number i, a format of i and of i + 1.
        size: width and height of the miniature's images.
        mode: ``"RGB"`` or ``"L"``; RGB sets have a grey image too, as CUB-200-2011 has eight.
    """

    classes: int
    train: int
    validation: int
    name: str = "{0:04d}"
    size: tuple[int, int] = (64, 48)
    mode: str = "RGB"


_WORDNET = "n{0:08d}"
# By the folder's name; numbers as in Table 5 and Appendix A, Places-LT as it is published now (errata E25).
DATA_SETS = {
    "imagenet": DataSet(1000, 1_281_167, 50_000, _WORDNET),
    "imagenet_100": DataSet(100, 128_117, 5_000, _WORDNET),
    "imagenet_500": DataSet(500, 640_584, 25_000, _WORDNET),
    "imagenet_lt": DataSet(1000, 115_846, 20_000, _WORDNET),
    "cub200": DataSet(200, 5_994, 5_794, "{1:03d}.Bird_{1}"),
    "imaterialist": DataSet(2019, 1_011_532, 10_095),
    "inat2019": DataSet(1010, 265_213, 3_030),
    "places_lt": DataSet(365, 62_500, 7_300, "{0:03d}"),
    "digits": DataSet(10, 1_201, 596, "{0}", (8, 8), "L"),
    FASHION: DataSet(10, 6_000, 2_000),
}


def data_set(path: str, num_classes: int) -> DataSet:
    """Return the data set of that folder; one unknown by name has the recipe's classes, 1,000 images each."""
    known = DATA_SETS.get(Path(path).name)
    return known or DataSet(num_classes, 1000 * num_classes, 50 * num_classes)


def write_miniature(folder: Path, data: DataSet) -> None:
    """Write a data set's layout, ``train/<class>/`` and ``val/<class>/``, with one image in each class."""
    pool = folder / ".pool"
    pool.mkdir(parents=True)
    suffix = "png" if data.mode == "L" else "jpg"
    rng = random.Random(0)
    images = []
    for number in range(_POOL):
        pixels = bytes(rng.randrange(256) for _ in range(3 * data.size[0] * data.size[1]))
        image = Image.frombytes("RGB", data.size, pixels)
        images.append(pool / f"{number}.{suffix}")
        (image.convert("L") if data.mode == "L" or not number else image).save(images[-1])
    for split in SPLITS:
        for number in range(data.classes):
            target = folder / split / data.name.format(number, number + 1)
            target.mkdir(parents=True)
            _link(images[number % _POOL], target / f"{number:04d}.{suffix}")
    shutil.rmtree(pool)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def write_fashion(folder: Path) -> None:
    """Write Fashion-MNIST's four files with as many images as the recipes use, all noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    data = DATA_SETS[FASHION]
    for split, count in (("train", data.train), ("t10k", data.validation)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % data.classes).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
