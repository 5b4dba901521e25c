"""CUB-200-2011 with its official split."""

from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.archives import MEMBER_LIMIT, check_md5, find_source, fingerprints, read_members
from lskd_study.data.folders.folders import Image, place
from lskd_study.data.folders.layout import Fill, Tree, build

FOLDER = "CUB_200_2011"
ARCHIVE = f"{FOLDER}.tgz"
_TEXTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def prepare_cub200(
    source: Path, output: Path, *, copy: bool = False, checksum: bool = True, expected: Numbers | None = None
) -> tuple[dict[str, Any], bool]:
    """Write CUB-200-2011: official training images to ``train``, test images to ``val``.

    Classes keep the publisher's folders, ``001.Black_footed_Albatross`` and so on. Eight images are grey.

    Args:
        source: ``CUB_200_2011.tgz``, what is in it, or a folder that holds either.
        output: folder to write.
        copy: copy files where links would do.
        checksum: check the MD5 of the archive.
        expected: numbers of images instead of the published ones.

    Raises:
        LskdError: for a source that is missing, damaged or not whole, or an output that cannot be written.
    """

    found = find_source(source, (FOLDER, ARCHIVE), "cub200")

    def plan() -> Fill:
        size = 0
        if found.is_dir():
            texts = {name: _read(found / name) for name in _TEXTS}
            present = {path.relative_to(found / "images").as_posix() for path in found.glob("images/*/*")}
        else:
            texts, present = {}, set()
            for member in read_members(found, title=f"reading {found.name}"):
                inner = member.name.removeprefix(f"{FOLDER}/")
                if inner in _TEXTS:
                    texts[inner] = member.read().decode("utf-8", "replace")
                elif inner.startswith("images/"):
                    present.add(inner.removeprefix("images/"))
                    size += member.size
            if missing := [name for name in _TEXTS if name not in texts]:
                raise LskdError(
                    f"{found} has no {FOLDER}/{missing[0]}; get it from {PUBLISHED['cub200'].get}"
                )
        split_of = _join(found, texts)
        if missing := sorted(set(split_of) - present):
            raise LskdError(
                f"{found}: images.txt names {len(split_of):,} images, {len(missing):,} of them are missing, "
                f"e.g. {missing[0]}; get it again from {PUBLISHED['cub200'].get}"
            )
        numbers = {
            split: sum(1 for value in split_of.values() if value == split) for split in ("train", "val")
        } | {"classes": len({name.partition("/")[0] for name in split_of})}
        check_numbers("cub200", numbers, expected)

        def fill(tree: Tree) -> dict[str, Any]:
            if found.is_dir():
                names = [(split, *name.partition("/")[::2], name) for name, split in split_of.items()]
                place(tree, [Image(a, b, c, found / "images" / name) for a, b, c, name in names])
            else:
                tree.require_space(size)
                if checksum:
                    check_md5(tree, found, PUBLISHED["cub200"].md5[ARCHIVE])
                for member in read_members(found, title="images"):
                    name = member.name.removeprefix(f"{FOLDER}/images/")
                    if name in split_of:
                        label, _, file = name.partition("/")
                        tree.add_bytes(split_of[name], label, file, member.read())
            return {"checksums": checksum and not found.is_dir()}

        return fill

    files = [found, *(found / name for name in _TEXTS)]
    return build(output, "cub200", origin("cub200", expected), plan, copy, fingerprints(files))


def _read(path: Path) -> str:
    mend = f"get it from {PUBLISHED['cub200'].get}"
    return read_bytes(path, MEMBER_LIMIT, mend=mend).decode("utf-8", "replace")


def _join(found: Path, texts: dict[str, str]) -> dict[str, str]:
    """Return the split of each image by its name, ``class/file``; the lists must agree."""
    tables = {name: _table(found, name, text) for name, text in texts.items()}
    classes, labels = tables["classes.txt"], tables["image_class_labels.txt"]
    splits = tables["train_test_split.txt"]
    result = {}
    for key, name in tables["images.txt"].items():
        label = name.partition("/")[0]
        if name.count("/") != 1 or ".." in name.split("/") or classes.get(labels.get(key, "")) != label:
            raise LskdError(
                f"{found}: images.txt and image_class_labels.txt contradict each other at image {key}"
            )
        if splits.get(key) not in ("0", "1"):
            raise LskdError(f"{found}: train_test_split.txt does not say where image {key} belongs")
        result[name] = "train" if splits[key] == "1" else "val"
    return result


def _table(found: Path, name: str, text: str) -> dict[str, str]:
    rows = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if len(parts) != 2:
            raise LskdError(f"{found}: {name}:{number} is not two words; get it again")
        rows[parts[0]] = parts[1]
    return rows
