"""Runs of one machine are forked from one process that has imported their trainer.

Importing takes longer than a small run. A job stays a process of its own, ``python -m lskd_study.runs PLAN
RUN``, which the scheduler starts, sees and kills. Where `forking` has named a socket, it lets the run be
forked there, hands SIGTERM on to it and ends with its exit status; a run whose job was killed is killed. The
job does the run itself where there is no server, or it could not import, or is of another number of threads,
and where there is a GPU: CUDA does not outlive a fork.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

_SOCKET = "LSKD_FORKSERVER"
_NUMBER = struct.Struct("i")  # what is answered: the run's process, then its exit status
_PEER = struct.Struct("3i")  # process, user and group at the other end of a socket
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS = 5.0


@contextlib.contextmanager
def forking(
    modules: Sequence[str], threads: int, environment: Mapping[str, str]
) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Start a server for the jobs that are started in the block.

    Gives what their scheduler has to be given: a variable, and a file descriptor by which the server knows
    that there is still somebody who can ask. Nothing where there is no server.

    Args:
        modules: what a run imports.
        threads: OMP_NUM_THREADS of the runs.
        environment: of the runs.
    """
    if sys.platform != "linux":  # elsewhere the system's own libraries break in a fork
        yield {}, ()
        return
    name = f"lskd-{secrets.token_hex(16)}"
    life, alive = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")  # no file, so that nothing stays behind
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno()), str(life), *modules],
            pass_fds=(listener.fileno(), life),
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    os.close(life)
    try:
        yield {_SOCKET: name}, (alive,)
    finally:
        os.close(alive)
        server.terminate()  # while it imports; later it ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_SECONDS)


def run_forked(arguments: Sequence[str]) -> int | None:
    """Let the server do a job by its command's arguments; return its exit status, None where none does it."""
    if _SOCKET not in os.environ:
        return None
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(f"\0{os.environ[_SOCKET]}")
            if not _is_own(server):
                return None
            said = os.fsencode("\0".join([_threads(), os.getcwd(), *arguments])) + b"\n"
            socket.send_fds(server, [said], [1, 2])
        except OSError:
            return None
        asked: list[int] = []  # before there is a process to tell
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: asked.append(number))
        run = _number(server)
        if run is None:
            for number, handler in before.items():
                signal.signal(number, handler)
            return 128 + asked[0] if asked else None
        signal.signal(signal.SIGTERM, lambda number, frame: _kill(run, number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the run, too
        for early in asked:
            _kill(run, early)
        status = _number(server)
        if status is None:  # the server was killed
            _kill(run, signal.SIGKILL)
            return 128 + signal.SIGKILL
        return 128 - status if status < 0 else status


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "")


def _is_own(connection: socket.socket) -> bool:
    """Whether the same user is at the other end: the name of a socket without a file is no secret."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return bool(_PEER.unpack(peer)[1] == os.getuid())


def _number(server: socket.socket) -> int | None:
    try:
        answer = server.recv(_NUMBER.size, socket.MSG_WAITALL)
    except OSError:
        return None
    return _NUMBER.unpack(answer)[0] if len(answer) == _NUMBER.size else None


def _kill(run: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(run, number)


def serve(
    listener: socket.socket,
    life: int,
    do: Callable[[list[str]], int],
    before: Callable[[str, list[str]], object] = lambda cwd, arguments: None,
) -> None:
    """Fork what is asked for, until nobody can ask any more and all runs have ended.

    Args:
        listener: where jobs ask.
        life: file descriptor that is at its end when nobody can.
        do: does the job of a command's arguments in its own process; returns the exit status.
        before: what is done here for it, given also its working directory, so that the next find it done.
    """
    jobs: dict[BaseProcess, socket.socket] = {}
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    asking: list[Any] = [listener, life]
    while asking or jobs:
        runs: dict[Any, BaseProcess] = {run.sentinel: run for run in jobs}
        gone: dict[Any, BaseProcess] = {job: run for run, job in jobs.items() if run.is_alive()}
        for ready in wait([*asking, *runs, *gone]):
            if ready == life:
                asking = []
            elif ready is listener:
                job, _ = listener.accept()
                try:
                    _fork(job, jobs, listener, handlers, do, before)
                except (OSError, ValueError):  # no room for a process: the job does it itself
                    job.close()
            elif ready in runs:
                run = runs[ready]
                run.join()
                with jobs.pop(run) as job:
                    _answer(job, run.exitcode or 0)
            elif gone[ready] in jobs:  # its job was killed
                gone[ready].kill()
                gone[ready].join()


def _fork(
    job: socket.socket,
    jobs: dict[BaseProcess, socket.socket],
    listener: socket.socket,
    handlers: Mapping[signal.Signals, Any],
    do: Callable[[list[str]], int],
    before: Callable[[str, list[str]], object],
) -> None:
    said, output, _, _ = socket.recv_fds(job, 1 << 16, 2)
    while not said.endswith(b"\n") and (more := job.recv(1 << 16)):
        said += more
    threads, cwd, *arguments = os.fsdecode(said.removesuffix(b"\n")).split("\0")
    fork = multiprocessing.get_context("fork")

    def start() -> None:
        tell.close()
        try:
            known.recv_bytes()
        except EOFError:  # the server was killed before the job knew of this run, and the job does it itself
            os._exit(1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(cwd)
        for place, stream in enumerate(output, start=1):
            os.dup2(stream, place)
        for inherited in (listener, job, *jobs.values()):
            inherited.close()
        sys.exit(do(arguments))

    try:
        if not _is_own(job) or threads != _threads():
            raise ValueError
        before(cwd, arguments)
        known, tell = fork.Pipe(duplex=False)
        with known, tell:
            run = fork.Process(target=start)
            run.start()
            jobs[run] = job
            _answer(job, run.pid or 0)
            tell.send_bytes(b"")
    finally:
        for stream in output:
            os.close(stream)


def _answer(job: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it was killed
        job.sendall(_NUMBER.pack(number))


def _main(listener: int, life: int, modules: Sequence[str]) -> int:
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    if torch.cuda.is_available():
        return 0
    try:
        for module in modules:
            importlib.import_module(module)
        from lskd_study.runs.job import do_job, know_plan
    except ImportError:  # each job then says so
        return 1
    gc.collect()
    gc.freeze()  # or a run's first collection would copy all of it
    signal.signal(signal.SIGINT, interrupt)
    with socket.socket(fileno=listener) as opened:
        serve(opened, life, do_job, know_plan)
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
