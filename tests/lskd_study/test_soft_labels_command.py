"""`lskd soft-labels`: what it says of a store, which damage it finds, and to whom it hands on."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lskd import LskdError, SoftLabels, SoftLabelsWriter
from lskd.base.install import how_to_install
from lskd.soft_labels.format import SoftLabelsLayout
from lskd_study.cli.main import main

pytestmark = pytest.mark.unit

IDENTITY = {
    "teacher": {"checksum": "ab" * 32, "architecture": "resnet50"},
    "augmentation": None,
    "versions": {"torch": "2.14.1"},
}
LAYOUTS = {
    "images": SoftLabelsLayout(1000, 5, 20_000, 2, rows_per_sample=1, seeds=True),
    "sentences": SoftLabelsLayout(70_000, 8, 20_000, values="float32"),
}


def write(path, layout, keys):
    lengths = np.full(keys, layout.rows_per_sample or 2)
    count = int(lengths.sum())
    seeds = np.arange(count) if layout.seeds else None
    values = np.full((count, layout.k), -1.0)
    with SoftLabelsWriter(path, layout, IDENTITY) as writer:
        writer.append(values, np.tile(np.arange(layout.k), (count, 1)), lengths, seeds)
    return path


@pytest.fixture(params=LAYOUTS)
def store(request, tmp_path):
    layout = LAYOUTS[request.param]
    return write(tmp_path / "store", layout, layout.keys)


@pytest.fixture
def info(capsys):
    """Return what `info` prints of a store, whole and by name."""

    def read(path):
        assert main(["soft-labels", "info", str(path)]) == 0
        said = capsys.readouterr().out
        return said, dict(line.split(None, 1) for line in said.splitlines())

    return read


def test_info_for_people(tmp_path, info):
    said, lines = info(write(tmp_path / "images", LAYOUTS["images"], 30_000))
    assert lines["written"] == (
        "unfinished: 30000 of 40000 (1 of 2 epochs and 10000 of 20000 samples); "
        "the command that wrote them goes on"
    )
    assert lines["classes"] == "top 5 of 1000, float16"
    assert lines["teacher.architecture"] == "resnet50"
    assert lines["augmentation"] == "none"
    assert "0.7 MiB, 24 bytes a sample and epoch" in said  # 4 + 4 K
    said, _ = info(write(tmp_path / "sentences", LAYOUTS["sentences"], 20_000))
    assert "complete: 20000 samples, 1 epoch\n" in said
    assert "40000, any number a sample" in said
    assert "64 bytes a row (a target token)" in said  # 4 bytes an id beyond 65,536 classes


def test_info_shows_the_form_of_the_teacher(tmp_path, info):
    form = {"mode": "int8", "made": "convolutions in int8", "mean_kl": 5e-4, "max_kl": 0.003, "images": 36}
    layout = LAYOUTS["images"]
    SoftLabelsWriter(tmp_path / "store", layout, IDENTITY | {"teacher_form": form}).close()
    _, lines = info(tmp_path / "store")
    for name, value in form.items():
        assert lines[f"teacher_form.{name}"] == str(value)


def test_info_as_json(store, capsys):
    assert main(["soft-labels", "info", str(store), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["identity"] == IDENTITY
    assert content["written"]["complete"]
    assert content["bytes"] == sum((store / name).stat().st_size for name in ("rows.bin", "index.bin"))


def test_verify_names_every_damaged_block(store, capsys):
    assert main(["soft-labels", "verify", str(store)]) == 0
    assert "all as they were written; complete" in capsys.readouterr().out
    with open(store / "rows.bin", "r+b") as file:
        for place in (10, 300_000):
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
    assert main(["soft-labels", "verify", str(store)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "rows.bin is damaged in block 0 (bytes 0 to 262144)" in said.err
    assert "rows.bin is damaged in block 1 (bytes 262144 to 524288)" in said.err
    assert said.err.splitlines()[-1].startswith("lskd: error: 2 of ")


@pytest.mark.parametrize("name", ["rows.bin.sums", "manifest.json"])
def test_verify_sees_damage_in_the_other_files(store, name, capsys):
    content = bytearray((store / name).read_bytes())
    content[len(content) // 2] ^= 1
    (store / name).write_bytes(content)
    assert main(["soft-labels", "verify", str(store)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lskd: error: ")
    assert error.count("\n") == 1
    assert "damaged" in error


def test_no_store_is_one_line(tmp_path, capsys):
    for command in ("info", "verify"):
        assert main(["soft-labels", command, str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"lskd: error: {tmp_path} contains no soft labels")


def test_what_is_at_a_url_is_looked_at_in_a_copy(store, info, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where fsspec looks for the user, too
    url, there = "file://me:secret@host/labels", tmp_path / "me:secret@host" / "labels"
    there.parent.mkdir()
    store.rename(there)
    said = info(url)[0]
    (copy,) = (path for path in (tmp_path / "cache/lskd/soft_labels").iterdir() if path.is_dir())
    name = f"the copy of file://host/labels in {copy}"
    assert said.replace(name, str(there)) == info(there)[0]
    assert main(["soft-labels", "verify", url]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{name}: ")
    assert "secret" not in said.out + said.err
    for file, message in (
        ("rows.bin", f"blocks in {name} are damaged"),
        ("manifest.json", f"{name} cannot be read ({copy}"),
    ):
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        assert main(["soft-labels", "verify", url]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.endswith(f"; remove {copy}, it is copied again\n")
        assert "secret" not in error
        (copy / file).write_bytes(whole)
    assert main(["soft-labels", "info", f"{url}-not-there"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lskd: error: file://host/labels-not-there cannot be read")
    assert error.count("\n") == 1


@pytest.mark.parametrize("ecosystem", ["timm", "fairseq", "mmcls", "merge"])
def test_nothing_is_written_at_a_url(ecosystem, tmp_path, monkeypatch, capsys):
    recipe = Path(__file__).parents[2] / "recipes" / "digits_bnn" / "student.py"
    monkeypatch.chdir(tmp_path)
    url = "s3://me:secret@bucket/labels"
    if ecosystem == "timm":
        from timm_ls_kd.cli import main as write

        words = "soft-labels data --model test_resnet --kd-teacher test_resnet --kd-soft-labels"
        assert write([*words.split(), url]) == 2
        error = capsys.readouterr().err
    elif ecosystem == "merge":
        assert main(["soft-labels", "merge", url]) == 2
        error = capsys.readouterr().err
    elif ecosystem == "fairseq":
        from fairseq_kd.soft_labels import main as write

        with pytest.raises(LskdError) as caught:
            write(["data-bin", "--path", "teacher.pt", "--output", url])
        error = str(caught.value)
    else:
        from mmcls_bnn.soft_labels import main as write

        assert write([str(recipe), "--cfg-options", f"model.distillation.soft_labels.path={url}"]) == 2
        error = capsys.readouterr().err
    assert "s3://bucket/labels is a URL, where nothing is written; name a local folder" in error
    assert "\n" not in error.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ecosystem", "words"),
    [
        ("timm", ["timm_ls_kd", "soft-labels"]),
        ("fairseq", ["fairseq_kd.soft_labels"]),
        ("mmcls", ["mmcls_bnn.soft_labels"]),
    ],
)
def test_write_hands_on_what_it_got_and_what_it_got_back(ecosystem, words, monkeypatch):
    called = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: called.append(command) or SimpleNamespace(returncode=7)
    )
    arguments = ["--top-k", "8", "data", "--help", "--", "-x"]
    assert main(["soft-labels", "write", ecosystem, *arguments]) == 7
    assert called[0][:2] == [sys.executable, "-m"]
    assert [word for word in called[0][2:] if word != "--"] == [
        *words,
        *(word for word in arguments if word != "--"),
    ]


def test_the_page_of_the_format_reads_a_store_with_numpy_alone(store):
    page = (Path(__file__).parents[2] / "docs" / "soft_labels.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("labels/", f"{store}/")
    names = {}
    exec(program, names)
    labels = SoftLabels(store)
    wanted = labels.take(range(len(labels)))
    np.testing.assert_array_equal(names["data"]["values"], wanted.values)
    np.testing.assert_array_equal(names["data"]["ids"], wanted.ids)
    if wanted.seeds is not None:
        np.testing.assert_array_equal(names["data"]["seed"], wanted.seeds)


def test_write_without_the_ecosystem_is_one_line(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fairseq" else real(name, *rest)
    )
    assert main(["soft-labels", "write", "fairseq", "data"]) == 2
    assert capsys.readouterr().err == (
        f"lskd: error: fairseq is not installed here; {how_to_install('fairseq')}\n"
    )
    assert main(["soft-labels", "write", "jax"]) == 2
    assert "give one of timm, fairseq, mmcls" in capsys.readouterr().err
    assert main(["soft-labels", "write", "--help"]) == 0
    assert "{timm|fairseq|mmcls}" in capsys.readouterr().out
