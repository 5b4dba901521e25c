"""The manifest of stored soft labels: what they are, and how far they got."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lskd._block_file import EMPTY, Committed
from lskd._errors import SoftLabelsError

MANIFEST = "manifest.json"
FORMAT, VERSION = "lskd soft labels", 1
BLOCK_BYTES = 1 << 18

ValueDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class SoftLabelsLayout:
    """What a row of stored soft labels holds, and how many there will be.

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
    def id_dtype(self) -> np.dtype[Any]:
        """Class ids: two bytes where they fit, four where not."""
        return np.dtype("<u2" if self.num_classes <= 1 << 16 else "<u4")

    @property
    def row(self) -> np.dtype[Any]:
        """One row as it lies on the disk: ``4 + 4 * k`` bytes with seeds, float16, up to 65,536 classes."""
        value = np.dtype("<f2" if self.values == "float16" else "<f4")
        fields = [("values", value, (self.k,)), ("ids", self.id_dtype, (self.k,))]
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
            OSError: the disk's own errors.
        """
        content = self._as_json()
        content["checksum"] = _checksum(content)
        scratch = folder / f".{MANIFEST}.new"
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, folder / MANIFEST)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def advanced(self, keys: int, rows: int, files: Mapping[str, Committed]) -> "Manifest":
        """Return the manifest further on."""
        return replace(self, keys=keys, rows=rows, files=files)

    def _as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "layout": asdict(self.layout),
            "identity": json.loads(json.dumps(self.identity)),
            "written": {"keys": self.keys, "rows": self.rows, "complete": self.complete},
            "files": {name: committed.as_json() for name, committed in self.files.items()},
            "block_bytes": self.block_bytes,
        }


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in ``folder``.

    Raises:
        SoftLabelsError: it is missing, altered, or of a version that this release cannot read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SoftLabelsError(
            f"{folder} holds no soft labels ({MANIFEST}: {error.strerror}); check the path or write them"
        ) from None
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SoftLabelsError(f"{path} is no manifest of soft labels; check the path")
    if content.get("version") != VERSION:
        raise SoftLabelsError(
            f"{path} has version {content.get('version')} of the format, this release reads {VERSION}; "
            "write the soft labels again or use the release that wrote them"
        )
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise _damaged(path)
    try:
        return Manifest(
            layout=SoftLabelsLayout(**content["layout"]),
            identity=content["identity"],
            keys=content["written"]["keys"],
            rows=content["written"]["rows"],
            files={name: Committed(**fields) for name, fields in content["files"].items()},
            block_bytes=content["block_bytes"],
        )
    except (AttributeError, KeyError, TypeError):  # made by hand, with a checksum that fits
        raise _damaged(path) from None


def check_identity(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare what soft labels were made of with what a run has; only what ``expected`` names counts.

    Raises:
        SoftLabelsError: with the first difference.
    """
    for name, value in _flat(expected).items():
        there = _flat(found).get(name)
        if there != value:
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
    return text if len(text) <= 40 else text[:16] + "..."


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path) -> SoftLabelsError:
    return SoftLabelsError(f"{path} is damaged; remove the folder and write the soft labels again")
