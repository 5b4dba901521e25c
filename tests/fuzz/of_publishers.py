"""Files of data sets, and images."""

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from archives import pack
from fuzz import attacks
from fuzz.harness import Read, Target, one_file, same
from lskd import LskdError
from lskd.base import files


def tar_archive(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.data.folders.archives import read_members

    def read(path: Path) -> None:
        for member in read_members(path):
            assert not member.name.startswith("/")
            assert ".." not in member.name.split("/")
            member.read(1 << 20)

    members = {"a/b.txt": b"x" * 600, "n" * 150: b"y", "ä/c": bytes(2000)}
    sound = [pack(folder / "t", members, mode).read_bytes() for mode in ("w", "w:gz", "w:bz2", "w:xz")]
    small = [
        data + bytes(1024)
        for _, data in (*attacks.damaged_tars(), *attacks.leading_out())
        if len(data) < 9000
    ]
    return [
        *sound,
        *small,
        attacks.pax({"path": "p" * 300}) + attacks.header("x", 3) + bytes(2048),
    ], one_file("x.tar", read)(folder)


def publisher(
    name: str, file: str, sound: Callable[[], Sequence[bytes]], read: Callable[[Path], Any]
) -> Target:
    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        return sound(), one_file(file, read)(folder)

    return Target(
        f"data: {name}", prepare, inputs=15_000, tokens=[b'"', b",", b"[", b"]", b"..", b"/", b"::", b" "]
    )


def _packed(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder, "t"), members, mode).read_bytes()


def _cub() -> Sequence[bytes]:
    lists = {
        "images.txt": b"1 001.A/x.jpg\n2 002.B/y.jpg\n",
        "image_class_labels.txt": b"1 1\n2 2\n",
        "train_test_split.txt": b"1 1\n2 0\n",
        "classes.txt": b"1 001.A\n2 002.B\n",
    }
    members = {f"CUB_200_2011/{name}": text for name, text in lists.items()}
    members |= {f"CUB_200_2011/images/{name}": b"x" for name in ("001.A/x.jpg", "002.B/y.jpg")}
    return [_packed(members, "w"), _packed(members)]


def _read_cub(path: Path) -> None:
    from lskd_study.data.published.cub200 import _join, _look_into

    for split, label, image in _join(path, _look_into(path)[0]).values():
        assert split in ("train", "val")
        assert not {"..", ""} & {label, image}
        assert "/" not in label + image


def _imagenet() -> Sequence[bytes]:
    images = _packed({f"n01440764_{number}.JPEG": b"x" for number in (1, 2)}, "w")
    validation = {f"ILSVRC2012_val_0000000{number}.JPEG": b"x" for number in (1, 2)}
    return [_packed({"n01440764.tar": images}, "w"), _packed(validation, "w")]


def _read_imagenet(path: Path) -> None:
    """Read it as the archive of training and as that of validation."""
    from lskd_study.data.published.imagenet import _Devkit, _training, _validation

    refused = []
    for images in (_training(path), _validation(path, _Devkit(b"", ["n01440764"] * 2))):
        try:
            for _, label, name, _ in images:
                assert re.fullmatch(r"n\d{8}", label)
                assert "/" not in name
        except LskdError as error:
            refused.append(error)
    if len(refused) == 2:
        raise refused[0]


def _inat() -> Sequence[bytes]:
    content = {
        "images": [
            {"id": 1, "file_name": "train_val2019/A/1/x.jpg"},
            {"id": 2, "file_name": "train_val2019/B/2/y.jpg"},
        ],
        "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}],
    }
    return [json.dumps(content).encode()]


def _read_inat(path: Path) -> None:
    from lskd_study.data.published.inat2019 import _join

    for split, label, image in _join(path.parent, "train", False).values():
        assert split == "train"
        assert "/" not in label + image
        assert image[0] != "."


def _read_imaterialist(path: Path) -> None:
    from lskd_study.data.published.imaterialist import _read

    assert all("/" not in name and label >= 0 for name, label in _read(path.parent, "train"))


def _iwslt() -> Sequence[bytes]:
    from lskd_study.data.text import iwslt14

    members = {}
    for language in ("de", "en"):
        members[f"de-en/train.tags.de-en.{language}"] = b"<url>x</url>\n Das ist gut. \n"
        for name in iwslt14._TEST.values():
            members[f"de-en/{name.format(language)}"] = b'<doc>\n<seg id="1"> It is. </seg>\n</doc>\n'
    return [_packed(members), _packed(members, "w")]


