"""Compile the inner loops when the package is built; without a C compiler the package goes without."""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Vectorised loops over exact numbers: NaN and infinity keep their meaning. The alignment of a row in memory
# must not decide in which order its numbers are added.
FLAGS = ["-O3", "-std=c11", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
GCC_FLAGS = ["-mprefer-vector-width=512", "--param=vect-max-peeling-for-alignment=0"]
ATTEMPTS = [GCC_FLAGS, ["-DLSKD_ONE_TARGET"]]
SOURCES = {
    "common/lskd/kernel/rows.c": ["-ffp-contract=fast"],
    "plugins/mmcls_bnn/binary/xnor.c": ["-ffp-contract=off"],  # every processor rounds as torch does
}


class CompiledLoops(BuildHookInterface[Any]):
    """Put the libraries into the wheel; of an editable installation, beside their sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this kind of machine."""
        for name in SOURCES:
            source = Path(self.root, name)
            target = source.with_suffix(".so")
            if version != "editable":
                target = Path(self.directory, target.name)
                target.parent.mkdir(parents=True, exist_ok=True)
            note = target.with_suffix(".txt")  # what stands in the library's place, for who asks why
            for left in (target, note):
                left.unlink(missing_ok=True)
            reason = compile_source(source, target)
            if reason:
                self.app.display_warning(f"{name}: {reason}; it runs by torch, more slowly")
                note.write_text(reason, encoding="utf-8")
            if version == "editable":
                continue
            made = note if reason else target
            package = Path(*Path(name).parts[1:])  # without the source root
            build_data["force_include"][str(made)] = package.with_suffix(made.suffix).as_posix()
            if reason:
                continue
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_source(source: Path, target: Path) -> str:
    """Compile for every processor of this kind, or else for the plainest; return why neither can be done."""
    own = next(flags for name, flags in SOURCES.items() if source.match(name))
    name = os.environ.get("CC", "cc")
    reason = ""
    for flags in ATTEMPTS:
        command = [*shlex.split(name), *FLAGS, *own, *flags, str(source), "-o", str(target), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError:
            return f"there was no C compiler ({name})"
        if done.returncode == 0:
            return ""
        said = next(
            (line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}"
        )
        reason = f"the C compiler ({name}) failed: {said[:160]}"
    return reason
