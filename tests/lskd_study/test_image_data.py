"""``lskd data``: miniature archives with the publishers' inner layout, through the real command."""

import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder, ImageNet
from torchvision.datasets import imagenet as torchvision_imagenet

from lskd import LskdError
from lskd_study.claims import contrasts
from lskd_study.cli import main as cli
from lskd_study.data.expected import PUBLISHED, parse_expected
from lskd_study.data.folders import layout as _layout
from lskd_study.data.folders.archives import MEMBER_LIMIT, read_members
from lskd_study.data.folders.derived import pareto_sizes
from lskd_study.stores import decide
from lskd_study.study.checks import check_data_folder
from lskd_study.study.own_images import look_at
from timm_ls_kd.data import check_data, open_dataset

pytestmark = pytest.mark.unit


def picture(number: int, form: str = "JPEG") -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pack(file: Path, members: dict[str, bytes], mode: str = "w:gz") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, content in members.items():
            add(tar, name, content)


def run(*words: object) -> int:
    return cli.main(["data", *map(str, words)])


def refused(capsys, output: Path, *words: object) -> str:
    """Insist on one line, status 2, and nothing left of the output or beside it."""
    before = sorted(output.parent.rglob("*")) if output.parent.exists() else None
    assert run(*words, "--output", output) == 2
    err = capsys.readouterr().err
    assert err.startswith("lskd: error: ")
    assert err.count("\n") == 1
    after = sorted(output.parent.rglob("*")) if output.parent.exists() else None
    assert after == before or after == []
    return err


def agree(folder: Path) -> dict[str, dict[str, int]]:
    """Read a result by timm and torchvision, and insist that they and the manifest agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found: dict[str, dict[str, int]] = {}
    for split in ("train", "val"):
        theirs = ImageFolder(folder / split)
        timms = create_dataset("", root=str(folder), split=split)
        assert timms.reader.class_to_idx == theirs.class_to_idx
        assert dict(timms.reader.samples) == dict(theirs.samples)
        assert theirs.classes == manifest["classes"]
        assert len(theirs) == manifest["images"][split]
        theirs[0]
        found[split] = {Path(path).name: label for path, label in theirs.samples}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    return found


# ImageNet


WNIDS = ("n01440764", "n01443537", "n02084071")


@pytest.fixture
def ilsvrc(tmp_path, monkeypatch) -> Path:
    """Archives of three classes; the devkit's ids are not in the order of the names."""
    folder = tmp_path / "ilsvrc"
    outer = {}
    for wnid in WNIDS:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            for i in range(4):
                add(tar, f"{wnid}_{i}.JPEG", picture(i))
        outer[f"{wnid}.tar"] = inner.getvalue()
    pack(folder / "ILSVRC2012_img_train.tar", outer, "w")
    pack(
        folder / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i) for i in (3, 1, 2, 4, 5, 6)},
        "w",
    )
    kinds = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", object),
    ]
    rows = [
        (1, WNIDS[2], "dog, hound", "", 0),
        (2, WNIDS[0], "tench", "", 0),
        (3, WNIDS[1], "goldfish", "", 0),
    ]
    rows.append((4, "n00001740", "entity", "", 3))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n3\n3\n2\n1\n",
    }
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit)
    for split, (name, _) in torchvision_imagenet.ARCHIVE_META.items():
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, split, (name, digest))
    return folder


IMAGENET = ("--expect", "train=12,val=6,classes=3")


