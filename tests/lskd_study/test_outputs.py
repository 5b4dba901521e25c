import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lskd import LskdError
from lskd_study.teachers import files
from lskd_study.teachers.outputs import Outputs, read_outputs, write_outputs

pytestmark = pytest.mark.unit

N, K, D = 13, 4, 6
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((N, K)).astype(np.float32)
LABELS = np.arange(N) % K
FEATURES = RNG.standard_normal((N, D)).astype(np.float32)
WEIGHT = RNG.standard_normal((K, D)).astype(np.float32)
KEYS = [f"val/ä/{i}.png" for i in range(N)]
NAMES = ["ein Hund", "b", "ç", "d"]
ALL = {"logits": LOGITS, "labels": LABELS, "features": FEATURES, "weight": WEIGHT}


def write_npz(path, arrays, save=np.savez):
    save(path, **arrays)
    return path


def write_safetensors(path, arrays):
    tensors = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        text = array.dtype.kind == "U"
        content = np.frombuffer("\n".join(array.tolist()).encode(), np.uint8).copy() if text else array
        tensors[name] = torch.as_tensor(content)
    save_file(tensors, path)
    return path


def write_parquet(path, arrays, list_type=lambda number, _: pa.list_(number), **options):
    columns = {}
    for name, array in arrays.items():
        if name in ("weight", "class_names"):  # a table has no place for these
            continue
        kind = list_type(pa.from_numpy_dtype(array.dtype), array.shape[-1]) if array.ndim == 2 else None
        values = list(array) if array.ndim == 2 else array.tolist() if array.dtype.kind == "U" else array
        columns[name] = pa.array(values, kind)
    table = pa.table(columns)
    if "class_names" in arrays:
        table = table.replace_schema_metadata({"class_names": json.dumps(arrays["class_names"].tolist())})
    pq.write_table(table, path, **options)
    return path


