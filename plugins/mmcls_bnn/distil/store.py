"""What a recipe says about stored soft labels, and what a store must agree in with a run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from mmengine.config import Config

from lskd import LskdError
from lskd.checkpoints import file_checksum
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.run import image_layout
from lskd.teachers.replay import MixingPolicy
from lskd.terms import Rest
from mmcls_bnn.compat import FRAMEWORK
from mmcls_bnn.distil.mixing import ImageMixing
from mmcls_bnn.distil.teacher import TeacherSettings

OnError = Literal["stop", "continue"]
# The libraries that make the images; a store ends with their versions.
_LIBRARIES = (FRAMEWORK, "mmcv-lite", "mmcv", "opencv-python", "opencv-python-headless", "pillow", "numpy")


@dataclass(frozen=True)
class SoftLabelSettings:
    """`model.distillation.soft_labels` of a recipe.

    Attributes:
        path: folder of the store.
        top_k: classes kept of each image; 0: all; None: as stored, 10 where nothing is stored yet.
        values: "float16" or "float32"; None: as stored, else float32 for all classes and float16 otherwise.
        seed: of the augmentation, which all students of the store share; `randomness.seed` is each one's own.
        rest: what becomes of the probability of classes that are not stored; see :class:`lskd.TopK`.
        verify: how many stored images the teacher is asked about again before training.
        on_error: when the disk fails: "stop", or "continue" with the teacher and store nothing.
    """

    path: str
    top_k: int | None = None
    values: str | None = None
    seed: int = 42
    rest: Rest = "spread"
    verify: int = 0
    on_error: OnError = "stop"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SoftLabelSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown or missing, or a value out of range.
        """
        where = "model.distillation.soft_labels"
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise LskdError(f"{where} has an unknown key {key!r}; there are {', '.join(known)}.")
        if not values.get("path"):
            raise LskdError(f"{where} names no folder; give path='DIR'.")
        settings = cls(**values)
        for name in ("top_k", "seed", "verify"):
            number = getattr(settings, name)
            if number is not None and (not isinstance(number, int) or number < 0):
                raise LskdError(f"{where}.{name} is {number!r}; it must be a whole number from 0 on.")
        choices = {
            "values": (None, "float16", "float32"),
            "rest": get_args(Rest),
            "on_error": get_args(OnError),
        }
        for name, allowed in choices.items():
            if getattr(settings, name) not in allowed:
                names = " or ".join(str(choice) for choice in allowed if choice)
                raise LskdError(f"{where}.{name} is {getattr(settings, name)!r}; it must be {names}.")
        return settings

    def layout(self, num_classes: int, samples: int, epochs: int) -> SoftLabelsLayout:
        """Return the layout that was asked for; what was not asked for is as in the store, if there is one.

        Raises:
            SoftLabelsError: a top-K beyond the number of classes, or a damaged store.
        """
        return image_layout(self.path, num_classes, samples, epochs, self.top_k, self.values)


def identity_of(
    settings: SoftLabelSettings,
    layout: SoftLabelsLayout,
    teacher: TeacherSettings,
    preprocessor: Any,
    dataset: Any,
    pipeline: list[Any],
    amp: bool,
    mixing: ImageMixing | None = None,
) -> dict[str, Any]:
    """Return what a store must agree in with a run, as names and texts.

    Args:
        settings: of the store.
        layout: of the store.
        teacher: who speaks.
        preprocessor: mmcls' data preprocessor, which makes the batches.
        dataset: the training images.
        pipeline: its transforms as the recipe has them.
        amp: whether the teacher runs in mixed precision.
        mixing: of images with one another.

    Raises:
        LskdError: the teacher's checkpoint cannot be read.
    """
    if not Path(teacher.checkpoint).is_file():
        raise LskdError(f"the teacher's checkpoint {teacher.checkpoint} does not exist; check the path.")
    steps = {f"step{number} {_kind(step)}": _described(step) for number, step in enumerate(pipeline)}
    return {
        "stored": {"classes": layout.num_classes, "top_k": layout.k, "values": layout.values},
        "teacher": {
            "architecture": teacher.name,
            "library": teacher.library,
            "weights": file_checksum(teacher.checkpoint),
            "arguments": _text(teacher.kwargs or {}),
            "mean": _text(teacher.mean),
            "std": _text(teacher.std),
            "image_size": _text(teacher.image_size),
            "run_beside_it": _beside(teacher),
            "precision": "autocast" if amp else "float32",
        },
        "data": {"images": layout.samples, "listing": listing_checksum(dataset)},
        # The number of steps too: what only one side names would not be compared.
        "augmentation": {"seed": settings.seed, "steps": len(steps), **steps, **_mixed(mixing)},
        "batches": _batches(preprocessor),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def listing_checksum(dataset: Any) -> str:
    """Return a checksum of a data set's relative file names (or arrays) and labels."""
    digest = hashlib.sha256()
    root = Path(dataset.data_root or "")
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        path = info.get("img_path")
        if path is not None:
            inside = Path(path).is_relative_to(root)
            name = (Path(path).relative_to(root) if inside else Path(path)).as_posix()
            digest.update(name.encode(errors="surrogateescape"))
        else:
            digest.update(np.ascontiguousarray(info["img"]).tobytes())
        digest.update(f"\t{np.asarray(info['gt_label']).tolist()}\n".encode())
    return digest.hexdigest()


def _beside(teacher: TeacherSettings) -> str:
    """What else decides how the teacher sees an image: the args.yaml of its run, or its config."""
    if teacher.library == "mmcls":
        try:
            return _checksum(_text(Config.fromfile(str(teacher.config)).to_dict().get("model")))
        except Exception as error:  # a config is a program
            reason = " ".join(str(error).split())[:200]
            raise LskdError(
                f"the teacher's config {teacher.config} cannot be read ({reason}); check it."
            ) from None
    arguments = Path(teacher.checkpoint).parent / "args.yaml"
    return file_checksum(arguments) if arguments.is_file() else "none"


def _batches(preprocessor: Any) -> dict[str, str]:
    normalised = getattr(preprocessor, "_enable_normalize", False)
    return {
        "mean": _text(preprocessor.mean.flatten().tolist() if normalised else None),
        "std": _text(preprocessor.std.flatten().tolist() if normalised else None),
        "to_rgb": _text(getattr(preprocessor, "to_rgb", False)),
        "pad_size_divisor": _text(getattr(preprocessor, "pad_size_divisor", 1)),
        "pad_value": _text(getattr(preprocessor, "pad_value", 0)),
    }


def _mixed(mixing: ImageMixing | None) -> dict[str, str]:
    policy = MixingPolicy() if mixing is None else mixing.policy
    on = policy.probability > 0 and max(policy.mixup_alpha, policy.cutmix_alpha) > 0
    return {field.name: _text(getattr(policy, field.name)) if on else "off" for field in fields(policy)}


def _kind(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, Mapping) else type(step).__name__


def _described(step: Any) -> Any:
    if isinstance(step, Mapping):
        return {"arguments": len(step), **{str(name): _text(value) for name, value in step.items()}}
    return repr(step)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
