"""iNaturalist 2019: the images of the archive, split by the two annotation files."""

from pathlib import Path, PurePosixPath
from typing import Any

from lskd import LskdError
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.annotations import only_name, read_json
from lskd_study.data.folders.archives import check_md5, find_source, fingerprints, read_members
from lskd_study.data.folders.folders import Image, place
from lskd_study.data.folders.layout import SPLITS, Fill, Tree, build

FOLDER = "train_val2019"
ARCHIVE = f"{FOLDER}.tar.gz"


def prepare_inat2019(
    source: Path, output: Path, *, copy: bool = False, checksum: bool = True, expected: Numbers | None = None
) -> tuple[dict[str, Any], bool]:
    """Write iNaturalist 2019 as ``train/0000/`` to ``train/1009/``, by the category of the annotations.

    torchvision and timm read the images without the split; it is in ``train2019.json`` and ``val2019.json``
    alone. Folder names are padded with zeros, because image folders are sorted as text.

    Args:
        source: folder with ``train_val2019.tar.gz`` or ``train_val2019/``, and the two annotation files
            (``.json``, or ``.json.tar.gz`` as published).
        output: folder to write.
        copy: copy files where links would do.
        checksum: check the MD5 of the archive.
        expected: numbers of images instead of the published ones.

    Raises:
        LskdError: for a source that is missing, damaged or not whole, or an output that cannot be written.
    """

    found = find_source(source, (FOLDER, ARCHIVE), "inat2019")
    lists = [
        find_source(source, (name, f"{name}.tar.gz"), "inat2019")
        for name in (f"{split}2019.json" for split in SPLITS)
    ]

    def plan() -> Fill:
        places: dict[str, tuple[str, str]] = {}
        for split in SPLITS:
            places |= _join(source, split, checksum)
        classes = {label for _, label in places.values()}
        numbers = {split: sum(1 for s, _ in places.values() if s == split) for split in SPLITS}
        check_numbers("inat2019", numbers | {"classes": len(classes)}, expected)
        if found.is_dir():
            missing = [name for name in places if not (found / name).is_file()]
            _refuse_missing(found, missing, len(places))

        def fill(tree: Tree) -> dict[str, Any]:
            if found.is_dir():
                place(
                    tree,
                    [
                        Image(split, label, name.rpartition("/")[2], found / name)
                        for name, (split, label) in places.items()
                    ],
                )
            else:
                tree.require_space(found.stat().st_size)
                if checksum:
                    check_md5(tree, found, PUBLISHED["inat2019"].md5[ARCHIVE])
                left = dict(places)
                for member in read_members(found, title="images"):
                    where = left.pop(member.name.removeprefix(f"{FOLDER}/"), None)
                    if where is None:
                        continue
                    name = member.name.rpartition("/")[2]
                    if not tree.holds(*where, name, member.size):
                        tree.add_bytes(*where, name, member.read())
                _refuse_missing(found, sorted(left), len(places))
            return {"checksums": checksum and not found.is_dir()}

        return fill

    sources = fingerprints([found, *lists])
    return build(output, "inat2019", origin("inat2019", expected), plan, copy, sources)


def _join(source: Path, split: str, checksum: bool) -> dict[str, tuple[str, str]]:
    """Return split and class folder by image, as ``super/category/hash.jpg``."""
    file = f"{split}2019.json"
    content = read_json(source, file, "inat2019", checksum)
    try:
        categories = {int(item["image_id"]): int(item["category_id"]) for item in content["annotations"]}
        names = {int(item["id"]): str(item["file_name"]) for item in content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise LskdError(
            f"{source / file} has no images and annotations as iNaturalist's ({error!r})"
        ) from None
    places = {}
    for key, name in names.items():
        if key not in categories:
            raise LskdError(f"{source / file} does not say what is on image {key}; get it again")
        parts = PurePosixPath(name).parts
        if parts[:1] != (FOLDER,) or ".." in parts:
            raise LskdError(
                f"{source / file} names {name!r}; expected {FOLDER}/<super>/<category>/<hash>.jpg"
            )
        only_name(parts[-1], source / file)
        places["/".join(parts[1:])] = (split, f"{categories[key]:04d}")
    return places


def _refuse_missing(found: Path, missing: list[str], total: int) -> None:
    if missing:
        raise LskdError(
            f"{found}: the annotations name {total:,} images, {len(missing):,} of them are missing, "
            f"e.g. {missing[0]}; get it again from {PUBLISHED['inat2019'].get}"
        )
