"""Stored soft labels: what comes back, what is refused, and what an ended writer leaves."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lskd import LskdError, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels import format as manifest_module
from lskd.soft_labels.format import SoftLabelsLayout

pytestmark = pytest.mark.unit

IDENTITY = {"teacher": {"checksum": "a" * 64}, "data": "b" * 64}
LENGTHS = np.array([3, 0, 1, 7, 2, 5])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 40 bytes, so that a few rows fill many; the size is part of each store."""
    monkeypatch.setattr(manifest_module.Manifest, "__init__", _with_small_blocks)


_original = manifest_module.Manifest.__init__


def _with_small_blocks(self, *arguments, **named):
    _original(self, *arguments, **({"block_bytes": 40} | named))


def layout(**changes):
    return SoftLabelsLayout(**({"num_classes": 50, "k": 4, "samples": len(LENGTHS)} | changes))


def rows(count, k=4, num_classes=50, seed=0):
    generator = np.random.default_rng(seed)
    values = np.sort(-generator.exponential(2, (count, k)))[:, ::-1]
    ids = np.argsort(generator.random((count, num_classes)))[:, :k]
    return values, ids


def write(path, **changes):
    values, ids = rows(LENGTHS.sum())
    with SoftLabelsWriter(path, layout(**changes), IDENTITY) as writer:
        writer.append(values, ids, LENGTHS)
    return values, ids


def test_what_is_written_comes_back_by_sample(tmp_path):
    values, ids = write(tmp_path / "s", values="float32")
    labels = SoftLabels(tmp_path / "s", IDENTITY)
    assert labels.complete
    assert len(labels) == len(LENGTHS)
    assert labels.rows == LENGTHS.sum()
    assert labels.lengths().tolist() == LENGTHS.tolist()
    end = 0
    for key, length in enumerate(LENGTHS):
        got = labels[key]
        np.testing.assert_array_equal(got.values, values[end : end + length].astype(np.float32))
        np.testing.assert_array_equal(got.ids, ids[end : end + length])
        assert got.seeds is None
        end += length
    labels.verify()


def test_rows_are_views_of_the_map_and_cannot_be_written(tmp_path):
    write(tmp_path / "s")
    labels = SoftLabels(tmp_path / "s")
    assert np.shares_memory(labels[3].values, labels._rows_file.bytes)
    with pytest.raises(ValueError, match="read-only"):
        labels[3].values[0, 0] = 0


@pytest.mark.parametrize(
    ("num_classes", "width"), [(2, 2), (65_535, 2), (65_536, 2), (65_537, 4), (2**24, 4)]
)
def test_ids_are_as_wide_as_the_class_count_needs(tmp_path, num_classes, width):
    shape = SoftLabelsLayout(num_classes=num_classes, k=2, samples=1, rows_per_sample=1)
    assert shape.row["ids"].base.itemsize == width
    with SoftLabelsWriter(tmp_path / "s", shape, {}) as writer:
        writer.append([[-0.1, -3]], [[num_classes - 1, 0]])
    assert SoftLabels(tmp_path / "s")[0].ids.tolist() == [[num_classes - 1, 0]]


def test_images_take_4_and_4k_bytes_a_sample_and_epoch(tmp_path):
    k, samples, epochs = 10, 30, 3
    shape = SoftLabelsLayout(1000, k, samples, epochs, rows_per_sample=1, seeds=True)
    values, ids = rows(samples * epochs, k, 1000)
    seeds = np.random.default_rng(1).integers(0, 2**32, samples * epochs, dtype=np.uint32)
    with SoftLabelsWriter(tmp_path / "s", shape, {}) as writer:
        for epoch in range(epochs):
            part = slice(epoch * samples, (epoch + 1) * samples)
            writer.append(values[part], ids[part], seeds=seeds[part])
    labels = SoftLabels(tmp_path / "s")
    key = labels.key(sample=7, epoch=2)
    assert labels[key].seeds.tolist() == [seeds[2 * samples + 7]]
    np.testing.assert_array_equal(labels[key].ids, ids[[2 * samples + 7]])
    assert (tmp_path / "s" / "rows.bin").stat().st_size == samples * epochs * (4 + 4 * k)
    assert (tmp_path / "s" / "index.bin").stat().st_size == 0
    with pytest.raises(IndexError, match="epoch 3"):
        labels.key(0, 3)


