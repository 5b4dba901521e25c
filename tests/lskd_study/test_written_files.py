"""What commands write: with the user's umask, files and folders alike, whole, and nothing else beside it."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lskd import LskdError, SoftLabelsWriter
from lskd.base import files
from lskd.soft_labels.format import SoftLabelsLayout
from lskd_study.data.published.small import prepare_digits
from lskd_study.data.text.number_words import prepare_number_words
from lskd_study.drawing.style import Drawing, write_drawing
from lskd_study.teachers.outputs import Outputs, write_outputs

pytestmark = pytest.mark.unit


def outputs(folder: Path) -> None:
    torch.manual_seed(0)
    write_outputs(Outputs("x", torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), folder / "x.safetensors")


def packed(folder: Path) -> None:
    module = pytest.importorskip("mmcls_bnn.binary.packed", reason="mmcls is not installed")
    torch.manual_seed(0)
    module.save_packed(torch.nn.Linear(2, 2), {}, folder / "x.safetensors")


def curves(folder: Path) -> None:
    module = pytest.importorskip("mmcls_bnn.distil.curves", reason="mmcls is not installed")
    module._write(folder / "epochs.csv", {1: dict.fromkeys(module.COLUMNS[1:], "1")}, "epoch")


def soft_labels(folder: Path) -> None:
    with SoftLabelsWriter(folder / "labels", SoftLabelsLayout(3, 3, 2, 1, 1, "float32", True), {}) as writer:
        ids = np.tile(np.arange(3), (2, 1))
        writer.append(np.zeros((2, 3), np.float32), ids, seeds=np.zeros(2, np.uint32))
        writer.commit()


WRITERS: dict[str, Callable[[Path], object]] = {
    "a data set of images": lambda folder: prepare_digits(folder / "digits"),
    "a data set of text": lambda folder: prepare_number_words(folder / "words", 30, 3, 2, bpe_tokens=0),
    "a figure": lambda folder: write_drawing(Drawing(Figure(), {"": "a,b\n"}), folder / "figure"),
    "outputs": outputs,
    "packed weights": packed,
    "soft labels": soft_labels,
    "curves": curves,
}


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_has_the_users_umask(tmp_path: Path, umask: int, name: str) -> None:
    folder = tmp_path / "new"
    WRITERS[name](folder)
    written = [folder, *folder.rglob("*")]
    assert any(path.is_file() for path in written)
    for path in written:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~umask, path
        assert not path.name.startswith(".") or path.name == ".lock", path


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith(("a data set", "soft"))])
def test_a_write_that_fails_leaves_nothing_and_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    WRITERS[name](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_to_disk", full)
    with pytest.raises(LskdError, match="the disk is full") as caught:
        WRITERS[name](tmp_path)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
