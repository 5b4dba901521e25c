"""Stored soft labels when things go wrong: cut files, killed writers, full disks, forks; and many readers."""

import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lskd import SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.base import files
from lskd.soft_labels import blocks as _block_file
from lskd.soft_labels import format as manifest_module
from lskd.soft_labels import store as _soft_labels
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import form_of_store
from lskd.soft_labels.run import SCRATCH, StoredRun

pytestmark = pytest.mark.unit

FILES = ("rows.bin", "index.bin", "rows.bin.sums", "index.bin.sums", "manifest.json")
SAMPLES = 9
_original = manifest_module.Manifest.__init__


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    """Blocks of 40 bytes, so that a few rows fill many; and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(
        manifest_module.Manifest,
        "__init__",
        lambda self, *args, **named: _original(self, *args, **({"block_bytes": 40} | named)),
    )


def content(layout, key):
    """The rows of a key, of whatever layout."""
    count = layout.rows_per_sample or key * 7 % 4
    numbers = np.arange(count * layout.k).reshape(count, layout.k)
    seeds = np.full(count, 7 * key + 1) if layout.seeds else None
    return -numbers / 8 - key, (numbers + key) % layout.num_classes, [count], seeds


def write(path, layout, stop=None, commit_every=3):
    with SoftLabelsWriter(path, layout, {"teacher": "a"}) as writer:
        while writer.keys < (layout.keys if stop is None else stop):
            writer.append(*content(layout, writer.keys))
            if writer.keys % commit_every == 0:
                writer.commit()


def assert_a_right_beginning(labels, layout):
    for key in range(len(labels)):
        values, ids, _, seeds = content(layout, key)
        got = labels[key]
        np.testing.assert_array_equal(got.values, values.astype(got.values.dtype))
        np.testing.assert_array_equal(got.ids, ids)
        assert (got.seeds is None) == (seeds is None)
        if seeds is not None:
            np.testing.assert_array_equal(got.seeds, seeds)


def contents(path):
    return {name: (path / name).read_bytes() for name in FILES}


@st.composite
def layouts(draw):
    return SoftLabelsLayout(
        num_classes=draw(st.sampled_from([6, 70_000])),
        k=draw(st.integers(1, 3)),
        samples=draw(st.integers(1, 4)),
        epochs=draw(st.integers(1, 2)),
        rows_per_sample=draw(st.sampled_from([None, 1, 2])),
        values=draw(st.sampled_from(["float16", "float32"])),
        seeds=draw(st.booleans()),
    )


# --- cut at any byte ---


@settings(max_examples=2, deadline=None)
@given(layout=layouts(), committed=st.floats(0, 1), left_over=st.integers(0, 50))
def test_cut_at_any_byte_it_is_continued_or_refused(layout, committed, left_over):
    """With bytes behind what is committed, as a killed writer leaves them."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        write(whole, layout)
        write(cut, layout, stop=round(committed * layout.keys))
        for name in FILES[:4]:
            with open(cut / name, "ab") as file:
                file.write(b"x" * left_over)
        before = contents(cut)
        outcomes = set()
        for name in FILES:
            for size in range(len(before[name])):
                (cut / name).write_bytes(before[name][:size])
                try:
                    labels = SoftLabels(cut)
                    labels.verify()
                    assert_a_right_beginning(labels, layout)
                    outcomes.add("read")
                except SoftLabelsError:
                    outcomes.add("reading refused")
                try:
                    write(cut, layout)
                    assert contents(cut) == contents(whole)
                    outcomes.add("continued")
                except SoftLabelsError:
                    outcomes.add("continuing refused")
                if name != "manifest.json":  # nothing is touched before that is read
                    for other in FILES:
                        (cut / other).write_bytes(before[other])
            (cut / name).write_bytes(before[name])
        assert "reading refused" in outcomes  # the manifest cut in half, if nothing else
        assert not left_over or {"read", "continued"} <= outcomes


