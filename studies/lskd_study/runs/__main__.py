"""One job of a study: ``python -m lskd_study.runs PLAN RUN``; what a rule of the workflow executes."""

import sys

from lskd_study.runs.forkserver import run_forked


def main(arguments: list[str] | None = None) -> int:
    """Do one run; returns the exit status. What went wrong is one line on stderr, the rest is in the log."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m lskd_study.runs PLAN RUN", file=sys.stderr)
        return 2
    status = run_forked(arguments)
    if status is None:
        from lskd_study.runs.job import do_job  # imports torch

        status = do_job(arguments)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
