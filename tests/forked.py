"""Commands in processes of their own that need not import anything: each is forked from one that has.

What a command sees is a fresh interpreter with some modules imported: its own arguments, folder, environment,
files, exit hooks, and end. It saves the seconds that importing torch and a framework takes.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, NoReturn

_servers: dict[tuple[str, ...], tuple[subprocess.Popen[str], IO[str]]] = {}


def run(
    *words: object,
    imported: tuple[str, ...],
    cwd: object = None,
    env: dict[str, str] | None = None,
    watch: Callable[[int], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a console script, a file of Python, or `-m` and a module; return its status and output.

    Args:
        words: the command line; a leading `sys.executable` may be there or not.
        imported: modules that it finds imported, beside torch and the core; the first command imports them.
        cwd: its folder; None: this one.
        env: its environment; None: this one. What Python itself reads is fixed by the first command.
        watch: is told its process, which leads a session of its own, when it begins.
    """
    command = {
        "argv": [str(word) for word in words[words[0] == sys.executable :]],
        "cwd": str(cwd or Path.cwd()),
        "env": env or dict(os.environ),
    }
    if imported not in _servers:
        answers, answer = os.pipe()
        server = subprocess.Popen(
            [sys.executable, __file__, str(answer), *imported],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # what the modules print
            text=True,
            env=command["env"],
            pass_fds=[answer],
            start_new_session=True,
        )
        os.close(answer)
        _servers[imported] = server, open(answers)  # noqa: SIM115
    server, statuses = _servers[imported]
    groups = [server.pid]
    with tempfile.TemporaryDirectory() as folder:
        command |= {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        try:
            print(json.dumps(command), file=server.stdin, flush=True)
            groups.append(int(statuses.readline()))
            if watch is not None:
                watch(groups[1])
            status = int(statuses.readline())
        except BaseException:  # a test's time is up, or nothing can be imported
            for group in groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            del _servers[imported]
            raise
        output = [Path(folder, name).read_text(errors="backslashreplace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command["argv"], status, *output)


def _serve(answer: int) -> None:
    """Answer commands until there are no more; return in each command's own process, ready for it."""
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # or a command's first collection would copy all of it
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            os.write(answer, b"%d\n" % os.getpid())
            for number, file in enumerate((os.devnull, command["stdout"], command["stderr"])):
                opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(opened, number)
                os.close(opened)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115
            os.chdir(command["cwd"])
            os.environ.clear()
            os.environ.update(command["env"])
            sys.argv = command["argv"]
            os.close(answer)
            return
        os.write(answer, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit()


def _execute(name: str) -> None:
    if name == "-m":
        sys.path[0] = os.getcwd()
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif name.endswith(".py"):
        sys.path[0] = str(Path(name).parent)
        runpy.run_path(name, run_name="__main__")
    else:
        (script,) = entry_points(group="console_scripts", name=Path(name).name)
        sys.exit(script.load()())


def _end(code: object) -> NoReturn:
    """End as the interpreter does, but for taking down all that was imported, which costs a second or two."""
    threading._shutdown()  # type: ignore[attr-defined]
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    # Every optimiser imports torch._dynamo at its first step.
    for module in ("torch._dynamo", "torch._inductor.utils", "lskd", *sys.argv[2:]):
        importlib.import_module(module)
    _serve(int(sys.argv[1]))
    # As in the tests themselves (pyproject.toml), but for what they run in an interpreter of its own.
    warnings.filterwarnings("error", module=r"(lskd|lskd_study|timm_ls_kd|fairseq_kd|mmcls_bnn)(\.|$)")
    # timm closes an image's file when nothing refers to it any more, which may be in our code.
    warnings.filterwarnings("ignore", category=ResourceWarning)
    for message in (
        r"\s*'config' is validated against ConfigStore schema",
        "Converting a tensor with requires_",
    ):
        warnings.filterwarnings("ignore", message)
    try:
        _execute(sys.argv[0])
    except SystemExit as end:
        _end(end.code)
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(None)