def test_what_float16_cannot_hold_stays_a_finite_number(tmp_path):
    with SoftLabelsWriter(tmp_path / "s", layout(samples=1), {}) as writer:
        writer.append([[0.0, -1e6, -np.inf, -5]], [[1, 2, 3, 4]], [1])
    assert SoftLabels(tmp_path / "s")[0].values.tolist() == [[0.0, -65504.0, -65504.0, -5.0]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=hnp.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, 9)),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    k=st.integers(1, 5),
    classes=st.sampled_from([5, 300, 70_000]),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_lengths_in_any_number_of_sittings(lengths, cuts, k, classes, dtype):
    generator = np.random.default_rng(0)
    total = int(lengths.sum())
    values = -generator.random((total, k)).astype(dtype)
    ids = generator.integers(0, classes, (total, k))
    shape = SoftLabelsLayout(classes, k, len(lengths), values=dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        bounds = [*sorted(min(cut, len(lengths)) for cut in cuts), len(lengths)]
        for stop in bounds:
            with SoftLabelsWriter(Path(folder) / "s", shape, IDENTITY) as writer:
                start = writer.keys
                first = int(ends[start - 1]) if start else 0
                last = int(ends[stop - 1]) if stop else 0
                writer.append(values[first:last], ids[first:last], lengths[start:stop])
        labels = SoftLabels(Path(folder) / "s")
        labels.verify()
        assert labels.complete
        assert labels.lengths().tolist() == lengths.tolist()
        if len(lengths):
            np.testing.assert_array_equal(
                np.concatenate([labels[i].values for i in range(len(lengths))]), values
            )
            np.testing.assert_array_equal(np.concatenate([labels[i].ids for i in range(len(lengths))]), ids)


# --- refused ---


@pytest.mark.parametrize(
    "name", ["rows.bin", "index.bin", "rows.bin.sums", "index.bin.sums", "manifest.json"]
)
def test_a_flipped_byte_anywhere_is_found(tmp_path, name):
    write(tmp_path / "s")
    file = tmp_path / "s" / name
    clean = file.read_bytes()
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
    file.write_bytes(clean)
    SoftLabels(tmp_path / "s").verify()


def test_a_damaged_block_is_found_when_it_is_read_and_named(tmp_path):
    write(tmp_path / "s")
    file = tmp_path / "s" / "rows.bin"
    content = bytearray(file.read_bytes())
    content[130] ^= 1
    file.write_bytes(content)
    labels = SoftLabels(tmp_path / "s")
    assert len(labels[0].ids) == 3  # rows of 16 bytes: these lie in blocks 0 and 1
    with pytest.raises(SoftLabelsError, match=r"rows.bin is damaged in block 3 \(bytes 120 to 160\)"):
        [labels[key] for key in range(len(labels))]


@pytest.mark.parametrize(
    "name", ["rows.bin", "index.bin", "rows.bin.sums", "index.bin.sums", "manifest.json"]
)
def test_truncated_at_any_byte_is_refused_by_reader_and_writer(tmp_path, name):
    write(tmp_path / "s")
    file = tmp_path / "s" / name
    clean = file.read_bytes()
    for size in range(len(clean) - (2 if name == "manifest.json" else 0)):
        file.write_bytes(clean[:size])
        with pytest.raises(SoftLabelsError, match=r"truncated|damaged"):
            SoftLabels(tmp_path / "s")
        with pytest.raises(SoftLabelsError, match=r"truncated|damaged"):
            SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY)


@pytest.mark.parametrize("name", ["rows.bin", "index.bin", "rows.bin.sums", "manifest.json"])
def test_a_missing_file_is_one_line(tmp_path, name):
    write(tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    with pytest.raises(SoftLabelsError, match="No such file") as caught:
        SoftLabels(tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_soft_labels_of_another_teacher_are_refused_with_the_reason(tmp_path):
    write(tmp_path / "s")
    other = {"teacher": {"checksum": "c" * 64}}
    with pytest.raises(SoftLabelsError, match=r"teacher.checksum is a+\.\.\. there and c+\.\.\. here"):
        SoftLabels(tmp_path / "s", other)
    with pytest.raises(SoftLabelsError, match=r"teacher.checksum"):
        SoftLabelsWriter(tmp_path / "s", layout(), other)
    with pytest.raises(SoftLabelsError, match=r"augmentation is unknown there"):
        SoftLabels(tmp_path / "s", {"augmentation": "flip"})
    with pytest.raises(SoftLabelsError, match=r"layout.k is 4 there and 5 here"):
        SoftLabelsWriter(tmp_path / "s", layout(k=5), IDENTITY)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SoftLabelsError, match=r"contains something else \(thesis.txt\)"):
        SoftLabelsWriter(tmp_path, layout(), IDENTITY)
    with pytest.raises(SoftLabelsError, match="contains no soft labels"):
        SoftLabels(tmp_path)


def test_two_writers_at_once(tmp_path):
    with (
        SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY),
        pytest.raises(SoftLabelsError, match="is being written by another process"),
    ):
        SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY)
    SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [[0.0] * 4]}, "must both be"),
        ({"values": [[np.nan] * 4] * 2}, "NaN"),
        ({"values": [[np.inf] * 4] * 2}, "infinity"),
        ({"ids": [[0, 1, 2, 50]] * 2}, "0 to 49"),
        ({"ids": [[0, 1, 2, -1]] * 2}, "0 to 49"),
        ({"lengths": [1, 2]}, "sum to 2"),
        ({"lengths": None}, "lengths are needed"),
        ({"lengths": [1, 1, 0, 0, 0, 0, 0]}, "6 keys are planned"),
        ({"seeds": [1, 2]}, "seeds"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, change, message):
    good = {"values": [[-1.0] * 4] * 2, "ids": [[0, 1, 2, 3]] * 2, "lengths": [1, 1]}
    with (
        SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY) as writer,
        pytest.raises(ValueError, match=message),
    ):
        writer.append(**(good | change))
    assert len(SoftLabels(tmp_path / "s")) == 0


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 51}, {"samples": -1}, {"epochs": 0}, {"values": "int8"}])
def test_a_layout_that_fits_nothing(change):
    with pytest.raises(LskdError):
        layout(**change)


