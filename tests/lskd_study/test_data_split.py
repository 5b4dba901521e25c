"""`lskd data split`: real small images, drawn by class; what a table of labels may say; what becomes PNG."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset

from lskd.base.images import pixel_checksums
from lskd_study.cli import main as cli
from lskd_study.data.folders.split import _Found, _validation
from lskd_study.study.own_images import look_at

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = RNG.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def save(path: str | Path, image: Image.Image | None = None, **options: object) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


@pytest.fixture
def pets(scene):
    """Three classes of 10, 20 and 5 images without a split."""
    for label, count in {"cat": 10, "dog": 20, "eel": 5}.items():
        for number in range(count):
            save(f"pets/{label}/{number:02d}.png")
    return scene


def made(folder: str = "pets_split") -> dict:
    return json.loads(Path(folder, "manifest.json").read_text())


def placed(folder: str = "pets_split") -> dict[str, str]:
    """Return the split of each image, by its class and name; timm must read the same ones."""
    found = {}
    for split in ("train", "val"):
        paths = sorted(Path(folder, split).glob("*/*.*"))
        timms = create_dataset("", root=folder, split=split).reader.samples
        assert sorted(path for path, _ in timms) == [str(path) for path in paths]
        found |= {f"{path.parent.name}/{path.name}": split for path in paths}
    return found


def test_each_class_is_split_on_its_own(pets):
    before = {path: path.stat().st_mtime_ns for path in Path("pets").rglob("*")}
    out = pets.run("data", "split", "pets", "--validation", "0.2")
    assert "28 training and 7 validation images, written" in out
    assert made()["images_per_class"] == {"train": [8, 16, 4], "val": [2, 4, 1]}
    assert placed().keys() == {f"{path.parent.name}/{path.name}" for path in Path("pets").glob("*/*")}
    assert {path: path.stat().st_mtime_ns for path in Path("pets").rglob("*")} == before
    assert "already there" in pets.run("data", "split", "pets")
    found = look_at("pets_split")
    assert (found.train, found.validation, found.classes) == (28, 7, ["cat", "dog", "eel"])


def test_the_seed_decides_and_other_classes_do_not(pets):
    def drawn(*words: str) -> dict[str, str]:
        name = f"out{len(list(Path().glob('out*')))}"
        pets.run("data", "split", "pets", "--output", name, *words)
        return {file: split for file, split in placed(name).items() if file.startswith("dog")}

    first = drawn()
    assert drawn() == first
    assert drawn("--seed", "1") != first
    save("pets/ant/1.png"), save("pets/ant/2.png")
    assert drawn() == first


def test_identical_images_are_on_one_side_and_named(pets, capsys):
    """The same file under another name, the same pixels in another file, and one picture in two classes."""
    for number in range(3):
        (Path("pets/cat") / f"again{number}.png").write_bytes(Path("pets/cat/00.png").read_bytes())
    with Image.open("pets/dog/00.png") as image:
        save("pets/dog/other.bmp", image)
        save("pets/dog/alpha.png", image.convert("RGBA"))
        assert Path("pets/dog/alpha.png").read_bytes() != Path("pets/dog/00.png").read_bytes()
    with Image.open("pets/eel/00.png") as image:
        save("pets/cat/eel.png", image)
    assert cli.main(["data", "split", "pets", "--validation", "0.4"]) == 0
    warning = capsys.readouterr().err
    assert "9 images are identical to others; those of one picture are on one side" in warning
    assert "pictures under several classes, all of them in training: 1; " in warning
    assert made()["identical"] == {"images": 9, "groups": 3, "of_several_classes": 1}
    where = placed()
    with open("pets_split/identical.csv") as file:
        rows = list(csv.DictReader(file))
    groups = {row["group"]: set() for row in rows}
    for row in rows:
        assert where[f"{row['label']}/{row['file']}"] == row["split"]
        groups[row["group"]].add(row["split"])
        assert Path("pets", row["source_file"]).is_file()
    assert [len(splits) for splits in groups.values()] == [1, 1, 1]
    assert where["eel/00.png"] == where["cat/eel.png"] == "train"
    assert {row["source_file"] for row in rows} >= {"dog/00.png", "dog/other.bmp", "dog/alpha.png"}
    # No picture is on both sides, by timm's own reading.
    seen = {
        split: {
            np.asarray(image).tobytes() for image, _ in create_dataset("", root="pets_split", split=split)
        }
        for split in ("train", "val")
    }
    assert not seen["train"] & seen["val"]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=6, max_size=30),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_a_draw_divides_no_group_and_empties_no_class(sizes, share, seed):
    """Groups of one class each, of 1 to 4 identical images; two of each class are there once."""
    groups, found = [], []
    for size, label in [*sizes, *[(1, label) for label in (0, 1, 2, 0, 1, 2)]]:
        groups.append([len(found) + i for i in range(size)])
        found += [_Found(str(label), f"{label}/{len(found) + i}") for i in range(size)]
    chosen = _validation(found, groups, share, seed)
    assert all(len(chosen & set(group)) in (0, len(group)) for group in groups)
    for label in "012":
        own = {i for i, image in enumerate(found) if image.label == label}
        wanted = min(max(1, round(share * len(own))), len(own) - 1)
        assert 0 < len(own & chosen) <= wanted
        assert wanted - len(own & chosen) < 4  # the largest group


def test_other_formats_become_png_with_the_same_pixels(scene):
    kinds = {"webp": {"lossless": True}, "bmp": {}, "tif": {"compression": "tiff_lzw"}, "TIFF": {}}
    sources = {}
    for number, (kind, options) in enumerate(kinds.items()):
        for label in ("a", "b"):
            path = save(f"pets/{label}/{number}.{kind}", **options)
            sources[f"{label}/{path.name}.png"] = path
    sources["a/grey.tif.png"] = save("pets/a/grey.tif", picture("L"))
    sources["a/print.tif.png"] = save("pets/a/print.tif", picture("CMYK"))
    Path("pets/a/notes.txt").touch()
    scene.run("data", "split", "pets")
    assert made()["files"] == {"written": 10}
    assert made()["passed_over"] == {".txt": 1}
    assert placed().keys() == sources.keys()
    for name, path in sources.items():
        target = next(Path("pets_split").glob(f"*/{name}"))
        with Image.open(target) as new, Image.open(path) as old:
            assert new.format == "PNG"
            assert new.convert("RGB").tobytes() == old.convert("RGB").tobytes()
    with Image.open(next(Path("pets_split").glob("*/a/grey.tif.png"))) as image:
        assert image.mode == "L"


def table(*rows: str, header: str = "file,label") -> str:
    Path("labels.csv").write_text("\n".join([header, *rows, ""]))
    return "labels.csv"


def test_classes_from_a_table(pets):
    """Images of several folders that have the same names; those that it does not name are left out."""
    rows = [
        f"{label}/{n:02d}.png,{'=sum' if n % 2 else 'even'}" for label in ("cat", "dog") for n in range(10)
    ]
    pets.run("data", "split", "pets", "--labels", table(*rows), "--output", "out")
    assert made("out")["classes"] == ["=sum", "even"]
    assert made("out")["images"] == {"train": 16, "val": 4}
    for name in placed("out"):
        label, _, file = name.partition("/")
        folder, _, number = file.removesuffix(".png").partition("-")
        target = next(Path("out").glob(f"*/{name}"))
        assert target.read_bytes() == Path("pets", folder, f"{number}.png").read_bytes()
        assert label == ("=sum" if int(number) % 2 else "even")
    assert "already there" in pets.run("data", "split", "pets", "--labels", "labels.csv", "--output", "out")
    table(*rows[:-1])
    assert "was made when the source was another" in pets.refused(
        "data", "split", "pets", "--labels", "labels.csv", "--output", "out"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../secret.png,a", r"row 1: file '../secret.png' leads out of pets"),
        (f"cat/{'n' * 300}.png,a", "nnn.png' is not in pets"),
        ("/etc/passwd,a", "row 1: file '/etc/passwd' leads out of pets"),
        ("cat/link.png,a", "row 1: file 'cat/link.png' leads out of pets"),
        ("cat/00.png,../a", "row 1: label '../a' can be no folder's name"),
        ("cat/00.png,..", "row 1: label '..' can be no folder's name"),
        ("cat/00.png,", "row 1: label '' can be no folder's name"),
        ("cat/00.png,.a", "row 1: label '.a' can be no folder's name"),
        ("cat/00.heic,a", "row 1: file 'cat/00.heic' has no name of an image (.bmp, .jpeg,"),
        ("cat/99.png,a", "row 1: file 'cat/99.png' is not in pets"),
        (",a", "row 1: file '' leads out of pets"),
        ("cat/00.png", "row 1 has not as many cells as the header"),
        ("cat/00.png,a\ncat/./00.png,b", "row 2: file 'cat/./00.png' stands there twice"),
        ("cat/00.png,a\ncat/01.png,a", "there is one class only, 'a'"),
        ("", "labels.csv names no image"),
    ],
)
def test_a_table_that_will_not_do_is_one_line(pets, row, message):
    save("secret.png")
    os.symlink("../../secret.png", "pets/cat/link.png")
    assert message in pets.refused("data", "split", "pets", "--labels", table(row) if row else table())


def test_a_table_without_the_columns(pets):
    table("cat/00.png,a", header="path,class")
    assert "has no column file, label" in pets.refused("data", "split", "pets", "--labels", "labels.csv")
    assert "labels2.csv cannot be read" in pets.refused("data", "split", "pets", "--labels", "labels2.csv")


def alone(label: str) -> None:
    save(f"pets/{label}/1.png")


def twins() -> None:
    for number in range(3):
        save(f"pets/fox/{number}.png", Image.new("RGB", (4, 4)))


BROKEN = {
    "deep": (
        lambda: Image.new("I;16", (8, 8), 4095).save("pets/cat/x.tif"),
        "image pets/cat/x.tif has grey values of more than 8 bits",
    ),
    "damaged": (
        lambda: [Path(f"pets/{label}/x.webp").write_bytes(b"RIFF") for label in ("cat", "dog")],
        "2 of 37 images looked at cannot be used: pets/cat/x.webp cannot be read",
    ),
    "one image": (lambda: alone("fox"), "class fox has not two different images that are its own"),
    "one picture": (twins, "class fox has not two different images that are its own"),
    "no images": (lambda: Path("pets/fox").mkdir(), "class folder pets/fox has no images"),
    "a split": (
        lambda: save("pets/train/cat/1.png"),
        "pets has a split already; `lskd study --own pets` takes",
    ),
    "loose": (lambda: save("pets/1.webp"), "pets has 1 images outside of any class, e.g. 1.webp; name their"),
    "a pipe": (lambda: os.mkfifo("pets/cat/x.png"), "pets/cat/x.png cannot be read (a link to nowhere, or"),
    "a dead link": (lambda: os.symlink("x", "pets/cat/x.png"), "pets/cat/x.png cannot be read (a link to"),
    "no text": (
        lambda: save(os.fsdecode(b"pets/cat/\xff.png")),
        r"'pets/cat/\udcff.png' has a name that is no UTF-8 text in one line; rename it",
    ),
    "nested": (lambda: save("pets/cat/x/1.png"), "class folder pets/cat has a folder in it, x"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_that_will_not_do_is_one_line(pets, name):
    break_it, message = BROKEN[name]
    break_it()
    assert message in pets.refused("data", "split", "pets")


def test_arguments_that_will_not_do(pets):
    assert "--validation must be above 0" in pets.refused("data", "split", "pets", "--validation", "1")
    assert "lies in the source" in pets.refused("data", "split", "pets", "--output", "pets/made")
    assert "cats is no folder" in pets.refused("data", "split", "cats")
    assert "lies in the source" in pets.refused("data", "split", "/")


def test_checksums_are_of_what_trainers_see(tmp_path):
    first = picture()
    same = [save(tmp_path / "a.png", first), save(tmp_path / "b.bmp", first)]
    turned = save(tmp_path / "c.png", first.transpose(Image.Transpose.ROTATE_180))
    wider = save(tmp_path / "d.png", Image.frombytes("RGB", (6, 8), first.tobytes()))
    sums = pixel_checksums([*same, turned, wider])
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3
