"""What a folder that `lskd data` made says of itself: ``manifest.json``, read by all in one way."""

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from lskd_study.base.files import read_object

MANIFEST = "manifest.json"


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _lists(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(counts, list) and counts and all(type(count) is int for count in counts)
        for counts in value.values()
    )


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "num_classes": lambda value: type(value) is int,
    "images": _counts,
    "images_per_class": _lists,
    "files": _counts,
    "pairs": _counts,
    "options": lambda value: isinstance(value, dict),
    "sizes_as_expected": lambda value: isinstance(value, bool),
    "text_sha256": lambda value: isinstance(value, str),
    "listing_sha256": lambda value: isinstance(value, str),
}


def read_manifest(folder: Path, needs: Set[str] = frozenset()) -> dict[str, Any]:
    """Return a data folder's manifest; empty where it has none, or one that `lskd data` did not write.

    Args:
        folder: of the data.
        needs: keys without which it is none.
    """
    content = read_object(folder / MANIFEST)
    fits = all(kind(content[key]) for key, kind in _KINDS.items() if key in content)
    return content if fits and needs <= content.keys() else {}
