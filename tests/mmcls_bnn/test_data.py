"""Data sets: what they read, and what they refuse in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from image_folders import write_digits
from lskd import LskdError, smooth_targets
from lskd.errors import loading_error
from mmcls_bnn import data
from mmcls_bnn.compat import MODELS, register_all_modules
from mmcls_bnn.data import CheckedImageFolder
from mmcls_bnn.losses import SmoothedCrossEntropy

pytestmark = pytest.mark.unit


def test_folder_is_checked(digits, tmp_path):
    folder = CheckedImageFolder(str(digits), "val", num_classes=4)
    assert len(folder) == 48
    with pytest.raises(LskdError, match="nowhere/train does not exist; make it so"):
        CheckedImageFolder("nowhere", "train", num_classes=4, hint="make it so")
    with pytest.raises(LskdError, match="has 4 class folders, the recipe 10 classes"):
        CheckedImageFolder(str(digits), "val", num_classes=10)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(LskdError, match="has no images"):
        CheckedImageFolder(str(tmp_path), "train", num_classes=1)


def test_an_image_that_vanishes_or_rots_after_the_folder_was_checked(tmp_path):
    """One line names it, also where another process loads it."""
    write_digits(tmp_path)
    register_all_modules()
    pipeline = [{"type": "LoadImageFromFile"}]
    folder = CheckedImageFolder(str(tmp_path), "val", num_classes=4, pipeline=pipeline)
    image = Path(folder.get_data_info(1)["img_path"])
    image.write_bytes(image.read_bytes()[:20])
    with pytest.raises(LskdError, match=rf"{image} cannot be read"):
        folder[1]
    image.unlink()
    with pytest.raises(LskdError, match="Caught LskdError in DataLoader worker") as wrapped:
        list(DataLoader(folder, num_workers=1, collate_fn=list))
    assert str(loading_error(wrapped.value)).startswith(f"image {image} cannot be read ([Errno 2]")


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_smoothed_cross_entropy_in_both_conventions(convention):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7).double(), torch.tensor([0, 6, 3, 3, 2])
    found = SmoothedCrossEntropy(0.1, convention)(logits.float(), labels, avg_factor=5)
    rows = smooth_targets(labels, 7, 0.1, convention).double()
    assert found.item() == pytest.approx(-(rows * logits.log_softmax(-1)).sum().item() / 5, rel=1e-6)
    if convention == "uniform":
        torchs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        assert found.item() == pytest.approx(torchs.item(), rel=1e-6)


@pytest.mark.parametrize("weight", [1, 0.7])
@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_one_hot_and_mixed_labels_are_smoothed_too(convention, weight):
    """As mmcls' own loss does, which has "uniform" alone."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7).double(), torch.tensor([0, 6, 3, 3, 2])
    rows = torch.nn.functional.one_hot(labels, 7)  # whole numbers, as mmcls makes them
    if weight < 1:
        rows = weight * rows + (1 - weight) * rows.flip(0)
    found = SmoothedCrossEntropy(0.3, convention)(logits.float(), rows)
    if convention == "uniform":
        expected = MODELS.build({"type": "LabelSmoothLoss", "label_smooth_val": 0.3})(logits, rows)
    else:  # Eq. 1
        smoothed = 0.7 * rows + 0.3 / 6 * (1 - rows)
        expected = -(smoothed * logits.log_softmax(-1)).sum() / 5
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
def test_deep_grey_images_are_refused_and_not_clipped(tmp_path, monkeypatch, backend):
    """Found when the folder is listed, or when one that was not looked at is loaded."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(folder / "deep.png")
    with pytest.raises(LskdError, match=r"deep.png has grey values of more than 8 bits"):
        CheckedImageFolder(str(tmp_path), "train", num_classes=1)
    monkeypatch.setattr(data, "check_images", lambda paths: None)
    register_all_modules()
    pipeline = [{"type": "LoadImageFromFile", "imdecode_backend": backend}]
    images = CheckedImageFolder(str(tmp_path), "train", num_classes=1, pipeline=pipeline)
    with pytest.raises(LskdError, match=r"deep.png has grey values of more than 8 bits"):
        images[0]
