"""What a folder that `lskd data` made says of itself: ``manifest.json``, read by all in one way."""

import os
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class _Manifest(BaseModel):
    """What is relied on; a manifest contains more."""

    model_config = ConfigDict(strict=True)

    name: str = ""
    num_classes: int = 0
    classes: list[Any] = []
    images: dict[str, int] = {}
    images_per_class: dict[str, Annotated[list[int], Field(min_length=1)]] = {}
    files: dict[str, int] = {}
    pairs: dict[str, int] = {}
    identical: dict[str, int] = {}
    passed_over: dict[str, int] = {}
    options: dict[str, Any] = {}
    sizes_as_expected: bool = True
    text_sha256: str = ""
    listing_sha256: str = ""


def read_manifest(folder: Path, needs: Set[str] = frozenset()) -> dict[str, Any]:
    """Return a data folder's manifest; empty where it has none, or one that `lskd data` did not write.

    Args:
        folder: of the data.
        needs: keys without which it is none.
    """
    content = read_object(folder / MANIFEST)
    try:
        _Manifest.model_validate(content)
    except ValidationError:
        return {}
    return content if needs <= content.keys() else {}


def refuse_other(output: Path, what: str, fix: str) -> None:
    """Refuse an output that has something in it and is not ``what`` is to be written.

    Raises:
        LskdError: saying so, and how to fix it.
    """
    if os.path.exists(output) and (not output.is_dir() or any(output.iterdir())):
        raise LskdError(f"{output} exists and is not this {what}; {fix}")