def test_imagenet_from_its_archives(ilsvrc, tmp_path, capsys):
    output = tmp_path / "out" / "imagenet"
    assert run("imagenet", ilsvrc, "--output", output, *IMAGENET) == 0
    assert "3 classes; images in a class: train 4 to 4, median 4; val 2 to 2" in capsys.readouterr().out
    found = agree(output)
    assert {int(name[-8:-5]): label for name, label in ((n, v) for n, v in found["val"].items())} == {
        1: 2, 2: 0, 3: 1, 4: 1, 5: 0, 6: 2
    }  # fmt: skip
    assert (output / "train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG").read_bytes() == picture(3)
    assert ImageNet(output, "val").classes[2] == ("dog", "hound")
    # What is there is not made again; its folders do as a source, with links.
    assert run("imagenet", ilsvrc, "--output", output, *IMAGENET) == 0
    assert "already there" in capsys.readouterr().out
    again = tmp_path / "out" / "again"
    assert run("imagenet", output, "--output", again, *IMAGENET) == 0
    image = f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG"
    assert (again / image).samefile(output / image)
    assert agree(again) == found
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    (flat / "train").symlink_to(output / "train")
    for path in output.glob("val/*/*"):
        (flat / "val" / path.name).symlink_to(path)
    (flat / "ILSVRC2012_devkit_t12.tar.gz").symlink_to(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    assert run("imagenet", flat, "--output", tmp_path / "out" / "flat", *IMAGENET, "--copy") == 0
    assert agree(tmp_path / "out" / "flat") == found
    assert not (tmp_path / "out" / "flat" / image).samefile(output / image)


def test_imagenet_refuses_what_is_not_whole(ilsvrc, tmp_path, capsys):
    output = tmp_path / "out" / "imagenet"
    err = refused(capsys, output, "imagenet", ilsvrc)
    assert (
        "expected 1,281,167 training and 50,000 validation images in 1,000 classes, found 12 training" in err
    )
    train = ilsvrc / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    for cut in (len(whole) // 2, 600):
        train.write_bytes(whole[:cut])
        assert "cut short" in refused(capsys, output, "imagenet", ilsvrc, *IMAGENET)
    train.write_bytes(b"no archive at all" * 100)
    assert "is no tar archive" in refused(capsys, output, "imagenet", ilsvrc, *IMAGENET)
    train.write_bytes(whole + b"\0" * 512)
    assert "expected md5" in refused(capsys, output, "imagenet", ilsvrc, *IMAGENET)
    assert run("imagenet", ilsvrc, "--output", output, *IMAGENET, "--no-checksum") == 0
    train.unlink()
    assert "image-net.org" in refused(capsys, tmp_path / "two" / "x", "imagenet", ilsvrc, *IMAGENET)
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x")
    assert "not the devkit" in refused(capsys, tmp_path / "two" / "x", "imagenet", ilsvrc, *IMAGENET)


# CUB-200-2011


CUB = ("--expect", "train=4,val=2,classes=2", "--no-checksum")


@pytest.fixture
def cub() -> dict[str, bytes]:
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in range(3)]
    lists = {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        "image_class_labels.txt": "".join(f"{i} {int(name[2])}\n" for i, name in enumerate(names, 1)),
        "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n5 1\n6 1\n",
        "classes.txt": "1 001.Bird_1\n2 002.Bird_2\n",
        "bounding_boxes.txt": "1 0 0 5 5\n",
    }
    members = {f"CUB_200_2011/{name}": text.encode() for name, text in lists.items()}
    return members | {f"CUB_200_2011/images/{name}": picture(i) for i, name in enumerate(names)}


def test_cub_with_its_official_split(cub, tmp_path):
    pack(tmp_path / "cub" / "CUB_200_2011.tgz", cub)
    output = tmp_path / "out" / "cub"
    assert run("cub200", tmp_path / "cub", "--output", output, *CUB) == 0
    found = agree(output)
    assert found["val"] == {"Bird_1_1.jpg": 0, "Bird_2_0.jpg": 1}
    with tarfile.open(tmp_path / "cub" / "CUB_200_2011.tgz") as tar:
        tar.extractall(tmp_path / "open", filter="data")
    assert run("cub200", tmp_path / "open", "--output", tmp_path / "out" / "linked", *CUB) == 0
    assert agree(tmp_path / "out" / "linked") == found


def test_cub_refuses_what_contradicts_itself(cub, tmp_path, capsys):
    archive = tmp_path / "cub" / "CUB_200_2011.tgz"
    output = tmp_path / "out" / "cub"
    pack(archive, cub)
    assert "expected md5" in refused(capsys, output, "cub200", archive, *CUB[:2])
    archive.write_bytes(archive.read_bytes()[:-200])
    assert "cut short" in refused(capsys, output, "cub200", archive, *CUB)
    pack(archive, {name: content for name, content in cub.items() if "Bird_2_1" not in name})
    assert "1 of them are missing, e.g. 002.Bird_2/Bird_2_1.jpg" in refused(
        capsys, output, "cub200", archive, *CUB
    )
    pack(archive, cub | {"CUB_200_2011/image_class_labels.txt": b"1 2\n"})
    assert "contradict each other" in refused(capsys, output, "cub200", archive, *CUB)
    pack(archive, cub | {"../../evil.jpg": b"x"})
    assert "leads out of it" in refused(capsys, output, "cub200", archive, *CUB)
    assert "vision.caltech.edu" in refused(capsys, output, "cub200", tmp_path, *CUB)


# iNaturalist, iMaterialist


def test_inat_is_split_by_its_annotations(tmp_path, capsys):
    source, output = tmp_path / "inat", tmp_path / "out" / "inat"
    names = {i: f"train_val2019/Birds/{c}/{i:032x}.jpg" for i, c in enumerate((2, 10, 2, 10, 2, 10))}
    for split, ids in (("train", (0, 1, 2, 3)), ("val", (4, 5))):
        text = {
            "images": [{"id": i, "file_name": names[i]} for i in ids],
            "annotations": [{"id": i, "image_id": i, "category_id": (2, 10)[i % 2]} for i in ids],
        }
        pack(source / f"{split}2019.json.tar.gz", {f"{split}2019.json": json.dumps(text).encode()})
    pack(source / "train_val2019.tar.gz", {names[i]: picture(i) for i in names})
    words = ("inat2019", source, "--expect", "train=4,val=2,classes=2")
    assert "train2019.json.tar.gz: expected md5 b06a6683" in refused(capsys, output, *words)
    for split in ("train", "val"):
        with tarfile.open(source / f"{split}2019.json.tar.gz") as tar:
            tar.extractall(source, filter="data")
        (source / f"{split}2019.json.tar.gz").unlink()
    assert "expected md5 c60a6e29" in refused(capsys, output, *words)
    assert run(*words, "--no-checksum", "--output", output) == 0
    assert sorted(agree(output)["val"].values()) == [0, 1]
    assert json.loads((output / "manifest.json").read_text())["classes"] == ["0002", "0010"]
    pack(source / "train_val2019.tar.gz", {names[i]: picture(i) for i in range(5)})
    assert "1 of them are missing" in refused(capsys, tmp_path / "two" / "x", *words, "--no-checksum")


def test_imaterialist_says_what_is_missing(tmp_path, capsys):
    source, output = tmp_path / "imat", tmp_path / "out" / "imat"
    (source / "train").mkdir(parents=True)
    entries = {"train": [(f"{i}a.jpg", i % 2) for i in range(6)], "val": [("0b.jpg", 0), ("1b.jpg", 1)]}
    for split, part in entries.items():
        text = {"images": [{"id": name, "url": "x", "class": label} for name, label in part]}
        (source / f"{split}.json").write_text(json.dumps(text))
    for i in range(5):
        (source / "train" / f"{i}a.jpg").write_bytes(picture(i))
    for name, _ in entries["val"]:
        (source / name).write_bytes(picture(9))
    words = ("imaterialist", source, "--expect", "train=6,val=2,classes=2")
    assert "1 of 6 training and 0 of 2 validation images are missing, e.g. 5a.jpg" in refused(
        capsys, output, *words
    )
    assert run(*words, "--allow-missing", "--output", output) == 0
    assert len(agree(output)["train"]) == 5
    assert json.loads((output / "manifest.json").read_text())["missing"] == {"train": 1, "val": 0}


# Lists


@pytest.mark.parametrize("layout", ["easy", "nested"])
def test_places_goes_by_the_numbers_of_the_lists(tmp_path, capsys, layout):
    """`desert_road` comes before `desert-sand` in the lists and after it as text."""
    source, output = tmp_path / "places", tmp_path / "out" / "places"
    labels = ["airfield", "desert_road", "desert-sand"]
    lists = {"train": "", "val": ""}
    for number, label in enumerate(labels):
        nested = f"data_256/{label[0]}/{label.replace('-', '/')}"
        folder = source / (f"train/{label}" if layout == "easy" else nested)
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i:08d}.jpg").write_bytes(picture(i))
            listed = f"train/{label}" if number else f"data_256/a/{label}"
            lists["train" if i < 2 else "val"] += f"{listed}/{i:08d}.jpg {number}\n"
    for split, text in lists.items():
        (source / f"Places_LT_{split}.txt").write_text(text)
    words = ("places-lt", source, "--expect", "train=6,val=3,classes=3")
    assert run(*words, "--output", output) == 0
    agree(output)
    classes = json.loads((output / "manifest.json").read_text())["classes"]
    assert classes == ["0_airfield", "1_desert_road", "2_desert-sand"]
    next(source.rglob("00000002.jpg")).unlink()
    assert "1 of the 9 images that the lists name are missing" in refused(
        capsys, tmp_path / "two" / "x", *words
    )
    (source / "Places_LT_val.txt").write_text("../../etc/x.jpg 0\n")
    assert "Places_LT_val.txt:1: expected" in refused(capsys, tmp_path / "two" / "x", *words)


