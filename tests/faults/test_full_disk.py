"""A disk that is full or read-only: one line says so, and with room again the same command goes on.

The disk is a tmpfs whose size the test chooses. The kinds of writes have tests of their
own where they are made; there the kernel's limit of a file's size stands for a full disk.
"""

import argparse
import csv
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import forked
from digit_teacher import teach
from faults import test_kills
from image_folders import write_digits
from lskd.base.files import read_csv

TABLE = Path(__file__).parents[2] / "docs" / "reliability" / "faults.csv"
RESULTS = TABLE.parents[1] / "results" / "fashion_mnist"
ROOM, SIZES = 256 << 20, 5
COMMON = shlex.split(
    "--model test_resnet --num-classes 4 --in-chans 1 --img-size 16 --batch-size 32 --workers 0 --device cpu "
    "--lr 0.05 --warmup-epochs 0 --hflip 0 --scale 0.7 1 --color-jitter 0 --epochs 2"
)
pytestmark = pytest.mark.integration
digits, numbers, recipe = (getattr(test_kills, name) for name in ("digits", "numbers", "recipe"))


class Disk:
    """A disk of a size that can be changed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def mount(self, size: int) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.place]
        return subprocess.run(words, capture_output=True).returncode == 0

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.place], check=True)

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.place], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.place], check=True)

    def used(self) -> int:
        about = os.statvfs(self.place)
        return (about.f_blocks - about.f_bfree) * about.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    if not disk.mount(ROOM):
        pytest.skip("no disk can be mounted here: not root, or a container without that right")
    disk.unmount()
    yield disk
    if disk.place.is_mount():
        disk.unmount()


def contents(folder: Path) -> dict[str, object]:
    """Return what is in a folder, by file: weights of checkpoints, and the bytes of the rest."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".pth.tar"):
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, weights_only=True)["state_dict"]
            found[str(path)] = {name: value.tolist() for name, value in weights.items()}
        elif path.is_file() and ".aside-" not in path.name and path.name != "lock":
            found[str(path)] = path.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["train-and-store", "train", "soft-labels", "data"])
def test_a_full_disk_is_one_line_and_the_command_goes_on(kind, disk, tmp_path, request):
    long, seed = request.config.getoption("--long"), request.config.getoption("randomly_seed", 0)
    if kind != "train-and-store" and not long:
        pytest.skip("in the long form alone; training that stores writes what the others write")
    write_digits(tmp_path / "digits")
    teacher = teach(tmp_path / "digits", tmp_path)
    kd = ["--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", teacher, "--mean", 0.5, "--std", 0.5]
    where = ["--output", disk.place, "--experiment", "run", "--resume", "auto"]
    store = ["--kd-soft-labels", disk.place / "store"]
    words = {
        "train": ["-m", "timm_ls_kd", "train.py", tmp_path / "digits", *COMMON, *where],
        "soft-labels": ["-m", "timm_ls_kd", "soft-labels", tmp_path / "digits", *COMMON, *kd, *store],
        "train-and-store": [
            *("-m", "timm_ls_kd", "train.py", tmp_path / "digits", *COMMON, *kd, *store, *where),
        ],
        "data": ["-m", "lskd_study", "data", "number-words", "--output", disk.place / "words"],
    }[kind]

    def run() -> subprocess.CompletedProcess[str]:
        return forked.run(*words, imported=("torchvision", "timm"), env={**os.environ, "HF_HUB_OFFLINE": "1"})

    disk.mount(ROOM)
    done = run()
    assert done.returncode == 0, done.stderr
    whole, used = contents(disk.place), disk.used()
    disk.unmount()
    generator = random.Random(f"{kind} {seed}")
    sizes = [generator.randrange(4096, used - 4096) for _ in range(SIZES if long else 1)]
    for size in sizes:
        disk.mount(size)
        full = run()
        assert full.returncode == 2, (size, full.stdout, full.stderr)
        (line,) = full.stderr.splitlines()
        assert ": error: " in line, size
        assert str(disk.place) in line, size
        assert "(No space left on device)" in line, size
        assert not [path for path in disk.place.rglob("*") if ".new" in path.name], size
        disk.resize(ROOM)
        again = run()
        assert again.returncode == 0, (size, again.stderr)
        assert contents(disk.place) == whole, size
        disk.unmount()
        if long:
            print(f"{kind}: a disk of {size:,} bytes of {used:,}: {line}", flush=True)
    if long:
        expected = "one line, status 2, nothing half-written; with room the same command ends as unbroken"
        names = {"train": "timm train.py --resume auto", "train-and-store": "timm train.py --kd-soft-labels"}
        names |= {"soft-labels": "timm soft-labels", "data": "lskd data number-words"}
        note("full disk", names[kind], expected, len(sizes))


