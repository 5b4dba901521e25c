"""A study that is asked to stop, by Ctrl-C or SIGTERM: what it started ends with it."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil

from lskd import LskdError

_SECONDS = 5.0  # to end in, before what has not ended is asked (again)


class StoppedError(LskdError):
    """Somebody asked for the end of a study; ``status`` is the command's exit status."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception."""


@contextlib.contextmanager
def until_stopped(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """End a process and all that it started when somebody asks for it while the block runs.

    Gives a list that then contains the signal. A second request ends this process as usual.
    """

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield asked
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGTERM, before)
        asked.append(signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
        _end(process, told=asked[0] == signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: "subprocess.Popen[bytes]", told: bool) -> None:
    """Wait for the end; ``told``: a terminal's Ctrl-C reaches all, but `kill -INT` this process alone."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # and so it is in all that was started
    while True:
        if not told:
            with contextlib.suppress(psutil.Error):
                snakemake = psutil.Process(process.pid)
                # It lets jobs end by themselves after SIGTERM, and cancels those of a cluster after SIGINT.
                snakemake.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
                for job in snakemake.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        job.terminate()
        told = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
            return
