"""iMaterialist product 2019: images that the user fetched, by the publisher's lists of URLs."""

from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd_study.data.expected import PUBLISHED, Numbers, check_numbers, origin
from lskd_study.data.folders.annotations import only_name, read_json
from lskd_study.data.folders.archives import find_source, fingerprints
from lskd_study.data.folders.folders import Image, place
from lskd_study.data.folders.layout import SPLITS, Fill, Tree, build


def prepare_imaterialist(
    source: Path,
    output: Path,
    *,
    images: Path | None = None,
    allow_missing: bool = False,
    copy: bool = False,
    expected: Numbers | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write iMaterialist product 2019 as ``train/0000/`` to ``train/2018/``, by the class of the lists.

    The publisher ships no images, and some of the URLs are dead. An image is looked for by its id in
    ``<images>/train/`` or ``<images>/val/``, then in ``<images>/`` itself.

    Args:
        source: folder with ``train.json`` and ``val.json``.
        output: folder to write.
        images: folder of the images; ``source`` by default.
        allow_missing: go on without the images that are not there; the manifest counts them.
        copy: copy files where links would do.
        expected: numbers of images in the lists instead of the published ones.

    Raises:
        LskdError: for lists that are not the publisher's, missing images, or an output that cannot be
            written.
    """
    where = images or source

    def plan() -> Fill:
        wanted: list[Image] = []
        listed: dict[str, int] = {}
        classes = set()
        for split in SPLITS:
            entries = _read(source, split)
            listed[split] = len(entries)
            classes |= {label for _, label in entries}
            wanted += [
                Image(split, f"{label:04d}", name, where / split / name)
                for name, label in dict.fromkeys(entries)
            ]
        check_numbers("imaterialist", listed | {"classes": len(classes)}, expected)
        flat = {path.name for path in _entries(where)}
        by_split = {split: {path.name for path in _entries(where / split)} for split in SPLITS}
        found, missing = [], dict.fromkeys(SPLITS, 0)
        example = ""
        for image in wanted:
            if image.name in by_split[image.split]:
                found.append(image)
            elif image.name in flat:
                found.append(image._replace(source=where / image.name))
            else:
                missing[image.split] += 1
                example = example or image.name
        lost = {
            split: len(classes) - len({image.label for image in found if image.split == split})
            for split in SPLITS
        }
        if example and not allow_missing:
            raise LskdError(
                f"{where}: {missing['train']:,} of {listed['train']:,} training and {missing['val']:,} of "
                f"{listed['val']:,} validation images are missing, e.g. {example}; fetch them by the URLs of "
                "the lists, or go on without them with --allow-missing"
            )
        for split, number in lost.items():
            if number:
                raise LskdError(f"{where}: {number} of {len(classes)} classes would have no {split} image")

        def fill(tree: Tree) -> dict[str, Any]:
            place(tree, found)
            return {
                "listed": listed,
                "missing": missing,
                "listed_twice": sum(listed.values()) - len(wanted),
            }

        return fill

    names = [f"{split}.json" for split in SPLITS]
    lists = [find_source(source, (name, f"{name}.tar.gz"), "imaterialist") for name in names]
    sources = fingerprints(lists)
    return build(output, "imaterialist", origin("imaterialist", expected), plan, copy, sources)


def _read(source: Path, split: str) -> list[tuple[str, int]]:
    content = read_json(source, f"{split}.json", "imaterialist")
    try:
        entries = [(item["id"], int(item["class"])) for item in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise LskdError(
            f"{source}/{split}.json is not the list of iMaterialist product 2019 ({error!r}); "
            f"get it from {PUBLISHED['imaterialist'].get}"
        ) from None
    return [(only_name(name, f"{source}/{split}.json"), label) for name, label in entries]


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []
