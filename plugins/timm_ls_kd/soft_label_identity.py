"""What stored soft labels belong to: teacher, images, augmentation, versions."""

import hashlib
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm

from lskd import LskdError
from lskd.checkpoints import file_checksum
from lskd.soft_labels.format import SoftLabelsLayout
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.replay import ReplayedDataset
from timm_ls_kd.run_settings import settings_beside
from timm_ls_kd.soft_label_arguments import SoftLabelsConfig

# Arguments of the transform; those of the upstream script alone are None elsewhere.
_TRANSFORM = (
    "train_crop_mode",
    "scale",
    "ratio",
    "hflip",
    "vflip",
    "color_jitter",
    "color_jitter_prob",
    "grayscale_prob",
    "gaussian_blur_prob",
    "aa",
)
_ERASING = ("reprob", "remode", "recount")
_MIXED = ("mixup", "cutmix")
_MIXING = ("mixup_prob", "mixup_switch_prob", "mixup_off_epoch")
# How a teacher is made faster: the form that came of it is in the store, see lskd.TeacherForm.
_FAST = ("teacher_fast", "teacher_fast_bound", "teacher_compile")
# What a teacher's normalisation and input size are made of.
_TEACHER_SETTINGS = ("img_size", "in_chans", "input_size", "mean", "std", "gp", "model_kwargs")


def identity_of(
    args: Namespace,
    kd: KdConfig,
    layout: SoftLabelsLayout,
    dataset: ReplayedDataset,
    normalisation: Normalisation,
    prefetch: bool,
) -> dict[str, Any]:
    """Return what the store must agree in with a run, number for number.

    Args:
        args: the run's arguments, of the bundled trainer or timm's script.
        kd: what the run distils.
        layout: of the store.
        dataset: the training images, with their transform.
        normalisation: of the batches.
        prefetch: whether it is applied on the device.

    Raises:
        LskdError: images of a data set that has no list of them.
    """
    assert kd.soft_labels is not None
    return {
        "stored": {"classes": layout.num_classes, "top_k": layout.k, "values": layout.values},
        "teacher": _teacher(kd, bool(args.amp), str(args.amp_dtype)),
        "data": {"images": layout.samples, "listing": listing_checksum(dataset.dataset)},
        "augmentation": augmentation_of(args, kd.soft_labels, dataset, normalisation, prefetch),
        "versions": {"timm": timm.__version__}
        | {name: version(name) for name in ("torchvision", "pillow", "numpy")},
    }


def _teacher(kd: KdConfig, amp: bool, amp_dtype: str) -> dict[str, Any]:
    if kd.checkpoint is not None:
        weights = file_checksum(kd.checkpoint)
        beside = settings_beside(Path(kd.checkpoint), kd.teacher)
    else:
        known = timm.models.get_pretrained_cfg(kd.teacher) if ":" not in kd.teacher else None
        source = known and (known.hf_hub_id or known.url or known.file)
        weights, beside = f"pretrained, {known.tag if known else kd.teacher} {source}", {}
    # Whatever else the arguments say about the teacher changes what it says.
    asked = {
        field.name: _plain(getattr(kd, field.name))
        for field in fields(kd)
        if field.name.startswith("teacher_") and field.name not in _FAST
    }
    return {
        "architecture": kd.teacher,
        "weights": weights,
        "precision": kd.teacher_dtype or (f"autocast {amp_dtype}" if amp else "float32"),
        "arguments": _text(asked),
        "run_beside_it": _text({name: _plain(beside.get(name)) for name in _TEACHER_SETTINGS}),
    }


def augmentation_of(
    args: Namespace,
    config: SoftLabelsConfig,
    dataset: ReplayedDataset,
    normalisation: Normalisation,
    prefetch: bool,
) -> dict[str, Any]:
    """Return what a run's training images follow from, beside the images on disk; as `identity_of`."""
    augmented = not args.no_aug
    mixed = args.mixup > 0 or args.cutmix > 0
    erased = augmented and args.reprob > 0
    # Values as text, and none left out: what only one side names would not be compared.
    named: dict[str, Any] = {"seed": config.seed, "no_aug": bool(args.no_aug)}
    named |= {name: _text(getattr(args, name, None)) if augmented else "off" for name in _TRANSFORM}
    named |= {name: _text(getattr(args, name)) if erased else "off" for name in _ERASING}
    named |= {name: _text(getattr(args, name)) for name in _MIXED}
    named |= {name: _text(getattr(args, name)) if mixed else "off" for name in _MIXING}
    named |= {"mean": _text(normalisation.mean), "std": _text(normalisation.std), "prefetcher": prefetch}
    transform = re.sub(r" at 0x[0-9a-f]+", "", repr(dataset.transform))
    # What the names above do not say: image size, interpolation, and the library's own constants.
    return named | {"transform": hashlib.sha256(transform.encode()).hexdigest()}


def listing_checksum(dataset: Any) -> str:
    """Return a checksum of a timm data set's relative file names and class ids.

    Raises:
        LskdError: a data set that lists neither its files nor its arrays.
    """
    digest = hashlib.sha256()
    for line in _lines(dataset):
        digest.update(line)
    return digest.hexdigest()


def _lines(dataset: Any) -> Iterable[bytes]:
    reader = getattr(dataset, "reader", None)
    reader = getattr(reader, "reader", reader)  # the one inside that which reads each sample once
    samples = getattr(reader, "samples", None)
    if reader is not None and samples is not None:
        targets = getattr(reader, "targets", None)
        labels = [sample[1] for sample in samples] if targets is None else targets
        for name, label in zip(reader.filenames(absolute=False), labels, strict=True):
            yield f"{name}\t{int(label)}\n".encode()
    elif getattr(dataset, "samples", None) is not None and hasattr(dataset, "root"):  # torchvision's folders
        for path, label in dataset.samples:
            name = Path(path).relative_to(dataset.root)
            yield f"{name}\t{int(label)}\n".encode(errors="surrogateescape")
    elif hasattr(dataset, "data") and hasattr(dataset, "targets"):  # torchvision's arrays
        yield np.ascontiguousarray(dataset.data).tobytes()
        yield np.asarray(dataset.targets, np.int64).tobytes()
    else:
        raise LskdError(
            f"data set {type(dataset).__name__} has no list of its images, by which --kd-soft-labels could "
            "know them again; use a folder of images or a tar file."
        )


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 0 on the command line and 0.0 in a file are one number
    return str(value)