SAME = {
    "fairseq": test_kills.assert_same_fairseq,
    "mmcls": test_kills.assert_same_mmcls,
    "fairseq_kd.soft_labels": test_kills.assert_same_store,
    "mmcls_bnn.soft_labels": test_kills.assert_same_store,
}


@pytest.mark.parametrize("kind", list(SAME))
def test_of_other_trainers(kind, disk, tmp_path, request):
    """In the long form alone, on disks of a few sizes that are drawn."""
    if not request.config.getoption("--long"):
        pytest.skip("in the long form alone; the full disk of each writer is tried where it is made")
    seed, of_fairseq = request.config.getoption("randomly_seed", 0), "fairseq" in kind
    made = request.getfixturevalue("numbers" if of_fairseq else "recipe")
    script = Path(find_spec("mmcls").origin).parent / ".mim" / "tools" / "train.py"
    asked = made / "out" / "checkpoint_best.pt"
    words = {
        "fairseq": test_kills.fairseq_words("student", made / "bin", f"criterion.kd_teacher='{asked}'"),
        "mmcls": [script, made, "--work-dir", "out", "--resume"],
        "fairseq_kd.soft_labels": [made / "bin", "--path", asked, "--cpu", "--output", "labels"],
        "mmcls_bnn.soft_labels": [
            *(made, "--cpu", "--epochs", 4, "--cfg-options", "model.distillation.soft_labels.path=labels"),
        ],
    }[kind]
    if kind.endswith("soft_labels"):
        words = [Path(__file__).with_name("small_windows.py"), kind, *words]
    imported = test_kills.OF_FAIRSEQ if of_fairseq else test_kills.OF_MMCLS

    def run() -> subprocess.CompletedProcess[str]:
        return forked.run(*words, imported=imported, cwd=disk.place)

    disk.mount(ROOM)
    done = run()
    assert done.returncode == 0, done.stderr
    used = disk.used()
    whole = shutil.copytree(disk.place, tmp_path / "whole")
    disk.unmount()
    draws = random.Random(f"{kind} {seed}")
    # The least has no room for a log.
    sizes = [4096, used // 2, *(draws.randrange(4096, used - 4096) for _ in range(SIZES))]
    for size in sizes:
        disk.mount(size)
        full = run()
        said = full.stdout + full.stderr
        assert full.returncode == 2, (size, said)
        assert "Traceback" not in said, (size, said)
        (line,) = [line for line in said.splitlines() if ": error: " in line]
        assert "(No space left on device)" in line, size
        assert not [path for path in disk.place.rglob("*") if ".new" in path.name], size
        disk.resize(ROOM)
        again = run()
        assert again.returncode == 0, (size, again.stderr)
        SAME[kind](whole, disk.place)
        disk.unmount()
        print(f"{kind}: a disk of {size:,} bytes of {used:,}: {line}", flush=True)
    note("full disk", kind, "one line, status 2; with room the same command ends as unbroken", len(sizes))


def test_of_a_study(disk, tmp_path, request):
    """Its runs, most of the time: what is made of them is smaller than a checkpoint that is written."""
    if not request.config.getoption("--long"):
        pytest.skip("in the long form alone; a study on a full disk is in tests/lskd_study/test_engine.py")
    digits = {"path": str(request.getfixturevalue("digits")), "num_classes": 4}
    study = test_kills.STUDY | {"data": digits, "output": str(disk.place / "out")}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump(test_kills.TRAINER))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "lskd_study", *map(str, words)]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    def study_and_index() -> subprocess.CompletedProcess[str]:
        done = run("study", "study.yaml", "--cores", 1)
        return (
            done
            if done.returncode
            else run("index", disk.place / "out", "--output", disk.place / "index.html")
        )

    disk.mount(ROOM)
    done = study_and_index()
    assert done.returncode == 0, done.stderr
    used = disk.used()
    whole = shutil.copytree(disk.place, tmp_path / "whole")
    disk.unmount()
    draws = random.Random(request.config.getoption("randomly_seed", 0))
    sizes = [draws.randrange(4096, used - 4096), used - 4096]
    for size in sizes:
        disk.mount(size)
        full = study_and_index()
        assert full.returncode in (1, 2), (size, full.stderr)  # 1: a run is missing
        assert "Traceback" not in full.stderr, (size, full.stderr)
        said = [line for line in full.stderr.splitlines() if "the disk is full" in line]
        assert said, (size, full.stderr)
        disk.resize(ROOM)
        again = study_and_index()
        assert again.returncode == 0, (size, again.stderr)
        test_kills.assert_same_study(whole, disk.place)
        disk.unmount()
        print(f"study: a disk of {size:,} bytes of {used:,}: {said[-1]}", flush=True)
    expected = "a line says it, status 1 or 2; with room the same command ends as unbroken"
    note("full disk", "lskd study", expected, len(sizes))


