"""Commands that get SIGKILL at random moments and are given again, until they are done.

A moment is a time, drawn evenly over the length of the unbroken run, or a step, drawn evenly over all that
the unbroken run does to its files: it then ends with half of a write done, or just before a file is brought
to the disk, renamed, linked, cut or removed (steps.c).
"""

import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
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
    in_a_write: int = 0  # of these
    resumes: int = 0  # how often the same command was given again
    runs: int = 0  # that were killed, once or more
    equal: int = 0  # of these: at their end the unbroken one's equals, bit for bit
    seed: int = 0
    seconds: int = 0


@dataclass
class Moment:
    """When a command is killed: after seconds, or at a step; neither: it ends by itself."""

    seconds: float | None = None
    step: int | None = None

    def __str__(self) -> str:
        return f"after {self.seconds:.2f} s" if self.step is None else f"at step {self.step}"


@dataclass
class Ended:
    """How a command ended: whether it was killed, how long it took, and the letters of its steps."""

    status: int
    output: str
    killed: bool
    seconds: float = 0
    steps: str = ""


@dataclass
class Command:
    """A command that is given in a run's folder, and writes there.

    Attributes:
        words: the command line.
        group: whether all that was started ends with the process whose step it is, in a real one.
        imported: what the process has imported that it is forked from; nothing: it is always a real one.
    """

    words: Sequence[object]
    imported: tuple[str, ...] = ()
    group: bool = True

    def start(self, library: Path, folder: Path, moment: Moment, real: bool) -> Ended:
        """Start it, kill it at the moment, and wait for its end; ``real``: it is not forked."""
        with tempfile.TemporaryDirectory() as scratch:
            steps = Path(scratch, "steps")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            environment |= {"LD_PRELOAD": str(library), "LSKD_STEPS": str(steps)}
            environment |= {"LSKD_STEPS_BELOW": str(folder.resolve())}
            if moment.step is not None:
                environment["LSKD_KILL_AT"] = str(moment.step)
            if real and self.group:
                environment["LSKD_KILL_GROUP"] = "1"
            begun = time.monotonic()
            done = (self._run if real else self._fork)(folder, environment, moment)
            done.seconds = time.monotonic() - begun
            done.steps = steps.read_text() if steps.exists() else ""
            done.killed |= len(done.steps) >= (moment.step or math.inf)
            return done

    def _fork(self, folder: Path, environment: dict[str, str], moment: Moment) -> Ended:
        done = forked.run(
            *self.words,
            imported=(*self.imported, "faults.killing"),  # or the server may be one that counts no steps
            cwd=folder,
            env=environment,
            killed_after=moment.seconds,
        )
        return Ended(done.returncode, done.stdout + done.stderr, done.returncode == -signal.SIGKILL)

    def _run(self, folder: Path, environment: dict[str, str], moment: Moment) -> Ended:
        words = [str(word) for word in self.words]
        if words[0] == "-m" or words[0].endswith(".py"):
            words.insert(0, sys.executable)
        elif "/" not in words[0]:  # a console script
            words[0] = str(Path(sys.executable).with_name(words[0]))
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            killed = False
            try:
                process.wait(moment.seconds)
            except subprocess.TimeoutExpired:
                killed = self.kill(process)
                process.wait()
            said.seek(0)
            return Ended(process.returncode, said.read(), killed)

    def kill(self, process: subprocess.Popen[bytes]) -> bool:
        """Kill a real command and all that it started; return whether there was something to kill."""
        os.killpg(process.pid, signal.SIGKILL)
        return True


class Killer:
    """Kills commands of a kind as often as is wanted, and compares what they come to.

    Args:
        library: steps.c, compiled.
        seed: of the moments.
        long: the long form, whose rows go into the table.
    """

    def __init__(self, library: Path, seed: int, long: bool) -> None:
        self.library, self.seed, self.long = library, seed, long

    def kill(
        self,
        kind: str,
        folder: Path,
        command: Command,
        assert_same: Callable[[Path, Path], None],
        begin: Callable[[Path], object] = lambda run: run.mkdir(),
        in_a_row: int = 4,
        wanted: int = 0,
        steps: bool = True,
    ) -> None:
        """Kill runs below a folder, give their command again until they are done, and compare them.

        Args:
            kind: of command, by its name in the table.
            assert_same: fails where the second folder is not as the first one, that of the unbroken run.
            begin: makes a run's folder, with what is there before.
            in_a_row: kills of one run, which then goes on to its end.
            wanted: kills, where they are not as many as of other kinds.
            steps: whether it is killed at steps too, and not only after seconds.
        """
        wanted, in_a_row = (wanted or KILLS, in_a_row) if self.long else (SHORT, SHORT)
        row, begun = Row(kind, seed=self.seed), time.monotonic()
        draws = random.Random(f"{self.seed} {kind}")

        def say(what: str) -> None:
            print(f"{kind} (seed {self.seed}): {what}", flush=True)

        forms = [True] if not command.imported else [True, False] if self.long else [False]
        whole, unbroken = folder / "whole", {}
        for real in [*forms, *([False] if len(forms) > 1 else [])]:  # the first fork has more to import
            shutil.rmtree(whole, ignore_errors=True)
            begin(whole)
            unbroken[real] = command.start(self.library, whole, Moment(), real)
            assert unbroken[real].status == 0, unbroken[real].output
        last = len(unbroken[forms[-1]].steps)
        assert last, "no step was counted"
        say(f"unbroken: {last} steps, {' and '.join(f'{one.seconds:.1f} s' for one in unbroken.values())}")
        while row.kills < wanted:
            run, before = folder / f"run{row.runs}", row.kills
            shutil.rmtree(run, ignore_errors=True)
            begin(run)
            while True:
                # One of eight is a real command, which is killed while it imports most of the time.
                real = forms[0] if draws.random() < 0.12 else forms[-1]
                moment = Moment(draws.uniform(0, unbroken[real].seconds))
                if steps and draws.random() < 0.6:
                    moment = Moment(step=draws.randint(1, last))
                if row.kills == before + in_a_row:
                    moment = Moment()
                done = command.start(self.library, run, moment, real)
                if not done.killed:
                    break
                inside = moment.step is not None and done.steps[moment.step - 1] == "w"
                row.kills += 1
                row.in_a_write += inside
                row.resumes += 1
                say(f"killed {moment}{' in a write' * inside}{', a real command' * real}")
            assert done.status == 0, f"{run}:\n{done.output[-5000:]}"
            assert_same(whole, run)
            row.runs += row.kills > before
            row.equal += row.kills > before
            shutil.rmtree(run)
            left = (time.monotonic() - begun) / max(row.kills, 1) * max(wanted - row.kills, 0)
            say(f"equal; {row.kills} of {wanted} kills, about {left:.0f} s left")
            row.seconds = round(time.monotonic() - begun)
            if self.long:
                write_row(row)
        say(str(row))


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
    """Load a checkpoint of any trainer, which a test has made itself."""
    return torch.load(path, weights_only=False)


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
