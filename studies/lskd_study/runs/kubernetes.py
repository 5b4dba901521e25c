"""What a study on Kubernetes needs beyond Snakemake's executor: an image, and a volume with all of it."""

import argparse
import shlex
from pathlib import Path

from lskd import LskdError
from lskd_study.base.progress import VARIABLE
from lskd_study.plan.plan import Plan

_SNAKEMAKES_IMAGE = "snakemake/snakemake"  # the default, in which there is no lskd


def more_options(args: argparse.Namespace, plan: Plan) -> list[str]:
    """Return options for the executor, after checking those that only the user can know.

    Raises:
        LskdError: without an image or a volume, and for a study that is not on the volume or lacks its data.
    """
    if args.container_image.partition(":")[0] == _SNAKEMAKES_IMAGE:
        raise LskdError("--executor kubernetes needs --container-image IMAGE too, an image that holds lskd")
    volumes = args.kubernetes_persistent_volumes
    if not isinstance(volumes, list) or not volumes:
        mend = "the claim of the volume that holds the study"
        raise LskdError(f"--executor kubernetes needs --kubernetes-persistent-volumes CLAIM:PATH too, {mend}")
    mounts = [Path(str(volume).partition(":")[2]) for volume in volumes]
    for folder in (Path(plan.cwd), plan.root, plan.data_dir):
        if not any(folder.resolve().is_relative_to(mount) for mount in mounts):
            known = ", ".join(str(mount) for mount in mounts)
            raise LskdError(f"{folder} is not below {known}; jobs see nothing but that volume")
    if plan.prepare and not plan.data_dir.exists():
        raise LskdError(f"{plan.data} is not there yet; make it with `lskd {shlex.join(plan.prepare_words)}`")
    words = ["--config", "copied=true", "--envvars", VARIABLE]
    if not args.default_storage_prefix:
        words += ["--default-storage-prefix", str(plan.root.resolve())]
    return words