# --- ended writers, many readers ---

WRITE_SLOWLY = """
import sys, time
import numpy as np
from lskd import SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
layout = SoftLabelsLayout(num_classes=50, k=4, samples=400)
with SoftLabelsWriter(sys.argv[1], layout, {"teacher": "a"}) as writer:
    while not writer.complete:
        key = writer.keys
        length = key % 7
        values = -np.arange(length * 4).reshape(length, 4) / 8 - key / 8
        writer.append(values, np.tile([key % 50, 1, 2, 3], (length, 1)), [length])
        if key % 10 == int(sys.argv[2]):
            writer.commit()
            print(key, flush=True)
            time.sleep(float(sys.argv[3]))
"""


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_bytes_that_an_ended_writer_left_behind_do_not_count(tmp_path):
    write(tmp_path / "s")
    for name in ("rows.bin", "index.bin", "rows.bin.sums"):
        with open(tmp_path / "s" / name, "ab") as file:
            file.write(b"half a r")
    (tmp_path / "s" / ".manifest.json.new").write_text("{")
    SoftLabels(tmp_path / "s").verify()
    SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY).close()
    assert SoftLabels(tmp_path / "s").complete
    assert (tmp_path / "s" / "rows.bin").stat().st_size == 16 * LENGTHS.sum()


def test_a_full_disk_is_one_line_and_what_was_committed_stays(tmp_path):
    code = """
    import resource, sys
    import numpy as np
    from lskd import SoftLabelsError, SoftLabelsWriter
    from lskd.soft_labels.format import SoftLabelsLayout
    writer = SoftLabelsWriter(sys.argv[1], SoftLabelsLayout(50, 4, 100_000, rows_per_sample=1), {})
    rows = np.full((1000, 4), -1.0), np.tile(np.arange(4), (1000, 1))
    writer.append(*rows)
    writer.commit()
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # as good as a full disk
    try:
        for _ in range(99):
            writer.append(*rows)
        writer.commit()
    except SoftLabelsError as error:
        print(error)
    """
    process = python(code, tmp_path / "s")
    said = process.communicate()[0]
    assert process.returncode == 0
    assert "cannot be written (File too large)" in said
    assert said.count("\n") == 1
    labels = SoftLabels(tmp_path / "s")
    labels.verify()
    assert len(labels) == 1000
    with SoftLabelsWriter(tmp_path / "s", SoftLabelsLayout(50, 4, 100_000, rows_per_sample=1), {}) as writer:
        assert writer.keys == 1000


def test_pickle_is_the_path_and_not_the_content(tmp_path):
    write(tmp_path / "s")
    labels = SoftLabels(tmp_path / "s")
    pickled = pickle.dumps(labels)
    assert len(pickled) < 300
    np.testing.assert_array_equal(pickle.loads(pickled)[3].ids, labels[3].ids)  # noqa: S301


def test_a_reader_sees_what_was_committed_while_the_writer_goes_on(tmp_path):
    values, ids = rows(4)
    with SoftLabelsWriter(tmp_path / "s", layout(), IDENTITY) as writer:
        writer.append(values[:3], ids[:3], [3])
        assert len(SoftLabels(tmp_path / "s")) == 0
        writer.commit()
        labels = SoftLabels(tmp_path / "s")
        writer.append(values[3:], ids[3:], [0, 1])
        writer.commit()
        assert len(labels) == 1
        assert len(SoftLabels(tmp_path / "s")) == 3
        labels.verify()
        with pytest.raises(IndexError, match="key 1 is not in"):
            labels[1]


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
        process = python(MEASURE, tmp_path / str(samples), samples)
        peaks[samples] = [int(word) / 1024 for word in process.communicate()[0].split()]
        assert process.returncode == 0
    size = sum(file.stat().st_size for file in (tmp_path / "500000").iterdir()) / 2**20
    print(f"\npeak of writing, anonymous memory of reading [MiB]: {peaks}; the store has {size:.0f} MiB")
    assert size > 60
    for small, large in zip(peaks[5_000], peaks[500_000], strict=True):
        assert large - small < 8


def test_reading_while_another_process_writes(tmp_path):
    process = python(WRITE_SLOWLY, tmp_path / "s", 3, 0.005)
    process.stdout.readline()
    seen = []
    while process.poll() is None:
        labels = SoftLabels(tmp_path / "s")
        labels.verify()
        seen.append(len(labels))
        assert labels[len(labels) - 1].ids.shape[0] == (len(labels) - 1) % 7
    process.communicate()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert os.path.getsize(tmp_path / "s" / "lock") == 0
