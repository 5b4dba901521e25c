"""Fashion-MNIST as an image folder."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.base.extras import needs_study_extra
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.archives import find_source, fingerprints
from lskd_study.data.folders.layout import Fill, Tree, build

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_LIMIT = 256 << 20  # bytes; the largest of the four has 47 MB
_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def prepare_fashion_mnist(
    source: Path, output: Path, *, expected: Numbers | None = None
) -> tuple[dict[str, Any], bool]:
    """Write Fashion-MNIST as 28 x 28 grey PNG, the publisher's test images as ``val``.

    torchvision reads the four files. Classes are ``0`` to ``9``; the manifest has their names. An image is
    named by its place in the publisher's file.

    Args:
        source: folder with the four idx files, ``.gz`` or not.
        output: folder to write.
        expected: numbers of images instead of the published ones.

    Raises:
        LskdError: for files that are missing, damaged or not whole, or an output that cannot be written.
    """

    files = [find_source(source, (f"{name}.gz", name), "fashion-mnist") for name in _FILES]

    def plan() -> Fill:
        splits, names = _read(source, files)
        found = {split: len(labels) for split, (_, labels) in splits.items()}
        classes = {int(label) for _, labels in splits.values() for label in labels}
        check_numbers("fashion-mnist", found | {"classes": len(classes)}, expected)

        def fill(tree: Tree) -> dict[str, Any]:
            with needs_study_extra():
                from PIL import Image
                from tqdm import tqdm
            for split, (images, labels) in splits.items():
                pairs = zip(images.numpy(), labels.tolist(), strict=True)
                for index, (image, label) in enumerate(
                    tqdm(pairs, desc=split, total=len(labels), unit=" images", leave=False, disable=None)
                ):
                    content = io.BytesIO()
                    Image.fromarray(image).save(content, "PNG")
                    tree.add_bytes(split, str(label), f"{index:05d}.png", content.getvalue())
            return {"class_names": names}

        return fill

    sources = fingerprints(files)
    return build(output, "fashion-mnist", origin("fashion-mnist", expected), plan, sources=sources)


def _read(source: Path, files: Sequence[Path]) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    with needs_study_extra():
        from torchvision.datasets import FashionMNIST
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, file in zip(_FILES, files, strict=True):
            (raw / name).write_bytes(read_bytes(file, _LIMIT, "one of the four files", "get it again"))
        try:
            parts = {
                split: FashionMNIST(scratch, train=split == "train", download=False)
                for split in ("train", "val")
            }
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, KeyError) as error:
            raise LskdError(
                f"{source} does not hold the four files of Fashion-MNIST as published "
                f"({str(error) or type(error).__name__}); get them from {PUBLISHED['fashion-mnist'].get}"
            ) from None
    for split, part in parts.items():
        if len(part.data) != len(part.targets):
            raise LskdError(f"{source}: {len(part.data):,} {split} images have {len(part.targets):,} labels")
    return {split: (part.data, part.targets) for split, part in parts.items()}, list(FashionMNIST.classes)
