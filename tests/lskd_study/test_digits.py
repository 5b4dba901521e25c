import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lskd import LskdError
from lskd_study.data.folders.layout import listing_checksum
from lskd_study.data.manifest import MANIFEST, read_manifest
from lskd_study.data.published.small import prepare_digits

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("data") / "deep" / "digits"
    assert prepare_digits(target).written
    return target


def test_every_digit_is_there_once_with_its_own_pixels(folder):
    digits = load_digits()
    found = {}
    for path in folder.glob("*/*/*.png"):
        found[int(path.stem)] = (path.parent.name, np.asarray(Image.open(path)))
    assert sorted(found) == list(range(1797))
    for index, (label, pixels) in found.items():
        assert int(label) == digits.target[index]
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), digits.images[index])


def test_the_split_is_fixed_and_the_manifest_true(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    for split, count in (("train", 1201), ("val", 596)):
        assert len(list((folder / split).glob("*/*.png"))) == count == manifest["images"][split]
        for label, expected in enumerate(manifest["images_per_class"][split]):
            assert len(list((folder / split / str(label)).iterdir())) == expected
    assert manifest["listing_sha256"] == listing_checksum(folder)
    first_ten_zeros = [index for index, label in enumerate(load_digits().target) if label == 0][:9]
    in_val = {int(path.stem) for path in (folder / "val" / "0").iterdir()}
    assert [index in in_val for index in first_ten_zeros] == [False, False, True] * 3


def test_a_second_time_writes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not prepare_digits(folder).written
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_a_folder_that_lost_an_image_is_not_taken_for_whole(tmp_path):
    target = tmp_path / "digits"
    prepare_digits(target)
    next((target / "val" / "3").iterdir()).unlink()
    with pytest.raises(LskdError, match="is not this data set"):
        prepare_digits(target)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"listing_sha256": 1}', '{"images": []}', "\xff"])
def test_a_manifest_of_something_else_is_none(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    assert read_manifest(tmp_path) == {}
