"""The manifest of stored soft labels: what they are, and how far they got."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lskd.base.files import read_json, write_text
from lskd.errors import LskdError, SoftLabelsError
from lskd.soft_labels.blocks import DIGEST_BYTES, EMPTY, Committed
from lskd.soft_labels.packed import packed_bytes

MANIFEST = "manifest.json"
COPY = "copy"  # the mark of a folder that is a copy of what is elsewhere, and only read
FORMAT, VERSION = "lskd soft labels", 1
_NEWER = ("views", "sampled", "shard")  # a layout with one is of version 2, which older releases refuse
BLOCK_BYTES = 1 << 18
_DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_DEEPEST = 32  # of identities, whose parts are compared one by one

ValueDtype = Literal["float16", "float32", "packed"]


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
        values: how the log-probabilities are stored; "packed": in 8 bits, and the ids in as few as they need.
        seeds: whether a row has the 32-bit seed that replays its sample's augmentation.
        views: whether its epochs are views of the samples, of which training reads one after the other and
            then the first again.
        sampled: whether the classes are drawn, see :func:`lskd.terms.sampled_log_probabilities`, and not the
            ``k`` largest.
        shard: "I/N" for the I-th of N shards, which has the keys from :attr:`first` to before :attr:`stop`;
            "" for all.

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
    views: bool = False
    sampled: bool = False
    shard: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.k <= self.num_classes:
            raise SoftLabelsError(
                f"top-K must be 1 to {self.num_classes}, the number of classes; got {self.k}"
            )
        if self.samples < 0 or self.epochs < 1 or (self.rows_per_sample or 1) < 1:
            raise SoftLabelsError("soft labels need samples >= 0, epochs >= 1 and rows_per_sample >= 1")
        if self.values not in get_args(ValueDtype):
            raise SoftLabelsError(f"values are stored as float16, float32 or packed, not as {self.values}")
        if self.shard and parsed_shard(self.shard)[1] > self.samples * self.epochs:
            raise SoftLabelsError(
                f"shard {self.shard} is more shards than keys ({self.samples * self.epochs}); choose fewer"
            )

    @property
    def keys(self) -> int:
        """How many keys there are: every sample in every epoch, or the shard's."""
        return self.stop - self.first

    @property
    def first(self) -> int:
        """The first key; 0 unless this is a shard's layout, whose rows are of the keys from this one on."""
        number, shards = parsed_shard(self.shard)
        return self.samples * self.epochs * (number - 1) // shards

    @property
    def stop(self) -> int:
        """The key after the last one."""
        number, shards = parsed_shard(self.shard)
        return self.samples * self.epochs * number // shards

    def stored_epoch(self, epoch: int) -> int:
        """Return which epoch of the store an epoch of training reads."""
        return epoch % self.epochs if self.views else epoch

    @property
    def kept(self) -> str:
        """What is kept of an answer, in words: "top 10 of 1000"."""
        if self.k == self.num_classes:
            return f"all {self.num_classes}"
        return f"{f'{self.k} drawn' if self.sampled else f'top {self.k}'} of {self.num_classes}"

    @property
    def row(self) -> np.dtype[Any]:
        """One row as it lies on the disk: ``4 + 4 * k`` bytes with seeds, float16, up to 65,536 classes."""
        if self.values != "packed":
            return self.decoded_row
        size = packed_bytes(self.num_classes, self.k)
        return np.dtype([*([("seed", "<u4")] if self.seeds else []), ("packed", "u1", (size,))])

    @property
    def decoded_row(self) -> np.dtype[Any]:
        """One row as it is worked with: as on the disk, unless it is packed there."""
        value = np.dtype("float32" if self.values == "float32" else "float16")
        class_id = "<u2" if self.num_classes <= 1 << 16 else "<u4"
        fields = [("values", value.newbyteorder("<"), (self.k,)), ("ids", class_id, (self.k,))]
        return np.dtype(([("seed", "<u4")] if self.seeds else []) + fields)


def parsed_shard(shard: str) -> tuple[int, int]:
    """Return number and count of "I/N", 1 and 1 of "".

    Raises:
        SoftLabelsError: anything else.
    """
    found = re.fullmatch("([0-9]{1,4})/([0-9]{1,4})", shard or "1/1")
    number, shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= shards:
        raise SoftLabelsError(f"shard '{shard[:20]}' must be I/N with I from 1 to N, and N at most 9999")
    return number, shards


def shard_folder(path: str | Path, shard: str) -> Path:
    """Return where a shard of the store in ``path`` is written; ``path`` itself where there are no shards.

    Raises:
        SoftLabelsError: not of the form "I/N".
    """
    number, shards = parsed_shard(shard)
    return Path(path, f"shard-{number}-of-{shards}") if shard else Path(path)


