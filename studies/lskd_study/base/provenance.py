"""What a result was made with: versions, hardware, git state."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("lskd", "torch", "timm", "torchvision", "torchmetrics", "numpy", "snakemake", "mmcls", "mmengine"),
    *("mmcv", "mmcv-lite", "scipy"),
    *("ve-fairseq", "fairseq-fixed", "hydra-core", "sacrebleu", "sacremoses", "subword-nmt"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter; a missing one is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Return CPU, number of usable cores and GPUs, with the CUDA that PyTorch drives them by."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"cpu": cpu_name(), "cores": usable_cores(), "gpus": gpus, "system": platform.system()}
    return {**machine, "cuda": torch.version.cuda} if gpus else machine


def cpu_name() -> str:
    """Return the CPU's name as the operating system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it, for a folder in a git checkout; None elsewhere."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            [git, "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package below somebody else's repository is not that repository's code.
        if not ask("ls-files", "--", str(folder)):
            return None
        return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain"))}
    except (subprocess.SubprocessError, OSError):
        return None
