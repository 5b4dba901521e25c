"""Stored answers of a teacher: what a recipe says of them, what they must agree in with a run, their use."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from mmengine.dataset import default_collate
from mmengine.dist import get_dist_info
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lskd import LskdError, TopK
from lskd.checkpoints import file_checksum
from lskd.soft_labels.format import SoftLabelsLayout, ValueDtype
from lskd.soft_labels.forms import teacher_form
from lskd.soft_labels.remote import local_folder
from lskd.soft_labels.run import StoredRun
from lskd.soft_labels.settings import LARGEST_SEED, OnError, StoreSettings
from lskd.teachers.outputs import answers_to
from lskd.teachers.replay import MixingPolicy
from lskd.terms import Rest
from mmcls_bnn.compat import DISTRIBUTIONS
from mmcls_bnn.data import name_of
from mmcls_bnn.distil.replay import ImageMixing, KeyedImages, keys_of, mix_by_image, seed_pipeline
from mmcls_bnn.distil.teacher import TeacherSettings, autocast_of
from mmcls_bnn.recipe import check_count, read_config, settings_of

# The libraries that make the images; a store ends with their versions.
_LIBRARIES = (*DISTRIBUTIONS, "opencv-python", "opencv-python-headless", "pillow", "numpy")


@dataclass(frozen=True)
class SoftLabelSettings(StoreSettings):
    """`model.distillation.soft_labels` of a recipe; `randomness.seed` is each student's own."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SoftLabelSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown or missing, or a value out of range.
        """
        where = "model.distillation.soft_labels"
        settings = settings_of(cls, values, where, "path='DIR'", path="")
        if not settings.path:
            raise LskdError(f"{where} names no folder; give path='DIR'.")
        check_count(f"{where}.seed", settings.seed, 0, LARGEST_SEED)
        for name in ("top_k", "sampled", "views", "verify"):
            if (number := getattr(settings, name)) is not None:
                check_count(f"{where}.{name}", number, 0)
        if settings.sampled == 0 or (settings.sampled and settings.top_k is not None):
            raise LskdError(f"{where}.sampled draws 1 class or more, and top_k takes the largest; give one.")
        if settings.sampled and settings.rest != "spread":
            raise LskdError(f"{where}.sampled leaves no rest; drop rest.")
        choices = {
            "values": (None, *get_args(ValueDtype)),
            "rest": get_args(Rest),
            "on_error": get_args(OnError),
        }
        for name, allowed in choices.items():
            if getattr(settings, name) not in allowed:
                names = " or ".join(str(choice) for choice in allowed if choice)
                raise LskdError(f"{where}.{name} is {getattr(settings, name)!r}; it must be {names}.")
        return settings


class StoredTeacher(StoredRun):
    """What one process of a run has of the store that its recipe names.

    The training images follow from the seeds of the store from now on, and are mixed one by one.

    Args:
        model: the student, an LsKdClassifier with settings of soft labels, which loads the teacher when it is
            needed; its preprocessor mixes no more.
        amp: the teacher's mixed precision, see :func:`mmcls_bnn.distil.teacher.autocast_of`.
        shard: "I/N": that shard of the store, to be written.

    Attributes:
        all_there: nothing is left to be stored.
        needs_no_teacher: all that this run asks for is stored.

    Raises:
        LskdError: what the run does cannot be repeated, or the store belongs to another run, or is damaged.
    """

    def __init__(
        self,
        model: Any,
        cfg: Any,
        loader: Any,
        epochs: int,
        amp: torch.dtype | bool = False,
        shard: str = "",
    ) -> None:
        self.settings: SoftLabelSettings = model.soft_label_settings
        self.dataset, self.epoch = loader.dataset, 0
        self._model, self._amp = model, amp
        mixing = mix_by_image(model)
        self._pipeline = seed_pipeline(loader, self.settings.seed, mixing)
        classes, images = int(model.head.num_classes), len(self.dataset)
        settings = self.settings
        path = local_folder(settings.path, settings.cache)
        layout = settings.layout(path, classes, images, epochs, model.distillation.temperature, shard)
        steps = cfg.train_dataloader.dataset.get("pipeline") or self._pipeline.transforms
        rank, processes = get_dist_info()
        super().__init__(
            path,
            layout,
            _identity(model, layout, self.dataset, list(steps), amp, mixing),
            seed=settings.seed,
            on_error=settings.on_error,
            rank=rank,
            processes=processes,
            say=lambda line: MMLogger.get_current_instance().warning(line),
            teacher=model.fast_settings.mode,
            bound=model.fast_settings.bound,
        )
        self.all_there = self.keys >= layout.stop
        self.needs_no_teacher = self.all_there and not settings.verify

    def begin_epoch(self, epoch: int) -> None:
        """Begin to train an epoch; what is not stored of the epochs before it is asked for now.

        Raises:
            SoftLabelsError: the disk cannot take them, and the run is to stop then.
        """
        self.epoch = epoch = self.layout.stored_epoch(epoch)
        self._pipeline.set_epoch(epoch)
        if self.epochs > epoch or self.failed:
            return
        self.open_writer()
        if self.epochs < epoch:
            self.complete(epoch * self.layout.samples, self.answers)

    def answer(self, inputs: Tensor, data_samples: list[Any]) -> Tensor | TopK:
        """Return what the teacher says about a training batch, in the form that every student gets.

        Args:
            inputs: images `(B, C, H, W)`, normalised.

        Raises:
            SoftLabelsError: damaged rows, or the disk cannot take more, and the run is to stop then.
        """
        keys = keys_of(data_samples)
        found = self.stored(keys)
        if found is None:
            found = self.record(keys, self._model.speaking_teacher()(inputs))
        values, ids = (part.to(inputs.device) for part in found)
        return teacher_form(values, ids, self.layout, self.settings.rest)

    def end_epoch(self) -> None:
        """Ask about images that the epoch left out, and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self.writing and self.epochs <= self.epoch:
            self.complete((self.epoch + 1) * self.layout.samples, self.answers)

    def answers(self, keys: Any, batch_size: int = 64, workers: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Ask the teacher about keys: yield some of them `(n,)` and its logits `(n, K)`, until all are."""
        images = KeyedImages(self.dataset, keys)
        loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=default_collate)
        batches = (self._model.data_preprocessor(batch, False) for batch in loader)
        teacher = self._model.speaking_teacher()
        return answers_to(
            ((keys_of(batch["data_samples"]).numpy(), batch["inputs"]) for batch in batches),
            teacher,
            batch_size,
            autocast_of(teacher.device, self._amp),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTeacher":
        """Return itself: a student's copy (an averaged model, say) has the same store."""
        return self


def _identity(
    model: Any,
    layout: SoftLabelsLayout,
    dataset: Any,
    pipeline: list[Any],
    amp: torch.dtype | bool,
    mixing: ImageMixing | None,
) -> dict[str, Any]:
    """Return what a store must agree in with a run, as names and texts; `pipeline`: as the recipe has it."""
    teacher: TeacherSettings = model.teacher_settings
    if not Path(teacher.checkpoint).is_file():
        raise LskdError(f"the teacher's checkpoint {teacher.checkpoint} does not exist; check the path.")
    steps = dict(_step(number, step) for number, step in enumerate(pipeline))
    policy = MixingPolicy() if mixing is None else mixing.policy
    mixes = policy.probability > 0 and max(policy.mixup_alpha, policy.cutmix_alpha) > 0
    mixed = {each.name: _text(getattr(policy, each.name)) if mixes else "off" for each in fields(policy)}
    batches = model.data_preprocessor
    normalised = getattr(batches, "_enable_normalize", False)
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
            "precision": _precision(amp),
        },
        "data": {"images": layout.samples, "listing": _listing_checksum(dataset)},
        # The number of steps too: what only one side names would not be compared.
        "augmentation": {"seed": model.soft_label_settings.seed, "steps": len(steps), **steps, **mixed},
        "batches": {
            "mean": _text(batches.mean.flatten().tolist() if normalised else None),
            "std": _text(batches.std.flatten().tolist() if normalised else None),
            "to_rgb": _text(getattr(batches, "to_rgb", False)),
            "pad_size_divisor": _text(getattr(batches, "pad_size_divisor", 1)),
            "pad_value": _text(getattr(batches, "pad_value", 0)),
        },
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _listing_checksum(dataset: Any) -> str:
    """Return a checksum of a data set's relative file names (or arrays) and labels."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        name = name_of(dataset.data_root, info)
        if name is None:
            digest.update(np.ascontiguousarray(info["img"]).tobytes())
        else:
            digest.update(name.encode(errors="surrogateescape"))
        digest.update(f"\t{np.asarray(info['gt_label']).tolist()}\n".encode())
    return digest.hexdigest()


def _precision(amp: torch.dtype | bool) -> str:
    if not amp:
        return "float32"
    # float16 is the default of GPUs, on which alone mmengine trains so; a CPU may write for them.
    return "autocast" if amp in (True, torch.float16) else f"autocast {str(amp).removeprefix('torch.')}"


def _beside(teacher: TeacherSettings) -> str:
    """Return what else decides how the teacher sees an image: the args.yaml of its run, or its config."""
    if teacher.library == "mmcls":
        model = read_config(str(teacher.config), what="the teacher's config").to_dict().get("model")
        return hashlib.sha256(_text(model).encode()).hexdigest()
    arguments = Path(teacher.checkpoint).parent / "args.yaml"
    return file_checksum(arguments) if arguments.is_file() else "none"


def _step(number: int, step: Any) -> tuple[str, Any]:
    if not isinstance(step, Mapping):
        return f"step{number} {type(step).__name__}", repr(step)
    arguments = {str(name): _text(value) for name, value in step.items()}
    return f"step{number} {step.get('type')}", {"arguments": len(step), **arguments}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
