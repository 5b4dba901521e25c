"""Ctrl-C and SIGTERM as an exception."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The run was asked to stop by the signal in `args[0]`; no `except Exception` is to catch it."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `Interrupted`; a second one ends the process as usual.

    A signal that the process was started to ignore, as a shell's background job does Ctrl-C, stays ignored.
    """
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in usual}
    heard = [number for number in usual if before[number] is not signal.SIG_IGN]

    def stop(number: int, frame: Any) -> None:
        for one in heard:
            signal.signal(one, usual[one])
        # Loading processes may have got the signal too; torch would raise an error about their end.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Interrupted(number)

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
