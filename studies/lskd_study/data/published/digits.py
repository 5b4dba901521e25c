"""scikit-learn's handwritten digits (1,797 real 8 x 8 scans) as an image folder with a fixed split."""

import io
from pathlib import Path
from typing import Any

from lskd_study.base.extras import needs_study_extra
from lskd_study.data.folders.layout import Fill, Tree, build, listing_checksum

__all__ = ["listing_checksum", "prepare_digits"]

SOURCE = "sklearn.datasets.load_digits (UCI, Optical Recognition of Handwritten Digits, test part)"


def prepare_digits(output: Path) -> tuple[dict[str, Any], bool]:
    """Write the digits to ``output`` unless they are there; return the manifest and whether it was written.

    Every third image of a class (in the order of the data set) is validation: 1,201 training and 596
    validation images, 8-bit grey PNG at their own 8 x 8 size, named by their index in the data set. The
    folder appears whole or not at all.

    Raises:
        LskdError: for an output that cannot be written or that holds something else.
    """
    return build(output, "digits", {}, _plan)


def _plan() -> Fill:
    with needs_study_extra():
        from sklearn.datasets import load_digits
    digits = load_digits()

    def fill(tree: Tree) -> dict[str, Any]:
        from PIL import Image

        seen = [0] * 10
        for index, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            split = "val" if seen[label] % 3 == 2 else "train"
            seen[label] += 1
            content = io.BytesIO()
            Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(content, "PNG")
            tree.add_bytes(split, str(label), f"{index:04d}.png", content.getvalue())
        return {
            "source": SOURCE,
            "split": "every third image of a class, in the order of the data set, is validation",
        }

    return fill
