"""CUB-200-2011 with its official split."""

from pathlib import Path

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Copy, Expect, NoChecksum, Output, Source
from lskd_study.data.expected import PUBLISHED, check_numbers, count, origin
from lskd_study.data.folders.archives import MEMBER_LIMIT, find_source, fingerprints, read_members
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import Rows, extracted, refuse_missing
from lskd_study.data.manifest import Made

FOLDER = "CUB_200_2011"
ARCHIVE = f"{FOLDER}.tgz"
_TEXTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
_NAMED = "images.txt names"


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
        texts, present, size = _look_into(found)
        wanted = {}
        for name, split in _join(found, texts).items():
            label, _, image = name.partition("/")
            wanted[f"images/{name}"] = (split, label, image)
        missing = sorted(wanted.keys() - present)
        refuse_missing(
            found, "cub200", _NAMED, [name.removeprefix("images/") for name in missing], len(wanted)
        )
        check_numbers("cub200", count((split, label) for split, label, _ in wanted.values()), expect)
        return extracted(found, "cub200", wanted, not no_checksum, size, _NAMED)

    files = [found, *(found / name for name in _TEXTS)]
    return build(output, "cub200", origin("cub200", expect), plan, copy, fingerprints(files))


def _look_into(found: Path) -> tuple[dict[str, str], set[str], int]:
    """Return the publisher's texts by name, which images there are, and how large they are in an archive."""
    fix = f"get it from {PUBLISHED['cub200'].get}"
    if found.is_dir():
        texts = {
            name: read_bytes(found / name, MEMBER_LIMIT, fix=fix).decode("utf-8", "replace")
            for name in _TEXTS
        }
        return texts, {path.relative_to(found).as_posix() for path in found.glob("images/*/*")}, 0
    texts, present, size = {}, set(), 0
    for member in read_members(found, title=f"reading {found.name}"):
        name = member.name.removeprefix(f"{FOLDER}/")
        if name in _TEXTS:
            texts[name] = member.read().decode("utf-8", "replace")
        elif name.startswith("images/"):
            present.add(name)
            size += member.size
    if missing := [name for name in _TEXTS if name not in texts]:
        raise LskdError(f"{found} has no {FOLDER}/{missing[0]}; {fix}")
    return texts, present, size


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
