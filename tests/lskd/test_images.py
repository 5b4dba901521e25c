"""Folders of images: one rule for what is in them, and bad images reported at once."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lskd import LskdError
from lskd.base.images import check_images, class_folders, class_images, unsuited

pytestmark = pytest.mark.unit

WIDE = {
    "I;16": ("PNG", np.uint16),
    "I;16B": ("TIFF", np.dtype(">u2")),
    "I": ("TIFF", np.int32),
    "F": ("TIFF", np.float32),
}


def deep(mode: str) -> bytes:
    """A grey picture whose brightest value, 4,095, is far above 255."""
    form, dtype = WIDE[mode]
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 64).reshape(8, 8).astype(dtype)).save(content, form)
    return content.getvalue()


def huge() -> bytes:
    """A PNG of 100 bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", WIDE)
def test_grey_values_of_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path, mode: str) -> None:
    (tmp_path / "x.png").write_bytes(deep(mode))
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode
        assert unsuited(image).startswith("has grey values of more than 8 bits")
    with pytest.raises(LskdError, match=r"x.png has grey values of more than 8 bits .* convert it to 8 bits"):
        check_images([tmp_path / "x.png"])


def test_what_pillow_scales_or_converts_itself_is_taken(tmp_path: Path) -> None:
    """16 bits of colour become 8 by their upper half; palettes, transparency and CMYK are converted."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    check_images(sorted(tmp_path.iterdir()))


def test_too_many_pixels_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huge.png").write_bytes(huge())
    with pytest.raises(LskdError, match=r"huge.png cannot be read \(Image size"):
        check_images([tmp_path / "huge.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(LskdError, match="has 4 x 4 pixels, more than 10"):
        check_images([tmp_path / "a.png"])


def test_bad_images_are_reported_together(tmp_path: Path) -> None:
    for number in range(9):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    for number in (2, 4, 5, 7):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG")
    with pytest.raises(LskdError) as caught:
        check_images(sorted(tmp_path.iterdir()))
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert message.startswith("4 of 9 images looked at cannot be used: 2.png cannot be read (")
    assert message.endswith("; also 4.png, 5.png ...")


def test_what_file_managers_and_notebooks_leave_is_no_class_and_no_image(tmp_path: Path) -> None:
    for name in ("cat", ".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    for name in ("1.png", "2.JPG", "._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (tmp_path / "cat" / name).touch()
    assert class_folders(tmp_path) == ["cat"]
    assert class_images(tmp_path / "cat") == (["1.png", "2.JPG"], ["notes.txt"])
    (tmp_path / "cat" / "more").mkdir()
    with pytest.raises(LskdError, match="has a folder in it, more"):
        class_images(tmp_path / "cat")
