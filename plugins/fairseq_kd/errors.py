"""What a user can mend is one line and exit status 2, in fairseq's own commands too."""

import logging
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from hydra.errors import CompactHydraException

from lskd import LskdError

PREFIX = "fairseq_kd: error: "
_REFUSED = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed global|whose module)")  # in torch's message
_LAST_LINE = re.compile(rf"^[\w.]+: ({re.escape(PREFIX)}.*)\Z", re.MULTILINE)


class FairseqKdError(LskdError, CompactHydraException):
    """An error that `fairseq-train`, `-generate`, `-validate` and `fairseq-hydra-train` show as one line."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Give errors of the core the form that fairseq's commands show as one line."""
    try:
        yield
    except FairseqKdError:
        raise
    except LskdError as error:
        raise FairseqKdError(PREFIX + " ".join(str(error).split())) from None


def install() -> None:
    """Print such errors without a traceback; every other exception is shown as before."""
    if getattr(sys.excepthook, "of_fairseq_kd", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = _as_line(error)
        if line is None:
            before(kind, error, traceback)
            return
        logging.shutdown()
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
        # Not sys.exit: fairseq's thread that reads ahead would turn it into an abort with lines of its own.
        os._exit(2)

    hook.of_fairseq_kd = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _as_line(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, LskdError):
        return text if text.startswith(PREFIX) else PREFIX + " ".join(text.split())
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in text.lower().replace(" ", "_"):
        what = (
            refused[1] if (refused := _REFUSED.search(text)) else "something other than weights and settings"
        )
        return (
            f"{PREFIX}the checkpoint is refused: it holds {what}, and loading that would run code that is in "
            "the file; use one that fairseq itself wrote"
        )
    if raised := _LAST_LINE.search(text.strip()):  # a process that fairseq spawned ended with such an error
        return raised[1]
    return None


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command of this plugin and exit."""
    try:
        main()
    except LskdError as error:
        print(_as_line(error), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fairseq_kd: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
