"""Files that are whole or not there at all, locks that follow no link, JSON within bounds."""

import errno
import gzip
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lskd import LskdError
from lskd.base import files
from lskd.base.files import (
    lock,
    parse_json,
    read_bytes,
    read_csv,
    read_json,
    read_yaml,
    say_full_logs_once,
    take_lock,
    whole_file,
    whole_folder,
    write_text,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_users_umask(tmp_path: Path, umask: int) -> None:
    code = (
        f"import os, sys; os.umask({umask}); from lskd.base.files import write_text, take_lock\n"
        "write_text(sys.argv[1], 'text'); take_lock(sys.argv[1] + '.lock')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=True)
    for name in ("file", "file.lock"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_umask_holds_whatever_wrote_the_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as scratch:
        scratch.unlink()
        scratch.touch(mode=0o600)  # as tempfile does
    assert (tmp_path / "file").stat().st_mode & 0o077 != 0


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "new") as scratch:
        (scratch / "file").touch(mode=0o600)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o077 != 0
    with pytest.raises(ValueError, match="half"), whole_folder(tmp_path / "half") as scratch:  # noqa: PT012
        (scratch / "file").touch()
        raise ValueError("half")
    with pytest.raises(OSError, match="no image"), whole_folder(tmp_path / "half"):
        raise OSError("no image")  # as Pillow says of what was read
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for taken in ("new", "link"):
        with pytest.raises(LskdError, match="cannot write"), whole_folder(tmp_path / taken):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new"]


def test_names_as_long_as_may_be_in_folders_that_may_not_be_listed(tmp_path: Path, monkeypatch) -> None:
    opened = os.open

    def refused(path: Path, *arguments: int) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refused)  # as of a folder with the mode 0333, but for root too
    monkeypatch.setattr(os, "listdir", refused)
    with whole_folder(tmp_path / ("é" * 120)) as scratch:
        (scratch / "file").touch()
    write_text(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("é" * 120) / "file").exists()
    assert len(list(os.scandir(tmp_path))) == 2


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "file") as scratch:  # noqa: PT012 - two steps
        scratch.write_text("half")
        tmp_path.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("writes", ["whole_file", "whole_folder"])
def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(tmp_path: Path, writes: str) -> None:
    code = (
        f"import os, signal, sys; from lskd.base.files import {writes}\n"
        f"with {writes}(sys.argv[1]) as scratch:\n"
        "    file = scratch / 'file' if scratch.is_dir() else scratch\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    left = list(tmp_path.iterdir())
    assert "half" in [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / ".file.01234567.new").touch()
    with whole_folder(tmp_path / "folder") as folder, whole_file(tmp_path / "file") as scratch:
        assert not any(path.exists() for path in left)
        scratch.write_text("last")
        files._remove_left.__wrapped__(tmp_path)  # as another process does
        (folder / "file").touch()
        write_text(tmp_path / "file", "first")
    assert (tmp_path / "file").read_text() == "last"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.01234567.new", "file", "folder"]


def test_where_there_are_no_locks_nothing_is_taken_for_what_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_lock_for_others", lambda *_: False)
    with whole_file(tmp_path / "file") as scratch:
        files._remove_left.__wrapped__(tmp_path)
        scratch.write_text("whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "whole")]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LskdError, match="the disk is full"), whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("mine")
    (tmp_path / "file").symlink_to(foreign)
    write_text(tmp_path / "file", "ours")
    assert foreign.read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()


def test_a_lock_excludes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("what was in it")
    with lock(path) as held:
        assert held is not None
        assert take_lock(path) is None
    with lock(path) as again:
        assert again is not None
    assert path.read_text() == "what was in it"


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("mine")
    (tmp_path / "lock").symlink_to(foreign)
    with pytest.raises(LskdError, match="is a link"):
        take_lock(tmp_path / "lock")
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 6000,
        "Infinity",
        "[NaN]",
        "1e999",
        '{"\\ud800": 1}',
        "{",
        "",
    ],
)
def test_json_that_nothing_can_use_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(LskdError, match=r"file\.json is damaged or not a plan") as caught:
        read_json(tmp_path / "file.json", "a plan")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_json_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_LIMIT", 50)
    (tmp_path / "file.json").write_text(f'"{"x" * 100}"')
    with pytest.raises(LskdError, match="more than"):
        read_json(tmp_path / "file.json")
    (tmp_path / "bytes.json").write_bytes(b'"\xff"')
    with pytest.raises(LskdError, match="damaged"):
        read_json(tmp_path / "bytes.json")
    with pytest.raises(LskdError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


def test_json_as_it_should_be() -> None:
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", null]}') == {"a": [1, 2.5, "\U0001f600", None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2024-13-45", "a value cannot be read"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 1" + ":1" * 3000, "a number of 6001 digits"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ("a: [1\n", "file:2: not valid YAML"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("? [1]\n: 2", "unhashable"),
        ("a: \0", "not valid YAML"),
        ("a: 1\n" * 250_000, "more than 1 MiB"),
    ],
)
def test_what_is_no_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(LskdError, match=message) as caught:
        read_yaml(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_aliases_that_come_to_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}\n")
    assert read_yaml(tmp_path / "file") == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}, {"x": 1}]}}


