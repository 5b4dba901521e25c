"""Stored soft labels when things go wrong: cut files, killed writers, full disks, forks, forged manifests."""

import gc
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lskd import SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels import blocks
from lskd.soft_labels import format as manifest_module
from lskd.soft_labels.forms import form_of_store
from lskd.soft_labels.run import SCRATCH, StoredRun
from soft_label_stores import (
    FILES,
    IDENTITY,
    assert_a_right_beginning,
    content,
    contents,
    in_a_fork,
    layout,
    layouts,
    write,
)

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("small_blocks")]
SENTENCES, IMAGES = layout(), layout(rows_per_sample=1)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# --- cut at any byte ---


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(), committed=st.floats(0, 1), left_over=st.integers(0, 50))
def test_cut_at_any_byte_it_is_continued_or_refused(tmp_path_factory, layout, committed, left_over):
    """With bytes behind what is committed, as a killed writer leaves them."""
    folder = tmp_path_factory.mktemp("stores")
    whole = write(folder / "whole", layout)
    cut = write(folder / "cut", layout, stop=round(committed * layout.keys))
    needed = {name: len(data) for name, data in contents(cut).items()} | {"manifest.json": 0}
    for name in FILES[:4]:
        with open(cut / name, "ab") as file:
            file.write(b"x" * left_over)
    before = contents(cut)
    outcomes, refused = set(), []
    for name in FILES:
        for size in range(len(before[name])):
            (cut / name).write_bytes(before[name][:size])
            try:
                assert_a_right_beginning(cut, layout)
                outcomes.add("read")
                assert size >= needed[name]
            except SoftLabelsError as error:
                refused.append(str(error))
                outcomes.add("reading refused")
            try:
                write(cut, layout)
                assert contents(cut) == contents(whole)
                outcomes.add("continued")
                assert size >= needed[name]
            except SoftLabelsError as error:
                refused.append(str(error))
                outcomes.add("continuing refused")
            if name != "manifest.json":  # nothing is touched before that is read
                for other in FILES:
                    (cut / other).write_bytes(before[other])
        (cut / name).write_bytes(before[name])
    assert all("truncated" in line or "damaged" in line for line in refused)
    assert "reading refused" in outcomes  # the manifest cut in half, if nothing else
    assert not left_over or {"read", "continued"} <= outcomes


# --- writers that end in the middle ---


