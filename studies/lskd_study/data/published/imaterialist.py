"""iMaterialist product 2019: images that the user fetched, by the publisher's lists of URLs."""

from pathlib import Path
from typing import Annotated

import typer

from lskd import LskdError
from lskd_study.data.arguments import Copy, Expect, Output, Source
from lskd_study.data.expected import PUBLISHED, check_numbers, count, origin
from lskd_study.data.folders.archives import find_source, fingerprints, only_name, read_annotations
from lskd_study.data.folders.layout import build
from lskd_study.data.folders.rows import SPLITS, Image, Rows, file_names
from lskd_study.data.manifest import Made


def prepare_imaterialist(
    source: Source,
    output: Output = Path("data/imaterialist"),
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images you fetched.", show_default="the source")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without lost images.")
    ] = False,
    copy: Copy = False,
    expect: Expect = None,
) -> Made:
    """Write iMaterialist product 2019 from train.json, val.json and the images you fetched by them.

    Folders are the classes of the lists, ``0000`` to ``2018``. The publisher ships no images, and some of the
    URLs are dead. An image is looked for by its id in ``<images>/train/`` or ``<images>/val/``, then in
    ``<images>/`` itself. The manifest counts those that are missing; ``expect`` is about the lists.

    Raises:
        LskdError: for lists that are not the publisher's, missing images, or an output that cannot be
            written.
    """
    where = images or source

    def plan() -> Rows:
        entries = {split: _read(source, split) for split in SPLITS}
        numbers = count((split, f"{label}") for split in SPLITS for _, label in entries[split])
        check_numbers("imaterialist", numbers, expect)
        listed = {split: len(entries[split]) for split in SPLITS}
        twice = sum(len(part) - len(set(part)) for part in entries.values())
        found: list[Image] = []
        lost: list[Image] = []
        flat = file_names(where)
        for split in SPLITS:
            there = file_names(where / split)
            for name, label in dict.fromkeys(entries[split]):
                folder = where / split if name in there else where
                image = Image(split, f"{label:04d}", name, folder / name)
                (found if name in there or name in flat else lost).append(image)
        missing = {split: sum(image.split == split for image in lost) for split in SPLITS}
        if lost and not allow_missing:
            raise LskdError(
                f"{where}: {missing['train']:,} of {listed['train']:,} training and {missing['val']:,} of "
                f"{listed['val']:,} validation images are missing, e.g. {lost[0].name}; fetch them by the "
                "URLs of the lists, or go on without them with --allow-missing"
            )
        for split in SPLITS:
            empty = numbers["classes"] - len({image.label for image in found if image.split == split})
            if empty:
                raise LskdError(
                    f"{where}: {empty} of {numbers['classes']} classes would have no {split} image"
                )
        return Rows(found, more={"listed": listed, "missing": missing, "listed_twice": twice})

    names = [f"{split}.json" for split in SPLITS]
    lists = [find_source(source, (name, f"{name}.tar.gz"), "imaterialist") for name in names]
    return build(output, "imaterialist", origin("imaterialist", expect), plan, copy, fingerprints(lists))


def _read(source: Path, split: str) -> list[tuple[str, int]]:
    content = read_annotations(source, f"{split}.json", "imaterialist")
    try:
        entries = [(item["id"], int(item["class"])) for item in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise LskdError(
            f"{source}/{split}.json is not the list of iMaterialist product 2019 ({error!r}); "
            f"get it from {PUBLISHED['imaterialist'].get}"
        ) from None
    return [(only_name(name, f"{source}/{split}.json"), label) for name, label in entries]
