"""What this package's commands have in common."""

import sys
from collections.abc import Callable

from lskd import DivergedError, LskdError


def run(work: Callable[[], str]) -> int:
    """Print what `work` returns; an error of the user is one line on stderr and status 2 (diverged: 3)."""
    try:
        print(work())
    except LskdError as error:
        print(f"mmcls_bnn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return DivergedError.STATUS if isinstance(error, DivergedError) else 2
    return 0
