"""Readers under inputs that nobody meant for them: in forked workers, within bounds of memory and time.

An input follows from seed, target and number alone, so that any one can be made again. What may come of it:
it is accepted, and what was read survives a check of the target's own, or it is refused by an `LskdError`.
Everything else is a failure: another exception, a signal, more CPU time than the target's limit, more memory
above the worker's own than its bound.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lskd import LskdError

SEED = 18
_STUCK = 120.0  # seconds after which an input that takes no CPU time either has hung
_ADDRESSES = 8 << 30  # bytes above the worker's own: a failure does not bring down the machine
_AT_ONCE = 5_000  # inputs of a worker, whose size is measured anew then
_STATE = struct.Struct("qqqq")  # the number of the input, how many were accepted and refused, kB of memory
_SHRINKS, _TRIES = 60, 40  # steps in which an input is made smaller, and what is tried in each
_SECONDS = 30.0  # that it takes
_M_MMAP_THRESHOLD = -3  # of malloc.h: from that size on memory is the kernel's, where the heap has no hole
_HOLE = 1 << 16
_OURS = ("/common/lskd/", "/plugins/", "/studies/", "/tests/fuzz/")

Read = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A reader, and what it is given.

    Attributes:
        prepare: from an empty folder to sound inputs and the reader of one, which raises `LskdError` to
            refuse it, and anything else where what it has accepted is wrong.
        inputs: in the long form.
        vary: makes another input of a sound one; None: its bytes are changed.
        tokens: that are put between bytes.
        megabytes: that an input may take above what the worker has.
        seconds: of CPU time for an input.
            short: inputs in the short form.
        warm: whether it is read once before the workers are forked, so that what it imports is no part of
            any input's time.
    """

    name: str
    prepare: Callable[[Path], tuple[Sequence[bytes], Read]]
    inputs: int
    vary: Callable[[random.Random, bytes], bytes] | None = None
    tokens: Sequence[bytes] = ()
    megabytes: int = 256
    seconds: float = 10
    short: int = 20
    warm: bool = True


@dataclass
class Failure:
    """The first of a kind, made small."""

    number: int
    reason: str
    data: bytes
    times: int = 1


