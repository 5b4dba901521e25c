"""``lskd data``: miniature archives with the publishers' inner layout, through the real command."""

import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder, ImageNet
from torchvision.datasets import imagenet as torchvision_imagenet

from archives import pack
from lskd import LskdError
from lskd_study.claims import contrasts
from lskd_study.cli import main as cli
from lskd_study.data.expected import PUBLISHED, parse_expected
from lskd_study.data.folders import layout as _layout
from lskd_study.data.folders.derived import pareto_sizes
from lskd_study.paper.printed import load_tables
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


class Made(NamedTuple):
    """What a command has made: folder, manifest, the class of each image by split, and what was printed."""

    folder: Path
    manifest: dict[str, Any]
    labels: dict[str, dict[str, int]]
    said: str


class Command:
    """`lskd data`, in a test's own folder."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self.capsys = folder, capsys

    def run(self, *words: object, status: int = 0) -> str:
        self.capsys.readouterr()
        assert cli.main(["data", *map(str, words)]) == status
        return "".join(self.capsys.readouterr())

    def make(self, *words: object, name: str = "made") -> Made:
        """Make a data set; timm, torchvision and the manifest must agree about it."""
        output = self.folder / "out" / name
        said = self.run(*words, "--output", output)
        manifest = manifest_of(output)
        assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]
        return Made(output, manifest, agree(output, manifest), said)

    def refuse(self, *words: object, output: Path | None = None) -> str:
        """Insist on one line, status 2, and nothing left of the output or beside it."""
        output = output or self.folder / "refused" / "x"
        before = sorted(output.parent.rglob("*"))
        error = self.run(*words, "--output", output, status=2)
        assert error.startswith("lskd: error: ")
        assert error.count("\n") == 1
        assert sorted(output.parent.rglob("*")) == before
        return error


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def agree(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
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
    return found


@pytest.fixture
def data(tmp_path, capsys) -> Command:
    return Command(tmp_path, capsys)


# Publishers' files


WNIDS = ("n01440764", "n01443537", "n02084071")
IMAGENET = ("--expect", "train=12,val=6,classes=3")
CUB = ("--expect", "train=4,val=2,classes=2", "--no-checksum")


@pytest.fixture
def ilsvrc(tmp_path, monkeypatch) -> Path:
    """Archives of three classes; the devkit's ids are not in the order of the names."""
    folder = tmp_path / "ilsvrc"
    outer = {}
    for wnid in WNIDS:
        pack(folder / wnid, {f"{wnid}_{i}.JPEG": picture(i) for i in range(4)}, "w")
        outer[f"{wnid}.tar"] = (folder / wnid).read_bytes()
    pack(folder / "ILSVRC2012_img_train.tar", outer, "w")
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i) for i in (3, 1, 2, 4, 5, 6)}
    pack(folder / "ILSVRC2012_img_val.tar", images, "w")
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [
        (1, WNIDS[2], "dog, hound", "", 0),
        (2, WNIDS[0], "tench", "", 0),
        (3, WNIDS[1], "goldfish", "", 0),
        (4, "n00001740", "entity", "", 3),
    ]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
    devkit = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"1\n2\n3\n3\n2\n1\n"}
    devkit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in devkit.items()}
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit)
    for split, (name, _) in torchvision_imagenet.ARCHIVE_META.items():
        digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, split, (name, digest))
    return folder


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


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def test_imagenet_from_archives_and_from_folders(data, ilsvrc, tmp_path):
    made = data.make("imagenet", ilsvrc, *IMAGENET)
    assert "3 classes; images in a class: train 4 to 4, median 4; val 2 to 2" in made.said
    numbers = {int(name[-8:-5]): label for name, label in made.labels["val"].items()}
    assert numbers == {1: 2, 2: 0, 3: 1, 4: 1, 5: 0, 6: 2}
    assert (made.folder / "train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG").read_bytes() == picture(3)
    assert ImageNet(made.folder, "val").classes[2] == ("dog", "hound")
    # What is there is not made again; its folders do as a source, with links.
    assert "already there" in data.make("imagenet", ilsvrc, *IMAGENET).said
    again = data.make("imagenet", made.folder, *IMAGENET, name="again")
    image = f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG"
    assert (again.folder / image).samefile(made.folder / image)
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    (flat / "train").symlink_to(made.folder / "train")
    for path in made.folder.glob("val/*/*"):
        (flat / "val" / path.name).symlink_to(path)
    (flat / "ILSVRC2012_devkit_t12.tar.gz").symlink_to(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    copied = data.make("imagenet", flat, *IMAGENET, "--copy", name="copied")
    assert made.labels == again.labels == copied.labels
    assert not (copied.folder / image).samefile(made.folder / image)


def test_imagenet_refuses_what_is_not_whole(data, ilsvrc):
    words = ("imagenet", ilsvrc, *IMAGENET)
    expected = "expected 1,281,167 training and 50,000 validation images in 1,000 classes, found 12 training"
    said = data.refuse(*words[:2])
    assert expected in said
    assert "; get the whole of it from https://" in said
    assert "--expect train=12,val=6,classes=3" in said
    said = data.refuse(*words[:2], "--expect", "train=13,val=6,classes=3")
    assert "expected 13 training and 6 validation images in 3 classes, found 12 training and 6" in said
    assert "must look like train=5994," in data.refuse(*words[:2], "--expect", "train=13,val=6")
    train = ilsvrc / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "cut short"),
        (whole[:600], "cut short"),
        (b"no archive at all" * 100, "is no tar archive"),
        (whole + b"\0" * 512, "expected md5"),
    ):
        train.write_bytes(content)
        assert message in data.refuse(*words)
    data.make(*words, "--no-checksum")
    train.unlink()
    assert "image-net.org" in data.refuse(*words)
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x")
    assert "not the devkit" in data.refuse(*words)


