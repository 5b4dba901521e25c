"""iNaturalist 2019: the images of the archive, split by the two annotation files."""

from pathlib import Path, PurePosixPath

from lskd import LskdError
from lskd_study.data.arguments import Copy, Expect, NoChecksum, Output, Source
from lskd_study.data.expected import origin
from lskd_study.data.folders.archives import find_source, fingerprints, only_name, read_annotations
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import SPLITS, Place, Rows, extracted
from lskd_study.data.manifest import Made

FOLDER = "train_val2019"
ARCHIVE = f"{FOLDER}.tar.gz"


def prepare_inat2019(
    source: Source,
    output: Output = Path("data/inat2019"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> Made:
    """Write iNaturalist 2019 from train_val2019.tar.gz and its two annotation files.

    torchvision and timm read the images without the split; it is in ``train2019.json`` and ``val2019.json``
    alone, which may be packed as published, in ``.json.tar.gz``. Folders are the categories of the
    annotations, ``0000`` to ``1009``, padded with zeros because image folders are sorted as text.

    Raises:
        LskdError: for a source that is missing, damaged or not whole, or an output that cannot be written.
    """
    found = find_source(source, (FOLDER, ARCHIVE), "inat2019")
    lists = [
        find_source(source, (name, f"{name}.tar.gz"), "inat2019")
        for name in (f"{split}2019.json" for split in SPLITS)
    ]

    def plan() -> Rows:
        wanted: dict[str, Place] = {}
        for split in SPLITS:
            wanted |= _join(source, split, not no_checksum)
        named = "the annotations name"
        return extracted(found, "inat2019", wanted, named, expect, not no_checksum, FOLDER)

    return build(output, "inat2019", origin("inat2019", expect), plan, copy, fingerprints([found, *lists]))


def _join(source: Path, split: str, checksum: bool) -> dict[str, Place]:
    """Return where each image of a split goes, by its name, ``super/category/hash.jpg``."""
    file = f"{split}2019.json"
    content = read_annotations(source, file, "inat2019", checksum)
    try:
        categories = {int(item["image_id"]): int(item["category_id"]) for item in content["annotations"]}
        names = {int(item["id"]): str(item["file_name"]) for item in content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise LskdError(
            f"{source / file} has no images and annotations as iNaturalist's ({error!r})"
        ) from None
    wanted = {}
    for key, name in names.items():
        if key not in categories:
            raise LskdError(f"{source / file} does not say what is on image {key}; get it again")
        parts = PurePosixPath(name).parts
        if parts[:1] != (FOLDER,) or ".." in parts:
            raise LskdError(
                f"{source / file} names {name!r}; expected {FOLDER}/<super>/<category>/<hash>.jpg"
            )
        image = only_name(parts[-1], source / file)
        wanted["/".join(parts[1:])] = (split, f"{categories[key]:04d}", image)
    return wanted
