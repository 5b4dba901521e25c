"""Stored soft labels: what comes back, to one reader and to many, and what is refused."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lskd import LskdError, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels import store
from soft_label_stores import (
    FILES,
    IDENTITY,
    assert_a_right_beginning,
    content,
    contents,
    layout,
    layouts,
    write,
)

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("small_blocks")]
PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IMAGES = layout(40, rows_per_sample=1, seeds=True)


# --- what comes back ---


@PROPERTY
@given(layout=layouts(), cuts=st.lists(st.integers(0, 8), max_size=4), data=st.data())
def test_any_layout_in_any_number_of_sittings(tmp_path_factory, layout, cuts, data):
    path = tmp_path_factory.mktemp("store") / "s"
    for stop in (*sorted(min(cut, layout.keys) for cut in cuts), None):
        write(path, layout, stop)
    labels = assert_a_right_beginning(path, layout, IDENTITY)
    lengths = [content(layout, key)[2][0] for key in range(layout.keys)]
    assert labels.complete
    assert (labels.rows, labels.lengths().tolist()) == (sum(lengths), lengths)
    keys = data.draw(st.lists(st.integers(0, layout.keys - 1), max_size=20))
    got, one_by_one = labels.take(keys), [labels[key] for key in keys]
    assert got.values.shape == got.ids.shape == (sum(len(rows.ids) for rows in one_by_one), layout.k)
    for part in ("values", "ids", "seeds") if layout.seeds else ("values", "ids"):
        wanted = [getattr(rows, part) for rows in one_by_one]
        found = getattr(got, part)
        np.testing.assert_array_equal(found, np.concatenate(wanted) if wanted else found[:0])


def test_rows_are_views_of_the_map_and_cannot_be_written(tmp_path):
    labels = SoftLabels(write(tmp_path / "s", layout()))
    assert np.shares_memory(labels[3].values, labels._rows_file.bytes)
    with pytest.raises(ValueError, match="read-only"):
        labels[3].values[0, 0] = 0


@pytest.mark.parametrize(
    ("num_classes", "width"), [(2, 2), (65_535, 2), (65_536, 2), (65_537, 4), (2**24, 4)]
)
def test_ids_are_as_wide_as_the_class_count_needs(tmp_path, num_classes, width):
    shape = layout(1, num_classes=num_classes, k=2, rows_per_sample=1)
    assert shape.row["ids"].base.itemsize == width
    with SoftLabelsWriter(tmp_path / "s", shape, {}) as writer:
        writer.append([[-0.1, -3]], [[num_classes - 1, 0]])
    assert SoftLabels(tmp_path / "s")[0].ids.tolist() == [[num_classes - 1, 0]]


def test_images_take_4_and_4k_bytes_a_sample_and_epoch(tmp_path):
    shape = layout(30, epochs=3, k=10, rows_per_sample=1, seeds=True)
    labels = SoftLabels(write(tmp_path / "s", shape))
    assert labels[2 * 30 + 7].seeds.tolist() == content(shape, 2 * 30 + 7)[3].tolist()
    assert (tmp_path / "s" / "rows.bin").stat().st_size == 30 * 3 * (4 + 4 * 10)
    assert (tmp_path / "s" / "index.bin").stat().st_size == 0


def test_packed_rows_of_the_top_10_of_1000_take_27_bytes(tmp_path):
    """4 of the seed, 10 codes and 10 ids of 10 bits; each probability within a step of its code."""
    packed = layout(50, num_classes=1000, k=10, rows_per_sample=1, seeds=True, values="packed")
    assert packed.row.itemsize == 27
    generator = np.random.default_rng(0)
    log_p = np.log(np.maximum(generator.dirichlet(np.full(1000, 0.05), 50), 1e-300))
    ids = np.argsort(-log_p)[:, :10]
    values = np.take_along_axis(log_p, ids, -1)
    with SoftLabelsWriter(tmp_path / "s", packed, IDENTITY) as writer:
        writer.append(values, ids, seeds=np.arange(50))
    assert (tmp_path / "s/rows.bin").stat().st_size == 50 * 27
    rows = SoftLabels(tmp_path / "s").take(np.arange(50))
    np.testing.assert_array_equal(rows.ids, ids)
    step = np.sqrt(16 * -values) / 255 + 16 / 255**2 / 4  # half of one, plus float16's own
    assert (np.abs(rows.values - values) <= step + 5e-4 * -values).all()


def test_what_float16_cannot_express_stays_a_finite_number(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", layout(1, k=4), {}) as writer:
        writer.append([[0.0, -1e6, -np.inf, -5]], [[1, 2, 3, 4]], [1])
    assert SoftLabels(tmp_path / "s")[0].values.tolist() == [[0.0, -65504.0, -65504.0, -5.0]]


def test_a_reader_sees_what_was_committed_while_the_writer_goes_on(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY) as writer:
        writer.append(*content(layout(), 0))
        assert len(SoftLabels(tmp_path / "s")) == 0
        writer.commit()
        labels = SoftLabels(tmp_path / "s")
        for key in (1, 2):
            writer.append(*content(layout(), key))
        writer.commit()
        assert len(labels) == 1
        assert len(assert_a_right_beginning(tmp_path / "s", layout())) == 3
        with pytest.raises(IndexError, match="key 1 is not in"):
            labels[1]


def test_a_manifest_that_says_nothing_new_is_not_written(tmp_path):
    """A kill in it would leave a scratch file beside a store that is whole, which nobody opens to write."""
    with SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY) as writer:
        writer.append(*content(layout(), 0))
        writer.commit()
        before = (tmp_path / "s" / "manifest.json").stat()
        writer.commit()
    after = (tmp_path / "s" / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_reading_while_another_process_writes(tmp_path):
    shape, seen = layout(400), []
    write(tmp_path / "s", shape, stop=1)
    process = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path / "s", shape, None, 1))
    process.start()
    while process.is_alive():
        seen.append(len(assert_a_right_beginning(tmp_path / "s", shape)))
    process.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert os.path.getsize(tmp_path / "s" / "lock") == 0


# --- many readers ---


def test_pickle_is_the_path_and_not_the_content(tmp_path):
    labels = SoftLabels(write(tmp_path / "s", layout()))
    pickled = pickle.dumps(labels)
    assert len(pickled) < 300
    np.testing.assert_array_equal(pickle.loads(pickled)[3].ids, labels[3].ids)  # noqa: S301


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
    labels = SoftLabels(write(tmp_path / "s", IMAGES))
    there = list(DataLoader(Rows(labels), 5, num_workers=2, multiprocessing_context="fork", timeout=100))
    values = torch.cat([batch[0] for batch in there]).numpy()
    np.testing.assert_array_equal(values[:, 0], labels.take(range(40)).values)
    assert all(batch[1].all() for batch in there)
    workers = {int(pid) for batch in there for pid in batch[2]}
    assert len(workers) == 2
    assert os.getpid() not in workers


@pytest.mark.integration
def test_spawned_loading_workers_read(tmp_path):
    labels = SoftLabels(write(tmp_path / "s", IMAGES))
    loader = DataLoader(labels, 5, collate_fn=list, num_workers=2, multiprocessing_context="spawn")
    there = [rows for batch in loader for rows in batch]
    for part in ("values", "seeds"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(rows, part) for rows in there]), getattr(labels.take(range(40)), part)
        )


MEASURE = """
import sys
import numpy as np
from lskd import SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
def memory(name):
    return next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]
