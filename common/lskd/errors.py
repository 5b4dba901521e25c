"""Errors that a user can cause; each message is one line: what is wrong, and what to do."""

import argparse
import errno
import os
import re
import sys
from typing import NoReturn

# torch's words. It raises the first wherever the process happens to be when one that loads for it dies.
_LOADING = re.compile(r"DataLoader worker \(pid.*")
_RANK = re.compile(r"gloo/transport/\S*pair\.cc|ncclRemoteError|remote process exited|process \d+ terminated")
# Of the store that the processes meet by, once the process that has it is gone.
_STORE = re.compile(r"Connection reset|Broken pipe|remote server shutdown")
_NO_PATH, _FORBIDDEN = {errno.ENAMETOOLONG, errno.ELOOP}, {errno.EACCES, errno.EROFS}
_JOINERS = "\u00a0\u200c\u200d"  # within names of many languages, and within emoji


class LskdError(Exception):
    """Something the user can fix. Command lines print the message as one line and exit with 2."""


class CheckpointError(LskdError):
    """A file of weights that is missing, damaged, unsafe or not what it should be."""


class SoftLabelsError(LskdError):
    """Stored soft labels that are missing, damaged, unfinished, in use, or of another teacher or data."""


class DivergedError(LskdError):
    """A run whose loss, weights or outputs are no longer finite: it failed, and no number of it counts.

    Command lines print the message as one line and exit with ``STATUS``, which tells such a run from a
    mistake in its settings.
    """

    STATUS = 3


class ShownParser(argparse.ArgumentParser):
    """A parser whose errors a terminal shows and does not obey: they name what it was given."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with 2."""
        super().error(printable(message))


def report(command: str, error: LskdError) -> int:
    """Print an error as one line, with the rank of a process that is not the first; return its status."""
    rank = os.environ.get("RANK", "0")
    prefix = f"[rank {rank}] " if rank != "0" else ""
    print(f"{command}: error: {prefix}{printable(str(loading_error(error)))}", file=sys.stderr, flush=True)
    return DivergedError.STATUS if isinstance(error, DivergedError) else 2


def printable(text: str) -> str:
    """Return a text in one line that a terminal shows and does not obey: names in it may be anybody's.

    >>> printable("not\\n  \\x1b[2Jgood")
    'not \\\\x1b[2Jgood'
    """
    line = re.sub(r"\s*[\r\n\t]\s*", " ", text.strip())
    return "".join(one if one.isprintable() or one in _JOINERS else ascii(one)[1:-1] for one in line)


def loading_error(error: LskdError) -> LskdError:
    """Return an error as it was raised, where it comes from a loading process, wrapped in its traceback."""
    lines = str(error).strip().splitlines()
    if not lines or not lines[0].startswith("Caught ") or "DataLoader worker" not in lines[0]:
        return error
    return type(error)(re.sub(r"^(\w+\.)*\w*Error: ", "", lines[-1]))


def from_outside(error: BaseException) -> LskdError | None:
    """Return the one line for what is no fault of this process; else None.

    Another process of the run has died, a path that was given is none (its name is too long, or it is a
    link to itself), which even a question like `Path.exists` raises, anywhere, or one may not be used
    (rights, a disk that is read-only), which a framework finds before us.

    >>> from_outside(RuntimeError("NCCL error: invalid usage, duplicate GPU")) is None
    True
    >>> from_outside(ValueError("Symlink loops are no samples")) is None
    True
    >>> str(from_outside(PermissionError(errno.EACCES, "Permission denied", "/out")))
    "[Errno 13] Permission denied: '/out'; check the path"
    >>> from_outside(PermissionError(errno.EACCES, "Permission denied")) is None  # a semaphore, a port
    True
    >>> died = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    >>> str(from_outside(died))[:36]
    'another process of this run has died'
    """
    no_path = isinstance(error, OSError) and error.errno in _NO_PATH
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        no_path = error.filename is not None
    # As pathlib says it before Python 3.13.
    if no_path or (type(error) is RuntimeError and str(error).startswith("Symlink loop")):
        return LskdError(f"{one_line(error, 300)}; check the path")
    if not isinstance(error, RuntimeError) and type(error).__name__ != "ProcessExitedException":
        return None
    text, goes_on = " ".join(str(error).split()), "the run goes on from its last checkpoint"
    if found := _LOADING.search(text):
        advice = "if memory was short, lower the number of loading processes"
        return LskdError(f"a process that loads data has died ({found[0].rstrip('. ')}); {advice}; {goes_on}")
    if _RANK.search(text) or (type(error).__name__ == "DistNetworkError" and _STORE.search(text)):
        reason, advice = text.partition(". This is typically")[0][:300], "what it said itself tells why"
        return LskdError(f"{_died(text)} of this run has died ({reason}); {advice}; {goes_on}")
    return None


def _died(text: str) -> str:
    """Name the process that has died; of more than two no error says which of them it is."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        rank, alone = distributed.get_rank(), distributed.get_world_size() == 2
        if _STORE.search(text) and not _RANK.search(text):  # the store is rank 0's, or torchrun's own
            rank, alone = 1, rank != 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if alone and "imeout" not in text:
            return f"rank {1 - rank}"
    return "another process"


def one_line(error: BaseException, limit: int = 160) -> str:
    """Fold an exception's text into one line of at most ``limit`` characters.

    >>> one_line(ValueError("not\\n  good"))
    'not good'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
