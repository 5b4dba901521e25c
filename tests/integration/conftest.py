"""Data that several tests of real commands train on."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """96 training and 48 validation images of 8 x 8, grey, of four classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    root = tmp_path_factory.mktemp("digits")
    for label in range(4):
        for i, index in enumerate(np.flatnonzero(data.target == label)[:36]):
            folder = root / ("val" if i % 3 == 0 else "train") / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((data.images[index] * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return root
