"""Compile the loss's inner loop when the package is built; without a C compiler the package goes without."""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Vectorised loops over exact numbers: NaN and infinity keep their meaning. The alignment of a row in memory
# must not decide in which order its numbers are added.
FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-ffp-contract=fast"]
GCC_FLAGS = ["-mprefer-vector-width=512", "--param=vect-max-peeling-for-alignment=0"]
ATTEMPTS = [GCC_FLAGS, ["-DLSKD_ONE_TARGET"]]


class CompiledLoss(BuildHookInterface[Any]):
    """Put ``lskd/kernel/rows.so`` into the wheel; of an editable installation, beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this kind of machine."""
        source = Path(self.root, "common", "lskd", "kernel", "rows.c")
        target = source.with_name("rows.so")
        if version != "editable":
            target = Path(self.directory, "rows.so")
            target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if not compile_loss(source, target):
            self.app.display_warning("no C compiler (CC, cc): the loss on a processor is three times slower")
            return
        if version == "editable":
            return
        build_data["force_include"][str(target)] = "lskd/kernel/rows.so"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_loss(source: Path, target: Path) -> bool:
    """Compile for every processor of this kind, or else for the plainest; False where neither can be done."""
    return any(_compiles(source, target, flags) for flags in ATTEMPTS)


def _compiles(source: Path, target: Path, flags: list[str]) -> bool:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *FLAGS, *flags, str(source), "-o", str(target), "-lm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