samples, window = int(sys.argv[2]), 5000
layout = SoftLabelsLayout(num_classes=10_000, k=8, samples=samples)
generator = np.random.default_rng(0)
with SoftLabelsWriter(sys.argv[1], layout, {}) as writer:
    while not writer.complete:
        lengths = generator.integers(2, 7, min(window, samples - writer.keys))
        shape = lengths.sum(), 8
        writer.append(-generator.random(shape), generator.integers(0, 10_000, shape), lengths)
written = memory("VmHWM")
labels = SoftLabels(sys.argv[1])
for key in generator.integers(0, samples, 20_000):
    labels[int(key)]
print(written, memory("RssAnon"))
"""


@pytest.mark.integration
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Half a million sentences, 2 million target tokens, against five thousand: the peak is the same."""
    peaks = {}
    for samples in (5_000, 500_000):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(samples)), str(samples)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[samples] = [int(word) / 1024 for word in said.split()]
    size = sum(file.stat().st_size for file in (tmp_path / "500000").iterdir()) / 2**20
    print(f"\npeak of writing, anonymous memory of reading [MiB]: {peaks}; the store has {size:.0f} MiB")
    assert size > 60
    for small, large in zip(peaks[5_000], peaks[500_000], strict=True):
        assert large - small < 8


# --- what is refused ---


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(tmp_path, name):
    file = write(tmp_path / "s", layout()) / name
    clean = file.read_bytes()
    sound = SoftLabels(tmp_path / "s")
    assert list(sound.damages()) == [None] * sound.blocks
    assert sound.blocks == sum(-(-(tmp_path / "s" / each).stat().st_size // 40) for each in FILES[:2])
    assert len(clean) > 0
    for position in range(len(clean)):
        damaged = bytearray(clean)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        try:
            content_changed = name != "manifest.json" or json.loads(damaged) != json.loads(clean)
        except ValueError:
            content_changed = True
        if content_changed:  # white space in the manifest means nothing
            with pytest.raises(SoftLabelsError, match=r"damaged|no manifest|version|again"):
                SoftLabels(tmp_path / "s").verify()
        if name in FILES[:2]:
            found = [damage for damage in SoftLabels(tmp_path / "s").damages() if damage]
            assert len(found) == 1
            assert f"{name} is damaged in block {position // 40} " in str(found[0])


def test_a_damaged_block_is_found_when_it_is_read_and_named(tmp_path):
    write(tmp_path / "s", layout(40, rows_per_sample=1))
    with open(tmp_path / "s" / "rows.bin", "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    labels = SoftLabels(tmp_path / "s")
    labels.take([0, 1, 2, 39])
    assert len(labels[0].ids) == 1
    with pytest.raises(SoftLabelsError, match=r"rows.bin is damaged in block 5 \(bytes 200 to 240\)"):
        labels[16]  # rows of 12 bytes: bytes 192 to 204
    for keys in ([0, 16], [17, 39, 0], [16]):
        with pytest.raises(SoftLabelsError, match="damaged in block 5"):
            labels.take(keys)
    for keys in ([0, 40], [-1]):
        with pytest.raises(IndexError, match=rf"key {keys[-1]} is not in"):
            labels.take(keys)
    assert not store._locks or all(lock.closed for lock in store._locks)


def test_a_damaged_block_amid_a_long_sentence_is_found(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", layout(2), IDENTITY) as writer:
        writer.append([[-1.0] * 3] * 40, [[0, 1, 2]] * 40, lengths=[30, 10])
    with open(tmp_path / "s" / "rows.bin", "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    labels = SoftLabels(tmp_path / "s")
    assert len(labels.take([1]).ids) == 10  # rows of 12 bytes, from byte 360 on
    for keys in ([0], [1, 0]):
        with pytest.raises(SoftLabelsError, match="damaged in block 5"):
            labels.take(keys)


def test_a_store_that_is_damaged_at_its_end_is_not_gone_on_with(tmp_path):
    path = write(tmp_path / "s", layout(40, rows_per_sample=1), stop=21)  # 252 bytes: six blocks and 12
    with open(path / "rows.bin", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    before = contents(path)
    with pytest.raises(SoftLabelsError, match=r"rows\.bin is damaged at its end"):
        SoftLabelsWriter(path, layout(40, rows_per_sample=1), IDENTITY)
    assert contents(path) == before


@pytest.mark.parametrize("name", ["rows.bin", "index.bin", "rows.bin.sums", "manifest.json"])
def test_a_missing_file_is_one_line(tmp_path, name):
    (write(tmp_path / "s", layout()) / name).unlink()
    with pytest.raises(SoftLabelsError, match="No such file") as caught:
        SoftLabels(tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_soft_labels_of_another_teacher_are_refused_with_the_reason(tmp_path):
    identity, other = ({"teacher": {"checksum": letter * 64}} for letter in "ac")
    write(tmp_path / "s", layout(), identity=identity)
    with pytest.raises(SoftLabelsError, match=r"teacher.checksum is a+\.\.\. there and c+\.\.\. here"):
        SoftLabels(tmp_path / "s", other)
    with pytest.raises(SoftLabelsError, match=r"teacher.checksum"):
        SoftLabelsWriter(tmp_path / "s", layout(), other)
    with pytest.raises(SoftLabelsError, match=r"augmentation is unknown there"):
        SoftLabels(tmp_path / "s", {"augmentation": "flip"})
    with pytest.raises(SoftLabelsError, match=r"layout.k is 3 there and 5 here"):
        SoftLabelsWriter(tmp_path / "s", layout(k=5), identity)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SoftLabelsError, match=r"contains something else \(thesis.txt\)"):
        SoftLabelsWriter(tmp_path, layout(), IDENTITY)
    with pytest.raises(SoftLabelsError, match="contains no soft labels"):
        SoftLabels(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [[0.0] * 3]}, "must both be"),
        ({"values": [[np.nan] * 3] * 2}, "NaN"),
        ({"values": [[np.inf] * 3] * 2}, "infinity"),
        ({"ids": [[0, 1, 20]] * 2}, "0 to 19"),
        ({"ids": [[0, 1, -1]] * 2}, "0 to 19"),
        ({"lengths": [1, 2]}, "sum to 2"),
        ({"lengths": None}, "lengths are needed"),
        ({"lengths": [1, 1, *[0] * 8]}, "9 keys are planned"),
        ({"seeds": [1, 2]}, "seeds"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, change, message):
    good = {"values": [[-1.0] * 3] * 2, "ids": [[0, 1, 2]] * 2, "lengths": [1, 1]}
    with (
        SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY) as writer,
        pytest.raises(ValueError, match=message),
    ):
        writer.append(**(good | change))
    assert len(SoftLabels(tmp_path / "s")) == 0


def test_samples_have_as_many_rows_as_their_layout_says(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", layout(rows_per_sample=2), IDENTITY) as writer:
        with pytest.raises(ValueError, match=r"has 2 row\(s\)"):
            writer.append([[-1.0] * 3] * 4, [[0, 1, 2]] * 4, lengths=[1, 3])
        assert writer.keys == 0


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 21}, {"samples": -1}, {"epochs": 0}, {"values": "int8"}])
def test_a_layout_that_fits_nothing(change):
    with pytest.raises(LskdError):
        layout(**change)