def test_imagenet_lt_keeps_the_names(tmp_path):
    source = tmp_path / "imagenet"
    for number, wnid in enumerate(WNIDS):
        (source / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            (source / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(picture(i))
            with open(source / f"ImageNet_LT_{'train' if i else 'val'}.txt", "a") as file:
                file.write(f"train/{wnid}/{wnid}_{i}.JPEG {number}\n")
    output = tmp_path / "out" / "lt"
    words = ("--output", output, "--expect", "train=6,val=3,classes=3")
    assert run("imagenet-lt", source, *words) == 0
    assert agree(output)["val"] == {f"{wnid}_0.JPEG": i for i, wnid in enumerate(WNIDS)}


def test_fashion_mnist_is_read_by_torchvision(tmp_path, capsys):
    source, output = tmp_path / "fashion", tmp_path / "out" / "fashion"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 28, 28), dtype=np.uint8)
    for split, n in (("train", 20), ("t10k", 10)):
        head = np.array([2051, n, 28, 28], dtype=">i4").tobytes()
        with gzip.open(source / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + pixels[:n].tobytes())
        with gzip.open(source / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(np.array([2049, n], dtype=">i4").tobytes() + bytes(i % 10 for i in range(n)))
    words = ("fashion-mnist", source, "--expect", "train=20,val=10,classes=10")
    assert run(*words, "--output", output) == 0
    agree(output)
    np.testing.assert_array_equal(np.asarray(Image.open(output / "train" / "3" / "00013.png")), pixels[13])
    assert "expected 60,000 training" in refused(capsys, tmp_path / "two" / "x", *words[:2])
    file = source / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-300])
    assert "cut short" in refused(capsys, tmp_path / "two" / "x", *words)


