"""What runs say of themselves: on stderr, or by way of a file that `lskd study` reads and shows.

So the terminal has one writer, whatever schedules the runs, and wherever they run.
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

from lskd import LskdError
from lskd.base.files import cannot_write

VARIABLE = "LSKD_PROGRESS"  # names the file; unset: stderr
FILE = "progress.log"
_SECONDS = 0.5


def say(line: str, timed: bool = True) -> None:
    """Print a line of progress, with the time of day; in one write, because runs share the terminal."""
    text = f"{at_the_time(line) if timed else line}\n"
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError, LskdError), open_log(Path(path)) as file:
            file.write(text)
            return
    with contextlib.suppress(OSError):  # a file on a disk that is full
        sys.stderr.write(text)
        sys.stderr.flush()


def at_the_time(line: str) -> str:
    """Return a line with the time of day before it."""
    return f"{datetime.now():%H:%M:%S}  {line}"


def open_log(path: Path) -> IO[str]:
    """Open a file for what others print, at its end; a link in its place is not followed.

    Raises:
        LskdError: it cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    return open(handle, "a", encoding="utf-8")


def say_epoch(name: str, done: int, of: int) -> None:
    """Tell who reads the file how many epochs of a run are done, of how many (0: not known); see `EPOCH`."""
    if os.environ.get(VARIABLE):
        say(f"epoch    {name}  {done} of {of}")


EPOCH = re.compile(r"\d\d:\d\d:\d\d  epoch    (\S+)  (\d+) of (\d+)")


class Follower:
    """Hands every line that is added to the file to ``show``, in a thread, until it is stopped.

    After each look at the file, every half second, it calls ``idle``.
    """

    def __init__(
        self, path: Path, show: Callable[[str], None], idle: Callable[[], None] = lambda: None
    ) -> None:
        """Start at the file's present end; it need not exist yet."""
        self._path, self._show, self._idle = path, show, idle
        self._position = path.stat().st_size if path.exists() else 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self, silently: bool = False) -> None:
        """Show what is left, or no more, and stop."""
        if silently:
            self._show, self._idle = (lambda line: None), (lambda: None)
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._end.wait(_SECONDS):
            self._read()
            with contextlib.suppress(OSError):  # of a folder on a network, for a moment
                self._idle()
        self._read()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._position)
            *lines, _ = file.read().split(b"\n")  # what follows the last newline is still being written
            for line in lines:
                self._position += len(line) + 1
                self._show(line.decode(errors="replace"))
