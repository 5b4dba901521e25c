"""Files of which it is enough to know that they are, or can be written, as they should be."""

import os
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


def check_writable(path: Path, fix: str = "choose another --output", folder: bool = False) -> None:
    """Refuse, before any work, the place of a file or a new folder that cannot be written; nothing is.

    Args:
        path: of the file or folder.
        fix: what to do.
        folder: what is already at ``path`` is no matter, it will be replaced.

    Raises:
        LskdError: saying what is in the way, and ``fix``.
    """
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise LskdError(f"cannot write {path}: {error.strerror or error}; {fix}") from None
    if there and not folder and not path.is_file():
        reason = "it is a folder" if path.is_dir() else "it is no file"
    elif not above.is_dir():
        reason = f"{above} is no folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        reason = "read-only file system" if read_only else "permission denied"
    else:
        return
    raise LskdError(f"cannot write {path}: {reason}; {fix}")
