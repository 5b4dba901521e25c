"""Whether two runs are the same experiment: which of their settings count for the result."""

import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lskd_study.trainers import trainer_of

_NOTHING = object()


def tidy(path: str, folder: Path | None = None) -> str:
    """Return a path in its one spelling: `./x/` is `x`, and so is `/there/x` where the folder is `/there`.

    ``folder``: where relative paths start, the present one if it is left out.
    """
    found = Path(path)
    here = folder or Path.cwd()
    if found.is_absolute() and found != here and found.is_relative_to(here):
        found = found.relative_to(here)
    return str(found)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Return how settings of two runs (`Plan.settings`) differ in what changes a result: "a was 1, now 2".

    ``folder``: where relative paths in them start.
    """
    trainer = trainer_of(str(now.get("ecosystem")), str(now.get("role")))
    old, new = (dict(_flat(json.loads(json.dumps(settings)))) for settings in (before, now))
    found = []
    for key in dict.fromkeys((*old, *new)):
        if any(fnmatchcase(key, f"config.{pattern}") for pattern in trainer.without_effect):
            continue
        if key == "temperature_squared" and old.get("temperature") == new.get("temperature") == 1:
            continue  # T^2 is 1
        was, is_now = old.get(key, _NOTHING), new.get(key, _NOTHING)
        if _plain(was, folder) != _plain(is_now, folder):
            found.append(f"{key.removeprefix('config.')} was {_word(was)}, now {_word(is_now)}")
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a mapping contains by dotted keys; a list without mappings and lists is one value."""
    if isinstance(value, dict) and value:
        parts = [(str(name).replace("-", "_"), part) for name, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        parts = [(str(number), part) for number, part in enumerate(value)]
    else:
        yield key, value
        return
    for name, part in parts:
        yield from _flat(part, f"{key}.{name}" if key else name)


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_plain(part, folder) for part in value]
    return tidy(value, folder) if isinstance(value, str) and os.sep in value else value


def _word(value: Any) -> str:
    if value is _NOTHING:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
