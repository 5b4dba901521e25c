"""Small images in the place of every data set, and what docs/recipes.md says that a recipe costs.

GPU-hours are an estimate: operations of student and teacher times images and epochs. A backward pass costs
two forward passes; data come in time.
"""

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
# Operations in a second of an H100 that trains a ResNet-50 in mixed precision: 2,790 images a second
# (published), of 3 x 8.18 GFLOPs each.
SUSTAINED = 68.5e12


@dataclass(frozen=True)
class DataSet:
    """What a recipe's data folder contains when it is the real one."""

    classes: int
    train: int
    validation: int


# By the folder's name; numbers as in Table 5 and Appendix A, Places-LT as it is published now (errata E25).
DATA_SETS = {
    "imagenet": DataSet(1000, 1_281_167, 50_000),
    "imagenet_100": DataSet(100, 128_117, 5_000),
    "imagenet_500": DataSet(500, 640_584, 25_000),
    "imagenet_lt": DataSet(1000, 115_846, 20_000),
    "cub200": DataSet(200, 5_994, 5_794),
    "imaterialist": DataSet(2019, 1_011_532, 10_095),
    "inat2019": DataSet(1010, 265_213, 3_030),
    "places_lt": DataSet(365, 62_500, 7_300),
    "digits": DataSet(10, 1_201, 596),
    "raw": DataSet(10, 6_000, 2_000),  # data/FashionMNIST/raw
}


class Costs:
    """The recipes' data sets and GPU-hours."""

    data_sets = DATA_SETS

    def __init__(self) -> None:
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| ([\w/]+) \|.*\| ([^|]+) \|$", page, re.MULTILINE)
        self.documented = {name: hours for name, hours in rows if name != "recipe"}

    @staticmethod
    def hours(
        epochs: int,
        images: int,
        validation: int,
        student: float,
        teacher: float = 0.0,
        backward: float = 2.0,
        sustained: float = SUSTAINED,
    ) -> float:
        """Return the hours of one training; ``student`` and ``teacher``: operations of a forward pass."""
        training = images * ((1 + backward) * student + teacher)
        return epochs * (training + validation * student) / sustained / 3600

    def check(self, recipe: str, hours: float) -> None:
        """Compare with what the page says."""
        text = "< 0.03" if hours < 0.025 else f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"
        assert self.documented[recipe] == text


@pytest.fixture(scope="session")
def costs() -> Costs:
    return Costs()


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """Make an image in each class of two splits; some are grey, as eight in CUB-200-2011 are."""
    made: dict[int, Path] = {}

    def make(classes: int) -> Path:
        if classes not in made:
            made[classes] = root = tmp_path_factory.mktemp(f"images{classes}")
            rng = np.random.default_rng(0)
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / "colour.jpg")
            Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)).save(root / "grey.jpg")
            for split, number in product(("train", "val"), range(classes)):
                folder = root / split / f"{number:04d}"
                folder.mkdir(parents=True)
                (folder / "0.jpg").hardlink_to(root / ("grey.jpg" if number % 2 else "colour.jpg"))
        return made[classes]

    return make
