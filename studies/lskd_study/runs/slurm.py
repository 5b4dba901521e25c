"""What a study on SLURM needs beyond Snakemake's executor: how it asks for jobs' states, jobs left behind."""

import argparse
import hashlib
import subprocess
import time
from pathlib import Path

_SECONDS = 60  # that a cancelled job may take to end


def more_options(args: argparse.Namespace, root: Path) -> list[str]:
    """Return options for the executor that the user has not set.

    Without accounting its default way to ask for jobs' states never gets an answer, and it waits for ever.
    """
    words = []
    if not isinstance(args.slurm_status_command, str) and not _accounting():
        words += ["--slurm-status-command", "squeue"]
    if not isinstance(args.slurm_jobname_prefix, str):
        words += ["--slurm-jobname-prefix", job_prefix(root)]
    return words


def job_prefix(root: Path) -> str:
    """Return what the names of all jobs of the study in that output folder begin with."""
    return f"lskd-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"


def cancel_orphans(root: Path) -> int:
    """Cancel jobs that a killed study left in the queue, wait for their end and return their number.

    Nobody collects their results, and each holds the folder of a run. Only for who holds the study's lock.
    """
    orphans = _queued(job_prefix(root))
    if orphans:
        subprocess.run(["scancel", *orphans], check=False)
        end = time.monotonic() + _SECONDS
        while _queued(job_prefix(root)) and time.monotonic() < end:
            time.sleep(1)
    return len(orphans)


def _queued(prefix: str) -> list[str]:
    done = subprocess.run(
        ["squeue", "--me", "--noheader", "--format", "%i %j"], capture_output=True, text=True, check=False
    )
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return [row[0] for row in rows if len(row) == 2 and row[1].startswith(f"{prefix}_")]


def _accounting() -> bool:
    try:
        done = subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
