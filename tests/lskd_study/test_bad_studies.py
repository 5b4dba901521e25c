"""Studies and data that cannot work: one line, before anything is written, with what to do."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.cli import main as cli
from lskd_study.data.folders.layout import listing_checksum
from lskd_study.plan.recipes import recipes_folder
from lskd_study.study import checks, engine

pytestmark = pytest.mark.unit

STUDY = {
    "title": "T",
    "data": {"path": "data", "num_classes": 2},
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}],
    "students": [{"model": "test_byobnet", "config": "s.yaml"}],
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "1.png")
    for name in ("t.yaml", "s.yaml"):
        (tmp_path / name).write_text("epochs: 1\nbatch_size: 2\n")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: object) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))


def refused(capsys, here: Path, *words: str) -> str:
    """Insist on one line, status 2 and an untouched folder."""
    before = sorted(here.rglob("*"))
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lskd: error: ")
    assert err.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    return err


# Class counts


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_classes: 3", "s.yaml sets num_classes, which the study sets for each run; remove it there"),
        ("model_kwargs: {num_classes: 3}", "s.yaml: model_kwargs sets num_classes, which the study sets"),
        (
            "initial_checkpoint: w.pth",
            "s.yaml: the number of classes in initial_checkpoint w.pth is 3, the study's num_classes 2; fix",
        ),
        ("initial_checkpoint: none.pth", "s.yaml: initial_checkpoint none.pth is not there"),
    ],
)
def test_a_students_file_of_other_classes(here, capsys, line, message, more):
    torch.save({"head.fc.weight": torch.zeros(3, 8), "head.fc.bias": torch.zeros(3)}, here / "w.pth")
    (here / "s.yaml").write_text(f"epochs: 1\nbatch_size: 2\n{line}\n")
    assert message in refused(capsys, here, "study", "study.yaml", *more)


def test_weights_of_the_same_classes_are_taken(here, capsys):
    torch.save({"head.fc.weight": torch.zeros(2, 8)}, here / "w.pth")
    (here / "s.yaml").write_text("epochs: 1\nbatch_size: 2\ninitial_checkpoint: w.pth\n")
    assert cli.main(["study", "study.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model = dict(head=dict(num_classes=7))", "model.head.num_classes is 7, the study's num_classes 10"),
        (
            "train_dataloader = dict(dataset=dict(num_classes=7))",
            "train_dataloader.dataset.num_classes is 7, the study's num_classes 10",
        ),
        ("data_preprocessor = dict(num_classes=7)", "data_preprocessor.num_classes is 7, the study's num_"),
        ("", ""),
    ],
)
def test_a_configuration_of_mmcls_of_other_classes(here, capsys, change, message):
    pytest.importorskip("mmengine", reason="the extra mmcls is not installed")
    assert cli.main(["data", "digits", "--output", "data/digits"]) == 0
    capsys.readouterr()
    base = recipes_folder() / "digits_bnn" / "student.py"
    (here / "s.py").write_text(f"_base_ = {str(base)!r}\n{change}\n")
    data = {"path": "data/digits", "num_classes": 10}
    write(here, ecosystem="mmcls", data=data, students=[{"model": "bnn", "config": "s.py"}])
    if message:
        assert f"s.py: {message}" in refused(capsys, here, "study", "study.yaml", "--dry-run")
    else:
        assert cli.main(["study", "study.yaml", "--dry-run"]) == 0


# What only building a run shows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opt": "nosuch"}, "optimiser 'nosuch' cannot be created"),
        ({"aa": "garbage"}, "check --aa garbage"),
        ({"batch_size": 512}, "2 training images do not fill one batch of 512"),
        ({"pretrained": True}, "the weights of 'test_byobnet' are not on this machine and cannot be had"),
        ({"train_only": ["nosuch"]}, "model 'test_byobnet' has no such module"),
        ({"in_chans": 1}, "its images have 1 channels, those of its teachers 3 (t.yaml)"),
    ],
)
def test_a_mistake_in_a_students_file_comes_out_before_the_teachers_train(
    here, capsys, monkeypatch, change, message
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (here / "s.yaml").write_text(yaml.safe_dump({"epochs": 1, "batch_size": 2} | change))
    err = refused(capsys, here, "study", "study.yaml", "--dry-run")
    assert err.startswith("lskd: error: s.yaml, student test_byobnet: ")
    assert message in err


@pytest.mark.parametrize("name", ["1.webp", "1.bmp", "1.tiff"])
def test_a_class_whose_images_timm_does_not_read(here, capsys, name):
    (here / "data" / "train" / "dog" / "1.png").unlink()
    Image.new("RGB", (4, 4)).save(here / "data" / "train" / "dog" / name)
    assert "dog has no images" in refused(capsys, here, "study", "study.yaml", "--dry-run")


def test_what_needs_no_data_is_tried_before_there_are_any(here, capsys):
    write(here, data={"path": "data/digits", "num_classes": 10, "prepare": "digits"})
    assert cli.main(["study", "study.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    (here / "s.yaml").write_text("epochs: 1\naa: garbage\n")
    assert "check --aa garbage" in refused(capsys, here, "study", "study.yaml", "--dry-run")


def test_a_mistake_in_a_configuration_of_mmcls(here):
    pytest.importorskip("mmengine", reason="the extra mmcls is not installed")
    base = recipes_folder() / "digits_bnn" / "student.py"
    data = {"path": "data", "num_classes": 2}
    write(here, ecosystem="mmcls", data=data, students=[{"model": "bnn", "config": "s.py"}])
    two = "num_classes=2"
    of_two = [f"data_preprocessor = dict({two})", f"model = dict(head=dict({two}))"]
    of_two += [f"{split}_dataloader = dict(dataset=dict({two}))" for split in ("train", "val")]
    (here / "base.py").write_text("\n".join([f"_base_ = {str(base)!r}", *of_two]))
    for change, message in {
        "": "",
        "optim_wrapper = dict(optimizer=dict(type='Nosuch'))": "its optim_wrapper cannot be made",
        "param_scheduler = dict(_delete_=True, type='Nosuch')": "its param_scheduler cannot be made (",
        "train_dataloader = dict(batch_size=9, drop_last=True)": "2 training images do not fill one batch",
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Nosuch')]))": "its train_dataloader",
        "model = dict(backbone=dict(type='Nosuch'))": "its model cannot be made",
    }.items():
        (here / "s.py").write_text(f"_base_ = 'base.py'\n{change}\n")
        plan = engine.make_plan("study.yaml", None)
        if message:
            with pytest.raises(LskdError, match=f"s.py, student bnn: {re.escape(message)}"):
                checks.try_out(plan)
        else:
            checks.try_out(plan)


# What is not installed


@pytest.mark.parametrize(("recipe", "extra"), [("digits_bnn", "mmcls"), ("number_words_de_en", "fairseq")])
def test_a_recipe_of_an_ecosystem_that_is_not_installed(here, recipe, extra):
    """In a fresh interpreter that cannot import it, as if it had never been installed."""
    file = f"recipes/{recipe}/study.yaml"
    hidden = {"mmcls": ["mmcls", "mmengine", "mmcv"], "fairseq": ["fairseq", "fairseq_cli", "hydra"]}[extra]
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "from lskd_study.cli.main import main\n"
        f"assert main(['study', {file!r}, '--dry-run']) == 2\n"
        f"assert main(['recipe', 'show', {recipe!r}]) == 0\n"
    )
    before = sorted(here.rglob("*"))
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lskd: error: ")
    assert line.endswith(f"{file} is a study of {extra}, not installed here; {how_to_install(extra)}")
    assert sorted(here.rglob("*")) == before


# Unknown keys


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"temperaturs": [1]}, "temperaturs", "temperatures"),
        ({"data": {"path": "data", "num_classes": 2, "prepair": "digits"}}, "prepair", "prepare"),
        ({"smoothing": {"values": [0, 0.1], "convension": "paper"}}, "convension", "convention"),
        ({"teachers": [{"model": "test_resnet", "confg": "t.yaml"}]}, "confg", "config"),
        ({"students": [STUDY["students"][0], {"modle": "x", "config": "s.yaml"}]}, "modle", "model"),
        ({"resources": {"thread": 1}}, "thread", "threads"),
    ],
)
def test_an_unknown_key_names_the_nearest_at_every_level(here, capsys, change, key, near):
    write(here, **change)
    line = next(
        number
        for number, text in enumerate((here / "study.yaml").read_text().splitlines(), 1)
        if f"{key}:" in text
    )
    err = refused(capsys, here, "study", "study.yaml")
    assert f"study.yaml:{line}: unknown key {key!r}; did you mean {near!r}?" in err


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"temprature": [1]}, "temprature", "temperatures"),
        ({"data": {"path": "d", "spilt": "val"}}, "spilt", "split"),
        ({"teachers": [{"name": "a", "logit": "a.npz"}]}, "logit", "logits"),
        (
            {"teachers": [{"name": "a", "logits": "a.npz", "tolerance": {"acuracy": 1, "one_minus_s": 1}}]},
            "acuracy",
            "accuracy",
        ),
    ],
)
def test_an_unknown_key_in_a_list_of_teachers(here, capsys, change, key, near):
    content = {
        "kind": "stability",
        "title": "T",
        "output": "o",
        "teachers": [{"name": "a", "logits": "a.npz"}],
    }
    (here / "study.yaml").write_text(yaml.safe_dump(content | change))
    err = refused(capsys, here, "stability", "--list", "study.yaml")
    assert f"unknown key {key!r}; did you mean {near!r}?" in err


@pytest.mark.parametrize(
    ("option", "near"), [("--coers", "--cores"), ("--executer", "--executor"), ("--zzzzz", "")]
)
def test_an_unknown_option_names_the_nearest(here, capsys, option, near):
    err = refused(capsys, here, "study", "study.yaml", option, "2")
    assert err.rstrip().endswith(
        f"snakemake; did you mean {near}?" if near else "an option of neither lskd study nor snakemake"
    )


# Data: counts, lists, damaged files, a full disk


def images(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xff\xd8" + name.encode())


def inat(folder: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        names = [f"train_val2019/Birds/{number % 2}/{split}{number}.jpg" for number in range(count)]
        images(folder, names)
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "category_id": i % 2} for i in range(count)],
        }
        (folder / f"{split}2019.json").write_text(json.dumps(content))


def imaterialist(folder: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        names = [f"{split}{number}.jpg" for number in range(count)]
        images(folder, names)
        listed = [{"id": name, "url": "x", "class": number % 2} for number, name in enumerate(names)]
        (folder / f"{split}.json").write_text(json.dumps({"images": listed}))


def lists(folder: Path, prefix: str) -> None:
    for split, count in (("train", 4), ("val", 2)):
        names = [f"train/n0000000{number % 2}/n{split}_{number}.JPEG" for number in range(count)]
        images(folder, names)
        text = "".join(f"{name} {number % 2}\n" for number, name in enumerate(names))
        (folder / f"{prefix}_{split}.txt").write_text(text)


PUBLISHERS = {
    "inat2019": (inat, "265,213 training and 3,030 validation images in 1,010 classes"),
    "imaterialist": (imaterialist, "1,011,532 training and 10,095 validation images in 2,019 classes"),
    "imagenet-lt": (
        lambda folder: lists(folder, "ImageNet_LT"),
        "115,846 training and 20,000 validation images in 1,000 classes",
    ),
    "places-lt": (
        lambda folder: lists(folder, "Places_LT"),
        "62,500 training and 7,300 validation images in 365 classes",
    ),
}


@pytest.mark.parametrize("name", PUBLISHERS)
def test_a_count_mismatch_says_expected_and_found(here, capsys, name):
    make, expected = PUBLISHERS[name]
    make(here / "source")
    err = refused(capsys, here, "data", name, "source", "--output", "data/made")
    found = "4 training and 2 validation images in 2 classes"
    assert f"expected {expected}, found {found}; get the whole of it from https://" in err
    assert "--expect train=4,val=2,classes=2" in err
    words = ["--expect", "train=5,val=2,classes=2"]
    err = refused(capsys, here, "data", name, "source", "--output", "data/made", *words)
    assert f"expected 5 training and 2 validation images in 2 classes, found {found}" in err


@pytest.mark.parametrize("name", ["imagenet-lt", "places-lt"])
def test_a_list_that_names_images_that_are_not_there(here, capsys, name):
    PUBLISHERS[name][0](here / "source")
    lost = list((here / "source").rglob("*val*.JPEG"))
    for path in lost:
        path.unlink()
    words = ["--expect", "train=4,val=2,classes=2"]
    err = refused(capsys, here, "data", name, "source", "--output", "data/made", *words)
    assert "2 of the 6 images that the lists name are missing, e.g. " in err
    assert any(path.name in err for path in lost)


def test_a_damaged_list_names_its_line(here, capsys):
    PUBLISHERS["imagenet-lt"][0](here / "source")
    with (here / "source" / "ImageNet_LT_val.txt").open("a") as file:
        file.write("train/n00000000/x.JPEG many\n")
    assert "ImageNet_LT_val.txt:3: expected" in refused(
        capsys, here, "data", "imagenet-lt", "source", "--output", "data/made"
    )


def test_annotations_cut_anywhere_are_one_line(here, capsys):
    inat(here / "source")
    file = here / "source" / "train2019.json"
    whole = file.read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:part])
        err = refused(capsys, here, "data", "inat2019", "source", "--output", "data/made")
        assert "train2019.json is no JSON, or is cut short" in err


def test_fashion_mnist_cut_anywhere_is_one_line(here, capsys):
    source = here / "source"
    source.mkdir()
    for split, count in (("train", 4), ("t10k", 2)):
        pixels = (
            b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + bytes(784 * count)
        )
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        for kind, content in (("images-idx3", pixels), ("labels-idx1", labels)):
            (source / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
    words = [
        "data",
        "fashion-mnist",
        "source",
        "--output",
        "data/made",
        "--expect",
        "train=4,val=2,classes=4",
    ]
    assert cli.main(words) == 0
    capsys.readouterr()
    words[4] = "data/again"
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        whole = (source / name).read_bytes()
        for part in (0, 5, len(whole) // 2, len(whole) - 1):
            (source / name).write_bytes(whole[:part])
            refused(capsys, here, *words)
        (source / name).write_bytes(whole)


FULL = (
    "import resource, signal, sys\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    "from lskd_study.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


@pytest.mark.parametrize(
    "words",
    [
        ["data", "number-words", "--output", "made/text", "--train", "200", "--valid", "9", "--test", "9"],
        ["data", "subset", "big", "--classes", "2", "--copy", "--output", "made/x"],
    ],
)
def test_a_disk_that_takes_no_more(here, words):
    """The kernel refuses to write beyond 4,000 bytes of a file, as a full disk or a quota would."""
    for split in ("train", "val"):
        images(here / "big", [f"{split}/{label}/{number}.jpg" for label in "ab" for number in range(2)])
        (here / "big" / split / "b" / "1.jpg").write_bytes(bytes(9000))
    done = subprocess.run([sys.executable, "-c", FULL, *words], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"lskd: error: cannot write {words[words.index('--output') + 1]} \(.*\); .*\n", done.stderr
    )
    assert not list((here / "made").rglob("*"))


# Names that cannot be stored


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"a\rb.png"])
def test_a_validation_image_whose_name_cannot_be_stored(here, capsys, name, more):
    """Every run would be trained before its logits could not be stored."""
    folder = os.fsencode(here / "data" / "val" / "cat")
    shutil.copy(os.path.join(folder, b"1.png"), os.path.join(folder, name))
    shutil.copy(os.path.join(folder, b"1.png"), os.path.join(folder, b"1" + name))
    err = refused(capsys, here, "study", "study.yaml", *more)
    assert "'data/val/cat/1" in err
    assert "(and 1 more) has a name that is no UTF-8 text in one line; rename it" in err
    assert "'data/val/cat/1" in refused(capsys, here, "study", "--own", "data", "--yes", *more).replace(
        str(here), ""
    )


def test_an_image_of_ones_own_whose_name_cannot_be_stored(here, capsys):
    folder = here / "data" / "val" / "cat"
    shutil.copy(folder / "1.png", folder / "a\nb.png")
    assert r"a\nb.png' has a name that" in refused(capsys, here, "study", "--own", "./data/", "--yes")


def test_a_class_whose_name_cannot_be_stored(here, capsys):
    for split in (b"train", b"val"):
        folder = os.path.join(os.fsencode(here / "data"), split)
        os.rename(os.path.join(folder, b"cat"), os.path.join(folder, b"c\nat"))
    assert r"'data/val/c\nat' has a name that" in refused(capsys, here, "study", "study.yaml")


def test_other_files_and_training_images_may_be_called_anything(here):
    root = os.fsencode(here / "data")
    shutil.copy(os.path.join(root, b"train/cat/1.png"), os.path.join(root, b"train/cat/\xff\n.png"))
    with open(os.path.join(root, b"val/cat/\xff.txt"), "w"):
        pass
    assert cli.main(["study", "study.yaml", "--dry-run"]) == 0
    assert len(listing_checksum(here / "data")) == 64


@pytest.mark.parametrize("changes", [{"output": "a\nb"}, {"data": {"path": "da\nta", "num_classes": 2}}])
def test_a_path_whose_name_cannot_be_stored(here, capsys, changes):
    write(here, **changes)
    assert r"\n" in refused(capsys, here, "study", "study.yaml")
    assert "no UTF-8 text" in refused(capsys, here, "study", "study.yaml", "--output", "\udcff")
