"""Every reader under inputs made of sound ones, and the harness under readers that fail."""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuzz.harness import SEED, Outcome, Target, fuzz, kind
from fuzz.targets import TARGETS
from lskd import LskdError

TABLE = Path(__file__).parents[2] / "docs" / "reliability" / "fuzz.csv"
COLUMNS = ("target", "inputs", "accepted", "refused", "failures", "seconds", "seed", "peak_mb")
Note = Callable[[Target, Outcome], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: some inputs take less time than a file on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def note() -> Note:
    """Print what became of a target and how long the rest may take, and note it in the table."""
    begun, done = time.monotonic(), list[str]()

    def add(target: Target, outcome: Outcome) -> None:
        failures = sum(f.times for f in outcome.failures.values())
        numbers = (outcome.inputs, outcome.accepted, outcome.refused, failures)
        numbers += (round(outcome.seconds), _seed(), round(outcome.peak))
        row = dict(zip(COLUMNS, map(str, (target.name, *numbers)), strict=True))
        done.append(target.name)
        left = (time.monotonic() - begun) / len(done) * (len(TARGETS) - len(done)) / 60
        print(f"\n{row}, {left:.0f} min left", flush=True)
        _keep(row)

    return add


def _keep(row: dict[str, str]) -> None:
    """Put a target's row into the table, in place of the one of an earlier run."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if old["target"] != row["target"]]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, row], key=lambda one: one["target"]))


def _seed() -> int:
    return int(os.environ.get("FUZZ_SEED", SEED))


@pytest.mark.unit
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_it_is_read_or_refused_in_one_line(target, folder, note, request):
    """In the long form `FUZZ_MINUTES` bounds the whole, and `FUZZ_SEED` makes other inputs."""
    if request.config.getoption("--long"):
        share = 60 * float(os.environ.get("FUZZ_MINUTES", "inf")) / len(TARGETS)
        outcome = fuzz(target, folder, target.inputs, _seed(), share)
        note(target, outcome)
    else:
        outcome = fuzz(target, folder, target.short)
    kept = Path(tempfile.gettempdir(), "lskd-fuzz")
    lines = []
    for one in outcome.failures.values():
        kept.mkdir(exist_ok=True)
        file = kept / f"{target.name.replace(' ', '-').replace('/', '-')}-{one.number}"
        file.write_bytes(one.data)
        lines.append(
            f"{one.times} times, first input {one.number} of seed {_seed()}: {one.reason}; see {file}"
        )
    assert not lines, "\n".join(lines)
    assert outcome.inputs == outcome.accepted + outcome.refused
    assert outcome.accepted > 0, "the first input is sound"


# The harness itself


@pytest.mark.unit
def test_a_run_of_some_targets_keeps_the_rows_of_the_others(tmp_path, monkeypatch, note):
    monkeypatch.setattr(f"{__name__}.TABLE", tmp_path / "new" / "fuzz.csv")
    for target, inputs in ((TARGETS[1], 7), (TARGETS[0], 8), (TARGETS[1], 9)):
        note(target, Outcome(inputs=inputs))
    rows = list(csv.DictReader((tmp_path / "new" / "fuzz.csv").read_text().splitlines()))
    assert [(row["target"], row["inputs"]) for row in rows] == [
        ("study file", "8"),
        ("study file to plan", "9"),
    ]


def _fails(data: bytes) -> None:
    if b"type" in data:
        raise TypeError("a traceback")
    if b"hang" in data:
        while True:
            pass
    if b"wait" in data:
        signal.pause()
    if b"kill" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"fill" in data:
        assert bytearray(200 << 20).count(b"\1") == 0
    if b"all" in data:
        try:
            bytearray(1 << 50)
        except MemoryError:
            raise LskdError("refused for want of memory") from None
    if b"take" in data:
        raise AssertionError("what was read is not what was written")
    if b"end" in data:
        raise SystemExit(1)
    if b"no" in data:
        raise LskdError("no")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("type", "TypeError @ test_fuzz.py:_fails"),
        ("hang", "hang"),
        ("wait", "hang"),
        ("kill", "crash"),
        ("fill", "memory"),
        ("all", "memory"),
        ("take", "AssertionError @ test_fuzz.py:_fails"),
        ("end", "SystemExit @ test_fuzz.py:_fails"),
        ("no", None),
        ("yes", None),
    ],
)
def test_the_harness_finds_it_and_makes_it_small(folder, monkeypatch, word, found):
    if word == "wait":
        monkeypatch.setattr("fuzz.harness._STUCK", 0.3)
    sound = [b"before " + word.encode() + b" after"]
    seconds = 0.1 if word == "hang" else 1.0
    target = Target("x", lambda _: (sound, _fails), 4, lambda dice, data: data, (), 100, seconds, warm=False)
    outcome = fuzz(target, folder, 4)
    assert outcome.inputs == 4
    if found is None:
        assert not outcome.failures
        assert (outcome.refused if word == "no" else outcome.accepted) > 1
        return
    (failure,) = outcome.failures.values()
    assert kind(failure.reason).startswith(found)
    assert failure.times > 1
    if word == "wait":  # on a busy machine others made nothing for a while, too
        return
    assert word.encode() in failure.data
    assert found in ("crash", "hang", "memory") or failure.data == word.encode()


@pytest.mark.unit
def test_memory_that_was_freed_before_hides_none(folder):
    freed = [bytearray(b"x" * 100_000) for _ in range(4000)]
    above = [bytes(70_000) for _ in range(100)]  # keeps what is below in the heap
    del freed
    target = Target("x", lambda _: ([b"fill"], _fails), 1, lambda dice, data: data, (), 100, warm=False)
    assert [kind(reason) for reason in fuzz(target, folder, 1).failures] == ["memory"]
    del above


@pytest.mark.integration
def test_inputs_that_coverage_guides_find_what_fails(tmp_path):
    """By atheris, which is not among the requirements."""
    pytest.importorskip("atheris")
    code = f"""
import atheris, fuzz.guided, fuzz.targets, pathlib
from fuzz.harness import Target
from lskd import LskdError

@atheris.instrument_func
def read(data):
    if data[:1] == b"n":
        raise LskdError("no")
    if data[:1] == b"b":
        if data[1:2] == b"a":
            if data[2:3] == b"d":
                raise TypeError("a traceback")

fuzz.targets.TARGETS[:] = [Target("fails", lambda folder: ([b"fine", b"no"], read), 1)]
here = pathlib.Path({str(tmp_path)!r})
fuzz.guided.KEPT = here / "kept"
(here / "work").mkdir()
fuzz.guided.fuzz("fails", 600, 18, here / "work")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "TypeError: a traceback" in done.stdout + done.stderr
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.read_bytes().startswith(b"bad")
