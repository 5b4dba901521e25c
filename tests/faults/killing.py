"""Commands that get SIGKILL at random moments and are given again, until they are done.

A moment is a time, drawn evenly over the length of the unbroken run from its first checkpoint on, or a step,
drawn as evenly over all that the unbroken run does to its files: it then ends with half of a write done, or
just before a file is brought to the disk, renamed, linked, cut or removed (steps.c). One of ten is earlier.
"""

import contextlib
import csv
import math
import os
import random
import select
import shutil
import signal
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

import forked

TABLE = Path(__file__).parents[2] / "docs" / "reliability" / "kills.csv"
KILLS, SHORT = 25, 1  # of each kind in the long form and in the short one, at least


@dataclass
class Row:
    """What became of the commands of a kind: a row of the table."""

    kind: str
    kills: int = 0
    before_a_checkpoint: int = 0  # of these: there was nothing yet to go on from
    in_a_write: int = 0  # of these
    resumes: int = 0  # how often the same command was given again
    runs: int = 0  # that were killed, once or more
    equal: int = 0  # of these: at their end the unbroken one's equals, bit for bit
    seed: int = 0
    seconds: int = 0


@dataclass
class Moment:
    """When a command is killed: after seconds, or at a step; neither: it ends by itself."""

    seconds: float = math.inf
    step: int | None = None

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s" if self.step is None else f"at step {self.step}"


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        killed: whether it was.
        seconds: how long it took.
        steps: their letters.
        first: seconds and steps until its first checkpoint.
    """

    status: int = 0
    output: str = ""
    killed: bool = False
    seconds: float = 0
    steps: str = ""
    first: tuple[float, int] | None = None


@dataclass
class Command:
    """A command that is given in a run's folder, and writes there.

    Attributes:
        words: the command line.
        imported: what the process has imported that it is forked from.
        checkpoint: a pattern of what it goes on from.
    """

    words: Sequence[object]
    imported: tuple[str, ...]
    checkpoint: str
    ends = "itself"  # what a step ends: itself, all, or nothing: then it is killed as after seconds

    def start(self, library: Path | None, folder: Path, moment: Moment) -> Ended:
        """Start it, kill it at the moment, and wait for its end; ``library``: steps.c, compiled."""
        with tempfile.TemporaryDirectory() as scratch:
            steps, ended = Path(scratch, "steps"), Ended()
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            if library is not None:
                environment |= {"LD_PRELOAD": str(library), "LSKD_STEPS": str(steps)}
                environment |= {"LSKD_STEPS_BELOW": str(folder.resolve())}
            if moment.step is not None and self.ends != "nothing":
                environment["LSKD_KILL_AT"] = str(moment.step)
            if self.ends == "all":
                environment["LSKD_KILL_GROUP"] = "1"

            def watch(process: int) -> None:
                """Kill the process when it is time; see when there is a first checkpoint."""
                begun, handle = time.monotonic(), os.pidfd_open(process)
                while not select.select([handle], [], [], 0.02)[0]:
                    seconds, count = time.monotonic() - begun, steps.stat().st_size if steps.exists() else 0
                    if ended.first is None and self.has_begun(folder):
                        ended.first = seconds, count
                    asked = moment.step is not None and self.ends == "nothing" and count >= moment.step
                    if (asked or seconds >= moment.seconds) and not ended.killed:
                        ended.killed = self.kill(process)
                ended.seconds = time.monotonic() - begun
                os.close(handle)

            imported = (*self.imported, "faults.killing")  # or the server may be one that counts no steps
            done = forked.run(*self.words, imported=imported, cwd=folder, env=environment, watch=watch)
            ended.status, ended.output = done.returncode, done.stdout + done.stderr
            ended.steps = steps.read_text() if steps.exists() else ""
            ended.killed |= "LSKD_KILL_AT" in environment and len(ended.steps) >= (moment.step or 0)
            return ended

    def has_begun(self, folder: Path) -> bool:
        """Return whether there is something to go on from."""
        return any(folder.glob(self.checkpoint))

    def kill(self, process: int) -> bool:
        """Kill the command, which leads a group; return whether there was something to kill."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
            return True
        return False