def dying_at(step):
    """Make the ``step``-th thing that a writer does to the disk its last, half-way through."""
    steps = iter(range(1, 10**6))

    def counted(real):
        def call(*args):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    def flush(self):
        if self._pending and next(steps) == step:
            self._file.write(self._pending[: len(self._pending) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real_flush(self)

    real_flush = blocks._Appended._flush
    blocks._Appended._flush = flush
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


@pytest.mark.parametrize("layout", [SENTENCES, IMAGES])
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(tmp_path, layout):
    write(tmp_path / "whole", layout)
    for step in range(1, 1000):
        path = tmp_path / f"killed{step}"

        def work(path=path, step=step):
            dying_at(step)
            write(path, layout)

        status = in_a_fork(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if (path / "manifest.json").exists():
            assert_a_right_beginning(path, layout)
        write(path, layout)
        assert contents(path) == contents(tmp_path / "whole"), step
    assert step > 30  # every commit is several files written and synchronised, and a manifest replaced


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    many = layout(2000)
    write(tmp_path / "whole", many, commit_every=5)
    generator, killed = random.Random(0), 0
    for step in range(100):
        process = multiprocessing.get_context("fork").Process(
            target=write, args=(tmp_path / "killed", many), kwargs={"commit_every": 5}
        )
        process.start()
        process.join(generator.uniform(0, 0.002 * 1.5**step))  # however fast the machine is at the moment
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        there = (tmp_path / "killed" / "manifest.json").exists()
        if there and assert_a_right_beginning(tmp_path / "killed", many).complete:
            break
    write(tmp_path / "killed", many, commit_every=5)
    assert killed > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_disk_that_is_full_at_any_size(tmp_path):
    """The largest size of a file stands for a full disk; at the smallest even the manifest does not fit."""
    images = layout(120, rows_per_sample=1)
    write(tmp_path / "whole", images)
    largest = max(len(data) for data in contents(tmp_path / "whole").values())
    kept = []
    for size in range(0, largest + 60, 59):
        path = tmp_path / str(size)

        def work(path=path, size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write(path, images)

        assert in_a_fork(work, r"cannot (write|be written).* \(File too large\)") == (
            3 if size < largest else 0
        )
        if (path / "manifest.json").exists():
            kept.append(len(assert_a_right_beginning(path, images)))
        write(path, images)
        assert contents(path) == contents(tmp_path / "whole")
    assert kept == sorted(kept)
    assert len(set(kept)) > 3


# --- files that rot, are cut or vanish while they are read ---


@pytest.mark.parametrize(("rows", "name"), [(1, "rows.bin"), (None, "rows.bin"), (None, "index.bin")])
def test_a_store_that_rots_while_it_is_read(tmp_path, rows, name):
    """Blocks that were sound when they were first read are checked again, whatever time the file has."""
    stored = layout(rows_per_sample=rows)
    labels = assert_a_right_beginning(write(tmp_path / "s", stored), stored)
    file, keys = tmp_path / "s" / name, range(len(labels))
    before, rows_before = file.stat(), labels.take(keys).values.copy()
    for position, byte in enumerate(file.read_bytes()):
        for value, reads in ((byte ^ 0x10, False), (byte, True)):
            with file.open("r+b") as opened:
                opened.seek(position)
                opened.write(bytes([value]))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            if reads:
                assert (labels.take(keys).values == rows_before).all()
                continue
            for read in (lambda: labels.take(keys), lambda: [labels[key] for key in keys]):
                with pytest.raises(SoftLabelsError, match=rf"{name} is damaged in block {position // 40} "):
                    read()


@pytest.mark.parametrize("name", FILES[:2])
def test_a_store_that_is_cut_or_removed_while_it_is_read(tmp_path, name):
    labels = SoftLabels(write(tmp_path / "s", layout()))
    labels.verify()
    file = tmp_path / "s" / name
    os.truncate(file, 7)
    for read in (lambda: labels.take(range(9)), lambda: labels[1], labels.verify):
        assert in_a_fork(read, rf"{name} is truncated: 7 bytes of \d+ are there") == 3  # and no SIGBUS
    stored = layout()
    labels = SoftLabels(write(tmp_path / "t", stored))
    (tmp_path / "t" / name).unlink()
    assert len(labels.take(range(9)).values) == labels.rows  # what is open is there


@pytest.fixture
def checked(monkeypatch):
    """Return how often a block was checked, by this process and its forks, since it was last asked."""
    count = np.frombuffer(mmap.mmap(-1, 8), np.int64)
    check_block = blocks.BlockReader._check_block

    def counting(*arguments):
        count[0] += 1
        check_block(*arguments)

    def asked():
        found, count[0] = int(count[0]), 0
        return found

    monkeypatch.setattr(blocks.BlockReader, "_check_block", counting)
    return asked


def test_a_block_is_checked_once_by_all_workers_and_once_more_where_the_file_was_touched(tmp_path, checked):
    labels = SoftLabels(write(tmp_path / "s", IMAGES))
    file = tmp_path / "s" / "rows.bin"

    def epoch():
        for _ in range(3):  # workers are forked anew in each epoch
            assert in_a_fork(lambda: labels.take(range(9))) == 0
        return checked()

    assert epoch() == labels.blocks > 1
    assert epoch() == 0
    file.chmod(0o600)
    assert [epoch(), epoch()] == [labels.blocks, 0]
    with file.open("ab") as growing:  # what a writer does that goes on
        growing.write(bytes(100))
    assert epoch() == 0
    os.truncate(file, file.stat().st_size - 100)  # and where the next one begins
    assert epoch() == labels.blocks


def test_a_store_that_is_written_to_while_one_process_checks_and_another_looks(tmp_path, monkeypatch):
    labels = SoftLabels(write(tmp_path / "s", IMAGES))
    digest = blocks._digest

    def interrupted(data):
        found = digest(data)
        monkeypatch.setattr(blocks, "_digest", digest)
        with (tmp_path / "s" / "rows.bin").open("r+b") as file:
            file.write(bytes([labels._rows_file.bytes[0] ^ 1]))
        assert in_a_fork(lambda: labels[0], "damaged in block 0") == 3
        return found

    monkeypatch.setattr(blocks, "_digest", interrupted)
    labels[0]
    with pytest.raises(SoftLabelsError, match="damaged in block 0"):
        labels[0]


def test_a_reader_closes_what_it_opened(tmp_path):
    path, handles = write(tmp_path / "s", SENTENCES), "/proc/self/fd"
    gc.collect()
    before = len(os.listdir(handles))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        labels = SoftLabels(path)
        assert len(os.listdir(handles)) - before <= 4  # of two files; of each a map has one for itself
        del labels
        path.joinpath("rows.bin").unlink()
        with pytest.raises(SoftLabelsError, match=r"rows\.bin cannot be read"):
            SoftLabels(path)
        gc.collect()
    assert (len(os.listdir(handles)), warned) == (before, [])


# --- forks of a process that writes ---


def test_a_forked_process_neither_writes_nor_keeps_the_lock(tmp_path):
    """Loading workers are forked from the process that writes, and may live a little longer than it."""
    write(tmp_path / "whole", SENTENCES)
    reading, writing = os.pipe()

    def parent():
        writer = SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY)
        for key in range(4):
            writer.append(*content(SENTENCES, key))
        fork = os.fork()
        if fork == 0:
            try:
                lock = writer._lock  # as a frame that is never left would keep it
                del writer  # what was appended and not committed must not reach the disk from here
                os.write(writing, b"ready")
                time.sleep(60)
                del lock
            finally:
                os._exit(0)
        assert os.read(reading, 5) == b"ready"
        os.write(writing, f"{fork:10}".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(parent) == -signal.SIGKILL
    fork = int(os.read(reading, 10))
    os.kill(fork, 0)  # it is there
    assert (tmp_path / "s" / "rows.bin").stat().st_size == 0
    write(tmp_path / "s", SENTENCES)  # at once
    os.kill(fork, signal.SIGKILL)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_fork_does_not_open_the_folder_to_a_second_writer(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY):
        assert in_a_fork(lambda: SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY)) == 3
        assert in_a_fork(lambda: None) == 0
        with pytest.raises(SoftLabelsError, match="is being written by another process"):
            SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY)
    SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY).close()


# --- manifests made by hand ---

WRONG = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.sampled_from([0, -1, 10**12, 2**63, 10**400, 1e300, 0.5, "", "x", "\x1b[2J\n", "é" * 200]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(content, path=()):
    """Every place in nested dictionaries, as the names that lead there."""
    for name, value in content.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def outcome(path, layout):
    """Use a store in every way; nothing but a right beginning or one line may come of it."""
    try:
        labels = assert_a_right_beginning(path, layout, IDENTITY)
        labels.info()
        form_of_store(path, labels.identity)
        with SoftLabelsWriter(path, layout, IDENTITY) as writer:
            assert writer.keys == layout.keys
    except SoftLabelsError as error:
        message = str(error)
    else:
        return "read"
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))
    return "refused"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A whole store of each kind, and its manifest."""
    folder, found = tmp_path_factory.mktemp("stores"), []
    form = {"mode": "int8", "made": "x", "mean_kl": 0.1, "max_kl": 0.2, "agreement": 1.0, "images": 9}
    for kind in (SENTENCES, IMAGES):
        path = write(folder / str(kind.rows_per_sample), kind, identity=IDENTITY | {"teacher_form": form})
        found.append((path, kind, (path / "manifest.json").read_bytes()))
    return found


def forge(path, forged):
    """Write a manifest whose checksum fits, as whoever makes one by hand can."""
    forged["checksum"] = manifest_module._checksum(forged)
    (path / "manifest.json").write_text(json.dumps(forged))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere_is_read_or_refused_in_one_line(stores, data):
    path, layout, clean = data.draw(st.sampled_from(stores))
    forged = json.loads(clean)
    del forged["checksum"]
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, name = data.draw(st.sampled_from(sorted(places(forged))))
        inner = forged
        for step in outer:
            inner = inner[step]
        if data.draw(st.booleans()):
            inner[name] = data.draw(WRONG)
        else:
            del inner[name]
    try:
        forge(path, forged)
        outcome(path, layout)
    finally:
        (path / "manifest.json").write_bytes(clean)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "lskd soft labels", "version": %s}' % ("9" * 6000),
        '{"format": "lskd soft labels", "version": 1, "identity": %s}' % ("[" * 5000 + "]" * 5000),
        '{"format": "lskd soft labels", "version": 1, "identity": %s}' % ('{"a":' * 900 + "1" + "}" * 900),
        '{"format": "lskd soft labels", "version": "1\\nhas passed"}',
        '"lskd soft labels"',
        "",
    ],
    ids=range(6),
)
def test_a_manifest_that_is_none(tmp_path, text):
    write(tmp_path / "s", SENTENCES)
    (tmp_path / "s" / "manifest.json").write_text(text)
    assert outcome(tmp_path / "s", SENTENCES) == "refused"


def test_a_manifest_is_read_with_a_bound(tmp_path, monkeypatch):
    write(tmp_path / "s", SENTENCES)
    monkeypatch.setattr("lskd.base.files.JSON_LIMIT", 100)
    assert outcome(tmp_path / "s", SENTENCES) == "refused"


def test_an_identity_nested_deeper_than_any_comparison(stores):
    path, layout, clean = stores[0]
    forged = json.loads(clean)
    del forged["checksum"]
    for _ in range(300):
        forged["identity"] = {"teacher": "a", "inner": forged["identity"]}
    forge(path, forged)
    try:
        assert outcome(path, layout) == "refused"
    finally:
        (path / "manifest.json").write_bytes(clean)


# --- what is somebody else's ---


@pytest.mark.parametrize("name", ["lock", "rows.bin", "index.bin", "rows.bin.sums"])
def test_a_link_to_a_foreign_file_is_not_written_through(tmp_path, name):
    foreign = tmp_path / "foreign"
    foreign.write_text("years of work")
    with SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY) as writer:
        writer.commit()
    (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / name).symlink_to(foreign)
    with pytest.raises(SoftLabelsError) as caught:
        SoftLabelsWriter(tmp_path / "s", SENTENCES, IDENTITY)
    assert "\n" not in str(caught.value)
    assert foreign.read_text() == "years of work"


def test_the_file_of_rows_that_wait_is_no_link_either(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.write_text("years of work")
    run = StoredRun(tmp_path / "s", layout(rows_per_sample=1, seeds=True), {}, seed=0)
    run.open_writer()
    (tmp_path / "s" / SCRATCH).mkdir()
    (tmp_path / "s" / SCRATCH / "rows-0.bin").symlink_to(foreign)
    with pytest.raises(SoftLabelsError, match="cannot be written"):
        run.record([0], torch.zeros(1, 20))
    run.close()
    assert foreign.read_text() == "years of work"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_users_umask_and_nothing_else_is_left(tmp_path, umask):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".manifest.json.0a1b.new").touch()  # of a writer that was killed

    def work():
        os.umask(umask)
        write(tmp_path / "s", SENTENCES)

    assert in_a_fork(work) == 0
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "s").iterdir()}
    assert found == dict.fromkeys([*FILES, "lock"], 0o666 & ~umask)
