"""Checks of an image folder, before anything heavy: what timm would pass over in silence."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from lskd import LskdError
from lskd.base.images import check_images, is_image, passed_over

# The names that timm looks for when there is no folder of the split's own name.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def is_image_folder(dataset: str, data_dir: str | None) -> bool:
    """Tell whether timm reads `data_dir` as a folder of images (no tar file, no named data set)."""
    return "/" not in dataset and not (data_dir is not None and Path(data_dir).is_file())


def check_data(
    dataset: str,
    data_dir: str | None,
    splits: Sequence[str],
    *,
    num_classes: int | None = None,
    class_map: str = "",
    open_images: bool = True,
    other_split: str = "name it by --train-split or --val-split",
) -> None:
    """Check the data folder of a run; named data sets ('torch/cifar10') are left to timm.

    Args:
        dataset: timm's data set name, '' for folders.
        data_dir: root folder.
        splits: the splits that will be read.
        num_classes: class count of the model; None: not compared.
        class_map: file that maps class names to labels; with it not every folder must have images.
        open_images: look into some of the images too.
        other_split: what to do where there is no folder of a split, for messages.

    Raises:
        LskdError: missing or empty folder, no folder for a split, a class without images, splits with
            different classes, another class count than the model's, a pickled class map, or images that
            cannot be read.
    """
    if class_map.endswith(".pkl"):
        raise LskdError(f"the class map {class_map} is pickled; write it as text, one class on each line.")
    if data_dir is None:
        if dataset.startswith(("hfds/", "hfids/", "tfds/")):
            return
        raise LskdError("no data folder is named; give it as --data-dir DIR.")
    root = Path(data_dir)
    if not root.exists():
        if "/" in dataset:
            return
        raise LskdError(f"data folder {root} does not exist; check the path.")
    if not is_image_folder(dataset, data_dir):
        return
    classes: dict[str, dict[str, list[Path]]] = {}
    for split in splits:
        folder = _split_folder(root, split, other_split)
        classes[split] = _class_images(folder, strict=not class_map)
    if not class_map:
        _compare_classes(classes, root)
        names = sorted(next(iter(classes.values())), key=natural_key)
        if num_classes is not None and len(names) != num_classes:
            raise LskdError(
                f"data folder {root} has {len(names)} classes, the model {num_classes}; "
                f"pass --num-classes {len(names)}."
            )
    if open_images:
        check_images([path for images in classes.values() for paths in images.values() for path in paths])


def _split_folder(root: Path, split: str, mend: str) -> Path:
    name = split.partition("[")[0]
    candidates: list[str] = [name, *next((names for names in _SYNONYMS if name in names), ())]
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    if not any(root.iterdir()):
        raise LskdError(
            f"data folder {root} is empty; give the folder that holds {name}/ with one folder per class."
        )
    raise LskdError(
        f"data folder {root} has no folder for the split '{split}' (looked for {', '.join(candidates)}); "
        f"{mend}."
    )


def _class_images(folder: Path, strict: bool) -> dict[str, list[Path]]:
    """Map class names to image files, as timm does: the class is the name of the folder an image lies in."""
    extensions: set[str] = get_img_extensions(as_set=True)
    classes: dict[str, list[Path]] = {}
    holders = set()
    folders = []
    for where, subfolders, files in os.walk(folder, followlinks=True):
        here = Path(where)
        subfolders[:] = sorted(name for name in subfolders if not passed_over(name))
        images = [here / name for name in sorted(files) if is_image(name, extensions)]
        folders.append(here)
        if not images:
            continue
        if here == folder:
            raise LskdError(
                f"image {images[0]} lies outside any class folder; move it into the folder of its class."
            )
        classes.setdefault(here.name, []).extend(images)
        holders.update([here, *here.parents])
    if not classes:
        raise LskdError(f"{folder} holds no images; give a folder with one folder of images per class.")
    empty = [path for path in folders if path not in holders]
    if empty and strict:
        raise LskdError(
            f"class folder {empty[0]} has no images, so all later classes would get other labels; "
            "fill or remove it."
        )
    return classes


def _compare_classes(classes: dict[str, dict[str, list[Path]]], root: Path) -> None:
    counts = Counter(name for images in classes.values() for name in images)
    for name, count in sorted(counts.items()):
        if count < len(classes):
            having = next(split for split in classes if name in classes[split])
            lacking = next(split for split in classes if name not in classes[split])
            raise LskdError(
                f"class '{name}' of {root} is in split '{having}' but not in '{lacking}', "
                "so labels would differ; give both splits the same class folders."
            )


def leave_out_litter(dataset: Any, class_map: str = "") -> None:
    """Take out of timm's list of a folder's images what `check_data` passes over: hidden files and the like.

    Classes are numbered as if it were not there; with a `class_map` labels stay.
    """
    reader = getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return
    parts = (Path(os.path.relpath(path, reader.root)).parts for path, _ in reader.samples)
    kept = [
        sample
        for sample, names in zip(reader.samples, parts, strict=True)
        if not any(map(passed_over, names))
    ]
    if len(kept) == len(reader.samples):
        return
    if not class_map:
        labels = {label for _, label in kept}
        names = [name for name, label in reader.class_to_idx.items() if label in labels]
        numbers = {reader.class_to_idx[name]: number for number, name in enumerate(names)}
        kept = [(path, numbers[label]) for path, label in kept]
        reader.class_to_idx = {name: number for number, name in enumerate(names)}
    reader.samples = kept
