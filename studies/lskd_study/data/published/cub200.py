"""CUB-200-2011 with its official split."""

from pathlib import Path

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Copy, Expect, NoChecksum, Output, Source
from lskd_study.data.expected import PUBLISHED, origin
from lskd_study.data.folders.archives import MEMBER_LIMIT, find_source, fingerprints, read_members
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import Place, Rows, extracted
from lskd_study.data.manifest import Made

FOLDER = "CUB_200_2011"
ARCHIVE = f"{FOLDER}.tgz"
_TEXTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def prepare_cub200(
    source: Source,
    output: Output = Path("data/cub200"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> Made:
    """Write CUB-200-2011 with its official split, from CUB_200_2011.tgz or what is in it.

    Official training images go to ``train``, test images to ``val``. Classes keep the publisher's folders,
    ``001.Black_footed_Albatross`` and so on. Eight images are grey.

    Raises:
        LskdError: for a source that is missing, damaged or not whole, or an output that cannot be written.
    """
    found = find_source(source, (FOLDER, ARCHIVE), "cub200")

    def plan() -> Rows:
        texts, present = _look_into(found)
        wanted, folder = _join(found, texts), f"{FOLDER}/images"
        named = "images.txt names"
        return extracted(found, "cub200", wanted, named, expect, not no_checksum, folder, present)

    files = [found, *(found / name for name in _TEXTS)]
    return build(output, "cub200", origin("cub200", expect), plan, copy, fingerprints(files))


def _look_into(found: Path) -> tuple[dict[str, str], set[str]]:
    """Return the publisher's texts by name, and which images an archive has."""
    fix = f"get it from {PUBLISHED['cub200'].get}"
    if found.is_dir():
        texts = {
            name: read_bytes(found / name, MEMBER_LIMIT, fix=fix).decode("utf-8", "replace")
            for name in _TEXTS
        }
        return texts, set()
    texts, present = {}, set()
    for member in read_members(found, title=f"reading {found.name}"):
        name = member.name.removeprefix(f"{FOLDER}/")
        if name in _TEXTS:
            texts[name] = member.read().decode("utf-8", "replace")
        elif name.startswith("images/"):
            present.add(name.removeprefix("images/"))
    if missing := [name for name in _TEXTS if name not in texts]:
        raise LskdError(f"{found} has no {FOLDER}/{missing[0]}; {fix}")
    return texts, present


def _join(found: Path, texts: dict[str, str]) -> dict[str, Place]:
    """Return where each image goes, by its name, ``class/file``; the lists must agree."""
    tables = {name: _table(found, name, text) for name, text in texts.items()}
    classes, labels = tables["classes.txt"], tables["image_class_labels.txt"]
    splits = tables["train_test_split.txt"]
    result = {}
    for key, name in tables["images.txt"].items():
        label, _, image = name.partition("/")
        if name.count("/") != 1 or ".." in name.split("/") or classes.get(labels.get(key, "")) != label:
            raise LskdError(
                f"{found}: images.txt and image_class_labels.txt contradict each other at image {key}"
            )
        if splits.get(key) not in ("0", "1"):
            raise LskdError(f"{found}: train_test_split.txt does not say where image {key} belongs")
        result[name] = ("train" if splits[key] == "1" else "val", label, image)
    return result


def _table(found: Path, name: str, text: str) -> dict[str, str]:
    rows = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if len(parts) != 2:
            raise LskdError(f"{found}: {name}:{number} is not two words; get it again")
        rows[parts[0]] = parts[1]
    return rows
