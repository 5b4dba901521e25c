"""Where the tests of this folder run: on a card; LSKD_TEST_DEVICE=cpu tries what of them a CPU can do."""

import os
import subprocess
import sys

import pytest
import torch

DEVICE = os.environ.get("LSKD_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    absent = pytest.mark.skip(reason="no CUDA device; LSKD_TEST_DEVICE=cpu tries what a CPU can do")
    for item in items:
        if item.path.parent.name == "gpu" and DEVICE == "cuda" and not torch.cuda.is_available():
            item.add_marker(absent)


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def run():
    """Run a command of this environment; return what it printed."""

    def call(*words, cwd):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    return call
