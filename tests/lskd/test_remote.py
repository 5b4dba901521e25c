"""Soft labels at a URL: copied once, block by block checked, and never half there."""

import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lskd import SoftLabels, SoftLabelsError
from lskd.soft_labels import remote
from lskd.soft_labels.remote import local_folder
from soft_label_stores import FILES, IDENTITY, assert_a_right_beginning, contents, layout, write

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("small_blocks")]
WHOLE = layout(60)
NAMES = (*FILES, "manifest.json")


@pytest.fixture
def bucket(tmp_path):
    """A store in fsspec's memory; nobody writes there."""
    store = write(tmp_path / "s", WHOLE)
    memory = fsspec.filesystem("memory")
    for name in NAMES:
        memory.pipe_file(f"/bucket/s/{name}", (store / name).read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def asked(monkeypatch):
    """What was asked for, and ``asked.fail``: what happens instead from the n-th question on."""
    read = MemoryFileSystem.cat_file

    class Asked(list):
        fail = staticmethod(lambda data: data)

    questions = Asked()

    def cat_file(self, path, start=None, end=None, **options):
        questions.append((path.rpartition("/")[2], start))
        return questions.fail(read(self, path, start, end, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return questions


@pytest.mark.usefixtures("bucket")
def test_a_copy_is_made_once_and_is_the_same_files(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(remote, "_AT_ONCE", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = local_folder("memory://bucket/s/")
    assert folder.parent == tmp_path / "home/lskd/soft_labels"
    assert contents(folder) == contents(tmp_path / "s")
    assert len(assert_a_right_beginning(folder, WHOLE, IDENTITY)) == 60
    asked.clear()
    assert local_folder("memory://bucket/s") == folder
    assert asked == [("manifest.json", 0)]
    here = local_folder(f"file://{tmp_path / 's'}", tmp_path / "other")
    assert contents(here) == contents(folder)
    with pytest.raises(SoftLabelsError, match="a copy of soft labels that are elsewhere"):
        write(folder, WHOLE)
    assert local_folder(tmp_path / "s") == tmp_path / "s"


def silence(data):
    threading.Event().wait()


def gone(data):
    raise ConnectionResetError("by s3://user:secret@host/s?sig=secret, of\nthe peer")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (silence, r"TimeoutError: no answer in 0\.2 seconds"),
        (gone, r"ConnectionResetError: by s3://host/s\?\.\.\. of the peer"),
        (lambda data: data[:-1], r"gave \d+ bytes from \d+ on where \d+ were asked for"),
        (lambda data: data + b"more", "cannot be read in parts"),
    ],
)
def test_storage_that_ends_in_between(tmp_path, asked, monkeypatch, fail, message):
    """One line, no folder of that name, and the next time only what is missing is asked for."""
    monkeypatch.setattr(remote, "_AT_ONCE", 64)
    monkeypatch.setattr(remote, "_SECONDS", 0.2)

    def later(data):
        return fail(data) if len(asked) > 20 else data

    asked.fail = later
    with pytest.raises(SoftLabelsError, match=message) as error:
        local_folder("memory://bucket/s", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".part", ".lock"}
    monkeypatch.setattr(remote, "_SECONDS", 60)
    before = set(asked[1:20])
    del asked.fail, asked[:]
    labels = SoftLabels(local_folder("memory://bucket/s", tmp_path / "cache"))
    assert contents(labels.path) == contents(tmp_path / "s")
    assert len(before) == 19
    assert before.isdisjoint(asked)


def cut(bucket):
    rows = bucket.cat_file("/bucket/s/rows.bin")
    bucket.pipe_file("/bucket/s/rows.bin", rows[:-7])


def lose(bucket):
    bucket.rm_file("/bucket/s/index.bin.sums")


def flip(bucket):
    rows = bytearray(bucket.cat_file("/bucket/s/rows.bin"))
    rows[50] ^= 1
    bucket.pipe_file("/bucket/s/rows.bin", bytes(rows))


def forge(bucket):
    manifest = bucket.cat_file("/bucket/s/manifest.json")
    bucket.pipe_file("/bucket/s/manifest.json", manifest.replace(b'"keys": 60', b'"keys": 61'))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cut short or not what its manifest says"),
        (lose, "FileNotFoundError"),
        (flip, "rows.bin is damaged in block .* read anew the next time"),
        (forge, "manifest.json is not one of soft labels"),
    ],
)
def test_what_is_not_as_it_was_written(tmp_path, bucket, harm, message):
    harm(bucket)
    with pytest.raises(SoftLabelsError, match=message) as error:
        local_folder("memory://bucket/s", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".part", ".lock"}
    for name in NAMES:  # it is put right there
        bucket.pipe_file(f"/bucket/s/{name}", (tmp_path / "s" / name).read_bytes())
    assert contents(local_folder("memory://bucket/s", tmp_path / "cache")) == contents(tmp_path / "s")


def test_what_cannot_be_read_at_all(tmp_path, bucket):
    write(tmp_path / "begun", WHOLE, stop=20)
    (tmp_path / "file").touch()
    for url, cache, message in (
        (f"file://{tmp_path}/begun", "cache", r"unfinished \(\d+ of 60 keys\)"),
        ("memory://bucket/none", "cache", "FileNotFoundError"),
        ("nosuch://user:secret@host/s", "cache", "nosuch://host/s cannot be read"),
        ("memory://bucket/s", "file", "cannot write"),
    ):
        with pytest.raises(SoftLabelsError, match=message) as error:
            local_folder(url, tmp_path / cache)
        assert "\n" not in str(error.value)
        assert "secret" not in str(error.value)
