"""A study that is asked to stop, by Ctrl-C, SIGTERM, SIGQUIT or SIGHUP: what it started ends with it."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil

from lskd import LskdError

# A terminal that is closed sends SIGHUP, Ctrl-\ SIGQUIT. What is ignored from the start stays so: `nohup`.
_REQUESTS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
_SECONDS = 5.0  # to end in, before what has not ended is asked (again)
_ROUNDS = 3  # of these without a job, after which a scheduler that goes on is stuck


class StoppedError(LskdError):
    """Somebody asked for the end of a study; ``status`` is the command's exit status."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class _Asked(KeyboardInterrupt):
    """A request other than Ctrl-C, as an exception: its signal."""


@contextlib.contextmanager
def until_stopped(process: "subprocess.Popen[bytes]", local: bool) -> Iterator[list[int]]:
    """End Snakemake and all that it started when somebody asks for it while the block runs.

    Gives a list that then contains the signal. A second request ends this process as usual. ``local``: its
    jobs are its children, so that without any it may be killed; that of a cluster cancels them.
    """

    def stop(number: int, frame: Any) -> None:
        raise _Asked(number)

    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in _REQUESTS}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, stop)
    try:
        yield asked
    except KeyboardInterrupt as request:
        for number, handler in heard.items():
            signal.signal(number, handler)
        asked.append(request.args[0] if isinstance(request, _Asked) else signal.SIGINT)
        _end(process, told=asked[0] == signal.SIGINT, local=local)
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


def _end(process: "subprocess.Popen[bytes]", told: bool, local: bool) -> None:
    """Wait for the end; ``told``: a terminal's Ctrl-C reaches all, but `kill -INT` this process alone."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # and so it is in all that was started
    idle = 0
    while True:
        if not told:
            with contextlib.suppress(psutil.Error):
                snakemake = psutil.Process(process.pid)
                # It lets jobs end by themselves after SIGTERM, and cancels those of a cluster after SIGINT.
                snakemake.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
                jobs = snakemake.children(recursive=True)
                idle = 0 if jobs else idle + 1
                if local and idle > _ROUNDS:  # its handler of SIGTERM waits for ever for a lock of its own
                    process.kill()
                for job in jobs:
                    with contextlib.suppress(psutil.Error):
                        job.terminate()
        told = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
            return
