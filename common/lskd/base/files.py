"""Files that are whole or not there at all, locks that follow no link, JSON and YAML within bounds."""

import contextlib
import csv
import errno
import functools
import gzip
import io
import json
import logging
import os
import re
import secrets
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lskd.errors import LskdError

CSV_LIMIT = 64 << 20  # bytes; a table of results has a few kB
JSON_LIMIT = 64 << 20  # bytes; the largest file of ours, the plan of 2,000 runs, has 3 MB
YAML_LIMIT = 1 << 20  # bytes; the largest recipe has 10 kB
_YAML_NODES, _YAML_DEPTH, _YAML_NUMBER = 100_000, 50, 1000  # with aliases written out; levels; digits
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LEFT = re.compile(r"\..+\.lskd-[0-9a-f]{8}\.new")  # a scratch file, locked as long as it is written
_FOLDER = ".d"  # after the name of a scratch file: the folder that it is locked for
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a name to write to; what was written takes the place of ``path`` at the end, or nothing does.

    The file reaches the disk before it takes its name, has the user's umask whatever wrote it, and the
    scratch file is gone when anything fails; that of a process that was killed goes when another one first
    writes into the folder. A link at ``path`` is replaced, not followed.

    Raises:
        LskdError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    scratch, handle = _open_scratch(path)
    mode = os.fstat(handle).st_mode & 0o777
    if sys.platform == "win32":  # which renames no file that is open
        os.close(handle)
    try:
        yield scratch
        os.chmod(scratch, mode)
        _to_disk(scratch)
        os.replace(scratch, path)
        if sys.platform != "win32":  # where a folder cannot be opened, and its journal keeps the new name
            with contextlib.suppress(PermissionError):  # as there, where it may not be listed
                _to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _behind(error)
        if isinstance(cause, OSError) and (
            cause.errno in _FULL or cause.filename in (None, str(scratch), str(path))
        ):
            raise cannot_write(path, cause) from error
        if cause is not error:
            raise cause from None
        raise
    finally:
        if sys.platform != "win32":
            os.close(handle)
        with contextlib.suppress(OSError):
            scratch.unlink()


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write into; it takes the name ``path`` at the end, or nothing does.

    ``path`` is absent or an empty folder. What is below it is on the disk before it takes its name, and has
    the user's umask whatever wrote it. That of a process that was killed goes as a file's does.

    Raises:
        LskdError: it cannot be written, or the disk is full.
    """
    path = Path(path)
    held, handle = _open_scratch(path)  # a folder cannot be locked everywhere
    scratch = held.with_name(held.name + _FOLDER)
    try:
        scratch.mkdir()
        yield scratch
        mode = scratch.stat().st_mode & 0o666
        for file in scratch.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.chmod(file, mode)
        to_disk(scratch)
        os.replace(scratch, path)
    except OSError as error:
        # Pillow's "cannot identify image" is an OSError without a number, and about what was read.
        ours = error.errno is not None and str(error.filename or scratch).startswith(str(scratch))
        if error.errno in _FULL or ours:
            raise cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            held.unlink()


def to_disk(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk, before it takes its name."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _to_disk(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8 and with the line ends as they are.

    Raises:
        LskdError: the folder cannot be written, or the disk is full.
    """
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def full_disk(error: BaseException) -> LskdError | None:
    """Return the one line for an error of a disk that is full, wherever a framework came to it; else None."""
    disk = _behind(error)
    if isinstance(disk, OSError) and disk.errno in _FULL:
        return cannot_write(disk.filename or "the run's files", disk)
    return None


