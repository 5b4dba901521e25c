"""What was made to run code, fill the memory or mislead is refused, in the bounds of its reader."""

import contextlib
import pickle
import pickletools
from dataclasses import replace

import pytest

from fuzz import attacks, targets
from fuzz.harness import failures_of
from lskd import LskdError

pytestmark = pytest.mark.unit

TRAP = "trap"
BY_NAME = {target.name: target for target in targets.TARGETS}
# What is sound after all: small when written out, or of a size that its reader allows.
TAKEN = {
    "a binary",
    "an odd set",
    "labels by a dictionary",
    "overlapping tensors",
    # no files of their own, and nothing is unpacked
    *(f"a {kind} link and a file behind it" for kind in ("symbolic", "hard")),
    *(f"a device ({kind})" for kind in ("character", "block", "pipe")),
}


CALLS = ["GLOBAL REDUCE", "STACK_GLOBAL", "INST", "OBJ", "a getattr chain"]


@pytest.mark.parametrize("name", [*CALLS, *(f"{what} before a call" for what in attacks.VALUES)])
def test_a_pickle_is_an_attack(tmp_path, name):
    """Or nothing would be shown by refusing it."""
    pickle.loads(dict(attacks.pickles(str(tmp_path / TRAP)))[name])  # noqa: S301
    assert (tmp_path / TRAP).exists()


def test_pickles_have_every_opcode():
    found = set()
    for _, data in attacks.pickles(TRAP):
        with contextlib.suppress(ValueError):  # what lies about itself ends early
            found |= {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert found == {opcode.name for opcode in pickletools.opcodes}


@pytest.mark.parametrize(
    ("target", "made", "megabytes"),
    [
        ("YAML itself", attacks.yamls, 100),
        ("run: job.json, begun.json", attacks.jsons, 100),
        ("data: archive", attacks.damaged_tars, 256),
        ("data: archive", attacks.leading_out, 100),
        ("checkpoint: weights", attacks.checkpoints, 150),
        ("checkpoint: fairseq", attacks.checkpoints, 150),
        ("logits: npz", attacks.npzs, 150),
        ("logits: safetensors", attacks.safetensors, 100),
        ("logits: parquet", attacks.parquets, 150),
    ],
)
def test_it_is_refused(tmp_path, monkeypatch, target, made, megabytes):
    monkeypatch.setattr("lskd_study.teachers.files._UNCOUNTED", 1 << 25)  # or the attacks were of a GB
    of = replace(BY_NAME[target], megabytes=megabytes)
    trap = tmp_path / TRAP
    named = dict(made(str(trap)) if made in (attacks.checkpoints, attacks.npzs) else made())
    sound, read = of.prepare(tmp_path)
    with contextlib.suppress(LskdError):
        read(sound[0])

    def refuse(data: bytes) -> None:
        read(data)
        raise AssertionError("accepted")

    found = failures_of(of, refuse, list(named.values()))
    wrong = {name: found[place] for place, name in enumerate(named) if place in found and name not in TAKEN}
    assert not wrong
    assert not trap.exists()


def test_a_path_that_can_be_none_is_one_line(tmp_path):
    of = BY_NAME["command: lskd"]
    sound, read = of.prepare(tmp_path)
    commands = {line.partition(b"\0")[0] for line in sound}
    lines = sorted(command + b"\0" + path for command in commands for path in (b"n" * 300, b"loop"))
    failed = failures_of(of, read, lines)
    assert not {lines[place]: why for place, why in failed.items()}


def test_a_store_of_a_name_too_long_is_refused(tmp_path):
    of = BY_NAME["soft labels: URL"]
    assert not failures_of(of, of.prepare(tmp_path)[1], [b"n" * 300])


def test_what_a_plugins_command_cannot_use_is_one_line(tmp_path):
    of = BY_NAME["command: plugins"]
    lines = [b"mmcls_bnn.soft_labels\0x\0--cfg-options\0a", b"mmcls_bnn.complexity\0" + b"n" * 300]
    lines += [b"mmcls_bnn.export\0a\0b\0\x1b[2J", b"fairseq_kd.soft_labels\0a\0\x1b[2J"]
    assert not failures_of(of, of.prepare(tmp_path)[1], lines)
