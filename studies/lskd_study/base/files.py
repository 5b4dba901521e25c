"""Files of which it is enough to know that they are as they should be."""

from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_json


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty where there is none, or something else."""
    try:
        content = read_json(path)
    except LskdError:
        return {}
    return content if isinstance(content, dict) else {}