# Any image folder


@pytest.fixture
def own(tmp_path) -> Path:
    """Six classes of 30 training and 2 validation images."""
    for split, n in (("train", 30), ("val", 2)):
        for label in "abcdef":
            folder = tmp_path / "own" / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                (folder / f"{label}{i:02d}.png").write_bytes(picture(i, "PNG"))
    return tmp_path / "own"


def test_a_long_tail(own, tmp_path, capsys):
    output = tmp_path / "out" / "lt"
    words = ("long-tail", own, "--head", 30, "--tail", 3, "--seed", 4)
    assert run(*words, "--output", output) == 0
    agree(output)
    manifest = json.loads((output / "manifest.json").read_text())
    assert sorted(manifest["images_per_class"]["train"], reverse=True) == pareto_sizes(6, 6, 30, 3)
    assert manifest["images_per_class"]["val"] == [2] * 6
    assert run(*words, "--output", tmp_path / "out" / "again") == 0
    again = json.loads((tmp_path / "out" / "again" / "manifest.json").read_text())
    assert again["listing_sha256"] == manifest["listing_sha256"]
    assert "the largest has 30" in refused(capsys, tmp_path / "two" / "x", "long-tail", own, "--head", 31)
    assert "--seed" not in refused(capsys, tmp_path / "two" / "x", "long-tail", own, "--head", 3)


def test_pareto_sizes_follow_the_distribution():
    """Against numpy's own Pareto draws, scaled in the same way."""
    sizes = np.array(pareto_sizes(1000, 6, 1280, 5))
    assert (sizes[0], sizes[-1]) == (1280, 5)
    draws = np.random.default_rng(0).pareto(6, 400_000)
    below = np.quantile(draws, 0.5 / 1000)
    top = np.quantile(draws, 1 - 0.5 / 1000)
    for share in (0.1, 0.25, 0.5, 0.75):
        expected = 5 + 1275 * (np.quantile(draws, 1 - share) - below) / (top - below)
        assert abs(sizes[int(share * 1000)] / expected - 1) < 0.05


