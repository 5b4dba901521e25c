"""Small data sets that a machine may have already: scikit-learn's digits and Fashion-MNIST, as PNG images."""

import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Expect, Output
from lskd_study.data.expected import PUBLISHED, check_numbers, count, origin
from lskd_study.data.folders.archives import find_source, fingerprints
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import Image, Rows
from lskd_study.data.manifest import Made

_LIMIT = 256 << 20  # bytes; the largest of Fashion-MNIST's four files has 47 MB
_FASHION_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def prepare_digits(output: Output = Path("data/digits")) -> Made:
    """Write scikit-learn's 1,797 handwritten digits as PNG images, with a fixed split.

    Every third image of a class (in the order of the data set) is validation: 1,201 training and 596
    validation images, 8-bit grey at their own 8 x 8 size, named by their index in the data set.

    Raises:
        LskdError: for an output that cannot be written or contains something else.
    """

    def plan() -> Rows:
        from sklearn.datasets import load_digits

        digits = load_digits()

        def images() -> Iterator[Image]:
            seen: Counter[int] = Counter()
            for index, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
                split = "val" if seen[label] % 3 == 2 else "train"
                seen[label] += 1
                pixels = (image * (255 / 16)).round().astype("uint8")
                yield Image(split, str(label), f"{index:04d}.png", _png(pixels))

        more = {
            "source": "sklearn.datasets.load_digits "
            "(UCI, Optical Recognition of Handwritten Digits, test part)",
            "split": "every third image of a class, in the order of the data set, is validation",
        }
        return Rows(unpacked=images, more=more)

    return build(output, "digits", {}, plan)


def prepare_fashion_mnist(
    source: Annotated[
        Path, typer.Argument(help="Folder with the four idx files; Debian's package installs them there.")
    ] = Path("/usr/share/datasets/fashion-mnist"),
    output: Output = Path("data/fashion_mnist"),
    expect: Expect = None,
) -> Made:
    """Write Fashion-MNIST as PNG images from the publisher's four files.

    torchvision reads them, ``.gz`` or not. The publisher's test images are ``val``; classes are ``0`` to
    ``9``, the manifest has their names. An image is named by its place in the publisher's file.

    Raises:
        LskdError: for files that are missing, damaged or not whole, or an output that cannot be written.
    """
    files = [find_source(source, (f"{name}.gz", name), "fashion-mnist") for name in _FASHION_FILES]

    def plan() -> Rows:
        splits, names = _read_fashion(source, files)
        labels = {split: part.targets.tolist() for split, part in splits.items()}
        check_numbers(
            "fashion-mnist", count((split, str(k)) for split in splits for k in labels[split]), expect
        )

        def images() -> Iterator[Image]:
            from tqdm import tqdm

            for split, part in splits.items():
                bar = tqdm(labels[split], desc=split, unit=" images", leave=False, disable=None)
                for index, (label, image) in enumerate(zip(bar, part.data.numpy(), strict=True)):
                    yield Image(split, str(label), f"{index:05d}.png", _png(image))

        return Rows(unpacked=images, more={"class_names": names})

    sources = fingerprints(files)
    return build(output, "fashion-mnist", origin("fashion-mnist", expect), plan, sources=sources)


def _read_fashion(source: Path, files: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """Return torchvision's data sets by split, and the names of the classes."""
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, file in zip(_FASHION_FILES, files, strict=True):
            (raw / name).write_bytes(read_bytes(file, _LIMIT, "one of the four files", "get it again"))
        try:
            splits = {
                split: FashionMNIST(scratch, train=split == "train", download=False)
                for split in ("train", "val")
            }
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, KeyError) as error:
            raise LskdError(
                f"{source} does not contain the four files of Fashion-MNIST as published "
                f"({str(error) or type(error).__name__}); get them from {PUBLISHED['fashion-mnist'].get}"
            ) from None
    for split, part in splits.items():
        if len(part.data) != len(part.targets):
            raise LskdError(f"{source}: {len(part.data):,} {split} images have {len(part.targets):,} labels")
    return splits, list(FashionMNIST.classes)


def _png(pixels: Any) -> bytes:
    from PIL import Image as Pillow

    content = io.BytesIO()
    Pillow.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
