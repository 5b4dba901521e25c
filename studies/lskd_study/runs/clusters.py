"""What a study on a cluster needs beyond Snakemake's executor for it."""

import argparse
import hashlib
import shlex
import subprocess
import time
from pathlib import Path

from lskd import LskdError
from lskd_study.base.progress import VARIABLE
from lskd_study.plan.plan import Plan

_SNAKEMAKES_IMAGE = "snakemake/snakemake"  # the default, in which there is no lskd
_SECONDS = 60  # that a cancelled job may take to end


def slurm_options(args: argparse.Namespace, root: Path) -> list[str]:
    """Return options for the executor that the user has not set.

    Without accounting its default way to ask for jobs' states never gets an answer, and it waits for ever.
    """
    arguments = []
    if not isinstance(args.slurm_status_command, str) and not _accounting():
        arguments += ["--slurm-status-command", "squeue"]
    if not isinstance(args.slurm_jobname_prefix, str):
        arguments += ["--slurm-jobname-prefix", job_prefix(root)]
    return arguments


def job_prefix(root: Path) -> str:
    """Return what the names of all jobs of the study in that output folder begin with."""
    return f"lskd-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"


def cancel_orphans(root: Path) -> int:
    """Cancel jobs that a killed study left in the queue, wait for their end and return their number.

    Nobody collects their results, and each locks the folder of a run. Only for who has the study's lock.
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


def kubernetes_options(args: argparse.Namespace, plan: Plan) -> list[str]:
    """Return options for the executor, after checking those that only the user can know.

    Raises:
        LskdError: without an image or a volume, and for a study that is not on the volume, lacks its data, or
            has a space in a path, whose parts Snakemake takes for paths in a job.
    """
    if args.container_image.partition(":")[0] == _SNAKEMAKES_IMAGE:
        raise LskdError(
            "--executor kubernetes needs --container-image IMAGE too, an image that contains lskd"
        )
    volumes = args.kubernetes_persistent_volumes
    if not isinstance(volumes, list) or not volumes:
        fix = "the claim of the volume that contains the study"
        raise LskdError(f"--executor kubernetes needs --kubernetes-persistent-volumes CLAIM:PATH too, {fix}")
    mounts = [Path(str(volume).partition(":")[2]) for volume in volumes]
    for folder in (Path(plan.cwd), plan.root, plan.data_dir):
        if not any(folder.resolve().is_relative_to(mount) for mount in mounts):
            known = ", ".join(str(mount) for mount in mounts)
            raise LskdError(f"{folder} is not below {known}; jobs see nothing but that volume")
        if " " in str(folder.resolve()):
            fix = "jobs on Kubernetes would not find it; take another folder"
            raise LskdError(f"{folder.resolve()} has a space in its name; {fix}")
    if plan.prepare and not plan.data_dir.exists():
        raise LskdError(
            f"{plan.data} is not there yet; make it with `lskd {shlex.join(plan.prepare_arguments)}`"
        )
    arguments = ["--config", "copied=true", "--envvars", VARIABLE]
    if not args.default_storage_prefix:
        arguments += ["--default-storage-prefix", str(plan.root.resolve())]
    return arguments