def test_a_gzip_file_is_unpacked_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "file.gz"
    file.write_bytes(gzip.compress(b"x" * 1000))
    assert read_bytes(file, 1000) == b"x" * 1000
    with pytest.raises(LskdError, match="has more than"):
        read_bytes(file, 999)
    for damaged in (file.read_bytes()[:-9], b"no gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff"):
        file.write_bytes(damaged)
        with pytest.raises(LskdError, match="damaged or cut short") as caught:
            read_bytes(file, 1000)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1\n", "row 1 has not as many cells"),
        (b"a,b\n1,2,3\n", "row 1 has not as many cells"),
        (b"a,b,a\n1,2,3\n", "two columns 'a'"),
        (b"a,b\n1," + b"x" * 200_000, r"no CSV table \(field larger"),
        (b"a,b\n\xff,1\n", "no CSV table"),
        (b'a,b\n"1,2\n', "no CSV table"),
        (b"a,b\n1,2\n", "has no column epoch"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(LskdError, match=message) as caught:
        read_csv(tmp_path / "x.csv", ("epoch",))
    assert "\n" not in str(caught.value)
    with pytest.raises(LskdError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")


WINDOWS = """
import os, sys, warnings
import torch, torchmetrics  # as they are here
sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "register_at_fork"):
    delattr(os, name)
sys.platform = "win32"
real_open = os.open
def open_no_folder(path, *arguments, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *arguments, **named)
os.open = open_no_folder

import lskd
from lskd import DistillationLoss, LskdError, Stability, smooth_targets
for name in lskd.__all__:
    getattr(lskd, name)
from lskd.base.files import read_json, take_lock, write_text
from lskd.soft_labels.format import SoftLabelsLayout

student = torch.zeros(2, 3, requires_grad=True)
DistillationLoss(hard_weight=0.5, alpha=0.1)(student, torch.ones(2, 3), torch.tensor([0, 1])).backward()
metric = Stability(3)
metric.update(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
smooth_targets(torch.tensor([0]), 3, 0.1)
folder = sys.argv[1]
write_text(os.path.join(folder, "file.json"), "[1]")
assert read_json(os.path.join(folder, "file.json")) == [1]
layout = SoftLabelsLayout(3, 2, 1)
for needs_a_lock in (
    lambda: take_lock(os.path.join(folder, "lock")),
    lambda: lskd.SoftLabelsWriter(folder, layout, {}),
):
    try:
        needs_a_lock()
    except LskdError as error:
        print(error)
"""


def test_without_locks_as_on_windows_all_but_what_needs_them_works(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WINDOWS, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert (
        said.stdout.splitlines()
        == ["this system has no file locks (fcntl), which runs and stored labels need"] * 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_is_one_line_and_a_wrong_call_is_pythons_own(capfd, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(logging.Handler, "handleError", logging.Handler.handleError)
    say_full_logs_once()
    logger = logging.Logger("full")
    logger.addHandler(logging.FileHandler("/dev/full"))
    for _ in range(3):
        logger.error("words")
    assert capfd.readouterr().err == "lskd: a log is cut short (No space left on device)\n"
    logger.handlers = [logging.StreamHandler()]
    logger.error("%d", "words")
    assert "--- Logging error ---" in capfd.readouterr().err


def test_ctrl_c_in_the_middle_of_a_checkpoint_is_not_torchs_error(tmp_path):
    class Interrupted(io.FileIO):
        def write(self, content):
            if self.tell() > 300:
                raise KeyboardInterrupt
            return super().write(content)

    def save():
        with whole_file(tmp_path / "a.pt") as scratch, Interrupted(scratch, "w") as file:
            torch.save([torch.zeros(1000)] * 2, file)

    with pytest.raises(KeyboardInterrupt):
        save()
    assert not list(tmp_path.iterdir())