@dataclass
class Outcome:
    """What became of a target's inputs."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    peak: float = 0.0  # megabytes above the worker's own
    seconds: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)


def fuzz(target: Target, folder: Path, count: int, seed: int = SEED, seconds: float = math.inf) -> Outcome:
    """Give a target so many inputs, or as many as there is time for; one that fails is kept, made small."""
    sound, read = target.prepare(folder)
    if target.warm:
        with contextlib.suppress(LskdError):
            read(sound[0])
    begun, outcome = time.monotonic(), Outcome()

    def made(number: int) -> bytes:
        return (
            sound[0] if number == 0 else make(target, sound, random.Random(f"{seed} {target.name} {number}"))
        )

    while outcome.inputs < count and time.monotonic() - begun < seconds:
        stop = min(outcome.inputs + _AT_ONCE, count)
        inputs = (
            made(number) for number in range(outcome.inputs, stop) if time.monotonic() - begun < seconds
        )
        state, failed = _worker(target, read, inputs, outcome.inputs)
        for number, reason in failed:
            if known := outcome.failures.get(kind(reason)):
                known.times += 1
            else:
                data = _small(target, read, made(number), reason)
                outcome.failures[kind(reason)] = Failure(number, reason, data)
        outcome.inputs = state[0]
        outcome.accepted += state[1]
        outcome.refused += state[2]
        outcome.peak = max(outcome.peak, state[3] / 1024)
    outcome.seconds = time.monotonic() - begun
    return outcome


def failures_of(target: Target, read: Read, inputs: Sequence[bytes]) -> dict[int, str]:
    """Return why inputs fail, by their places."""
    at, found = 0, dict[int, str]()
    while at < len(inputs):
        state, failed = _worker(target, read, inputs[at:], at)
        found |= failed
        at = state[0]
    return found


def kind(reason: str) -> str:
    """Return what two failures of one cause have in common: the exception and its place."""
    head, _, place = reason.partition(" @ ")
    return f"{head.partition(':')[0]} @ {place}" if place else head.partition(":")[0]


def _worker(
    target: Target, read: Read, inputs: Iterable[bytes], first: int
) -> tuple[tuple[int, int, int, int], list[tuple[int, str]]]:
    """Read inputs in a fork until one ends it; return how far it came, and which failed and why."""
    shared = mmap.mmap(-1, _STATE.size)
    shared[:] = _STATE.pack(first, 0, 0, 0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(target, read, inputs, first, shared, writing)
    os.close(writing)
    said, at, stuck = b"", first, False
    while True:
        ready, _, _ = select.select([reading], [], [], _STUCK)
        if ready:
            part = os.read(reading, 1 << 16)
            if not part:
                break
            said += part
        elif at == (now := _STATE.unpack(shared[:])[0]):
            os.kill(child, signal.SIGKILL)
            stuck = True
            break
        else:
            at = now
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    number, *counts = _STATE.unpack(shared[:])
    failed = [(int(where), str(reason)) for where, reason in map(json.loads, said.splitlines())]
    if status < 0:
        hung = stuck or status == -signal.SIGPROF
        why = f"hang: over {target.seconds:g} s" if hung else f"crash: signal {signal.Signals(-status).name}"
        failed.append((number, why))
        number += 1
    elif status:
        raise RuntimeError(f"{target.name}: the worker itself ended with {status} at input {number}")
    return (number, *counts), failed


def _work(
    target: Target, read: Read, inputs: Iterable[bytes], first: int, shared: mmap.mmap, writing: int
) -> NoReturn:
    status = 1
    try:
        faulthandler.disable()  # pytest's would tell every crash
        sys.settrace(None)  # what counts the lines that are reached can take any time
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + _ADDRESSES, own + _ADDRESSES))
        gc.freeze()
        _leave_no_hole()
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        number, accepted, refused, peak = first, 0, 0, 0
        for data in inputs:
            signal.setitimer(signal.ITIMER_PROF, target.seconds)
            why = ""
            try:
                read(data)
                accepted += 1
            except LskdError as error:
                refused += 1
                if _out_of_memory(error):
                    why = f"memory: refused only when there was no more @ {_place(error)}"
            except BaseException as error:
                why = f"{type(error).__name__}: {error} @ {_place(error)}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
            if peak > target.megabytes << 10 and not why:
                why = f"memory: {peak >> 10} MB"
            if why:
                os.write(writing, json.dumps([number, why]).encode() + b"\n")
            number += 1
            shared[:] = _STATE.pack(number, accepted, refused, peak)
            if why.startswith("memory"):
                break
        status = 0
    except BaseException:
        os.write(writing, json.dumps([-1, traceback.format_exc()]).encode() + b"\n")
    finally:
        os._exit(status)


def _leave_no_hole() -> None:
    """Use up what the process that tests has freed but still has: an input would take it unseen."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.mallopt(_M_MMAP_THRESHOLD, _HOLE)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [int(end, 16) for line in maps if line[-1] == "[heap]" for end in line[0].split("-")]
    first, last = min(ends, default=0), max(ends, default=0)
    while first <= (libc.malloc(_HOLE) or 0) < last:  # then it is the kernel's
        pass


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if type(error) is MemoryError:  # NumPy's own is of an array that nothing was written to
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """Return the innermost function of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(part in frame.filename for part in _OURS)]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"


def _small(target: Target, read: Read, data: bytes, reason: str) -> bytes:
    """Leave out of an input what is not needed for its failure."""
    size, left = len(data) // 2, _SHRINKS if not reason.startswith(("crash", "hang", "memory")) else 1
    begun = time.monotonic()
    while size and left and time.monotonic() - begun < _SECONDS:
        left -= 1
        step = max(size, len(data) // _TRIES)
        shorter = [data[:at] + data[at + size :] for at in range(0, len(data), step)]
        found = failures_of(target, read, shorter)
        same = [shorter[at] for at, why in found.items() if kind(why) == kind(reason)]
        if same:
            data = same[0]
        else:
            size //= 2
    return data


def one_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Read]:
    """Return what makes a reader of bytes of one of a file of that name in a folder."""

    def at(folder: Path) -> Read:
        path = folder / name

        def write_and_read(data: bytes) -> None:
            path.write_bytes(data)
            read(path)

        return write_and_read

    return at


def same(read: Any, again: Any) -> None:
    assert read == again, "what was read does not survive being written"


# Inputs


def make(target: Target, sound: Sequence[bytes], dice: random.Random) -> bytes:
    """Return another input: a sound one varied in its structure, its bytes, or both."""
    data = dice.choice(sound)
    if target.vary is not None and dice.random() < 0.7:
        data = target.vary(dice, data)
        if dice.random() < 0.8:
            return data
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        data = changed(dice, data, sound, target.tokens)
    return data


def changed(dice: random.Random, data: bytes, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Return bytes with one change: a flip, a cut, a copy, a token, or a piece of another."""
    at = dice.randrange(len(data) + 1)
    if dice.random() < 0.3:  # headers come first
        at = min(at, dice.randrange(200))
    size = min(dice.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
    match dice.randrange(9):
        case 0 | 1:  # a bit
            return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :] if size else data
        case 2:
            return data[:at] + dice.randbytes(size) + data[at + size :]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + data[at : at + size] * dice.choice((2, 3, 100)) + data[at + size :]
        case 5:
            return data[:at]
        case 6:
            number = dice.choice(
                (0, 1, -1, 255, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 62, (1 << 63) - 1, -512)
            )
            width = dice.choice((2, 4, 8))
            order = dice.choice(("little", "big"))
            whole = (number % (1 << 8 * width)).to_bytes(width, order)
            return data[:at] + whole + data[at + width :]
        case 7 if tokens:
            cut = dice.choice((0, 0, size))
            return data[:at] + dice.choice(tokens) + data[at + cut :]
        case _:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            return data[:at] + other[start : start + dice.choice((4, 64, 1 << 16))] + data[at + size :]
