"""Small images in the place of every data set, and what docs/recipes.md says that a recipe costs.

GPU-hours are an estimate: operations of student and teacher times images and epochs. A backward pass costs
two forward passes; data come in time.
"""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lskd_study.data.expected import PUBLISHED, numbers

ROOT = Path(__file__).parents[2]
# Operations in a second of an H100 that trains a ResNet-50 in mixed precision: 2,790 images a second
# (published), of 3 x 8.18 GFLOPs each.
SUSTAINED = 68.5e12


# Of what is in a recipe's data folder when it is the real one, by the folder's name: as published (Places-LT
# as it is now, errata E25) or as `lskd data` makes it.
DATA_SETS = {name.replace("-", "_"): published.numbers[0] for name, published in PUBLISHED.items()} | {
    "imagenet_100": numbers(128_117, 5_000, 100),
    "imagenet_500": numbers(640_584, 25_000, 500),
    "digits": numbers(1_201, 596, 10),
    "fashion_mnist_10000": numbers(10_000, 10_000, 10),
    "fashion_mnist_noise": numbers(10_000, 10_000, 10),
    "fashion_mnist_lt": numbers(10_165, 10_000, 10),
    "fashion_mnist_5": numbers(5_000, 5_000, 5),
    "fashion_mnist_3": numbers(3_000, 3_000, 3),
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