def test_cub_with_its_official_split(data, cub, tmp_path):
    pack(tmp_path / "cub" / "CUB_200_2011.tgz", cub)
    made = data.make("cub200", tmp_path / "cub", *CUB)
    assert made.labels["val"] == {"Bird_1_1.jpg": 0, "Bird_2_0.jpg": 1}
    unpack(tmp_path / "cub" / "CUB_200_2011.tgz", tmp_path / "open")
    assert data.make("cub200", tmp_path / "open", *CUB, name="linked").labels == made.labels
    (tmp_path / "open" / "CUB_200_2011" / "images" / "002.Bird_2" / "Bird_2_1.jpg").unlink()
    assert "missing, e.g. 002.Bird_2/Bird_2_1.jpg" in data.refuse("cub200", tmp_path / "open", *CUB)


def test_cub_refuses_what_contradicts_itself(data, cub, tmp_path):
    archive = tmp_path / "cub" / "CUB_200_2011.tgz"
    pack(archive, cub)
    assert "expected md5" in data.refuse("cub200", archive, *CUB[:2])
    pack(archive, {name: content for name, content in cub.items() if "Bird_2_1" not in name})
    assert "1 of them are missing, e.g. 002.Bird_2/Bird_2_1.jpg" in data.refuse("cub200", archive, *CUB)
    pack(archive, cub | {"CUB_200_2011/image_class_labels.txt": b"1 2\n"})
    assert "contradict each other" in data.refuse("cub200", archive, *CUB)
    assert "vision.caltech.edu" in data.refuse("cub200", tmp_path, *CUB)


def test_inat_is_split_by_its_annotations(data, tmp_path):
    source = tmp_path / "inat"
    names = {i: f"train_val2019/Birds/{c}/{i:032x}.jpg" for i, c in enumerate((2, 10, 2, 10, 2, 10))}
    for split, ids in (("train", (0, 1, 2, 3)), ("val", (4, 5))):
        text = {
            "images": [{"id": i, "file_name": names[i]} for i in ids],
            "annotations": [{"id": i, "image_id": i, "category_id": (2, 10)[i % 2]} for i in ids],
        }
        pack(source / f"{split}2019.json.tar.gz", {f"{split}2019.json": json.dumps(text).encode()})
    pack(source / "train_val2019.tar.gz", {names[i]: picture(i) for i in names})
    words = ("inat2019", source, "--expect", "train=4,val=2,classes=2")
    assert "train2019.json.tar.gz: expected md5 b06a6683" in data.refuse(*words)
    for split in ("train", "val"):
        unpack(source / f"{split}2019.json.tar.gz", source)
        (source / f"{split}2019.json.tar.gz").unlink()
    assert "expected md5 c60a6e29" in data.refuse(*words)
    made = data.make(*words, "--no-checksum")
    assert sorted(made.labels["val"].values()) == [0, 1]
    assert made.manifest["classes"] == ["0002", "0010"]
    pack(source / "train_val2019.tar.gz", {names[i]: picture(i) for i in range(5)})
    assert "1 of them are missing" in data.refuse(*words, "--no-checksum")


