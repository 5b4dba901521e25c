"""Files that are whole or not there at all, locks that follow no link, JSON that is read within bounds."""

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lskd._errors import LskdError

JSON_LIMIT = 64 << 20  # bytes; the largest file of ours, the plan of 2,000 runs, has 3 MB
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a name to write to; what was written takes the place of ``path`` at the end, or nothing does.

    The file reaches the disk before it takes its name, has the user's umask whatever wrote it, and the
    scratch file is gone when anything fails. A link at ``path`` is replaced, not followed.

    Raises:
        LskdError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created here and not by tempfile, whose files are for their owner alone.
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(handle).st_mode & 0o777
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield scratch
        os.chmod(scratch, mode)
        _to_disk(scratch)
        os.replace(scratch, path)
        if sys.platform != "win32":  # where a folder cannot be opened, and its journal keeps the new name
            _to_disk(path.parent)
    except OSError as error:
        if error.errno in _FULL or error.filename in (None, str(scratch), str(path)):
            raise cannot_write(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8 and with the line ends as they are.

    Raises:
        LskdError: the folder cannot be written, or the disk is full.
    """
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def cannot_write(path: str | Path, error: OSError) -> LskdError:
    """Return the one line for a write that failed: why, and what to do."""
    if error.errno in _FULL:
        return LskdError(
            f"cannot write {path}: the disk is full ({error.strerror}); what is finished is kept, "
            "make room and give the same command again"
        )
    return LskdError(f"cannot write {path} ({error.strerror or error}); name another place")


def read_json(path: str | Path, what: str = "", limit: int = JSON_LIMIT) -> Any:
    """Return what a JSON file contains: numbers are finite, text is UTF-8, nesting and size are bounded.

    Args:
        path: the file.
        what: what the file should be, for the message.
        limit: bytes.

    Raises:
        LskdError: it is missing, too large, or not such a file.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise LskdError(f"cannot read {path} ({error.strerror})") from error
    if len(raw) > limit:
        raise LskdError(f"{path} has more than {limit >> 20} MiB, so it is not {what or 'such a file'}")
    try:
        return parse_json(raw.decode("utf-8"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise LskdError(f"{path} is damaged or not {what or 'JSON'} ({reason})") from error


def parse_json(text: str) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a number or a text that nothing can store.
    """
    try:
        content = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if "\\ud" in text.lower():  # half a surrogate pair is no text
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return content


@contextlib.contextmanager
def lock(path: str | Path, wait: bool = False) -> Iterator[int | None]:
    """Lock a file, which is created where there is none and never changed; give None where somebody else has.

    The kernel lets go when the process ends, however it ends. A link in the file's place is not followed.

    Raises:
        LskdError: the file cannot be opened, or this system has no such locks.
    """
    handle = take_lock(path, wait)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def no_link(path: str | Path, flags: int) -> int:
    """Open a file that is ours and no link to another's; an ``opener`` of :func:`open`.

    Raises:
        OSError: it cannot be opened, or is a link (``ELOOP``).
    """
    return os.open(path, flags | _NOFOLLOW, 0o666)


def take_lock(path: str | Path, wait: bool = False) -> int | None:
    """Return the descriptor that has the lock until it is closed, or None: see :func:`lock`.

    Raises:
        LskdError: the file cannot be opened, or this system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise LskdError("this system has no file locks (fcntl), which runs and stored labels need") from None
    try:
        handle = no_link(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LskdError(f"{path} is a link where a lock should be; remove it") from error
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _to_disk(path: Path) -> None:
    # Windows synchronises what may be written to alone, others take a folder as it is.
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to synchronise
            raise
    finally:
        os.close(handle)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
