"""Checks of an image folder, before anything heavy: what timm would pass over in silence."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, resolve_data_config
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch import nn

from lskd import LskdError
from lskd.base.images import check_images, is_image, passed_over, unsuited
from lskd.errors import one_line
from lskd.teachers.frozen import Normalisation
from timm_ls_kd.models import first_channels

# The names that timm looks for when there is no folder of the split's own name.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


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
        num_classes: class count of the model; None: not compared.
        class_map: file that maps class names to labels; with it not every folder must have images.
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
    if "/" in dataset or root.is_file():  # a named data set, a tar file
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


def _split_folder(root: Path, split: str, fix: str) -> Path:
    name = split.partition("[")[0]
    candidates: list[str] = [name, *next((names for names in _SYNONYMS if name in names), ())]
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    if not any(root.iterdir()):
        raise LskdError(
            f"data folder {root} is empty; give the folder that contains {name}/ with one folder per class."
        )
    raise LskdError(
        f"data folder {root} has no folder for the split '{split}' (looked for {', '.join(candidates)}); "
        f"{fix}."
    )


def _class_images(folder: Path, strict: bool) -> dict[str, list[Path]]:
    """Map class names to image files, as timm does: the class is the name of the folder an image lies in."""
    extensions: set[str] = get_img_extensions(as_set=True)
    classes: dict[str, list[Path]] = {}
    filled = set()
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
        filled.update([here, *here.parents])
    if not classes:
        raise LskdError(f"{folder} contains no images; give a folder with one folder of images per class.")
    empty = [path for path in folders if path not in filled]
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


@dataclass(frozen=True)
class DataConfig:
    """How images become a model's input."""

    input_size: tuple[int, int, int]
    normalisation: Normalisation
    interpolation: str
    crop_pct: float
    crop_mode: str


def resolve_data(settings: Mapping[str, Any], model: nn.Module) -> DataConfig:
    """Resolve a run's data configuration, with as many channels as the model has.

    Raises:
        LskdError: a mean or deviation for another number of channels.
    """
    channels = first_channels(model)
    if channels not in (1, 3):
        raise LskdError(f"images have 1 or 3 channels, --in-chans is {channels}.")
    for name in ("mean", "std"):
        if settings.get(name) is not None and len(settings[name]) not in (1, channels):
            raise LskdError(f"--{name} has {len(settings[name])} values for {channels} channels.")
    # timm looks at in_chans for the length of mean and std.
    resolved = resolve_data_config({**settings, "in_chans": channels}, model=model)
    return DataConfig(
        input_size=(channels, *resolved["input_size"][-2:]),
        normalisation=Normalisation.of(resolved["mean"], resolved["std"], channels),
        interpolation=resolved["interpolation"],
        crop_pct=resolved["crop_pct"],
        crop_mode=resolved["crop_mode"],
    )


def open_dataset(
    settings: Mapping[str, Any], split: str, channels: int, num_classes: int | None, training: bool = False
) -> Any:
    """Open a split of a run's data set.

    Raises:
        LskdError: data that timm cannot open or can only stream, or that has more classes than the model.
    """
    try:
        dataset = create_dataset(
            settings.get("dataset") or "",
            root=settings["data_dir"],
            split=split,
            is_training=training,
            class_map=settings.get("class_map") or "",
            input_img_mode="RGB" if channels == 3 else "L",
        )
    except Exception as error:  # readers of many formats raise whatever they like
        raise LskdError(
            f"split '{split}' of {settings['data_dir']} cannot be opened: {one_line(error)}"
        ) from None
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise LskdError(
            f"data set '{settings['dataset']}' can only be streamed, which is not done here; "
            "to train, pass upstream's script: timm /path/to/train.py ..."
        )
    guard(dataset, settings.get("class_map") or "")
    labels = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    if labels and num_classes is not None and max(labels.values()) >= num_classes:
        raise LskdError(
            f"split '{split}' of {settings['data_dir']} has labels up to {max(labels.values())}, the model "
            f"{num_classes} classes; pass --num-classes {max(labels.values()) + 1}."
        )
    return dataset


class CheckedReader:
    """A reader of timm's whose images are fit for 8 bits."""

    def __init__(self, reader: Any) -> None:
        self.reader: Any = reader.reader if isinstance(reader, CheckedReader) else reader

    def __getattr__(self, name: str) -> Any:
        """Return what else a reader has, such as its list of samples and their files' names."""
        if name == "reader":  # there is none yet while a worker process is handed this
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __getitem__(self, index: int) -> Any:
        """Return a sample, its file open.

        Raises:
            LskdError: as `opened`.
        """
        sample = self.reader[index]
        self._image(sample[0], index)
        sample[0].seek(0)
        return sample

    @contextmanager
    def opened(self, index: int) -> Iterator[tuple[Image.Image, Any]]:
        """Give an image, not decoded yet, and its label; its file is closed afterwards.

        Raises:
            LskdError: grey values of more than 8 bits, or too many pixels.
        """
        file, label, *_ = self.reader[index]
        with file:
            yield self._image(file, index), label

    def _image(self, file: Any, index: int) -> Image.Image:
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            raise unreadable(self.filename(index, absolute=True), error) from None
        if problem := unsuited(image):
            raise LskdError(f"image {self.filename(index, absolute=True)} {problem}")
        return image

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.reader)


def guard(dataset: Any, class_map: str = "") -> None:
    """Take what `check_data` passes over out of timm's list of images, and check each one when it is read.

    Classes are numbered as if hidden files and the like were not there; with a `class_map` labels stay.
    """
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        _leave_out_litter(reader, class_map)
    if isinstance(dataset, ImageDataset):
        dataset.reader = CheckedReader(dataset.reader)


def _leave_out_litter(reader: ReaderImageFolder, class_map: str) -> None:
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


def unreadable(path: str, error: Exception) -> LskdError:
    """Return the error of an image file."""
    unnamed = isinstance(error, UnidentifiedImageError)  # which names an object of ours
    reason = "" if unnamed else f" ({' '.join(str(error).split())})"
    return LskdError(f"image {path} cannot be read{reason}; repair or remove it.")