def say_full_logs_once() -> None:
    """Let a log on a full disk be one line on stderr, and not a traceback for each of its lines."""
    usual, said = logging.Handler.handleError, list[str]()

    def handle(self: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in _FULL:
            usual(self, record)
        elif not said:
            said.append("said")
            print(f"lskd: a log is cut short ({error.strerror})", file=sys.__stderr__, flush=True)

    logging.Handler.handleError = handle  # type: ignore[method-assign]


def _behind(error: BaseException) -> BaseException:
    """Return what torch's writer has hidden, a full disk or Ctrl-C, behind an error of its own; else that."""
    hides = isinstance(error, RuntimeError) and "unexpected pos" in str(error)
    return (hides and error.__context__) or error


def cannot_write(path: str | Path, error: OSError) -> LskdError:
    """Return the one line for a write that failed: why, and what to do."""
    if error.errno in _FULL:
        return LskdError(
            f"cannot write {path}: the disk is full ({error.strerror}); what is finished is kept, "
            "make room and give the same command again"
        )
    return LskdError(f"cannot write {path} ({error.strerror or error}); name another place")


def read_json(path: str | Path, what: str = "") -> Any:
    """Return what a JSON file contains: numbers are finite, text is UTF-8, nesting and size are bounded.

    Args:
        what: what the file should be, for the message.

    Raises:
        LskdError: it is missing, too large, or not such a file.
    """
    raw = read_bytes(path, JSON_LIMIT, what, "check the path")
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


def read_bytes(path: str | Path, limit: int, what: str = "", fix: str = "copy the file again") -> bytes:
    """Return what is in a file of at most ``limit`` bytes, unpacked where its name ends in ``.gz``.

    Args:
        limit: bytes, after unpacking.
        what: what the file should be, for the message.
        fix: what to do about a file that is missing or damaged, for the message.

    Raises:
        LskdError: it is missing, too large, or a gzip file that is damaged or cut short.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(limit + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LskdError(f"{path} is damaged or cut short ({error}); {fix}") from None
    except OSError as error:
        what = f" as {what}" if what else ""
        raise LskdError(f"{path} cannot be read{what} ({error.strerror or error}); {fix}") from error
    if len(content) > limit:
        raise LskdError(
            f"{path} has more than {limit >> 20} MiB, so it is not {what or 'such a file'}; {fix}"
        )
    return bytes(content)


def read_csv(path: str | Path, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV table in UTF-8 with a header, in which ``columns`` must be.

    Raises:
        LskdError: it is missing, too large, no such table, has a column twice, or a row of another length
            than the header.
    """
    raw = read_bytes(path, CSV_LIMIT, "a table", "name a CSV table in UTF-8 with a header")
    try:
        reader = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise LskdError(f"{path} is no CSV table ({error}); name one in UTF-8 with a header") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise LskdError(f"{path}: row {number} has not as many cells as the header; fix the table")
    twice = [name for name, times in Counter(reader.fieldnames or ()).items() if times > 1 and name]
    if twice:
        raise LskdError(f"{path} has two columns {twice[0]!r}; remove one")
    if rows and (lost := [name for name in columns if name not in rows[0]]):
        raise LskdError(f"{path} has no column {', '.join(lost)}; it is no such table")
    return rows


def read_yaml(path: str | Path, what: str = "YAML file") -> Any:
    """Return what a YAML file contains; size, depth and what its aliases come to are bounded.

    Args:
        what: what the file is, for the message.

    Raises:
        LskdError: it is missing, too large, or not such a file; names the line.
    """
    return read_yaml_nodes(path, what)[1]


def read_yaml_nodes(path: str | Path, what: str = "YAML file") -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML file too, which know their lines; as :func:`read_yaml`."""
    raw = read_bytes(path, YAML_LIMIT, f"a {what}", "check the path")
    try:
        return _parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LskdError(f"{path} is not a text file in UTF-8; name a {what}, in YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())[:160]
        raise LskdError(f"{where}: not valid YAML ({problem}); fix the YAML there") from error
    except ValueError as error:
        raise LskdError(f"{path}: {error}") from error


def _parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    loader = yaml.SafeLoader(text)
    try:
        try:
            root = loader.get_single_node()
            if root is None:
                return None, None
            if _written_out(root, {}, 0) > _YAML_NODES:
                raise ValueError("too much with its aliases (*name) written out; write out what is meant")
        except RecursionError:
            raise ValueError("nested too deeply; write it out flat") from None
        try:
            return root, loader.construct_document(root)
        except ValueError as error:  # 2024-13-45 is no date
            raise ValueError(f"a value cannot be read ({error}); put it in quotes") from None
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """Return how many nodes there are below one, each as often as it is referred to."""
    if node in known:
        if known[node] == 0:
            raise ValueError("an alias (*name) within its own anchor (&name); write it out")
        return known[node]
    if depth > _YAML_DEPTH:
        raise ValueError("nested too deeply; write it out flat")
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise ValueError("half a surrogate pair, which no file can store; fix it")
        if len(node.value) > _YAML_NUMBER and node.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"a number of {len(node.value)} digits; put it in quotes if it is text")
        return 1
    known[node] = 0
    parts = (
        [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    )
    known[node] = 1 + sum(_written_out(part, known, depth + 1) for part in parts)
    return known[node]


@contextlib.contextmanager
def lock(path: str | Path, wait: bool = False) -> Iterator[int | None]:
    """Lock a file, which is created where there is none and never changed; yield None where it is locked.

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


def is_scratch(path: Path) -> bool:
    """Whether a path is named like what a process leaves that is killed while it writes a whole file."""
    return _LEFT.fullmatch(path.name) is not None


@functools.cache  # once in a process: a folder may contain a hundred thousand files
def _remove_left(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left; others have theirs locked."""
    try:
        names = os.listdir(folder)
    except PermissionError:  # it may be written to, but not listed
        return
    for name in names:
        if is_scratch(folder / name):
            with contextlib.suppress(OSError, LskdError), lock(folder / name) as taken:
                if taken is not None:
                    shutil.rmtree(folder / f"{name}{_FOLDER}", ignore_errors=True)
                    (folder / name).unlink()


def _open_scratch(path: Path) -> tuple[Path, int]:
    """Create a scratch file for a file: locked, or where there are no locks of a name that nobody removes.

    Raises:
        LskdError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(path.parent.absolute())
        name = os.fsencode(path.name)[:200].decode(errors="ignore")  # a name has at most 255 bytes
        while True:
            # Not by tempfile, whose files are for their owner alone.
            scratch = path.with_name(f".{name}.lskd-{secrets.token_hex(4)}.new")
            handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if not _lock_for_others(handle, scratch):
                    if sys.platform != "win32":  # which renames no file that is open
                        scratch = scratch.rename(scratch.with_suffix(".unlocked.new"))
                    return scratch, handle
                if os.fstat(handle).st_nlink:
                    return scratch, handle
            except (FileNotFoundError, BlockingIOError):
                pass
            except OSError:
                os.close(handle)
                scratch.unlink()
                raise
            os.close(handle)  # it was taken for one that is left
    except OSError as error:
        raise cannot_write(path, error) from error


def _lock_for_others(handle: int, scratch: Path) -> bool:
    """Lock a file that can still be written by its name: on SMB a lock keeps this process, too, from that."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    try:
        with open(scratch, "r+b", buffering=0) as other:
            other.write(b"?")
            other.truncate(0)
    except PermissionError:
        fcntl.flock(handle, fcntl.LOCK_UN)
        return False
    return True


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
