"""The manifest of stored soft labels: what they are, and how far they got."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lskd.base.files import read_json, write_text
from lskd.errors import LskdError, SoftLabelsError
from lskd.soft_labels.blocks import DIGEST_BYTES, EMPTY, Committed

MANIFEST = "manifest.json"
FORMAT, VERSION = "lskd soft labels", 1
BLOCK_BYTES = 1 << 18
_DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_DEEPEST = 32  # of identities, whose parts are compared one by one

ValueDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class SoftLabelsLayout:
    """What a row of stored soft labels contains, and how many there will be.

    Attributes:
        num_classes: classes, or entries of the vocabulary.
        k: classes kept of each distribution.
        samples: samples in the data.
        epochs: how often each sample is stored. A sample's key is ``epoch * samples + sample``.
        rows_per_sample: 1 where every sample is one row (an image); None where each has its own number (a
            sentence: one row per target token).
        values: how the log-probabilities are stored.
        seeds: whether a row has the 32-bit seed that replays its sample's augmentation.

    Raises:
        SoftLabelsError: for numbers that fit nothing.
    """

    num_classes: int
    k: int
    samples: int
    epochs: int = 1
    rows_per_sample: int | None = None
    values: ValueDtype = "float16"
    seeds: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.k <= self.num_classes:
            raise SoftLabelsError(
                f"top-K must be 1 to {self.num_classes}, the number of classes; got {self.k}"
            )
        if self.samples < 0 or self.epochs < 1 or (self.rows_per_sample or 1) < 1:
            raise SoftLabelsError("soft labels need samples >= 0, epochs >= 1 and rows_per_sample >= 1")
        if self.values not in ("float16", "float32"):
            raise SoftLabelsError(f"values are stored as float16 or float32, not as {self.values}")

    @property
    def keys(self) -> int:
        """How many keys there are: every sample in every epoch."""
        return self.samples * self.epochs

    @property
    def row(self) -> np.dtype[Any]:
        """One row as it lies on the disk: ``4 + 4 * k`` bytes with seeds, float16, up to 65,536 classes."""
        value, class_id = np.dtype(self.values), "<u2" if self.num_classes <= 1 << 16 else "<u4"
        fields = [("values", value.newbyteorder("<"), (self.k,)), ("ids", class_id, (self.k,))]
        return np.dtype(([("seed", "<u4")] if self.seeds else []) + fields)


@dataclass(frozen=True)
class Manifest:
    """Layout, identity and progress of stored soft labels.

    Attributes:
        layout: what a row is.
        identity: what they were made of: teacher, data, augmentation, versions. Plain JSON.
        keys: keys that are complete.
        rows: rows that belong to them.
        files: how far each file counts.
        block_bytes: bytes under one checksum.
    """

    layout: SoftLabelsLayout
    identity: Mapping[str, Any]
    keys: int = 0
    rows: int = 0
    files: Mapping[str, Committed] = field(default_factory=lambda: {"rows": EMPTY, "index": EMPTY})
    block_bytes: int = BLOCK_BYTES

    @property
    def complete(self) -> bool:
        """Whether every key is there."""
        return self.keys == self.layout.keys

    def write(self, folder: Path) -> None:
        """Replace the manifest in one step.

        Raises:
            LskdError: the folder cannot be written, or the disk is full.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "layout": asdict(self.layout),
            "identity": json.loads(json.dumps(self.identity)),
            "written": {"keys": self.keys, "rows": self.rows, "complete": self.complete},
            "files": {name: asdict(committed) for name, committed in self.files.items()},
            "block_bytes": self.block_bytes,
        }
        content["checksum"] = _checksum(content)
        write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in ``folder``.

    Raises:
        SoftLabelsError: it is missing, altered, or of a version that this release cannot read.
    """
    path, content = folder / MANIFEST, read_content(folder)
    if content.get("version") != VERSION:
        raise SoftLabelsError(
            f"{path} has version {_short(content.get('version'))} of the format, this release reads "
            f"{VERSION}; write the soft labels again or use the release that wrote them"
        )
    checksum = content.pop("checksum", None)
    try:
        if checksum != _checksum(content):
            raise ValueError("altered")
        return _checked(content)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SoftLabelsError):
        raise _damaged(path) from None


def read_content(folder: Path) -> dict[str, Any]:
    """Return what the manifest in ``folder`` says.

    Raises:
        SoftLabelsError: it is missing, or no manifest of soft labels.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except LskdError as error:
        if isinstance(error.__cause__, OSError):
            raise SoftLabelsError(
                f"{folder} contains no soft labels ({MANIFEST}: {error.__cause__.strerror}); "
                "check the path or write them"
            ) from None
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SoftLabelsError(f"{path} is no manifest of soft labels; check the path")
    return content


def _checked(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest that a content describes; one made by hand may have any type and size anywhere.

    Raises:
        Exception: of the kinds that `read_manifest` knows.
    """
    layout, written = SoftLabelsLayout(**content["layout"]), content["written"]
    per_sample = layout.rows_per_sample
    for number in (layout.num_classes, layout.k, layout.epochs, 1 if per_sample is None else per_sample):
        _require(_whole(number, 1 << 27) > 0)
    _whole(layout.samples, 1 << 40)
    _require(type(layout.seeds) is bool)
    keys, rows = _whole(written["keys"], layout.keys), _whole(written["rows"], 1 << 48)
    _require(per_sample is None or rows == keys * per_sample)
    files = {name: Committed(**content["files"][name]) for name in ("rows", "index")}
    _require(files["rows"].bytes == rows * layout.row.itemsize)
    _require(files["index"].bytes == (8 * keys if per_sample is None else 0))
    _require(all(_DIGEST.fullmatch(part) for file in files.values() for part in (file.sums, file.tail)))
    block_bytes, identity = _whole(content["block_bytes"], 1 << 30), content["identity"]
    _require(block_bytes > 0 and isinstance(identity, dict) and _depth(identity) <= _DEEPEST)
    return Manifest(layout, identity, keys=keys, rows=rows, files=files, block_bytes=block_bytes)


def _whole(value: Any, most: int) -> int:
    _require(type(value) is int and 0 <= value <= most)
    return int(value)


def _require(sound: bool) -> None:
    if not sound:
        raise ValueError("forged")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def check_identity(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare what soft labels were made of with what a run has; only what ``expected`` names counts.

    Raises:
        SoftLabelsError: with the first difference.
    """
    found = _flat(found)
    for name, value in _flat(expected).items():
        if (there := found.get(name)) != value:
            raise SoftLabelsError(
                f"the soft labels in {folder} do not belong to this run: {name} is {_short(there)} there and "
                f"{_short(value)} here; write them for this one (another folder)"
            )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(content)).items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= 40 else text[:16] + "..."


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path) -> SoftLabelsError:
    return SoftLabelsError(f"{path} is damaged; remove the folder and write the soft labels again")
