"""Errors that a user can cause; each message is one line: what is wrong, and what to do."""

import os
import sys


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


def report(command: str, error: LskdError) -> int:
    """Print an error as one line, with the rank of a process that is not the first; return its status."""
    rank = os.environ.get("RANK", "0")
    prefix = f"[rank {rank}] " if rank != "0" else ""
    print(f"{command}: error: {prefix}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return DivergedError.STATUS if isinstance(error, DivergedError) else 2


def one_line(error: BaseException, limit: int = 160) -> str:
    """Fold an exception's text into one line of at most ``limit`` characters.

    >>> one_line(ValueError("not\\n  good"))
    'not good'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
