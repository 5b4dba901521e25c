"""The process that runs are forked from: a job that it does ends, and is ended, as if it did it itself."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lskd_study.runs.forkserver import forking

pytestmark = pytest.mark.integration

# What jobs do here: say where and who they are, and then what their second argument says.
WORK = """
import os, signal, sys, time
from pathlib import Path

def do(arguments):
    name, what = arguments
    ended = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    Path(name).write_text(f"{os.getpid()}\\n{os.getcwd()}\\n{os.environ['OMP_NUM_THREADS']}")
    os.rename(name, name + ".txt")
    while what == "wait" and not ended:
        time.sleep(0.01)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    print("done", name)
    return 7
"""
SERVER = f"""{WORK}
import socket
from lskd_study.runs.forkserver import serve
with socket.socket(fileno=int(sys.argv[1])) as listener:
    serve(listener, int(sys.argv[2]), do)
"""
JOB = f"""{WORK}
from lskd_study.runs.forkserver import run_forked
status = run_forked(sys.argv[1:])
sys.exit(do(sys.argv[1:]) if status is None else status)
"""


class Server:
    """Serves `do`, and starts jobs."""

    def __init__(self, folder: Path, code: str = SERVER) -> None:
        self.folder = folder
        life, alive = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{folder}")
            listener.listen()
            self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "LSKD_FORKSERVER": str(folder)}
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(listener.fileno()), str(life)],
                pass_fds=(listener.fileno(), life),
                env=self.environment,
            )
        os.close(life)
        self.let_go = functools.cache(lambda: os.close(alive))
        self.jobs: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, what: str, **environment: str) -> tuple["subprocess.Popen[bytes]", int]:
        """Start a job; return it, and the process that does its work, once it does."""
        command = [sys.executable, "-c", JOB, name, what]
        environment = {**self.environment, **environment}
        with (self.folder / f"{name}.log").open("w") as log:
            job = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log)
        self.jobs.append(job)
        while not (self.folder / f"{name}.txt").exists():
            assert job.poll() is None or (self.folder / f"{name}.txt").exists()
        pid, cwd, threads = (self.folder / f"{name}.txt").read_text().splitlines()
        assert cwd == str(self.folder)
        assert threads == environment["OMP_NUM_THREADS"]
        return job, int(pid)

    def close(self) -> None:
        self.let_go()
        for process in (self.process, *self.jobs):
            process.kill()
            process.wait()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    with contextlib.closing(Server(tmp_path)) as found:
        yield found


def is_over(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=60)
    return not psutil.pid_exists(pid)


def test_a_job_is_done_by_a_fork_and_ends_as_that_does(server):
    job, run = server.start("a", "end")
    assert run != job.pid
    assert job.wait() == 7
    assert (server.folder / "a.log").read_text() == "done a\n"
    killed, _ = server.start("b", "kill")
    assert killed.wait() == 128 + signal.SIGKILL
    assert server.start("c", "interrupt")[0].wait() == 1  # KeyboardInterrupt, which `do` does not catch


def test_what_asks_a_job_to_end_asks_its_run(server):
    job, run = server.start("a", "wait")
    other, _ = server.start("b", "wait")
    job.terminate()
    assert job.wait() == 7
    assert other.poll() is None
    assert is_over(run)


def test_a_server_that_is_killed_before_its_job_knows_of_the_run_has_begun_none(tmp_path):
    killed = "def answer(*_): time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    code = SERVER.replace("\nimport socket\n", f"\nimport socket\n{killed}\n")
    code = code.replace(
        "with socket", "import lskd_study.runs.forkserver as f; f._answer = answer\nwith socket"
    )
    with contextlib.closing(Server(tmp_path, code)) as server:
        job, run = server.start("a", "end")
        assert run == job.pid
        assert job.wait() == 7
        assert (tmp_path / "a.log").read_text() == "done a\n"


def test_a_run_ends_with_a_killed_job_and_with_a_killed_server(server):
    job, run = server.start("a", "wait")
    job.kill()
    assert is_over(run)
    job, run = server.start("b", "wait")
    server.process.kill()
    assert job.wait() == 128 + signal.SIGKILL
    assert is_over(run)
    job, run = server.start("c", "end")  # nobody is there any more
    assert run == job.pid
    assert job.wait() == 7


def test_a_job_of_other_threads_does_its_work_itself(server):
    job, run = server.start("a", "end", OMP_NUM_THREADS="2")
    assert run == job.pid
    assert job.wait() == 7


def test_the_server_ends_when_nobody_can_ask_and_all_runs_have_ended(server):
    job, _ = server.start("a", "wait")
    server.let_go()
    job.terminate()
    assert job.wait() == 7
    assert server.process.wait(60) == 0


def test_what_interrupts_a_job_before_its_run_is_there_ends_it(server):
    """A terminal's Ctrl-C reaches the job while the server still imports."""
    server.process.send_signal(signal.SIGSTOP)
    command = [sys.executable, "-c", JOB, "a", "wait"]
    job = subprocess.Popen(command, cwd=server.folder, env=server.environment)
    server.jobs.append(job)
    while not has_handler(job.pid):
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    server.process.kill()
    assert job.wait() == 128 + signal.SIGINT
    assert not (server.folder / "a.txt").exists()


def has_handler(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_server_that_cannot_import_is_no_harm_and_none_stays_behind():
    with forking(["no_such_module"], 1, os.environ) as (variables, inherited):
        assert len(inherited) == 1
        found = started()
        found.wait(60)
        with socket.socket(socket.AF_UNIX) as asking, pytest.raises(ConnectionRefusedError):
            asking.connect(f"\0{variables['LSKD_FORKSERVER']}")
    with contextlib.suppress(KeyError), forking(["torch._dynamo"], 1, os.environ):
        found = started()
        raise KeyError  # what is wrong with a study is said at once
    assert not found.is_running()


def started() -> psutil.Process:
    """Return the server that this process has started last."""
    servers = [
        child for child in psutil.Process().children() if "lskd_study.runs.forkserver" in child.cmdline()
    ]
    return max(servers, key=psutil.Process.create_time)
