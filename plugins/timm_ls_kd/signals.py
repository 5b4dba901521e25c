"""Ctrl-C and SIGTERM as an exception."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The run was asked to stop by the signal in `args[0]`; no `except Exception` is to catch it."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `Interrupted`; a second one ends the process as usual."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Loading processes may have got the signal too; torch would raise an error about their end.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