def test_every_block_of_every_file_is_vouched_for_at_the_real_block_size(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module.Manifest, "__init__", _original)
    count = 70_000
    layout = SoftLabelsLayout(1000, 5, count)
    with SoftLabelsWriter(tmp_path / "s", layout, {}) as writer:
        writer.append(np.full((count, 5), -1.0), np.tile(np.arange(5), (count, 1)), np.ones(count, int))
    clean = SoftLabels(tmp_path / "s")
    size = manifest_module.BLOCK_BYTES
    assert list(clean.damages()) == [None] * clean.blocks
    assert clean.blocks == sum(
        -(-(tmp_path / "s" / name).stat().st_size // size) for name in ("rows.bin", "index.bin")
    )
    generator = np.random.default_rng(0)
    for name in ("rows.bin", "index.bin"):
        length = (tmp_path / "s" / name).stat().st_size
        for block in range(-(-length // size)):
            stop = min((block + 1) * size, length)
            place = int(generator.integers(block * size, stop))
            with open(tmp_path / "s" / name, "r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << int(generator.integers(8))]))
                file.flush()
                found = [damage for damage in SoftLabels(tmp_path / "s").damages() if damage]
                assert len(found) == 1
                assert f"{name} is damaged in block {block} " in str(found[0])
                file.seek(place)
                file.write(bytes([byte]))
    SoftLabels(tmp_path / "s").verify()


# --- writers that end in the middle ---


def in_a_fork(work):
    """Run ``work`` in a forked process and return how it ended: its exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SoftLabelsError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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

    real_flush = _block_file._Appended._flush
    _block_file._Appended._flush = flush
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


@pytest.mark.parametrize("per_sample", [None, 1])
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(tmp_path, per_sample):
    layout = SoftLabelsLayout(20, 3, SAMPLES, rows_per_sample=per_sample)
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
            labels = SoftLabels(path)
            labels.verify()
            assert_a_right_beginning(labels, layout)
        write(path, layout)
        assert contents(path) == contents(tmp_path / "whole"), step
    assert step > 30  # every commit is several files written and synchronised, and a manifest replaced


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path):
    layout = SoftLabelsLayout(20, 3, 2000)
    start = time.perf_counter()
    write(tmp_path / "whole", layout, commit_every=5)
    duration = time.perf_counter() - start
    generator, killed = random.Random(0), 0
    for _ in range(100):
        process = multiprocessing.get_context("fork").Process(
            target=write, args=(tmp_path / "killed", layout), kwargs={"commit_every": 5}
        )
        process.start()
        process.join(generator.uniform(0, duration / 4))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (tmp_path / "killed" / "manifest.json").exists():
            labels = SoftLabels(tmp_path / "killed")
            labels.verify()
            assert_a_right_beginning(labels, layout)
            if labels.complete:
                break
    write(tmp_path / "killed", layout, commit_every=5)
    assert killed > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_disk_that_is_full_at_any_size(tmp_path):
    """The largest size of a file stands for a full disk; at the smallest even the manifest does not fit."""
    layout = SoftLabelsLayout(20, 3, 120, rows_per_sample=1)
    write(tmp_path / "whole", layout)
    largest = max(len(data) for data in contents(tmp_path / "whole").values())
    kept = []
    for size in range(0, largest + 60, 59):
        path = tmp_path / str(size)

        def work(path=path, size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write(path, layout)

        assert in_a_fork(work) == (3 if size < largest else 0)
        if (path / "manifest.json").exists():
            labels = SoftLabels(path)
            labels.verify()
            assert_a_right_beginning(labels, layout)
            kept.append(len(labels))
        write(path, layout)
        assert contents(path) == contents(tmp_path / "whole")
    assert kept == sorted(kept)
    assert len(set(kept)) > 3


# --- forks of a process that writes ---


def test_a_forked_process_neither_writes_nor_keeps_the_lock(tmp_path):
    """Loading workers are forked from the process that writes, and may live a little longer than it."""
    layout = SoftLabelsLayout(20, 3, SAMPLES)
    write(tmp_path / "whole", layout)
    reading, writing = os.pipe()

    def parent():
        writer = SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"})
        for key in range(4):
            writer.append(*content(layout, key))
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
    write(tmp_path / "s", layout)  # at once
    os.kill(fork, signal.SIGKILL)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_fork_does_not_open_the_folder_to_a_second_writer(tmp_path):
    layout = SoftLabelsLayout(20, 3, SAMPLES)
    with SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"}):
        assert in_a_fork(lambda: SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"})) == 3
        assert in_a_fork(lambda: None) == 0
        with pytest.raises(SoftLabelsError, match="is being written by another process"):
            SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"})


# --- many readers ---


class Rows(Dataset):
    """Each item is a batch's worth of rows, and where they came from."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        rows = self.labels[key]
        mapped = np.shares_memory(rows.values, self.labels._rows_file.bytes)
        with open("/proc/self/maps", encoding="utf-8") as maps:  # r--s: read-only, shared with all others
            shared = any("rows.bin" in line and "r--s" in line for line in maps)
        return torch.from_numpy(rows.values.astype(np.float32)), mapped and shared, os.getpid()


def test_forked_loading_workers_read_without_copying(tmp_path):
    layout = SoftLabelsLayout(20, 3, 40, rows_per_sample=1, seeds=True)
    write(tmp_path / "s", layout)
    labels = SoftLabels(tmp_path / "s")
    there = list(DataLoader(Rows(labels), 5, num_workers=2, multiprocessing_context="fork", timeout=100))
    values = torch.cat([batch[0] for batch in there]).numpy()
    np.testing.assert_array_equal(values[:, 0], labels.take(range(40)).values)
    assert all(batch[1].all() for batch in there)
    workers = {int(pid) for batch in there for pid in batch[2]}
    assert len(workers) == 2
    assert os.getpid() not in workers


@pytest.mark.integration
def test_spawned_loading_workers_read(tmp_path):
    layout = SoftLabelsLayout(20, 3, 40, rows_per_sample=1, seeds=True)
    write(tmp_path / "s", layout)
    labels = SoftLabels(tmp_path / "s")
    loader = DataLoader(labels, 5, collate_fn=list, num_workers=2, multiprocessing_context="spawn")
    there = [rows for batch in loader for rows in batch]
    np.testing.assert_array_equal(
        np.concatenate([rows.values for rows in there]), labels.take(range(40)).values
    )
    np.testing.assert_array_equal(
        np.concatenate([rows.seeds for rows in there]), labels.take(range(40)).seeds
    )


def test_what_a_forked_worker_checked_is_checked_for_all(tmp_path):
    layout = SoftLabelsLayout(20, 3, 40, rows_per_sample=1)
    write(tmp_path / "s", layout)
    labels = SoftLabels(tmp_path / "s")
    assert not labels._rows_file._checked.any()
    assert in_a_fork(lambda: labels[0]) == 0
    assert labels._rows_file._checked.tolist().index(True) == 0
    assert labels._rows_file._checked.sum() == 1


# --- rows of many samples at once ---


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_take_is_the_rows_one_after_the_other(layout, data):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "s", layout)
        labels = SoftLabels(Path(folder) / "s")
        keys = data.draw(st.lists(st.integers(0, layout.keys - 1), max_size=20))
        got = labels.take(keys)
        one_by_one = [labels[key] for key in keys]
        assert got.values.shape == got.ids.shape == (sum(len(rows.ids) for rows in one_by_one), layout.k)
        for part in ("values", "ids", "seeds") if layout.seeds else ("values", "ids"):
            wanted = [getattr(rows, part) for rows in one_by_one]
            np.testing.assert_array_equal(
                getattr(got, part), np.concatenate(wanted) if wanted else getattr(got, part)[:0]
            )


def test_take_checks_the_blocks_and_the_keys(tmp_path):
    layout = SoftLabelsLayout(20, 3, 40, rows_per_sample=1)
    write(tmp_path / "s", layout)
    with open(tmp_path / "s" / "rows.bin", "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    labels = SoftLabels(tmp_path / "s")
    labels.take([0, 1, 2, 39])
    for keys in ([0, 16], [17, 39, 0], [16]):  # rows of 12 bytes: bytes 192 to 204 are key 16
        with pytest.raises(SoftLabelsError, match="damaged in block 5"):
            labels.take(keys)
    for keys in ([0, 40], [-1]):
        with pytest.raises(IndexError, match=rf"key {keys[-1]} is not in"):
            labels.take(keys)
    assert not _soft_labels._locks or all(lock.closed for lock in _soft_labels._locks)


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
        labels = SoftLabels(path, {"teacher": "a"})
        labels.verify()
        labels.info()
        form_of_store(path, labels.identity)
        assert_a_right_beginning(labels, layout)
        with SoftLabelsWriter(path, layout, {"teacher": "a"}) as writer:
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
    for per_sample in (None, 1):
        path, layout = folder / str(per_sample), SoftLabelsLayout(20, 3, SAMPLES, rows_per_sample=per_sample)
        with SoftLabelsWriter(path, layout, {"teacher": "a", "teacher_form": form}) as writer:
            for key in range(SAMPLES):
                writer.append(*content(layout, key))
        found.append((path, layout, (path / "manifest.json").read_bytes()))
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
        '{"format": "lskd soft labels", "version": 1, "layout": Infinity}',
        '{"format": "lskd soft labels", "version": 1, "layout": 1e999}',
        '{"format": "lskd soft labels", "version": 1, "identity": {"\\ud800": 1}}',
        '{"format": "lskd soft labels", "version": 1, "identity": %s}' % ("[" * 5000 + "]" * 5000),
        '{"format": "lskd soft labels", "version": 1, "identity": %s}' % ('{"a":' * 900 + "1" + "}" * 900),
        '{"format": "lskd soft labels", "version": "1\\nhas passed"}',
        "[" * 100_000,
        '"lskd soft labels"',
        "",
    ],
    ids=range(10),
)
def test_a_manifest_that_json_itself_cannot_take(tmp_path, text):
    write(tmp_path / "s", SoftLabelsLayout(20, 3, SAMPLES))
    (tmp_path / "s" / "manifest.json").write_text(text)
    assert outcome(tmp_path / "s", SoftLabelsLayout(20, 3, SAMPLES)) == "refused"


def test_a_manifest_that_is_no_utf_8_or_without_end(tmp_path, monkeypatch):
    layout = SoftLabelsLayout(20, 3, SAMPLES)
    write(tmp_path / "s", layout)
    clean = (tmp_path / "s" / "manifest.json").read_bytes()
    (tmp_path / "s" / "manifest.json").write_bytes(clean.replace(b"teacher", b"t\xe9acher"))
    assert outcome(tmp_path / "s", layout) == "refused"
    monkeypatch.setattr(files.read_json, "__defaults__", ("", 100))
    (tmp_path / "s" / "manifest.json").write_bytes(clean)
    assert outcome(tmp_path / "s", layout) == "refused"


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
    layout = SoftLabelsLayout(20, 3, SAMPLES)
    with SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"}) as writer:
        writer.commit()
    (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / name).symlink_to(foreign)
    with pytest.raises(SoftLabelsError) as caught:
        SoftLabelsWriter(tmp_path / "s", layout, {"teacher": "a"})
    assert "\n" not in str(caught.value)
    assert foreign.read_text() == "years of work"


def test_the_file_of_rows_that_wait_is_no_link_either(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.write_text("years of work")
    layout = SoftLabelsLayout(20, 3, SAMPLES, rows_per_sample=1, seeds=True)
    run = StoredRun(tmp_path / "s", layout, {}, seed=0)
    run.open_writer()
    (tmp_path / "s" / SCRATCH).mkdir()
    (tmp_path / "s" / SCRATCH / "rows-0.bin").symlink_to(foreign)
    with pytest.raises(SoftLabelsError, match="cannot be written"):
        run.record([0], torch.zeros(1, 20))
    run.close()
    assert foreign.read_text() == "years of work"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_users_umask_and_nothing_else_is_left(tmp_path, umask):
    layout = SoftLabelsLayout(20, 3, SAMPLES)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".manifest.json.0a1b.new").touch()  # of a writer that was killed

    def work():
        os.umask(umask)
        write(tmp_path / "s", layout)

    assert in_a_fork(work) == 0
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "s").iterdir()}
    assert found == dict.fromkeys([*FILES, "lock"], 0o666 & ~umask)
