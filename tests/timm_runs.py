"""Runs of the command `timm` in processes of their own, and what a run leaves."""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked

SCRIPT = os.environ.get("TIMM_TRAIN_SCRIPT", "")
needs_script = pytest.mark.skipif(
    not Path(SCRIPT).is_file(), reason="TIMM_TRAIN_SCRIPT names no upstream train.py of timm >= 1.0.27"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher * (processes > 1)), "-m", "timm_ls_kd", *map(str, arguments)]


def run(*arguments, processes=1, fresh=False, status=0):
    """Run the command; one process is forked from one that has imported timm, unless it is to be fresh."""
    environment = os.environ | ENVIRONMENT
    if processes == 1 and not fresh:
        words = ["-m", "timm_ls_kd", *arguments]
        result = forked.run(*words, imported=("torchvision", "timm"), env=environment)
    else:
        words = command(*arguments, processes=processes)
        result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode == 0) == (status == 0), result.stdout + result.stderr
    assert processes > 1 or result.returncode == status, result.stdout + result.stderr
    return result


def summary(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(folder, name="last.pth.tar"):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(folder / name, weights_only=True)["state_dict"])