def shard_folders(path: Path) -> list[Path]:
    """Return the folders of the shards of the store in ``path``."""
    try:
        return sorted(path.glob("shard-*-of-*"))
    except OSError:  # a name that is too long
        return []


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
        own_error: :class:`lskd.soft_labels.own_error.OwnError` as JSON; None: not measured (yet).
    """

    layout: SoftLabelsLayout
    identity: Mapping[str, Any]
    keys: int = 0
    rows: int = 0
    files: Mapping[str, Committed] = field(default_factory=lambda: {"rows": EMPTY, "index": EMPTY})
    block_bytes: int = BLOCK_BYTES
    own_error: Mapping[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether every key is there."""
        return self.keys == self.layout.keys

    def write(self, folder: Path) -> None:
        """Replace the manifest in one step.

        Raises:
            LskdError: the folder cannot be written, or the disk is full.
        """
        layout = asdict(self.layout)
        layout = {name: value for name, value in layout.items() if value or name not in _NEWER}
        content = {
            "format": FORMAT,
            "version": VERSION + (self.layout.values == "packed" or any(name in layout for name in _NEWER)),
            "layout": layout,
            "identity": json.loads(json.dumps(self.identity)),
            "written": {"keys": self.keys, "rows": self.rows, "complete": self.complete},
            "files": {name: asdict(committed) for name, committed in self.files.items()},
            "block_bytes": self.block_bytes,
        }
        if self.own_error is not None:
            content["own_error"] = dict(self.own_error)
        content["checksum"] = _checksum(content)
        write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in ``folder``.

    Raises:
        SoftLabelsError: it is missing, altered, or of a version that this release cannot read.
    """
    path, content = folder / MANIFEST, read_content(folder)
    if content.get("version") not in (VERSION, VERSION + 1):
        raise SoftLabelsError(
            f"{path} has version {_short(content.get('version'))} of the format, this release reads "
            f"{VERSION} and {VERSION + 1}; write the soft labels again or use the release that wrote them"
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
            check_merged(folder)
            raise SoftLabelsError(
                f"{folder} contains no soft labels ({MANIFEST}: {error.__cause__.strerror}); "
                "check the path or write them"
            ) from None
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SoftLabelsError(f"{path} is no manifest of soft labels; check the path")
    return content


def check_own(folder: Path) -> None:
    """Refuse to write in a folder that is a copy.

    Raises:
        SoftLabelsError: saying what to do.
    """
    if (folder / COPY).exists():
        raise SoftLabelsError(
            f"{folder} is a copy of soft labels that are elsewhere and lack what this run wants; nothing is "
            "written there: copy it to a folder of your own, without the file 'copy', and name that one"
        )


def check_merged(folder: Path) -> None:
    """Refuse a folder that has shards and no store of them yet.

    Raises:
        SoftLabelsError: saying how they are merged.
    """
    if shards := shard_folders(folder):
        raise SoftLabelsError(
            f"{folder} has {len(shards)} shard(s) of soft labels that are not merged yet; when all are "
            f"written: lskd soft-labels merge {folder}"
        )


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
    _require(all(type(each) is bool for each in (layout.seeds, layout.views, layout.sampled)))
    keys, rows = _whole(written["keys"], layout.keys), _whole(written["rows"], 1 << 48)
    _require(per_sample is None or rows == keys * per_sample)
    files = {name: Committed(**content["files"][name]) for name in ("rows", "index")}
    _require(files["rows"].bytes == rows * layout.row.itemsize)
    _require(files["index"].bytes == (8 * keys if per_sample is None else 0))
    _require(all(_DIGEST.fullmatch(part) for file in files.values() for part in (file.sums, file.tail)))
    block_bytes, identity = _whole(content["block_bytes"], 1 << 30), content["identity"]
    _require(block_bytes > 0 and isinstance(identity, dict) and _depth(identity) <= _DEEPEST)
    own_error = content.get("own_error")
    _require(own_error is None or isinstance(own_error, dict))
    return Manifest(
        layout, identity, keys=keys, rows=rows, files=files, block_bytes=block_bytes, own_error=own_error
    )


def _whole(value: Any, most: int) -> int:
    _require(type(value) is int and 0 <= value <= most)
    return int(value)


def _require(sound: bool) -> None:
    if not sound:
        raise ValueError("forged")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def check_identity(
    folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], whose: str = "this run"
) -> None:
    """Compare what soft labels were made of with what a run has; only what ``expected`` names counts.

    Raises:
        SoftLabelsError: with the first difference.
    """
    found = _flat(found)
    for name, value in _flat(expected).items():
        if (there := found.get(name)) != value:
            raise SoftLabelsError(
                f"the soft labels in {folder} do not belong to {whose}: {name} is {_short(there)} there and "
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