OF_OURS = ["timm train.py", "timm soft-labels", "lskd data", "lskd study", "lskd index", "lskd stability"]


@pytest.mark.parametrize("kind", [*OF_OURS, *SAME])
def test_a_read_only_disk_is_one_line(kind, disk, tmp_path, request):
    """Also for root."""
    if kind in SAME and not request.config.getoption("--long"):
        pytest.skip("in the long form alone")
    out, imported = disk.place / "out", ("torchvision", "timm")
    if kind.startswith("timm"):
        write_digits(tmp_path / "digits")
        kd = ["--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", teach(tmp_path / "digits", tmp_path)]
        writer = kind.split()[1]
        words = ["-m", "timm_ls_kd", writer, tmp_path / "digits", *COMMON, *kd, "--mean", 0.5, "--std", 0.5]
        words += ["--output", out] if writer == "train.py" else ["--kd-soft-labels", out]
    elif kind.startswith("lskd"):
        (tmp_path / "trainer.yaml").write_text(yaml.safe_dump(test_kills.TRAINER))
        digits = {"path": str(request.getfixturevalue("digits")), "num_classes": 4}
        study = test_kills.STUDY | {"data": digits, "output": str(out)}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        np.savez(tmp_path / "logits.npz", logits=np.eye(4, dtype=np.float32), labels=np.arange(4))
        own = {
            "data": ["number-words", "--output", out],
            "study": ["study.yaml", "--cores", 1],
            "index": [RESULTS / "classes3", "--output", out / "index.html"],
            "stability": ["--logits", "logits.npz", "--csv", out / "table.csv"],
        }
        words = ["-m", "lskd_study", kind.split()[1], *own[kind.split()[1]]]
    elif "fairseq" in kind:
        made, imported = request.getfixturevalue("numbers"), test_kills.OF_FAIRSEQ
        words = test_kills.fairseq_words("teacher", made / "bin", f"checkpoint.save_dir='{out}'")
        if kind != "fairseq":
            words = ["-m", kind, made / "bin", "--path", made / "out" / "checkpoint_best.pt", "--output", out]
    else:
        made, imported = request.getfixturevalue("recipe"), test_kills.OF_MMCLS
        words = [Path(find_spec("mmcls").origin).parent / ".mim" / "tools" / "train.py", made]
        words += ["--work-dir", out]
        if kind != "mmcls":
            words = ["-m", kind, made, "--cfg-options", f"model.distillation.soft_labels.path={out}"]
    disk.mount(ROOM)
    disk.make_read_only()
    done = forked.run(*words, imported=imported, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert "read-only file system" in line.lower(), line
    assert f"{disk.place.name}/{out.name}" in line, line
    if request.config.getoption("--long"):
        print(f"{kind}: {line}", flush=True)
        note("read-only disk", kind, "one line, status 2", 1)


def note(fault: str, command: str, expected: str, tries: int) -> None:
    """Put a row into the table of faults, in the place of an earlier one, once all tries went as expected."""
    TABLE.parent.mkdir(exist_ok=True)
    rows = read_csv(TABLE) if TABLE.exists() else []
    rows = [row for row in rows if (row["fault"], row["command"]) != (fault, command)]
    rows.append({"fault": fault, "command": command, "expected": expected, "tries": str(tries)})
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: list(row.values())))
