"""Studies and data that cannot work: one line, before anything is written, with what to do."""

import importlib.util
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

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.data.folders.layout import listing_checksum
from lskd_study.plan.recipes import recipes_folder
from lskd_study.study import checks, engine
from scenes import STUDY

pytestmark = pytest.mark.unit

DRY = ("study", "study.yaml", "--dry-run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{"model": "test_resnett", "config": "t.yaml"}]}, "did you mean test_resnet"),
        ({"students": [{"model": "resnet18.nope", "config": "t.yaml"}]}, "'resnet18.nope'; timm has"),
        (
            {"teachers": [{"model": "test_resnet", "config": "u.yaml"}]},
            "u.yaml cannot be read as a trainer's file",
        ),
        (
            {"students": [{"model": "torchvision:resnet18", "config": "t.yaml"}]},
            "unknown model 'torchvision:",
        ),
        ({"students": STUDY["students"] * 2}, "the same run is asked for twice"),
        ({"data": {"path": "nowhere", "num_classes": 2}}, "data folder nowhere does not exist"),
        (
            {"data": {"path": "x/digits", "num_classes": 10}},
            "make it with `lskd data digits --output x/digits`",
        ),
        (
            {"data": {"path": "data", "num_classes": 11, "prepare": "digits"}},
            "`lskd data digits` makes 10 classes; fix one",
        ),
        ({"data": {"path": "data", "num_classes": 3}}, "data/train has 2 class folders but num_classes is 3"),
        ({"output": "a\nb"}, r"a\nb"),
        ({"data": {"path": "da\nta", "num_classes": 2}}, r"da\nta"),
    ],
)
def test_what_the_study_file_names_is_checked(scene, changes, message):
    scene.write(**changes)
    assert message in scene.refused("study", "study.yaml")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(scene, name, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    scene.write(tracker=name)
    for words in (DRY, DRY[:2]):
        assert f"the tracker {name} is not installed here; pip install {name}\n" in scene.refused(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "`lskd recipe list` names all"),
        (["--executor", "local", "study.yaml"], "comes before the options for Snakemake"),
        (["study.yaml", "--output", "t.yaml/x"], "cannot write the folder t.yaml/x"),
        (["study.yaml", "--output", "\udcff"], "no UTF-8 text"),
        (["study.yaml", "--coers", "2"], "unrecognized arguments: --coers"),
        (["study.yaml", "--coers", "2"], "snakemake; did you mean --cores?\n"),
        (["study.yaml", "--executer", "2"], "snakemake; did you mean --executor?\n"),
        (["study.yaml", "--zzzzz", "2"], "an option of neither lskd study nor snakemake\n"),
        (["study.yaml", "--cores", "none"], "--cores"),
        (["study.yaml", "--cores", "0"], "--cores"),
        (["study.yaml", "--retries", "many"], "invalid int value: 'many'"),
        (["study.yaml", "--directory", "elsewhere"], "--directory is set by lskd study itself"),
        (["study.yaml", "--executor", "slrum"], "slrum"),
    ],
)
def test_options_are_checked_before_anything_runs(scene, words, message):
    assert message in scene.refused("study", *words)


def test_a_place_for_the_data_that_cannot_be_written(scene):
    data = {"path": "t.yaml/digits", "num_classes": 10, "prepare": "digits"}
    scene.write(data=data, output=".")
    assert "cannot write the folder t.yaml" in scene.refused("study", "study.yaml")