COMPRESSED = partial(write_npz, save=np.savez_compressed)
WRITERS = {".npz": write_npz, ".safetensors": write_safetensors, ".parquet": write_parquet}
WAYS = {
    "stored": (".npz", write_npz),
    "compressed": (".npz", COMPRESSED),
    "safetensors": (".safetensors", write_safetensors),
    "parquet": (".parquet", write_parquet),
    "large lists": (".parquet", partial(write_parquet, list_type=lambda kind, _: pa.large_list(kind))),
    "fixed lists": (".parquet", partial(write_parquet, list_type=pa.list_)),
    "row groups": (".parquet", partial(write_parquet, row_group_size=5)),
    "row groups of fixed lists": (".parquet", partial(write_parquet, list_type=pa.list_, row_group_size=5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_that_a_file_may_contain(tmp_path, way):
    suffix, write = WAYS[way]
    texts = {"keys": np.array(KEYS), "class_names": np.array(NAMES)}
    path = write(tmp_path / f"teacher{suffix}", ALL | texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_outputs(path)
    assert np.array_equal(found.logits.numpy(), LOGITS)
    assert found.labels.dtype is torch.int64
    assert np.array_equal(found.labels.numpy(), LABELS)
    assert np.array_equal(found.features.numpy(), FEATURES)
    assert (list(found.keys), list(found.class_names)) == (KEYS, NAMES)
    assert suffix == ".parquet" or np.array_equal(found.templates.numpy(), WEIGHT)
    assert found.name == "teacher"
    assert read_outputs(path, "other").name == "other"
    if suffix == ".npz":
        found.logits[0, 0] = 7  # of this process alone
        assert np.array_equal(read_outputs(path).logits.numpy(), LOGITS)


def test_file_of_a_study_is_called_as_its_run(tmp_path):
    (tmp_path / "run").mkdir()
    path = write_safetensors(
        tmp_path / "run" / "val_logits.safetensors", {"logits": LOGITS, "labels": LABELS}
    )
    assert read_outputs(path).name == "run"


def test_parquet_categories_as_keys_and_half_precision(tmp_path):
    table = pa.table(
        {
            "logits": pa.array(list(LOGITS.astype(np.float16)), pa.list_(pa.float16())),
            "labels": pa.array(LABELS.astype(np.uint8)),
            "keys": pa.array(KEYS).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_outputs(tmp_path / "a.parquet")
    assert found.logits.dtype is torch.float16
    assert np.array_equal(found.logits.numpy(), LOGITS.astype(np.float16))
    assert found.keys == KEYS


DTYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", np.longdouble]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_numpy(tmp_path, order, dtype):
    """Byte orders, widths and column order."""
    logits = np.asarray(LOGITS.astype(dtype), order=order)
    found = read_outputs(write_npz(tmp_path / "a.npz", {"logits": logits, "labels": LABELS})).logits
    width = min(np.dtype(dtype).itemsize, 8)
    assert found.dtype.itemsize == width
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), logits.astype(f"f{width}"))


@pytest.mark.parametrize("dtype", ["i1", "<i2", ">i4", "<i8", "u1", ">u2", "<u8"])
def test_integer_labels(tmp_path, dtype):
    path = write_npz(tmp_path / "a.npz", {"logits": LOGITS, "labels": LABELS.astype(dtype)})
    found = read_outputs(path).labels
    assert found.dtype is torch.int64
    assert found.tolist() == LABELS.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions_of_safetensors(tmp_path, dtype):
    logits = torch.from_numpy(LOGITS).to(dtype)
    save_file({"logits": logits, "labels": torch.from_numpy(LABELS)}, tmp_path / "a.safetensors")
    found = read_outputs(tmp_path / "a.safetensors").logits
    assert found.dtype is dtype
    assert torch.equal(found, logits)


def test_numbers_that_are_not_finite_are_left_alone(tmp_path):
    logits = LOGITS.copy()
    logits[3, 1], logits[4, 2] = np.nan, np.inf
    path = write_npz(tmp_path / "a.npz", {"logits": logits, "labels": LABELS})
    assert np.array_equal(read_outputs(path).logits.numpy(), logits, equal_nan=True)


def test_features_without_logits(tmp_path):
    path = write_npz(tmp_path / "a.npz", {"features": FEATURES, "labels": LABELS, "weight": WEIGHT})
    found = read_outputs(path)
    assert found.logits is None
    assert found.keys is None
    assert np.array_equal(found.templates.numpy(), WEIGHT)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8")), min_size=2, unique=True),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_is_written_is_read(tmp_path_factory, names, dtype):
    path = tmp_path_factory.mktemp("written") / "new" / "a.safetensors"
    logits = torch.randn(3, len(names)).to(dtype)
    written = Outputs("a", logits, torch.tensor([0, 1, 0]), ["x", "y", ""], names, torch.randn(5, 3).T, None)
    write_outputs(written, path)
    found = read_outputs(path)
    assert found.logits.dtype is dtype
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.features, written.features)
    assert (found.keys, found.class_names, found.templates) == (["x", "y", ""], names, None)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    path.write_bytes(b"")
    write_outputs(written, path)  # takes the place of what is there
    assert torch.equal(read_outputs(path).labels, written.labels)


def refused(path):
    with pytest.raises(LskdError) as error:
        read_outputs(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert "; " in message  # what is wrong; what to do
    return message


FIELDS = np.zeros((3, 2), dtype=[("ψ", "f4")])
WRONG = {
    "no labels": ({"labels": None}, "no 'labels' (it contains features, logits"),
    "no logits": ({"logits": None, "features": None}, "no 'logits' (it contains labels"),
    "labels high": ({"labels": np.where(LABELS == 3, 4, LABELS)}, "label of sample 3 is 4; with 4 classes"),
    "labels negative": ({"labels": np.where(LABELS == 2, -1, LABELS)}, "label of sample 2 is -1;"),
    "of features too": ({"logits": None, "weight": None, "labels": LABELS - 1}, "label of sample 0 is -1"),
    "labels of floats": ({"labels": LABELS.astype(np.float32)}, "store class ids as whole numbers"),
    "integer logits": ({"logits": LOGITS.astype(np.int32)}, "'logits' has dtype"),
    "one class": ({"logits": LOGITS[:, :1], "labels": 0 * LABELS, "weight": WEIGHT[:1]}, "1 class; at least"),
    "few names": ({"class_names": np.array(NAMES[1:])}, "logits have 4 classes, class_names 3"),
    "name twice": ({"class_names": np.array(["a", "b", "a", "c"])}, "class_names has 'a' twice"),
}
# A table's columns are equally long, and it has no place for a classifier.
WRONG_OUTSIDE_PARQUET = {
    "labels short": ({"labels": LABELS[:-1]}, "logits have 13 rows, labels 12"),
    "features short": ({"features": FEATURES[:-1]}, "features have 12 rows, labels 13"),
    "weight wide": ({"weight": WEIGHT[:, 1:]}, "features have 6 columns, weight 5"),
    "weight of other classes": ({"weight": WEIGHT[1:]}, "logits have 4 classes, weight 3"),
    "a row": ({"logits": LOGITS[0]}, "shape (4,); it must be (samples, classes)"),
    "a block": ({"logits": LOGITS[None]}, "shape (1, 13, 4)"),
    "a column": ({"labels": LABELS[:, None]}, "'labels' has shape (13, 1)"),
    "nothing": ({"logits": LOGITS[:0], "labels": LABELS[:0]}, "store at least one sample"),
    "no columns": ({"logits": LOGITS[:, :0]}, "no columns"),
    "few keys": ({"keys": np.array(KEYS[1:])}, "keys have 12 rows, labels 13"),
    "key twice": ({"keys": np.array([*KEYS[1:], KEYS[5]])}, f"keys has {KEYS[5]!r} twice"),
}
WRONG_IN_NPZ = {
    "keys of numbers": ({"keys": np.arange(N)}, "store a row of texts"),
    "large labels": (
        {"labels": np.where(LABELS == 3, np.uint64(2**63), LABELS.astype(np.uint64))},
        "label of sample 3 is 9223372036854775808",
    ),
    "fields": ({"logits": FIELDS}, "store floating-point numbers"),
}
CASES = WRONG | WRONG_OUTSIDE_PARQUET | WRONG_IN_NPZ


@pytest.mark.parametrize(
    ("case", "suffix"),
    [(case, ".npz") for case in CASES]
    + [(case, ".safetensors") for case in (*WRONG, *WRONG_OUTSIDE_PARQUET)]
    + [(case, ".parquet") for case in WRONG],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_wrong_content(tmp_path, case, suffix):
    changes, expected = CASES[case]
    arrays = {name: array for name, array in (ALL | changes).items() if array is not None}
    assert expected in refused(WRITERS[suffix](tmp_path / f"file{suffix}", arrays))


def test_texts_that_are_none(tmp_path):
    arrays = {"logits": LOGITS, "labels": LABELS}
    path = write_safetensors(tmp_path / "a.safetensors", arrays | {"keys": np.full(3, 255, np.uint8)})
    assert "no UTF-8 text" in refused(path)
    for text in ('{"a": 1}', "no json"):
        table = pq.read_table(write_parquet(tmp_path / "a.parquet", arrays))
        pq.write_table(table.replace_schema_metadata({"class_names": text}), tmp_path / "a.parquet")
        assert "no list of texts in JSON" in refused(tmp_path / "a.parquet")


def test_no_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "a.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is not a file" in refused(tmp_path / "folder.npz")
    (tmp_path / "a.csv").touch()
    assert ".npz, .safetensors, .parquet" in refused(tmp_path / "a.csv")
    assert "cannot be read" in refused(tmp_path / ("a" * 300 + ".npz"))


def test_pickled_objects_are_not_loaded(tmp_path):
    path = write_npz(tmp_path / "a.npz", {"logits": LOGITS, "labels": np.array([None] * N, dtype=object)})
    assert "run code that is in the file" in refused(path)


@pytest.mark.parametrize("way", ["stored", "safetensors", "parquet"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, way):
    suffix, write = WAYS[way]
    path = write(tmp_path / f"file{suffix}", {"logits": LOGITS, "labels": LABELS})
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("logits", "<f4", (10**9, 10**6)), ("logits", "<f4", (3, 4)), ("keys", "<i8", (1 << 40,))],
)
def test_arrays_are_as_long_as_their_headers_say(tmp_path, name, dtype, shape):
    content = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    file = write_npz(tmp_path / "a.npz", {part: a for part, a in ALL.items() if part != name})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{name}.npy", content.getvalue() + bytes(64))
    assert "is damaged" in refused(file)


def test_rows_of_parquet_that_are_not_alike(tmp_path):
    good = LOGITS.tolist()
    for rows, expected in (
        ([*good[:-1], good[0][:-1]], "sample 12 is not 4 numbers long"),
        ([*good[:6], None, *good[7:]], "'logits' of sample 6 has missing values"),
        ([*good[:-1], [1.0, None, 2.0, 3.0]], "'logits' of sample 12 has missing values"),
    ):
        table = pa.table({"logits": pa.array(rows, pa.list_(pa.float32())), "labels": pa.array(LABELS)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert expected in refused(tmp_path / "a.parquet")
    table = pa.table({"logits": pa.array(good), "labels": pa.array([None, *LABELS[1:].tolist()])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "'labels' of sample 0 has missing values" in refused(tmp_path / "a.parquet")
    pq.write_table(pa.table({"logits": LOGITS[:, 0], "labels": LABELS}), tmp_path / "a.parquet")
    assert "must be a list" in refused(tmp_path / "a.parquet")


def test_what_cannot_be_written(tmp_path):
    outputs = Outputs("a", torch.zeros(2, 2), torch.tensor([0, 1]), ["x", "y\nz"])
    with pytest.raises(LskdError, match="line break"):
        write_outputs(outputs, tmp_path / "a.safetensors")
    with pytest.raises(LskdError, match=r"\.safetensors"):
        write_outputs(outputs, tmp_path / "a.npz")
    (tmp_path / "file").touch()
    good = Outputs("a", torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(LskdError, match="cannot write"):
        write_outputs(good, tmp_path / "file" / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


MEMORY = """
import sys
import numpy, torch
from lskd_study.teachers.outputs import read_outputs
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
read_outputs(sys.argv[2]).logits.double().sum()  # whatever is loaded at first use, and a block's arithmetic
before, most, total = anonymous(), 0.0, 0.0
outputs = read_outputs(sys.argv[1])
most = anonymous()
for start in range(0, len(outputs.logits), 1000):
    total += float(outputs.logits[start : start + 1000].double().sum())
    most = max(most, anonymous())
print(most - before, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_safetensors_are_mapped_and_not_read(tmp_path):
    """200 MB of logits in less than 30 MB of memory."""

    def write(path, samples):
        logits = np.ones((samples, 1000), np.float32)
        logits[:, ::2] = np.arange(samples)[:, None] % 7
        write_safetensors(path, {"logits": logits, "labels": np.arange(samples) % 1000})
        return path, float(logits.sum(dtype=np.float64))

    large, expected = write(tmp_path / "large.safetensors", 50_000)
    small, _ = write(tmp_path / "small.safetensors", 1000)
    # glibc otherwise moves its threshold and keeps some freed blocks of 8 MB, more or fewer from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEMORY, large, small]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, total = map(float, result.stdout.split())
    assert total == expected
    assert growth < 30


@pytest.mark.parametrize("limit", ["size", "memory"])
@pytest.mark.parametrize("kind", ["logits.npz", "keys.npz", "labels.npz", "a.parquet"])
def test_a_file_that_would_fill_the_memory_is_one_line(tmp_path, monkeypatch, kind, limit):
    """100 times what lies in the file, and more than any file may become, or more than the memory."""
    many = 1 << 16
    arrays = {"logits": np.ones((many, 4), np.float32), "labels": np.zeros(many, np.int64)}
    if kind == "keys.npz":
        arrays = {"keys": np.full(many, "x"), **ALL}
    elif kind == "labels.npz":
        arrays = {**ALL, "labels": np.zeros(many, np.int64)}
    write = partial(write_parquet, compression="zstd") if kind == "a.parquet" else COMPRESSED
    file = write(tmp_path / kind, arrays)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("it was unpacked"))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it was unpacked"))
    if limit == "size":
        monkeypatch.setattr(files, "_UNCOUNTED", 1 << 16)
        message = "store it without compression"
    else:
        monkeypatch.setattr(files.os, "sysconf", lambda name: 300)
        message = "more than half of the memory"
    assert message in refused(file)


def test_without_pyarrow_it_is_said(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", {"logits": LOGITS, "labels": LABELS})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="pyarrow"):
        read_outputs(file)


def test_keys_of_parquet_are_counted_before_they_are_written_out(tmp_path):
    table = pa.table({"logits": pa.array(list(LOGITS)), "labels": LABELS, "keys": ["same"] * N})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(LskdError, match="a name twice"):
        read_outputs(tmp_path / "a.parquet")
