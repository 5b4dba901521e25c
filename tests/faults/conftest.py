"""What kills commands at moments that follow from the seed that pytest prints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from faults.killing import Killer


@pytest.fixture(scope="session")
def killer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    library = None
    if shutil.which("cc") is not None:
        library = tmp_path_factory.mktemp("steps") / "steps.so"
        source = Path(__file__).with_name("steps.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return Killer(library, request.config.getoption("randomly_seed", 0), request.config.getoption("--long"))