# The trainers' files: what their parser says, and what only building a run shows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epcohs: 3", "s.yaml: unknown key 'epcohs'; did you mean 'epochs'?"),
        ("img-size: 32", "s.yaml: unknown key 'img-size'; did you mean 'img_size'?"),
        ("zzzzz: 1", "s.yaml: unknown key 'zzzzz'; timm train.py --help lists them"),
        ("epochs: many", "s.yaml: epochs must be a whole number, got 'many'"),
        ("sched: zigzag", "s.yaml: argument --sched: invalid choice: 'zigzag'"),
        ("batch_size: 0", "s.yaml: batch_size must be at least 1, got 0"),
        ("bce_loss: true", "s.yaml, as a student's file: --bce-loss changes the loss of the hard labels"),
        ("kd_rest: lump", "s.yaml: remove kd_rest, and set soft_labels.rest of the study"),
        ("num_classes: 3", "s.yaml sets num_classes, which the study sets for each run; remove it there"),
        ("model_kwargs: {num_classes: 3}", "s.yaml: model_kwargs sets num_classes, which the study sets"),
        (
            "initial_checkpoint: w.pth",
            "s.yaml: the number of classes in initial_checkpoint w.pth is 3, the study's num_classes 2; fix",
        ),
        ("initial_checkpoint: none.pth", "s.yaml: initial_checkpoint none.pth is not there"),
        ("opt: nosuch", "s.yaml, student test_byobnet: optimiser 'nosuch' cannot be created"),
        ("aa: garbage", "check --aa garbage"),
        ("batch_size: 512", "2 training images do not fill one batch of 512"),
        ("pretrained: true", "the weights of 'test_byobnet' are not on this machine and cannot be had"),
        ("train_only: [nosuch]", "model 'test_byobnet' has no such module"),
        ("in_chans: 1", "its images have 1 channels, those of its teachers 3 (t.yaml)"),
    ],
)
def test_a_mistake_in_a_students_file_comes_out_before_the_teachers_train(scene, monkeypatch, line, message):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.save({"head.fc.weight": torch.zeros(3, 8), "head.fc.bias": torch.zeros(3)}, "w.pth")
    Path("s.yaml").write_text(yaml.safe_dump({"epochs": 1, "batch_size": 2} | yaml.safe_load(line)))
    err = scene.refused("study", "study.yaml")
    assert message in err
    assert "s.yaml" in err
    assert err == scene.refused(*DRY)


def test_weights_of_the_same_classes_are_taken(scene):
    torch.save({"head.fc.weight": torch.zeros(2, 8)}, "w.pth")
    Path("s.yaml").write_text("epochs: 1\nbatch_size: 2\ninitial_checkpoint: w.pth\n")
    scene.run(*DRY)


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
def test_a_configuration_of_mmcls_of_other_classes(scene, change, message):
    pytest.importorskip("mmengine", reason="the extra mmcls is not installed")
    scene.run("data", "digits", "--output", "data/digits")
    base = recipes_folder() / "digits_bnn" / "student.py"
    Path("s.py").write_text(f"_base_ = {str(base)!r}\n{change}\n")
    data = {"path": "data/digits", "num_classes": 10}
    scene.write(ecosystem="mmcls", data=data, students=[{"model": "bnn", "config": "s.py"}])
    if message:
        assert f"s.py: {message}" in scene.refused(*DRY)
    else:
        scene.run(*DRY)


# Folders of images


def test_the_data_folder_is_checked(scene):
    data = Path("data")
    image = (data / "val" / "dog" / "1.png").rename(data / "val" / "dog" / "1.txt")
    assert "data/val/dog has no images" in scene.refused("study", "study.yaml")
    image.rename(image.with_suffix(".png"))
    (data / "val" / "dog").rename(data / "val" / "cow")
    assert "different classes, e.g. cow" in scene.refused("study", "study.yaml")
    (data / "val").rename(data / "other")
    assert "data has no val folder" in scene.refused("study", "study.yaml")


def test_what_needs_no_data_is_tried_before_there_are_any(scene):
    scene.write(data={"path": "data/digits", "num_classes": 10, "prepare": "digits"})
    scene.run(*DRY)
    Path("s.yaml").write_text("epochs: 1\naa: garbage\n")
    assert "check --aa garbage" in scene.refused(*DRY)


