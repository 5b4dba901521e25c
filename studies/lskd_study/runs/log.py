"""What a trainer prints goes to the log of its run; why it stopped becomes one line."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from lskd import DivergedError, LskdError
from lskd.errors import from_outside
from lskd_study.base.extras import not_installed
from lskd_study.base.progress import open_log
from lskd_study.plan.folders import full_disk

# Exit statuses of a trainer that was asked to stop; its own advice is not a study's.
_STOPPED = (129, 130, 131, 143, -1, -2, -3, -15)
_NO_ROOM = re.compile(r"No space left|os error 28|[Qq]uota exceeded|PytorchStreamWriter|unexpected pos")
_PREFIX = re.compile(r"[\w.-]+: error: ")  # of a trainer's own command


@contextlib.contextmanager
def logged(name: str, log: Path) -> Iterator[None]:
    """Send all output to the log; whatever stops the trainer becomes one line that names the log.

    Raises:
        DivergedError: the trainer says so, by this error or by its exit status; its own line.
        LskdError: for whatever else stops it.
        KeyboardInterrupt: the trainer was asked to stop.
    """
    try:
        with _output_to(log):
            try:
                yield
            except (LskdError, SystemExit):
                raise
            except Exception as error:
                with contextlib.suppress(OSError), open_log(log) as file:
                    traceback.print_exc(file=file)
                raise LskdError(_reason(error)) from error
    except DivergedError as error:
        with contextlib.suppress(OSError), open_log(log) as file:
            file.write(f"{error}\n")
        raise
    except (LskdError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in _STOPPED:
            raise KeyboardInterrupt from error
        if full := full_disk(log.parent):
            raise LskdError(f"{name} failed: {full}") from error
        reason = str(error) if isinstance(error, LskdError) else _last_line(log, error)
        if isinstance(error, SystemExit) and error.code == DivergedError.STATUS:
            raise DivergedError(reason) from error
        raise LskdError(f"{name} failed: {reason.rstrip('.')}; the whole log is {log}") from error


def _reason(error: Exception) -> str:
    """Return what went wrong in one line; a disk that is full comes in the words of many libraries."""
    if isinstance(error, ModuleNotFoundError) and (missing := not_installed(error)):
        return str(missing)
    if (outside := from_outside(error)) is not None:
        return str(outside)
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    if _NO_ROOM.search(str(error)):
        return (
            f"a file could not be written, the disk is full ({line}); what is finished is kept, make room "
            "and give the same command again"
        )
    return line


def _last_line(log: Path, stop: SystemExit) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"the trainer exited with {stop.code}"
    return _PREFIX.sub("", reason, count=1) if _PREFIX.match(reason) else reason


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and its children print to a file, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open_log(log) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for stream, number, old in zip((sys.stdout, sys.stderr), (1, 2), saved, strict=True):
            try:
                stream.flush()
            except OSError:  # what a full disk did not take must not come out elsewhere later
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), number)
                stream.flush()
            os.dup2(old, number)
            os.close(old)