def _read_iwslt(path: Path) -> None:
    from lskd_study.data.text import iwslt14

    for name, text in iwslt14._read(path).items():
        assert all(
            isinstance(line, str)
            for line in (iwslt14.train_lines if "tags" in name else iwslt14.segments)(text)
        )


def _read_ding(path: Path) -> None:
    from lskd_study.data.text import ding

    try:
        lines = files.read_bytes(path, 1 << 20).decode()
    except UnicodeDecodeError:
        raise LskdError("no text") from None
    for pair in ding.read_pairs(lines.splitlines()):
        ding.is_sentence(pair)
        assert all(side.strip() for side in pair)


def _read_list(path: Path) -> None:
    from lskd_study.data.published.long_tailed_lists import _class_folders, _read

    entries = _read(path, "imagenet-lt")
    folders = _class_folders({"train": entries, "val": entries}, {"train": path, "val": path})
    assert all("/" not in name and name not in ("", "..") for name in folders.values())


def fashion(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.data.published.small import _FASHION_FILES, _read_fashion

    idx = {3: b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28)) + bytes(2 * 28 * 28)}
    idx[1] = b"\0\0\x08\1" + (2).to_bytes(4, "big") + b"\1\2"
    paths = [folder / name for name in _FASHION_FILES]
    kinds = [idx[3 if "images" in name else 1] for name in _FASHION_FILES]
    for path, clean in zip(paths, kinds, strict=True):
        path.write_bytes(clean)

    def read(data: bytes) -> None:
        which = data[0] % 4 if data else 0
        try:
            paths[which].write_bytes(data[1:])
            splits, _ = _read_fashion(folder, paths)
            for part in splits.values():
                assert part.data.ndim == 3
                assert len(part.data) == len(part.targets)
        finally:
            paths[which].write_bytes(kinds[which])

    return [bytes([which]) + clean for which, clean in enumerate(kinds)], read


def label_table(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.data.folders.split import _listed

    (folder / "images" / "a").mkdir(parents=True)
    for name in ("x.png", "a/y.png"):
        (folder / "images" / name).write_bytes(b"x")

    def read(path: Path) -> None:
        found = _listed(folder / "images", path)[0]
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = ([*row] for row in csv.reader(file) if row)
        same([one.label for one in found], [row[header.index("label")].strip() for row in rows])
        for one in found:
            assert "/" not in one.label
            assert ".." not in one.file.split("/")

    return [b"file,label\nx.png,cat\na/y.png,dog\n"], one_file("labels.csv", read)(folder)


def data_manifest(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.data.manifest import read_manifest

    content = {"name": "cub200", "num_classes": 2, "classes": ["a", "b"], "images": {"train": 2, "val": 2}}
    content |= {
        "images_per_class": {"train": [1, 1], "val": [1, 1]},
        "options": {"seed": 0},
        "listing_sha256": "x",
    }

    def read(path: Path) -> None:
        found = read_manifest(path.parent, {"name", "images"})
        if not found:
            raise LskdError("none of ours")
        same(found, json.loads(path.read_bytes()))

    return [json.dumps(content).encode()], one_file("manifest.json", read)(folder)


def images(folder: Path) -> tuple[Sequence[bytes], Read]:
    from PIL import Image

    from lskd.base.images import check_images, pixel_checksums

    sound = []
    for mode, kind in (
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("I;16", "PNG"),
    ):
        content = io.BytesIO()
        Image.new(mode, (9, 7)).save(content, kind)
        sound.append(content.getvalue())

    def read(path: Path) -> None:
        check_images([path])
        assert pixel_checksums([path]) == pixel_checksums([path])

    return sound, one_file("x.png", read)(folder)


PUBLISHERS = [
    publisher("CUB-200-2011", "CUB_200_2011.tgz", _cub, _read_cub),
    publisher("ImageNet", "x.tar", _imagenet, _read_imagenet),
    publisher("iNaturalist", "train2019.json", _inat, _read_inat),
    publisher(
        "iNaturalist, packed",
        "train2019.json.tar.gz",
        lambda: [_packed({"train2019.json": _inat()[0]})],
        _read_inat,
    ),
    publisher(
        "iMaterialist", "train.json", lambda: [b'{"images": [{"id": "a", "class": "3"}]}'], _read_imaterialist
    ),
    publisher("IWSLT", "de-en.tgz", _iwslt, _read_iwslt),
    publisher(
        "Ding", "de-en", lambda: [b"# c\nAal {m} (x) [y] | Aale {pl} :: eel /E/; b | eels\n"], _read_ding
    ),
    publisher(
        "long-tailed lists", "x.txt", lambda: [b"train/n01/x.JPEG 0\ntrain/n02/y.JPEG 1\n"], _read_list
    ),
]
