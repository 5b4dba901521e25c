"""A run's images: how they become a model's input, and the loaders of its splits."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_dataset, resolve_data_config
from torch import nn

from lskd import LskdError
from lskd.errors import one_line
from timm_ls_kd.data import Loader, create_loader, guard
from timm_ls_kd.models import first_channels
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.replay import replayed_parts
from timm_ls_kd.soft_label_arguments import SoftLabelsConfig


@dataclass(frozen=True)
class DataConfig:
    """How images become a model's input."""

    input_size: tuple[int, int, int]
    normalisation: Normalisation
    interpolation: str
    crop_pct: float
    crop_mode: str


def input_channels(settings: Mapping[str, Any]) -> int:
    """Return the input channels that a run's arguments ask for."""
    if settings.get("in_chans"):
        return int(settings["in_chans"])
    return int((settings.get("input_size") or (3,))[0])


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


def eval_loader(
    dataset: Any, data: DataConfig, args: Namespace, device: torch.device, rank: int = 0, world_size: int = 1
) -> Loader:
    """Load a split in its order through the validation transform."""
    return create_loader(
        dataset,
        input_size=data.input_size,
        batch_size=getattr(args, "validation_batch_size", None) or args.batch_size,
        normalisation=data.normalisation,
        device=device,
        transform={
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "crop_mode": data.crop_mode,
        },
        rank=rank,
        world_size=world_size,
        workers=args.workers,
        pin_memory=args.pin_mem,
        prefetch=not args.no_prefetcher,
    )


def train_loader(
    dataset: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    smoothing: float,
    replay: SoftLabelsConfig | None = None,
) -> Loader:
    """Load the training split through timm's augmentation; mixup's labels are smoothed timm's way."""
    mixing = None
    if args.mixup > 0 or args.cutmix > 0:
        mixing = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "prob": args.mixup_prob,
            "switch_prob": args.mixup_switch_prob,
            "mode": args.mixup_mode,
            "label_smoothing": smoothing,
            "num_classes": args.num_classes,
        }
    interpolation = data.interpolation if args.no_aug else (args.train_interpolation or data.interpolation)
    loader = create_loader(
        dataset,
        input_size=data.input_size,
        batch_size=args.batch_size,
        normalisation=data.normalisation,
        device=device,
        transform={
            "no_aug": args.no_aug,
            "train_crop_mode": args.train_crop_mode,
            "scale": args.scale,
            "ratio": args.ratio,
            "hflip": args.hflip,
            "vflip": args.vflip,
            "color_jitter": args.color_jitter,
            "auto_augment": args.aa,
            "interpolation": interpolation,
        },
        training=True,
        seed=args.seed,
        rank=args.rank,
        world_size=args.world_size,
        workers=args.workers,
        pin_memory=args.pin_mem,
        prefetch=not args.no_prefetcher,
        mixing=mixing,
        mixing_off_epoch=args.mixup_off_epoch,
        erasing={
            "re_prob": 0.0 if args.no_aug else args.reprob,
            "re_mode": args.remode,
            "re_count": args.recount,
        },
        parts=None if replay is None else replayed_parts(dataset, replay, not args.no_prefetcher),
    )
    if len(loader) == 0:
        raise LskdError(
            f"{loader.samples} training images do not fill one batch of {args.batch_size} "
            f"in each of {args.world_size} process(es); lower --batch-size."
        )
    return loader