def test_label_noise(own, tmp_path, capsys):
    output = tmp_path / "out" / "noise"
    assert run("noise", own, "--rate", 0.3, "--seed", 1, "--output", output) == 0
    found = agree(output)
    with open(output / "noise.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == round(0.3 * 180) == len([name for name in found["train"] if name.startswith("from-")])
    for row in rows:
        assert row["label"] != row["true_label"]
        original = own / "train" / row["true_label"] / row["source_file"]
        assert (output / "train" / row["label"] / row["file"]).read_bytes() == original.read_bytes()
    assert len(found["train"]) == 180
    assert "--rate must be" in refused(capsys, tmp_path / "two" / "x", "noise", own, "--rate", 1.5)


def test_a_subset_and_its_list(own, tmp_path, capsys):
    output = tmp_path / "out" / "subset"
    assert run("subset", own, "--classes", 3, "--output", output) == 0
    agree(output)
    words = ("subset", own, "--list", output / "classes.txt", "--output", tmp_path / "out" / "again")
    assert run(*words) == 0
    assert agree(tmp_path / "out" / "again") == agree(output)
    assert run("imagenet-subset", own, "--classes", 2, "--expect", "train=180,val=12,classes=6") == 0
    assert agree(tmp_path / "own_2")
    capsys.readouterr()
    assert "expected 1,281,167" in refused(capsys, tmp_path / "two" / "x", "imagenet-subset", own)
    assert "has 6 classes" in refused(capsys, tmp_path / "two" / "x", "subset", own, "--classes", 7)
    assert "contains subset with classes_asked 3, not 2" in refused(
        capsys, output, "subset", own, "--classes", 2
    )
    (own / "val" / "a" / "deeper").mkdir()
    assert "has a folder in it" in refused(capsys, tmp_path / "two" / "x", "subset", own, "--classes", 2)


def test_all_readers_see_the_same_images(own, tmp_path, capsys):
    """Whatever a Mac, Windows or a notebook leaves in the folders, for every one who looks."""
    mmcls = pytest.importorskip("mmcls_bnn.data", reason="mmcls is not installed")
    clean = {split: dict(ImageFolder(own / split).samples) for split in ("train", "val")}
    first = next((own / "train" / "a").iterdir())
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", "a/.ipynb_checkpoints", "__MACOSX", "b/__MACOSX"):
            (own / split / name).mkdir()
            shutil.copy(first, own / split / name / "x.png")
        for name in ("a/._0.png", "a/.DS_Store", "b/Thumbs.db", "b/notes.txt", "c/x.webp", ".DS_Store"):
            (own / split / name).write_bytes(b"no image")
    before = {path for path in own.rglob("*") if path.is_file()}
    for split, images in clean.items():
        timms = open_dataset({"data_dir": str(own)}, split, 3, 6).reader
        assert dict(timms.samples) == images
        assert timms.class_to_idx == {label: number for number, label in enumerate("abcdef")}
        ours = mmcls.CheckedImageFolder(str(own), split, num_classes=6)
        samples = [ours.get_data_info(i) for i in range(len(ours))]
        assert {s["img_path"]: int(s["gt_label"]) for s in samples} == images
    check_data("", str(own), ["train", "val"], num_classes=6)
    check_data_folder(own, "own", 6)
    found = look_at(str(own))
    assert (found.train, found.validation, found.classes) == (180, 12, list("abcdef"))
    assert {path.name for path in found.strangers} == {"notes.txt", "x.webp"}
    assert contrasts._class_sizes(own / "train") == dict.fromkeys("abcdef", 30)
    assert decide._count(own / "train") == 180
    output = tmp_path / "out" / "noise"
    assert run("noise", own, "--output", output) == 0
    agree(output)
    (output / "train" / "a" / ".DS_Store").touch()
    assert run("noise", own, "--output", output) == 0
    assert "already there" in capsys.readouterr().out
    assert {path for path in own.rglob("*") if path.is_file()} == before


# What can go wrong while writing


def test_a_killed_command_goes_on(own, tmp_path):
    """SIGKILL after 40 images; what was there is kept and the result is that of a run without a break."""
    output = tmp_path / "out" / "noise"
    script = (
        "import os, signal, sys\n"
        "from lskd_study.cli import main as cli\n"
        "from lskd_study.data.folders.layout import Tree\n"
        "add = Tree.add\n"
        "def die(self, image):\n"
        "    add(self, image)\n"
        "    if sum(self.links.values()) == 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Tree.add = die\n"
        "cli.main(sys.argv[1:])\n"
    )
    words = ["data", "noise", str(own), "--copy", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    partial = output.parent / ".noise.partial"
    before = {path.relative_to(partial): path.stat().st_ino for path in partial.rglob("*.png")}
    assert len(before) == 40
    assert cli.main(words) == 0
    agree(output)
    after = {path.relative_to(output): path.stat().st_ino for path in output.rglob("*.png")}
    assert before.items() <= after.items()
    assert run("noise", own, "--copy", "--output", tmp_path / "out" / "whole") == 0
    first, second = (
        json.loads((tmp_path / "out" / n / "manifest.json").read_text()) for n in ("noise", "whole")
    )
    assert first["listing_sha256"] == second["listing_sha256"]


def test_a_full_disk(own, cub, tmp_path, capsys, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pack(tmp_path / "cub" / "CUB_200_2011.tgz", cub)
    output = tmp_path / "out" / "x"
    output.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        err = refused(capsys, output, "cub200", tmp_path / "cub", *CUB)
        assert "No space left on device" in err
        assert "free some space" in err
    usage = _layout.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_layout.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    assert "this needs" in refused(capsys, output, "cub200", tmp_path / "cub", *CUB)
    assert "this needs" in refused(capsys, output, "subset", own, "--classes", 2, "--copy")


def test_symbolic_links_where_hard_ones_are_impossible(own, tmp_path, monkeypatch):
    def refuse(*words, **more):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    output = tmp_path / "out" / "x"
    assert run("subset", own, "--classes", 2, "--output", output) == 0
    assert next(output.glob("train/*/*")).is_symlink()
    agree(output)
    assert set(json.loads((output / "manifest.json").read_text())["files"]) == {"symbolic"}


def test_an_output_that_is_taken(own, tmp_path, capsys):
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "out" / "x" / "mine").write_text("keep")
    words = ("subset", own, "--classes", 2)
    assert "is not this data set" in refused(capsys, tmp_path / "out" / "x", *words)
    assert "is a file" in refused(capsys, tmp_path / "out" / "x" / "mine" / "y", *words)


def test_the_published_numbers_are_those_of_table_5():
    first = {name: PUBLISHED[name].numbers[0] for name in PUBLISHED}
    assert first["imagenet"] == parse_expected("train=1281167,val=50000,classes=1000")
    assert first["cub200"] == parse_expected("train=5994,val=5794,classes=200")
    assert first["inat2019"] == parse_expected("train=265213,val=3030,classes=1010")
    assert first["imagenet-lt"] == parse_expected("train=115846,val=20000,classes=1000")
    assert first["places-lt"] == parse_expected("train=62500,val=7300,classes=365")
    assert first["imaterialist"] == parse_expected("train=1011532,val=10095,classes=2019")
    assert {"train": 184_500, "val": 7_300, "classes": 365} in PUBLISHED["places-lt"].numbers


# Hostile archives


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header of any size, negative ones in the base-256 notation."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def pax(records: dict[str, str]) -> bytes:
    text = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        text += f"{length} {key}={value}\n".encode()
    return header("p", len(text), tarfile.XHDTYPE) + text.ljust(512, b"\0")


FIRST = header("first", 0)
HOSTILE = {
    "a negative size": FIRST + header("x", -512),
    "a negative size further back": FIRST + header("x", 512) + bytes(512) + header("y", -1024),
    "a negative size in an extended header": FIRST + pax({"size": "-1024"}) + header("x", 0),
    "an extended header of 2 GB": FIRST + header("x", 1 << 31, tarfile.XHDTYPE) + bytes(1 << 21),
    "a long name of negative size": FIRST + header("x", -512, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 21),
    "a size of thousands of digits": FIRST + pax({"size": "9" * 5000}) + header("x", 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_ends_in_one_line(tmp_path, name):
    """A member of negative size led back to itself, for ever."""
    file = tmp_path / "x.tar"
    file.write_bytes(HOSTILE[name] + bytes(1024))
    with pytest.raises(LskdError, match="damaged or cut short") as caught:
        list(itertools.islice(read_members(file), 5))
    assert "\n" not in str(caught.value)


def test_a_member_is_no_larger_than_it_can_be(tmp_path):
    """A few kB in gzip that become more than 128 MB of text."""
    file = tmp_path / "x.tgz"
    with tarfile.open(file, "w:gz") as tar:
        member = tarfile.TarInfo("images.txt")
        member.size = MEMBER_LIMIT + 1
        tar.addfile(member, Zeros())
    with pytest.raises(LskdError, match=r"images.txt has 134,217,729 bytes"):
        next(read_members(file)).read()
    assert file.stat().st_size < 1 << 20


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def test_a_data_set_is_already_there_only_from_the_same_source(cub, own, tmp_path, capsys):
    archive = tmp_path / "cub" / "CUB_200_2011.tgz"
    pack(archive, cub)
    chosen = tmp_path / "list.txt"
    chosen.write_text("a\nb\n")
    words = {
        "cub200": ("cub200", archive.parent, *CUB),
        "list": ("subset", own, "--list", chosen),
        "noise": ("noise", own),
    }
    for name, command in words.items():
        assert run(*command, "--output", tmp_path / "out" / name) == 0
        assert run(*command, "--output", tmp_path / "out" / name) == 0
        assert "already there" in capsys.readouterr().out
    archive.write_bytes(archive.read_bytes() + b"\0")
    chosen.write_text("a\nc\n")
    for name in ("cub200", "list"):
        assert run(*words[name], "--output", tmp_path / "out" / name) == 2
        assert "was made when the source was another" in capsys.readouterr().err
    next((own / "train" / "a").iterdir()).unlink()
    assert run(*words["noise"], "--output", tmp_path / "out" / "noise") == 2
    assert "was made when the source was another" in capsys.readouterr().err
    archive.unlink()
    assert run(*words["cub200"], "--output", tmp_path / "out" / "cub200") == 2
    assert "has no CUB_200_2011" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_nothing_of_others_is_removed(own, tmp_path, capsys, kind):
    """What lies where the hidden folder is made was once emptied, through a link too."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    hidden = tmp_path / "out" / ".noise.partial"
    hidden.parent.mkdir()
    if kind == "link":
        (mine / ".settings.json").write_text('{"name": "noise"}')
        hidden.symlink_to(mine)
    elif kind == "folder":
        mine = mine.rename(hidden)
    else:
        hidden.write_text("mine")
    assert run("noise", own, "--output", tmp_path / "out" / "noise") == 2
    assert "was not made by this command; move it away" in capsys.readouterr().err
    assert (hidden if kind == "file" else mine / "notes.txt").read_text() == "mine"


def test_what_a_run_of_other_settings_left_is_removed(own, tmp_path):
    hidden = tmp_path / "out" / ".noise.partial"
    (hidden / "train").mkdir(parents=True)
    (hidden / ".settings.json").write_text('{"name": "noise"}')
    (hidden / "train" / "old").touch()
    (tmp_path / "foreign").mkdir()
    (hidden / "val").symlink_to(tmp_path / "foreign")
    assert run("noise", own, "--output", tmp_path / "out" / "noise") == 0
    agree(tmp_path / "out" / "noise")
    assert not list((tmp_path / "foreign").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"images": {"train": 1, "val": 2}},
        {"images_per_class": {"train": [1], "val": "x"}},
        {"images_per_class": None},
        {"classes": []},
        {"num_classes": "6"},
        {"files": None},
    ],
)
def test_a_forged_manifest_is_not_believed(own, tmp_path, capsys, change):
    output = tmp_path / "out" / "noise"
    assert run("noise", own, "--output", output) == 0
    file = output / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert run("noise", own, "--output", output) == 2
    assert "exists and is not this data set" in capsys.readouterr().err
