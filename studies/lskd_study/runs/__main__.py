"""One job of a study: ``python -m lskd_study.runs PLAN RUN``; what a rule of the workflow executes."""

import errno
import sys
from pathlib import Path

from lskd import LskdError
from lskd.base.files import cannot_write
from lskd_study.base.progress import say
from lskd_study.plan.plan import Plan
from lskd_study.runs.job import run_job


def main(arguments: list[str] | None = None) -> int:
    """Do one run; returns the exit status. What went wrong is one line on stderr, the rest is in the log."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m lskd_study.runs PLAN RUN", file=sys.stderr)
        return 2
    try:
        plan = Plan.read(Path(arguments[0]))
        run_job(plan, plan.store_by_id.get(arguments[1]) or plan.run(arguments[1]))
    except LskdError as error:
        say(f"lskd: error: {error}", timed=False)
        return 1
    except OSError as error:
        where = error.filename or plan.output
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = cannot_write(where, error) if full else f"{where}: {error.strerror}"
        say(f"lskd: error: {reason}", timed=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
