"""What a folder that `lskd data` made says of itself: ``manifest.json``, read by all in one way."""

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from lskd import LskdError
from lskd_study.base.files import read_object

MANIFEST = "manifest.json"
OTHER_PLACE = "choose another --output or remove it"


class Made(NamedTuple):
    """A folder of data, its manifest, and whether it was written now or was there."""

    folder: Path
    manifest: dict[str, Any]
    written: bool

    @property
    def state(self) -> str:
        """The last of these, to be printed."""
        return "written" if self.written else "already there"


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
    "classes": lambda value: isinstance(value, list),
    "images": _counts,
    "images_per_class": _lists,
    "files": _counts,
    "pairs": _counts,
    "identical": _counts,
    "passed_over": _counts,
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


def refuse_other(output: Path, what: str, fix: str) -> None:
    """Refuse an output that has something in it and is not ``what`` is to be written.

    Raises:
        LskdError: saying so, and how to fix it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LskdError(f"{output} exists and is not this {what}; {fix}")
