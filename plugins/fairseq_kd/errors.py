"""What a user can fix is one line and exit status 2, in fairseq's own commands too; 3 if a run diverged."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from types import TracebackType

from lskd import DivergedError, LskdError
from lskd.base.files import full_disk, say_full_logs_once
from lskd.errors import from_outside, loading_error, printable

PREFIX = "fairseq_kd: error: "
# The end of the traceback that a process hands to the one that spawned it.
_SPAWNED = re.compile(rf"^{re.escape(LskdError.__module__)}\.(\w+): (.*)\Z", re.MULTILINE)


def install() -> None:
    """Print such errors without a traceback; every other exception is shown as before."""
    if getattr(sys.excepthook, "of_fairseq_kd", False):
        return
    say_full_logs_once()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or hydra prints a traceback of its own and exits with 1
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line, status = _as_line(error)
        if line is None:
            before(kind, error, traceback)
            return
        logging.shutdown()
        with contextlib.suppress(OSError):  # a full disk, which may be the error itself
            sys.stdout.flush()
        # In a run of several processes torch keeps what a hook writes until it returns; this one never does.
        print(line, file=sys.__stderr__, flush=True)
        # Not sys.exit: fairseq's thread that reads ahead would turn it into an abort with lines of its own.
        os._exit(status)

    hook.of_fairseq_kd = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _as_line(error: BaseException) -> tuple[str | None, int]:
    """Return the line, None for an error that is none of ours, and the exit status."""
    text = str(error)
    if isinstance(error, LskdError):
        return PREFIX + printable(str(loading_error(error))), getattr(error, "STATUS", 2)
    if raised := _SPAWNED.search(text.strip()):
        diverged = raised[1] == DivergedError.__name__
        return PREFIX + printable(raised[2]), DivergedError.STATUS if diverged else 2
    if (ours := from_outside(error) or full_disk(error)) is not None:
        return PREFIX + printable(str(ours)), 2
    return None, 1


def run(main: Callable[[], None]) -> None:
    """Run a command of this plugin; its errors are shown as those of fairseq's commands."""
    try:
        main()
    except KeyboardInterrupt:
        print("fairseq_kd: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
