"""scikit-learn's handwritten digits (1,797 real 8 x 8 scans) as an image folder with a fixed split."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lskd import LskdError
from lskd_study.extras import needs_study_extra

MANIFEST = "manifest.json"
SOURCE = "sklearn.datasets.load_digits (UCI, Optical Recognition of Handwritten Digits, test part)"


def prepare_digits(output: Path) -> tuple[dict[str, Any], bool]:
    """Write the digits to ``output`` unless they are there; return the manifest and whether it was written.

    Every third image of a class (in the order of the data set) is validation: 1,201 training and 596
    validation images, 8-bit grey PNG at their own 8 x 8 size, named by their index in the data set. The
    folder appears whole or not at all.

    Raises:
        LskdError: for an output that cannot be written or that holds something else.
    """
    finished = _finished_manifest(output)
    if finished is not None:
        return finished, False
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LskdError(f"{output} exists and is not this data set; choose another --output or remove it")
    with needs_study_extra():
        from sklearn.datasets import load_digits
    digits = load_digits()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise LskdError(f"cannot write {output} ({error.strerror}); choose another --output") from error
    try:
        scratch.chmod(0o755)
        manifest = _write(scratch, digits.images, digits.target.tolist())
        if output.is_dir():
            output.rmdir()
        os.replace(scratch, output)
    except OSError as error:
        raise LskdError(f"cannot write {output} ({error.strerror}); choose another --output") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest, True


def listing_checksum(folder: Path) -> str:
    """Return the sha256 of the sorted relative names and sizes of the files under ``train`` and ``val``."""
    digest = hashlib.sha256()
    for path in sorted(p for split in ("train", "val") for p in (folder / split).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _write(folder: Path, images: NDArray[np.float64], labels: list[int]) -> dict[str, Any]:
    from PIL import Image

    counts: dict[str, list[int]] = {"train": [0] * 10, "val": [0] * 10}
    seen = [0] * 10
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "val" if seen[label] % 3 == 2 else "train"
        seen[label] += 1
        counts[split][label] += 1
        target = folder / split / str(label)
        target.mkdir(parents=True, exist_ok=True)
        grey = (image * (255 / 16)).round().astype("uint8")
        Image.fromarray(grey).save(target / f"{index:04d}.png")
    manifest = {
        "name": "digits",
        "source": SOURCE,
        "num_classes": 10,
        "split": "every third image of a class, in the order of the data set, is validation",
        "images": {split: sum(values) for split, values in counts.items()},
        "images_per_class": counts,
        "listing_sha256": listing_checksum(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _finished_manifest(output: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("name") != "digits":
        return None
    return manifest if manifest.get("listing_sha256") == listing_checksum(output) else None
