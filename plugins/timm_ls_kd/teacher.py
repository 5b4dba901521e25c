"""The teacher: a timm network with its weights, made for the batches of a student and tried on images."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lskd import Convention, FrozenTeacher, LskdError, target_mass
from lskd.checkpoints import settings_beside
from lskd.teachers.fast import FastMode
from lskd.teachers.frozen import FAST_SAMPLES, Normalisation
from lskd.teachers.outputs import Autocast
from lskd.teachers.preflight import ask, check_teacher, spread_indices
from timm_ls_kd.arguments import KdConfig, SoftLabelsConfig, multi_label
from timm_ls_kd.models import (
    check_model_name,
    create,
    create_for_run,
    first_channels,
    input_arguments,
    input_channels,
    load_weights,
)

_BATCH = 64  # images of a trial at a time
_SIZE_OPTION = "--kd-teacher-img-size"


@dataclass(frozen=True)
class StudentRun:
    """A student's run as its teacher sees it: one of the bundled trainer, or of timm's own script.

    Attributes:
        args: its arguments, `num_classes`, `rank` and `world_size` among them.
        kd: what it distils.
        input_size: channels, height and width of the student's images.
        normalisation: of its batches, as its loader really applies it.
        device: where they go.
        autocast: makes the context of a forward pass in training.
        prefetch: whether they are normalised on the device, not in the transform.
        validation: images to try the teacher on, by number; None, or a stream: there are none.
        training: images to measure a fast teacher on, augmented the same way whenever they are asked for.
        images: with stored soft labels the training images by key, and what makes batches of them.
    """

    args: Namespace
    kd: KdConfig
    input_size: tuple[int, int, int]
    normalisation: Normalisation
    device: torch.device
    autocast: Autocast
    prefetch: bool
    validation: Any
    training: Any
    images: tuple[Any, Any] | None = None

    @property
    def stored(self) -> tuple[SoftLabelsConfig, Any, Any]:
        """What is done with stored soft labels, and the two of `images`; for runs that have them."""
        assert self.kd.soft_labels is not None
        assert self.images is not None
        return self.kd.soft_labels, *self.images

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        args = self.args
        return args.mixup > 0 or args.cutmix > 0 or getattr(args, "cutmix_minmax", None) is not None

    @property
    def multi_label(self) -> bool:
        """Whether its classes do not exclude one another."""
        return multi_label(self.args)

    def say(self, line: str) -> None:
        """Print a line of progress, on the primary process."""
        if self.args.rank == 0:
            print(line, flush=True)

    def batches(self, dataset: Dataset[Any], **loader: Any) -> Iterator[tuple[Tensor, Any]]:
        """Yield images and targets of a data set, whose transform is set already, as in training."""
        collate = fast_collate if self.prefetch else None
        batches: Any = DataLoader(dataset, **{"collate_fn": collate, **loader})
        if self.prefetch:
            mean, std = self.normalisation.mean, self.normalisation.std
            batches = PrefetchLoader(batches, mean=mean, std=std, channels=len(mean), device=self.device)
        for images, targets in batches:
            yield images.to(self.device), targets.to(self.device)


def make_teacher(run: StudentRun, mode: FastMode) -> FrozenTeacher:
    """Create the teacher, try it on validation images, make it fast as asked, and say so."""
    kd, args = run.kd, run.args
    run.say(f"teacher '{kd.teacher}': loading {kd.checkpoint or 'its pretrained weights'}")
    teacher = create_teacher(kd, args.num_classes, run.normalisation, args.channels_last)
    teacher.to(run.device)
    for line in describe_teacher(kd, teacher, 2 if run.multi_label else args.num_classes):
        run.say(line)
    dataset = run.validation
    if dataset is None or _streamed(dataset) or kd.preflight_samples == 0:
        ask(teacher, torch.zeros(2, *run.input_size, device=run.device), _SIZE_OPTION, run.autocast)
        run.say(f"teacher '{kd.teacher}': accuracy not checked")
    else:
        chosen = spread_indices(len(dataset), kd.preflight_samples)[args.rank :: args.world_size]
        line = check_teacher(
            teacher,
            run.batches(Subset(dataset, chosen), batch_size=_BATCH),
            args.num_classes,
            size_option=_SIZE_OPTION,
            skip_option="--kd-preflight-samples 0, in YAML kd_preflight_samples: 0,",
            autocast=run.autocast,
            multi_label=run.multi_label,
        )
        run.say(line)
    if mode != "none":
        run.say(_speed_up(run, teacher, mode))
    return teacher


def _speed_up(run: StudentRun, teacher: FrozenTeacher, mode: FastMode) -> str:
    kd, dataset = run.kd, run.training
    if _streamed(dataset):
        raise LskdError(
            "--kd-teacher-fast measures its error on training images of its choice, and this data set can "
            "only be streamed; drop it, or give a folder of images or a tar file."
        )
    chosen = spread_indices(len(dataset), min(kd.preflight_samples, FAST_SAMPLES))
    return teacher.speed_up(
        (images for images, _ in run.batches(Subset(dataset, chosen), batch_size=_BATCH)),
        mode,
        kd.teacher_fast_bound,
        option=f"--kd-teacher-fast {mode}",
        autocast=run.autocast,
        compiled=kd.teacher_compile,
        batch_size=run.args.batch_size,
    )


def _streamed(dataset: Any) -> bool:
    return isinstance(getattr(dataset, "dataset", dataset), IterableDataset)


def create_teacher(
    config: KdConfig, num_classes: int, student_norm: Normalisation, channels_last: bool = False
) -> FrozenTeacher:
    """Create the teacher that `config` names, with its weights loaded, on the CPU.

    Args:
        student_norm: normalisation of the batches, as the loader really applies it, channel by channel.
        channels_last: whether the student uses that memory layout.

    Raises:
        LskdError: unknown model, weights that cannot be had or do not fit, another class or channel count.
    """
    check_model_name(config.teacher, "teacher")
    make = _pretrained if config.checkpoint is None else _from_checkpoint
    model, settings, source = make(config, num_classes, len(student_norm.mean))
    try:
        data_config = timm.data.resolve_data_config(settings, model=model)
    except (AssertionError, TypeError, ValueError):
        raise LskdError(
            f"args.yaml beside {config.checkpoint} names an image size, mean or std that timm cannot use; "
            "repair it or move the checkpoint elsewhere."
        ) from None
    return FrozenTeacher(
        model,
        Normalisation.of(data_config["mean"], data_config["std"], first_channels(model), source),
        student_norm,
        _image_size(config, model, settings, data_config["input_size"]),
        name=config.teacher,
        dtype=None if config.teacher_dtype is None else getattr(torch, config.teacher_dtype),
        channels_last=channels_last,
        smoothing=_smoothing(settings),
    )


def describe_teacher(kd: KdConfig, teacher: FrozenTeacher, num_classes: int) -> Iterator[str]:
    """Yield lines: how the teacher's input is made of the student's, a warning of too high a temperature."""
    line = f"teacher '{kd.teacher}': normalisation {teacher.own}, {teacher.own.source}; the student's is "
    line += f"{teacher.student}, converted" if teacher.converts else "the same"
    if teacher.image_size is not None:
        line += f"; images resized to {teacher.image_size[0]} x {teacher.image_size[1]} where they differ"
    yield line
    if teacher.smoothing is not None and kd.temperature > 1:
        alpha, convention = teacher.smoothing
        cold, hot = (target_mass(num_classes, alpha, t, convention) for t in (1.0, kd.temperature))
        yield (
            f"teacher '{kd.teacher}' was trained with smoothing {alpha:g}: what it gives its own class falls "
            f"from about {cold:.3f} to {hot:.3f} at --kd-temperature {kd.temperature:g}, which often harms; "
            "1 is the paper's"
        )


def _pretrained(config: KdConfig, num_classes: int, in_chans: int) -> tuple[nn.Module, dict[str, Any], str]:
    name = config.teacher
    known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    fix = "give your own with --kd-teacher-checkpoint FILE"
    if ":" not in name and (known is None or not known.has_weights):
        raise LskdError(f"timm has no pretrained weights for teacher '{name}'; {fix}.")
    if known is not None:
        _check_counts(name, known.num_classes, num_classes, known.input_size[0], in_chans, fix)
    model = create(
        name,
        "teacher",
        fix="give the weights with --kd-teacher-checkpoint FILE",
        pretrained=True,
        extra={**input_arguments(name, _sized(config, {})), **config.teacher_kwargs},
    )
    # num_classes was not passed: this head is the one that came with the weights.
    _check_counts(
        name, int(getattr(model, "num_classes", 0)), num_classes, first_channels(model), in_chans, fix
    )
    return model, {}, "of its pretrained weights"


def _check_counts(
    name: str, classes: int, wanted_classes: int, channels: int, wanted_channels: int, fix: str
) -> None:
    if classes != wanted_classes:
        raise LskdError(
            f"teacher '{name}' has {classes} classes in its pretrained weights, "
            f"the student {wanted_classes}; {fix}, trained on the student's classes."
        )
    if channels != wanted_channels:
        raise LskdError(
            f"teacher '{name}' takes {channels} input channels, the student {wanted_channels}; "
            f"{fix}, trained with --in-chans {wanted_channels}."
        )


def _from_checkpoint(
    config: KdConfig, num_classes: int, in_chans: int
) -> tuple[nn.Module, dict[str, Any], str]:
    checkpoint = str(config.checkpoint)
    settings = settings_beside(checkpoint, config.teacher)
    trained_channels = input_channels(settings)
    if settings and trained_channels != in_chans:
        raise LskdError(
            f"teacher checkpoint {checkpoint} takes {trained_channels} input channels, "
            f"the student {in_chans}; give a teacher that was trained with --in-chans {in_chans}."
        )
    run = _sized(config, {**settings, "in_chans": in_chans})
    model = create_for_run(config.teacher, "teacher", run, num_classes, config.teacher_kwargs)
    load_weights(model, f"teacher '{config.teacher}'", checkpoint)
    if settings:
        return model, settings, "of the run beside its checkpoint (args.yaml)"
    return model, {}, "timm's default for this model"


def _smoothing(settings: dict[str, Any]) -> tuple[float, Convention] | None:
    alpha = settings.get("smoothing")
    if settings.get("kd_teacher") or not isinstance(alpha, float) or not 0 < alpha < 1:
        return None
    return alpha, "paper" if settings.get("smoothing_convention") == "paper" else "uniform"


def _sized(config: KdConfig, settings: dict[str, Any]) -> dict[str, Any]:
    size = config.teacher_img_size
    return settings if size is None else {**settings, "img_size": size}


def _image_size(
    config: KdConfig, model: nn.Module, settings: dict[str, Any], trained_at: Sequence[int]
) -> tuple[int, int] | None:
    """Return the height and width to resize batches to; None: unknown, the teacher gets the student's."""
    if config.teacher_img_size is not None:
        return config.teacher_img_size, config.teacher_img_size
    pretrained_cfg = getattr(model, "pretrained_cfg", {})
    size: Sequence[int]
    if pretrained_cfg.get("fixed_input_size"):
        size = (
            getattr(getattr(model, "patch_embed", None), "img_size", None)
            or pretrained_cfg["input_size"][-2:]
        )
    elif config.checkpoint is None or "img_size" in settings or "input_size" in settings:
        # Both null in a run's args.yaml: it was trained at the model's default, which timm has resolved.
        size = trained_at[-2:]
    else:
        return None
    return int(size[0]), int(size[1])
