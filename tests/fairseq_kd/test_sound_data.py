"""A data-bin whose files are damaged: one line that names the file, and never a place that is not there."""

import os
import shutil

import numpy as np
import pytest
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.translation import load_langpair_dataset

from lskd import LskdError

pytestmark = pytest.mark.integration
NAME = "train.de-en.en"


@pytest.fixture
def data_bin(corpus, tmp_path):
    return shutil.copytree(corpus.data, tmp_path / "bin")


def load(folder):
    words = [Dictionary.load(str(folder / f"dict.{language}.txt")) for language in ("de", "en")]
    return load_langpair_dataset(
        str(folder),
        "train",
        "de",
        words[0],
        "en",
        words[1],
        max_source_positions=1024,
        max_target_positions=1024,
        combine=False,
        dataset_impl=None,
        upsample_primary=1,
        left_pad_source=True,
        left_pad_target=False,
    )


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize(
    "place",
    [0, 9, 17, 20, 30, -5],  # name, version, kind, count, a length, a place
)
def test_a_byte_of_an_index(data_bin, place):
    flip(data_bin / f"{NAME}.idx", place)
    with pytest.raises(LskdError, match=rf"{NAME}.idx is (no index|damaged)"):
        load(data_bin)


@pytest.mark.parametrize("end", ["idx", "bin"])
@pytest.mark.parametrize("left", [0, 7, 25, -1])
def test_a_file_that_is_cut(data_bin, end, left):
    path = data_bin / f"{NAME}.{end}"
    os.truncate(path, left % path.stat().st_size)
    with pytest.raises(LskdError, match=rf"{NAME}.{end} (is no index|has [\d,]+ bytes, and by its index)"):
        load(data_bin)


@pytest.mark.parametrize("end", ["idx", "bin"])
def test_a_file_that_is_cut_while_it_is_read(data_bin, end):
    pairs = load(data_bin)
    assert len(pairs[0]["target"])
    os.truncate(data_bin / f"{NAME}.{end}", 10)
    with pytest.raises(LskdError, match=rf"{NAME}.{end} was cut while it was read"):
        pairs[1]


@pytest.mark.parametrize("put", [None, b"short"])
def test_one_that_is_removed_or_replaced_while_it_is_read_stays(data_bin, put):
    pairs = load(data_bin)
    path = data_bin / f"{NAME}.bin"
    path.unlink()
    if put is not None:
        path.with_suffix(".new").write_bytes(put)
        path.with_suffix(".new").rename(path)
    assert len(pairs[1]["target"])


def test_without_its_other_half_an_index_is_not_accused(data_bin):
    (data_bin / f"{NAME}.bin").unlink()
    assert indexed_dataset.infer_dataset_impl(str(data_bin / NAME)) is None


def test_a_word_that_the_dictionary_has_not(data_bin):
    path = data_bin / f"{NAME}.bin"
    words = np.fromfile(path, np.uint16)
    words[0] = 60_000
    words.tofile(path)
    pairs = load(data_bin)
    with pytest.raises(
        LskdError, match=rf"sentence 0 of .*{NAME}.bin has words that its dictionary of \d+ has"
    ):
        pairs.collater([pairs[1], pairs[0]])