class Killer:
    """Kills commands of a kind as often as is wanted, and compares what they come to.

    Args:
        library: steps.c, compiled; without a compiler they are killed after seconds alone.
        seed: of the moments.
        long: the long form, whose rows go into the table.
    """

    def __init__(self, library: Path | None, seed: int, long: bool) -> None:
        self.library, self.seed, self.long = library, seed, long
        self.unbroken: dict[Path, Ended] = {}

    def kill(
        self,
        kind: str,
        folder: Path,
        command: Command,
        assert_same: Callable[[Path, Path], None],
        begin: Callable[[Path], object] = lambda run: run.mkdir(),
        in_a_row: int = 4,
    ) -> None:
        """Kill runs below a folder, give their command again until they are done, and compare them.

        Args:
            kind: of command, by its name in the table.
            folder: kinds with the same one are compared with the same unbroken run.
            assert_same: fails where the second folder is not as the first one, that of the unbroken run.
            begin: makes a run's folder, with what is there before.
            in_a_row: kills of one run, which then goes on to its end.
        """
        wanted, in_a_row = (KILLS, in_a_row) if self.long else (SHORT, SHORT)
        row, begun = Row(kind, seed=self.seed), time.monotonic()
        draws = random.Random(f"{self.seed} {kind}")

        def say(what: str) -> None:
            print(f"{kind} (seed {self.seed}): {what}", flush=True)

        whole = folder / "whole"
        unbroken = self._unbroken(whole, command, begin)
        last = len(unbroken.steps)
        assert unbroken.first is not None, f"no {command.checkpoint}"
        assert last or self.library is None, "no step was counted"
        say(f"unbroken: {last} steps, {unbroken.seconds:.1f} s; a checkpoint after {unbroken.first}")
        while row.kills < wanted:
            run, before, gone = folder / f"run of {kind}", row.kills, 0.0
            shutil.rmtree(run, ignore_errors=True)
            begin(run)
            while True:
                stepwise = self.library and not (self.long and draws.random() < 0.4)
                length, first = last, unbroken.first[1]
                if not stepwise:
                    length, first = unbroken.seconds, unbroken.first[0]
                bounds = [first / length, 1]  # before there is a checkpoint nothing can go wrong
                if row.kills > before:
                    bounds = [0, max(1 - gone, 0.2)]  # of what is left
                elif self.long and draws.random() < 0.1:
                    bounds = [0, first / length]
                place = draws.uniform(*bounds)
                moment = Moment(step=math.ceil(place * last)) if stepwise else Moment(place * length)
                if row.kills == before + in_a_row:
                    moment = Moment()
                done = command.start(self.library, run, moment)
                if not done.killed:
                    break
                gone += place
                inside = moment.step is not None and done.steps[moment.step - 1] == "w"
                inside &= command.ends != "nothing"
                early = not command.has_begun(run)
                row.kills += 1
                row.before_a_checkpoint += early
                row.in_a_write += inside
                row.resumes += 1
                say(f"killed {moment}{' in a write' * inside}{', before a checkpoint' * early}")
            logs = "".join(f"\n{log}:\n{log.read_text()[-2000:]}" for log in run.glob("out/*.log"))
            row.runs += row.kills > before
            try:
                assert done.status == 0, f"{run}:\n{done.output[-5000:]}{logs}"
                assert_same(whole, run)
                row.equal += row.kills > before
            finally:
                row.seconds = round(time.monotonic() - begun)
                if self.long:
                    write_row(row)
            left = (time.monotonic() - begun) / max(row.kills, 1) * max(wanted - row.kills, 0)
            say(f"equal; {row.kills} of {wanted} kills, about {left:.0f} s left")
        say(str(row))

    def _unbroken(self, whole: Path, command: Command, begin: Callable[[Path], object]) -> Ended:
        if whole not in self.unbroken:
            begin(whole)
            self.unbroken[whole] = command.start(self.library, whole, Moment())
            assert self.unbroken[whole].status == 0, self.unbroken[whole].output
        return self.unbroken[whole]


def write_row(row: Row) -> None:
    """Put a row into the table, in the place of the last run's."""
    TABLE.parent.mkdir(exist_ok=True)
    columns = [column.name for column in fields(Row)]
    rows = []
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if old["kind"] != row.kind]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, asdict(row)], key=lambda one: one["kind"]))


def assert_same_files(whole: Path, run: Path, unless: Sequence[str] = ()) -> None:
    """Assert that two folders have the same files, bit for bit; of torch's the same content.

    Args:
        unless: patterns of names of files and folders that contain times, which need not even be there.
    """
    names = []
    for root in (whole, run):
        files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        names.append({str(path) for path in files if not _named(path, unless)})
    assert names[0] == names[1], f"in one of two alone: {sorted(names[0] ^ names[1])}"
    other = []
    for name in sorted(names[0]):
        if name.endswith((".pt", ".pth", ".pth.tar")):
            assert_same_content(load(whole / name), load(run / name), name)
        elif (whole / name).read_bytes() != (run / name).read_bytes():
            other.append(name)
    assert not other, f"of other content: {other}"


def _named(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(part, pattern) for part in path.parts for pattern in patterns)


def load(path: Path) -> Any:
    """Load a checkpoint of any trainer, which a test has made itself.

    timm's saver notes which files it had kept; of these it reads back those that are there.
    """
    state = torch.load(path, weights_only=False)
    if "saver" in state:
        kept = state["saver"]["checkpoint_files"]
        state["saver"]["checkpoint_files"] = [file for file in kept if path.with_name(file[0]).exists()]
    return state


def assert_same_content(one: Any, other: Any, where: str) -> None:
    """Assert that what two checkpoints contain is the same, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, Namespace):
        # timm's arguments: --resume auto is noted as the checkpoint that it came to.
        one, other = ({**vars(args), "resume": None} for args in (one, other))
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name, value in one.items():
            assert_same_content(value, other[name], f"{where}: {name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (value, its) in enumerate(zip(one, other, strict=True)):
            assert_same_content(value, its, f"{where}: {place}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert one.tobytes() == other.tobytes(), where
    else:
        assert one == other, where