def test_a_mistake_in_a_configuration_of_mmcls(scene):
    pytest.importorskip("mmengine", reason="the extra mmcls is not installed")
    base = recipes_folder() / "digits_bnn" / "student.py"
    scene.write(ecosystem="mmcls", students=[{"model": "bnn", "config": "s.py"}])
    two = "num_classes=2"
    of_two = [f"data_preprocessor = dict({two})", f"model = dict(head=dict({two}))"]
    of_two += [f"{split}_dataloader = dict(dataset=dict({two}))" for split in ("train", "val")]
    Path("base.py").write_text("\n".join([f"_base_ = {str(base)!r}", *of_two]))
    for change, message in {
        "": "",
        "optim_wrapper = dict(optimizer=dict(type='Nosuch'))": "its optim_wrapper cannot be made",
        "param_scheduler = dict(_delete_=True, type='Nosuch')": "its param_scheduler cannot be made (",
        "train_dataloader = dict(batch_size=9, drop_last=True)": "2 training images do not fill one batch",
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Nosuch')]))": "its train_dataloader",
        "model = dict(backbone=dict(type='Nosuch'))": "its model cannot be made",
    }.items():
        Path("s.py").write_text(f"_base_ = 'base.py'\n{change}\n")
        plan = engine.make_plan("study.yaml", None)
        if message:
            with pytest.raises(LskdError, match=f"s.py, student bnn: {re.escape(message)}"):
                checks.try_out(plan)
        else:
            checks.try_out(plan)


# What is not installed


@pytest.mark.parametrize(("recipe", "extra"), [("digits_bnn", "mmcls"), ("number_words_de_en", "fairseq")])
def test_a_recipe_of_an_ecosystem_that_is_not_installed(scene, recipe, extra):
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
    before = scene.listing()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lskd: error: ")
    assert line.endswith(f"{file} is a study of {extra}, not installed here; {how_to_install(extra)}")
    assert scene.listing() == before


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
def test_an_unknown_key_names_the_nearest_at_every_level(scene, change, key, near):
    scene.write(**change)
    lines = Path("study.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if f"{key}:" in text)
    err = scene.refused("study", "study.yaml")
    assert f"study.yaml:{line}: unknown key {key!r}; did you mean {near!r}?" in err


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


def test_annotations_cut_anywhere_are_one_line(scene):
    inat(Path("source"))
    file = Path("source/train2019.json")
    whole = file.read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:part])
        err = scene.refused("data", "inat2019", "source", "--output", "data/made")
        assert "train2019.json is no JSON, or is cut short" in err


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
def test_a_disk_that_takes_no_more(scene, words):
    """The kernel refuses to write beyond 4,000 bytes of a file, as a full disk or a quota would."""
    for split in ("train", "val"):
        images(Path("big"), [f"{split}/{label}/{number}.jpg" for label in "ab" for number in range(2)])
        Path("big", split, "b", "1.jpg").write_bytes(bytes(9000))
    # Or what counts the lines that are reached is too long a file as well.
    own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", FULL, *words], capture_output=True, text=True, env=own)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"lskd: error: cannot write {words[words.index('--output') + 1]}: the disk is full \(.*\); .*\n",
        done.stderr,
    )
    assert not list(Path("made").rglob("*"))


# Names that cannot be stored


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"a\rb.png"])
def test_a_validation_image_whose_name_cannot_be_stored(scene, name):
    """Every run would be trained before its logits could not be stored."""
    folder = os.fsencode(scene.folder / "data" / "val" / "cat")
    for odd in (name, b"1" + name):
        shutil.copy(os.path.join(folder, b"1.png"), os.path.join(folder, odd))
    for more in ([], ["--dry-run"]):
        err = scene.refused("study", "study.yaml", *more)
        assert "'data/val/cat/1" in err
        assert "(and 1 more) has a name that is no UTF-8 text in one line; rename it" in err
        own = scene.refused("study", "--own", "./data/", "--yes", *more)
        assert "'data/val/cat/1" in own.replace(str(scene.folder), "")


def test_a_class_whose_name_cannot_be_stored(scene):
    for split in (b"train", b"val"):
        folder = os.path.join(os.fsencode(scene.folder / "data"), split)
        os.rename(os.path.join(folder, b"cat"), os.path.join(folder, b"c\nat"))
    assert r"'data/val/c\nat' has a name that" in scene.refused("study", "study.yaml")


def test_other_files_and_training_images_may_be_called_anything(scene):
    root = os.fsencode(scene.folder / "data")
    shutil.copy(os.path.join(root, b"train/cat/1.png"), os.path.join(root, b"train/cat/\xff\n.png"))
    with open(os.path.join(root, b"val/cat/\xff.txt"), "w"):
        pass
    scene.run(*DRY)
    assert len(listing_checksum(Path("data"))) == 64
