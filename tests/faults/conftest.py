"""What kills commands at moments that follow from the seed that pytest prints."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.killing import Killer


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Callable[[str], Path | None]]:
    """Compile a library that is beside the tests, where LD_PRELOAD can name it; None without a compiler."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # that of the tests may have spaces in its name

        def compiled(name: str) -> Path | None:
            if shutil.which("cc") is None:
                return None
            library, source = Path(folder, f"{name}.so"), Path(__file__).with_name(f"{name}.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
            return library

        yield compiled


@pytest.fixture(scope="session")
def killer(request: pytest.FixtureRequest, preloaded: Callable[[str], Path | None]) -> Killer:
    long, seed = request.config.getoption("--long"), request.config.getoption("randomly_seed", 0)
    return Killer(preloaded("steps"), seed, long)