def test_imaterialist_says_what_is_missing(data, tmp_path):
    source = tmp_path / "imat"
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
    missing = "1 of 6 training and 0 of 2 validation images are missing, e.g. 5a.jpg"
    assert missing in data.refuse(*words)
    made = data.make(*words, "--allow-missing")
    assert len(made.labels["train"]) == 5
    assert made.manifest["missing"] == {"train": 1, "val": 0}


@pytest.mark.parametrize("layout", ["easy", "nested"])
def test_places_goes_by_the_numbers_of_the_lists(data, tmp_path, layout):
    """`desert_road` comes before `desert-sand` in the lists and after it as text."""
    source = tmp_path / "places"
    lists = {"train": "", "val": ""}
    for number, label in enumerate(("airfield", "desert_road", "desert-sand")):
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
    assert data.make(*words).manifest["classes"] == ["0_airfield", "1_desert_road", "2_desert-sand"]
    next(source.rglob("00000002.jpg")).unlink()
    assert "1 of the 9 images that the lists name are missing" in data.refuse(*words)
    (source / "Places_LT_val.txt").write_text("../../etc/x.jpg 0\n")
    assert "Places_LT_val.txt:1: expected" in data.refuse(*words)


def test_imagenet_lt_keeps_the_names(data, tmp_path):
    source = tmp_path / "imagenet"
    for number, wnid in enumerate(WNIDS):
        (source / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            (source / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(picture(i))
            with open(source / f"ImageNet_LT_{'train' if i else 'val'}.txt", "a") as file:
                file.write(f"train/{wnid}/{wnid}_{i}.JPEG {number}\n")
    made = data.make("imagenet-lt", source, "--expect", "train=6,val=3,classes=3")
    assert made.labels["val"] == {f"{wnid}_0.JPEG": i for i, wnid in enumerate(WNIDS)}


def test_fashion_mnist_is_read_by_torchvision(data, tmp_path):
    source = tmp_path / "fashion"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 28, 28), dtype=np.uint8)
    for split, n in (("train", 20), ("t10k", 10)):
        for kind, head, content in (
            ("images-idx3", [2051, n, 28, 28], pixels[:n]),
            ("labels-idx1", [2049, n], np.arange(n, dtype=np.uint8) % 10),
        ):
            with gzip.open(source / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(np.array(head, dtype=">i4").tobytes() + content.tobytes())
    words = ("fashion-mnist", source, "--expect", "train=20,val=10,classes=10")
    image = data.make(*words).folder / "train" / "3" / "00013.png"
    np.testing.assert_array_equal(np.asarray(Image.open(image)), pixels[13])
    assert "expected 60,000 training" in data.refuse(*words[:2])
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        whole = (source / name).read_bytes()
        for part in (0, 5, len(whole) // 2, len(whole) - 1):
            (source / name).write_bytes(whole[:part])
            assert ("cut short" if part else "does not contain the four files") in data.refuse(*words)
        (source / name).write_bytes(whole)


def test_the_published_numbers_are_those_of_table_5():
    """Of iMaterialist the paper rounds."""
    names = {"imagenet": "ImageNet-1K", "cub200": "CUB200-2011", "inat2019": "iNaturalist 2019"}
    names |= {"imagenet-lt": "ImageNet-LT", "places-lt": "Places-LT"}
    for name, printed in names.items():
        row = load_tables()["Table 5"].row(printed)
        keys = {"train": "training_images", "val": "test_images", "classes": "classes"}
        assert {key: row.number(column) for key, column in keys.items()} in PUBLISHED[name].numbers
    assert PUBLISHED["imaterialist"].numbers[0] == parse_expected("train=1011532,val=10095,classes=2019")
    assert PUBLISHED["places-lt"].numbers[0] == parse_expected("train=62500,val=7300,classes=365")


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


def test_a_long_tail(data, own):
    words = ("long-tail", own, "--head", 30, "--tail", 3, "--seed", 4)
    manifest = data.make(*words).manifest
    assert sorted(manifest["images_per_class"]["train"], reverse=True) == pareto_sizes(6, 6, 30, 3)
    assert manifest["images_per_class"]["val"] == [2] * 6
    assert data.make(*words, name="again").manifest["listing_sha256"] == manifest["listing_sha256"]
    assert "the largest has 30" in data.refuse("long-tail", own, "--head", 31)
    assert "--seed" not in data.refuse("long-tail", own, "--head", 3)


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


def test_label_noise(data, own):
    made = data.make("noise", own, "--rate", 0.3, "--seed", 1)
    with open(made.folder / "noise.csv") as file:
        rows = list(csv.DictReader(file))
    renamed = [name for name in made.labels["train"] if name.startswith("from-")]
    assert len(rows) == round(0.3 * 180) == len(renamed)
    for row in rows:
        assert row["label"] != row["true_label"]
        original = own / "train" / row["true_label"] / row["source_file"]
        assert (made.folder / "train" / row["label"] / row["file"]).read_bytes() == original.read_bytes()
    assert len(made.labels["train"]) == 180
    assert "--rate must be" in data.refuse("noise", own, "--rate", 1.5)


def test_a_subset_and_its_list(data, own, tmp_path):
    made = data.make("subset", own, "--classes", 3)
    again = data.make("subset", own, "--list", made.folder / "classes.txt", name="again")
    assert again.labels == made.labels
    data.run("imagenet-subset", own, "--classes", 2, "--expect", "train=180,val=12,classes=6")
    assert agree(tmp_path / "own_2", manifest_of(tmp_path / "own_2"))
    assert "expected 1,281,167" in data.refuse("imagenet-subset", own)
    assert "has 6 classes" in data.refuse("subset", own, "--classes", 7)
    other = data.refuse("subset", own, "--classes", 2, output=made.folder)
    assert "contains subset with classes_asked 3, not 2" in other
    (own / "val" / "a" / "deeper").mkdir()
    assert "has a folder in it" in data.refuse("subset", own, "--classes", 2)


def test_all_readers_see_the_same_images(data, own):
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
    (data.make("noise", own).folder / "train" / "a" / ".DS_Store").touch()
    assert "already there" in data.run("noise", own, "--output", data.folder / "out" / "made")
    assert {path for path in own.rglob("*") if path.is_file()} == before


# What can go wrong while writing


@pytest.mark.parametrize(
    ("where", "others"), [("images", 0), (".settings.json", 0), (".settings.json", 1), ("made", 0)]
)
def test_a_killed_command_goes_on(data, own, where, others):
    """SIGKILL after 40 images, or before a file or the folder takes its name; the end is as unbroken."""
    output = data.folder / "out" / "made"
    partial = output.with_name(".made.partial")
    if others:  # of other settings
        (partial / "train").mkdir(parents=True)
        (partial / ".settings.json").write_text('{"name": "noise"}')
        (partial / ".checked.json").touch()
    child = os.fork()
    if child == 0:
        add, replace, unlink = _layout.Tree.add, os.replace, Path.unlink

        def die_at(name):
            if name == where:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_add(self, image):
            add(self, image)
            if sum(self.links.values()) == 40:
                die_at("images")

        _layout.Tree.add = dying_add
        os.replace = lambda source, target: (die_at(Path(target).name), replace(source, target))
        Path.unlink = lambda path, **how: (unlink(path, **how), die_at(path.name))
        with contextlib.suppress(BaseException):
            cli.main(["data", "noise", str(own), "--copy", "--output", str(output)])
        os._exit(1)  # or it would run all other tests once more
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not output.exists()
    before = {path.relative_to(partial): path.stat().st_ino for path in partial.rglob("*.png")}
    assert len(before) == {"images": 40, "made": 192}.get(where, 0)
    made, whole = (data.make("noise", own, "--copy", name=name) for name in ("made", "whole"))
    after = {path.relative_to(output): path.stat().st_ino for path in output.rglob("*.png")}
    assert before.items() <= after.items()
    assert made.manifest["listing_sha256"] == whole.manifest["listing_sha256"]
    assert {path.name for path in output.iterdir()} == {"train", "val", "manifest.json", "noise.csv"}
    assert {path.name for path in output.parent.iterdir()} == {"made", "whole"}


def test_a_full_disk(data, own, cub, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pack(tmp_path / "cub" / "CUB_200_2011.tgz", cub)
    words = ("cub200", tmp_path / "cub", *CUB)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert ": the disk is full (No space left on device); what is finished is kept" in data.refuse(*words)
    usage = _layout.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_layout.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    assert "has 100 bytes free, this needs" in data.refuse(*words)
    assert "this needs" in data.refuse("subset", own, "--classes", 2, "--copy")


def test_symbolic_links_where_hard_ones_are_impossible(data, own, monkeypatch):
    def refuse(*words, **more):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    made = data.make("subset", own, "--classes", 2)
    assert next(made.folder.glob("train/*/*")).is_symlink()
    assert set(made.manifest["files"]) == {"symbolic"}


def test_an_output_that_is_taken(data, own, tmp_path):
    (tmp_path / "out" / "x").mkdir(parents=True)
    (tmp_path / "out" / "x" / "mine").write_text("keep")
    words = ("subset", own, "--classes", 2)
    assert "is not this data set" in data.refuse(*words, output=tmp_path / "out" / "x")
    assert "is no folder" in data.refuse(*words, output=tmp_path / "out" / "x" / "mine" / "y")


def test_a_place_that_cannot_be_written_is_known_before_the_source_is_read(tmp_path, monkeypatch):
    """The images are gathered beside an empty output, so its own permissions are not enough."""
    output = tmp_path / "made"
    output.mkdir()
    # Not by chmod: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(LskdError, match=r"cannot write .*/made: permission denied; choose another --output"):
        _layout.build(output, "own", {}, lambda: pytest.fail("the source was read"))


def test_a_data_set_is_already_there_only_from_the_same_source(data, cub, own, tmp_path):
    archive, chosen = tmp_path / "cub" / "CUB_200_2011.tgz", tmp_path / "list.txt"
    pack(archive, cub)
    chosen.write_text("a\nb\n")
    words = {
        "cub200": ("cub200", archive.parent, *CUB),
        "list": ("subset", own, "--list", chosen),
        "noise": ("noise", own),
    }
    for name, command in words.items():
        data.make(*command, name=name)
        assert "already there" in data.make(*command, name=name).said
    archive.write_bytes(archive.read_bytes() + b"\0")
    chosen.write_text("a\nc\n")
    next((own / "train" / "a").iterdir()).unlink()
    for name, command in words.items():
        other = data.refuse(*command, output=tmp_path / "out" / name)
        assert "was made when the source was another" in other
    archive.unlink()
    gone = data.refuse(*words["cub200"], output=tmp_path / "out" / "cub200")
    assert "has no CUB_200_2011" in gone


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_nothing_of_others_is_removed(data, own, tmp_path, kind):
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
    other = data.refuse("noise", own, output=tmp_path / "out" / "noise")
    assert "was not made by this command; move it away" in other
    assert (hidden if kind == "file" else mine / "notes.txt").read_text() == "mine"


def test_what_a_run_of_other_settings_left_is_removed(data, own, tmp_path):
    hidden = tmp_path / "out" / ".made.partial"
    (hidden / "train").mkdir(parents=True)
    (hidden / ".settings.json").write_text('{"name": "noise"}')
    (hidden / "train" / "old").touch()
    (tmp_path / "foreign").mkdir()
    (hidden / "val").symlink_to(tmp_path / "foreign")
    data.make("noise", own)
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
def test_a_forged_manifest_is_not_believed(data, own, change):
    made = data.make("noise", own)
    (made.folder / "manifest.json").write_text(json.dumps(made.manifest | change))
    assert "exists and is not this data set" in data.refuse("noise", own, output=made.folder)
