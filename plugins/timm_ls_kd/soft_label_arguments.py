"""The arguments of stored soft labels, and what cannot be stored because it cannot be repeated."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lskd import LskdError
from lskd.soft_labels.run import DEFAULT_TOP_K
from lskd.teachers.replay import MixingPolicy
from lskd.terms import Rest

DEFAULT_SEED = 42
OnError = Literal["stop", "continue"]

# What cannot be made again from a sample's seed: (attribute, values when off, what to say).
_NOT_REPLAYED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("aug_splits", (0,), "--aug-splits makes several images of one"),
    ("aug_repeats", (0,), "--aug-repeats gives an image several times in an epoch"),
    ("resplit", (False,), "--resplit erases by place in the batch"),
    ("cutmix_minmax", (None,), "--cutmix-minmax draws other boxes"),
    ("mixup_mode", ("batch", "elem"), "--mixup-mode {value} mixes the images of a batch with one another"),
    ("use_multi_epochs_loader", (False,), "--use-multi-epochs-loader loads across the ends of epochs"),
    ("epoch_repeats", (0, 0.0), "--epoch-repeats is for data that is streamed"),
    ("train_img_sizes", (None,), "--train-img-sizes changes the image size from batch to batch"),
    ("train_batches_per_epoch", (None,), "--train-batches-per-epoch leaves images out"),
    ("train_steps_per_epoch", (None,), "--train-steps-per-epoch leaves images out"),
    ("model_dtype", (None,), "--model-dtype rounds the images; use --amp"),
)


@dataclass(frozen=True)
class SoftLabelsConfig:
    """What a run does with stored soft labels.

    Attributes:
        path: the folder.
        top_k: classes kept of each image; 0: all; None: as stored, 10 where nothing is stored yet.
        values: how they are stored; None: as stored, else float32 for all classes and float16 otherwise.
        seed: base seed of the augmentation.
        verify: how many stored images the teacher is asked about again.
        on_error: what to do when the disk fails during training.
        rest: what becomes of the classes that are not stored.
        mixing: mixup and CutMix.
        mixing_off_epoch: first epoch without mixing, 0: none.
    """

    path: Path
    top_k: int | None = None
    values: str | None = None
    seed: int = DEFAULT_SEED
    verify: int = 0
    on_error: OnError = "stop"
    rest: Rest = "spread"
    mixing: MixingPolicy = field(default_factory=MixingPolicy)
    mixing_off_epoch: int = 0


def add_soft_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of stored soft labels to `parser`."""
    group = parser.add_argument_group("Stored soft labels (lskd)")
    group.add_argument(
        "--kd-soft-labels",
        metavar="DIR",
        default=None,
        help="store what the teacher says in DIR, and read what is stored there instead of asking it again; "
        "augmentation and mixing then follow from --kd-soft-labels-seed",
    )
    group.add_argument(
        "--kd-soft-labels-top-k",
        type=int,
        default=None,
        metavar="K",
        help=f"classes kept of each image, 0: all (default: as stored, {DEFAULT_TOP_K} in a new store)",
    )
    group.add_argument(
        "--kd-soft-labels-values",
        choices=("float16", "float32"),
        default=None,
        help="how they are stored (default: as stored; in a new store float16, for all classes float32)",
    )
    group.add_argument(
        "--kd-soft-labels-seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="N",
        help="seed of the augmentation that the students share; --seed is each student's own (default: 42)",
    )
    group.add_argument(
        "--kd-soft-labels-verify",
        type=int,
        default=0,
        metavar="N",
        help="ask the teacher again about N stored images and stop where it says something else (default: 0)",
    )
    group.add_argument(
        "--kd-soft-labels-on-error",
        choices=get_args(OnError),
        default="stop",
        help="when the disk fails in training: stop, or continue with the teacher and store nothing "
        "(default: stop)",
    )
    group.add_argument(
        "--kd-rest",
        choices=get_args(Rest),
        default="spread",
        help="what becomes of the probability of classes that are not stored: spread evenly over them, or "
        "renormalise the stored ones (default: spread)",
    )


def apply_soft_label_defaults(args: argparse.Namespace) -> None:
    """Normalise and erase in the transform: on the device erasing draws from what no seed gives back."""
    if args.kd_soft_labels is not None and args.reprob > 0 and not args.no_aug:
        args.no_prefetcher = True


def soft_labels_config(args: argparse.Namespace) -> SoftLabelsConfig | None:
    """Check the arguments of stored soft labels; None when nothing is stored.

    Raises:
        LskdError: a value out of range, or augmentation that no seed gives back.
    """
    if args.kd_soft_labels is None:
        defaults = {"top_k": None, "values": None, "seed": DEFAULT_SEED, "verify": 0, "on_error": "stop"}
        for name, default in defaults.items():
            if getattr(args, f"kd_soft_labels_{name}") != default:
                raise LskdError(
                    f"--kd-soft-labels-{name.replace('_', '-')} needs --kd-soft-labels DIR; add it."
                )
        if args.kd_rest != "spread":
            raise LskdError("--kd-rest needs --kd-soft-labels DIR; add it.")
        return None
    if args.kd_teacher is None:
        raise LskdError("--kd-soft-labels needs --kd-teacher MODEL, which says whose they are; add it.")
    for name, off, text in _NOT_REPLAYED:
        value = getattr(args, name, off[0])
        if value not in off:
            raise LskdError(
                f"{text.format(value=value)}, which --kd-soft-labels cannot repeat; drop one of them."
            )
    for name in ("top_k", "seed", "verify"):
        value = getattr(args, f"kd_soft_labels_{name}")
        if value is not None and value < 0:
            raise LskdError(f"--kd-soft-labels-{name.replace('_', '-')} must not be negative, got {value}.")
    return SoftLabelsConfig(
        path=Path(args.kd_soft_labels),
        top_k=args.kd_soft_labels_top_k,
        values=args.kd_soft_labels_values,
        seed=args.kd_soft_labels_seed,
        verify=args.kd_soft_labels_verify,
        on_error=args.kd_soft_labels_on_error,
        rest=args.kd_rest,
        mixing=MixingPolicy(args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob),
        mixing_off_epoch=args.mixup_off_epoch,
    )
