"""The folder of a run or a store: locked, begun or gone on with; only what the study wrote is removed."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import cannot_write, is_scratch, lock, write_text
from lskd.base.trackers import EVENTS
from lskd_study.base.progress import say
from lskd_study.plan.plan import BEGUN, CURVES, JOB, LOGITS, TRANSLATIONS
from lskd_study.plan.records import Begun, read_record

LOCK = ".lock"
LOG = "train.log"
# What a job writes itself, whatever trains; the first is left by a process that is killed while it writes.
# The note of what was begun is replaced and never removed: what lies there without one is taken for others'.
_OWN = (".*.new", LOG, CURVES, LOGITS, f".{LOGITS}", TRANSLATIONS, JOB, EVENTS)
LABEL_FILES = tuple(f"labels/{name}" for name in ("manifest.json", ".*.new", "lock", "*.bin", "*.bin.sums"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it; the kernel lets go when the process ends, however it ends.

    Raises:
        LskdError: another process is at work in it, it is a link, or it cannot be made.
    """
    check_no_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    with lock(folder / LOCK) as taken:
        if taken is None:
            raise LskdError(f"another process is at work in {folder}; wait for it or end it")
        yield


def check_no_link(folder: Path) -> None:
    """Refuse a link in the place of a folder in which files are replaced: they would be somebody else's.

    Raises:
        LskdError: it is one.
    """
    if folder.is_symlink():
        raise LskdError(f"{folder} is a link, and runs write into folders of their own; remove the link")


def begin(
    folder: Path,
    identity: dict[str, Any],
    same: Callable[[dict[str, Any]], bool],
    can_go_on: Callable[[], bool],
    files: Sequence[str],
) -> tuple[int, bool]:
    """Note what is begun in a locked folder; return how often that was resumed, and whether it is now.

    What was begun as something else is of no use and goes, by the names that it wrote. Where nothing says
    what was begun, everything is moved aside.

    Args:
        folder: of the run or the store.
        identity: what is begun, for ``begun.json``.
        same: whether what an earlier process noted is the same.
        can_go_on: whether there is something to go on from.
        files: patterns of the names that the trainer writes.

    Raises:
        LskdError: the note is damaged, or the folder cannot be written.
    """
    before = read_record(folder / BEGUN, Begun)
    goes_on = bool(before) and same(before) and can_go_on()
    try:
        if not before:
            _move_aside(folder)
        elif not goes_on:
            remove_files(folder, (*_OWN, *files))
    except OSError as error:
        raise cannot_write(folder, error) from error
    resumed = int(before.get("resumed", 0)) + 1 if goes_on else 0
    write_text(folder / BEGUN, json.dumps({**identity, "resumed": resumed}, indent=1) + "\n")
    return resumed, goes_on


def full_disk(folder: Path) -> LskdError | None:
    """Return the one line for a folder that takes no more, as far as a small file tells; else None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cannot_write(folder, error)
    return None


def remove_files(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files, and the links, of such names, and below no link; folders stay.

    Raises:
        OSError: the disk's own errors.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            if not path.parent.is_symlink() and (path.is_symlink() or not path.is_dir()):
                path.unlink()


def _move_aside(folder: Path) -> None:
    # One that is killed at its very beginning leaves half of its note, which the next one removes.
    items = [path for path in folder.iterdir() if path.name != LOCK and not is_scratch(path)]
    if not items:
        return
    aside = next(path for number in count(1) if not os.path.lexists(path := Path(f"{folder}.aside-{number}")))
    aside.mkdir()
    for path in items:
        os.rename(path, aside / path.name)
    say(f"{folder} contained what no run of this study had left; it was moved to {aside}")
