"""The distillation arguments, shared by the bundled trainer and the upstream script."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lskd import Convention, LskdError
from lskd.soft_labels.run import DEFAULT_TOP_K
from lskd.teachers.fast import FAST_BOUND, FAST_MODES, FastMode
from lskd.teachers.replay import MixingPolicy
from lskd.terms import Rest

DEFAULT_TEMPERATURE = 1.0
DEFAULT_PREFLIGHT_SAMPLES = 512
TEACHER_DTYPES = ("float32", "bfloat16")
# Their defaults say something too, so only typing them tells that a teacher is meant.
ABOUT_A_TEACHER = ("kd_temperature", "kd_preflight_samples", "kd_teacher_fast_bound")

# What a distilling run cannot be combined with: (attribute, value when off, what to say).
_CONFLICTS: tuple[tuple[str, Any, str], ...] = (
    ("kd_model_name", None, "--kd-model-name is timm's own distillation; give either it or --kd-teacher"),
    ("kd_distill_type", "logit", "--kd-distill-type is timm's own; --kd-teacher distils logits, drop it"),
    (
        "distill_loss_weight",
        None,
        "--distill-loss-weight is timm's own; with --kd-teacher use --kd-hard-weight",
    ),
    ("task_loss_weight", None, "--task-loss-weight is timm's own; with --kd-teacher use --kd-hard-weight"),
    ("bce_loss", False, "--bce-loss has no meaning with --kd-teacher; drop it"),
    ("jsd_loss", False, "--jsd-loss has no meaning with --kd-teacher; drop it"),
    ("naflex_loader", False, "--naflex-loader gives patches, the teacher wants images; drop it"),
    ("multi_label", False, "--multi-label has no meaning with --kd-teacher; drop it"),
)


class KeyValues(argparse.Action):
    """Collect `key=value` words into a dict of plain numbers, booleans and strings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the dict on the namespace."""
        from timm.utils import ParseKwargs

        words = [values] if isinstance(values, str) else list(values or ())
        for word in words:
            if "=" not in word:
                parser.error(f"argument {option_string}: expected key=value, got '{word}'")
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, words, option_string)


DEFAULT_SEED = 42


OnError = Literal["stop", "continue"]


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


@dataclass(frozen=True)
class KdConfig:
    """What a distilling run does; every value checked.

    `alpha` smooths the hard term's labels under `convention`; `hard_weight` is the paper's lambda.
    """

    teacher: str
    checkpoint: str | None = None
    temperature: float = DEFAULT_TEMPERATURE
    temperature_squared: bool = False
    hard_weight: float = 0.0
    alpha: float = 0.0
    convention: Convention = "uniform"
    teacher_dtype: str | None = None
    teacher_img_size: int | None = None
    teacher_kwargs: Mapping[str, Any] = field(default_factory=dict)
    preflight_samples: int = DEFAULT_PREFLIGHT_SAMPLES
    teacher_fast: FastMode = "none"
    teacher_fast_bound: float = FAST_BOUND
    teacher_compile: bool = False
    soft_labels: SoftLabelsConfig | None = None

    def loss_arguments(self) -> dict[str, Any]:
        """Return what the task's loss is made with."""
        names = ("temperature", "temperature_squared", "hard_weight", "alpha", "convention")
        return {name: getattr(self, name) for name in names}


def add_kd_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the distillation group to `parser`; `--kd-temperature` is left alone where it exists already."""
    group = parser.add_argument_group("Label smoothing and distillation (lskd)")
    group.add_argument(
        "--smoothing-convention",
        choices=get_args(Convention),
        default="uniform",
        help="what --smoothing A means: 'uniform' (timm) gives A/K to every class, "
        "'paper' A/(K-1) to every class but the label's (default: uniform)",
    )
    group.add_argument("--kd-teacher", metavar="MODEL", default=None, help="distil from this timm model")
    group.add_argument(
        "--kd-teacher-checkpoint",
        metavar="FILE",
        default=None,
        help="the teacher's weights (timm checkpoint, state dict or safetensors); "
        "without it timm's pretrained weights of that model",
    )
    if "--kd-temperature" not in parser._option_string_actions:
        group.add_argument(
            "--kd-temperature",
            type=float,
            default=DEFAULT_TEMPERATURE,
            metavar="T",
            help="divides both logits before the softmax (default: 1.0)",
        )
    group.add_argument(
        "--kd-temperature-squared",
        action="store_true",
        default=False,
        help="multiply the soft term by T^2, as Hinton et al. do",
    )
    group.add_argument(
        "--kd-hard-weight",
        type=float,
        default=0.0,
        metavar="L",
        help="lambda: weight L of the hard labels' loss, 1-L of the teacher's (default: 0, soft labels only)",
    )
    group.add_argument(
        "--kd-teacher-dtype",
        choices=TEACHER_DTYPES,
        default=None,
        help="precision of the teacher's weights and forward pass "
        "(default: float32 weights, and under --amp the same mixed precision as the student)",
    )
    group.add_argument(
        "--kd-teacher-img-size",
        type=int,
        default=None,
        metavar="N",
        help="resize the student's batch to N x N for the teacher (default: the size that the run beside its "
        "checkpoint, its pretrained weights or its fixed input size name; the student's where none does)",
    )
    group.add_argument(
        "--kd-teacher-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="more arguments for the teacher's create_model, such as img_size=32",
    )
    group.add_argument(
        "--kd-preflight-samples",
        type=int,
        default=DEFAULT_PREFLIGHT_SAMPLES,
        metavar="N",
        help="validation images on which the teacher must beat chance before training starts "
        "(default: 512, 0: no check)",
    )
    group.add_argument(
        "--kd-teacher-fast",
        choices=FAST_MODES,
        default="none",
        help="a faster teacher: batch norm folded, channels-last, and in this precision; auto: the fastest "
        "within the bound, as timed before training (default: none, the exact teacher); with a store "
        "a run takes what is stored in its form or a closer one",
    )
    group.add_argument(
        "--kd-teacher-fast-bound",
        type=float,
        default=FAST_BOUND,
        metavar="NATS",
        help="refuse a fast teacher whose mean KL(exact || fast) on training images is above this "
        f"(default: {FAST_BOUND:g})",
    )
    group.add_argument(
        "--kd-teacher-compile",
        action="store_true",
        default=False,
        help="compile the fast teacher too; takes about a minute, on the CPU with a C++ compiler",
    )
    add_soft_label_arguments(parser)


def given_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str], config: Mapping[str, Any], names: Sequence[str]
) -> set[str]:
    """Tell which of the destinations `names` the user set, in `argv` or in the YAML `config`."""
    unset = object()
    # argparse fills a default in only where the namespace has no such attribute yet.
    probe = argparse.Namespace(**dict.fromkeys(names, unset))
    parser.parse_known_args(list(argv), namespace=probe)
    return {name for name in names if getattr(probe, name) is not unset or config.get(name) is not None}


def apply_kd_defaults(args: argparse.Namespace, given: set[str]) -> None:
    """With a teacher: temperature 1 and no smoothing, unless the user asked for something else."""
    if args.kd_teacher is None:
        return
    if "kd_temperature" not in given:
        args.kd_temperature = DEFAULT_TEMPERATURE
    if "smoothing" not in given:
        args.smoothing = 0.0
    apply_soft_label_defaults(args)


def require_teacher(args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse flags that are about a teacher and were typed without one; a file of another run may name them.

    Raises:
        LskdError: naming the flag.
    """
    if args.kd_teacher is None and getattr(args, "kd_model_name", None) is None:
        for name in ABOUT_A_TEACHER:
            if name in typed:
                raise LskdError(f"{_flag(name)} needs --kd-teacher MODEL; add it.")


def check_smoothing(args: argparse.Namespace) -> None:
    """Refuse a smoothing outside [0, 1)."""
    if not (isinstance(args.smoothing, int | float) and 0.0 <= args.smoothing < 1.0):
        raise LskdError(f"--smoothing must lie in [0, 1), got {args.smoothing}; 0.1 is the usual value.")


def kd_config(args: argparse.Namespace) -> KdConfig | None:
    """Check the distillation arguments; None when the run does not distil.

    Raises:
        LskdError: a value out of range, or two options that exclude each other.
    """
    check_smoothing(args)
    soft_labels = soft_labels_config(args)
    if args.kd_teacher is None:
        for name in ("kd_teacher_checkpoint", "kd_teacher_dtype", "kd_teacher_img_size"):
            if getattr(args, name) is not None:
                raise LskdError(f"{_flag(name)} needs --kd-teacher MODEL; add it.")
        if args.kd_teacher_fast != "none" or args.kd_teacher_compile:
            raise LskdError("--kd-teacher-fast and --kd-teacher-compile need --kd-teacher MODEL; add it.")
        if args.kd_hard_weight != 0.0 or args.kd_temperature_squared or args.kd_teacher_kwargs:
            raise LskdError(
                "--kd-hard-weight, --kd-temperature-squared and --kd-teacher-kwargs need --kd-teacher MODEL."
            )
        return None
    for name, off, message in _CONFLICTS:
        if getattr(args, name, off) not in (off, None):
            raise LskdError(message + ".")
    if not (math.isfinite(args.kd_temperature) and args.kd_temperature > 0):
        raise LskdError(
            f"--kd-temperature must be greater than 0, got {args.kd_temperature}; 1 is the paper's value."
        )
    if not 0.0 <= args.kd_hard_weight <= 1.0:
        raise LskdError(
            f"--kd-hard-weight must lie in [0, 1], got {args.kd_hard_weight}; "
            "it is the hard labels' share of the loss."
        )
    if args.kd_teacher_img_size is not None and args.kd_teacher_img_size < 1:
        raise LskdError(f"--kd-teacher-img-size must be at least 1, got {args.kd_teacher_img_size}.")
    if args.kd_preflight_samples < 0:
        raise LskdError(
            f"--kd-preflight-samples must be 0 (no check) or more, got {args.kd_preflight_samples}."
        )
    _check_fast(args)
    return KdConfig(
        teacher=args.kd_teacher,
        checkpoint=args.kd_teacher_checkpoint,
        temperature=float(args.kd_temperature),
        temperature_squared=bool(args.kd_temperature_squared),
        hard_weight=float(args.kd_hard_weight),
        alpha=float(args.smoothing),
        convention=args.smoothing_convention,
        teacher_dtype=args.kd_teacher_dtype,
        teacher_img_size=args.kd_teacher_img_size,
        teacher_kwargs=dict(args.kd_teacher_kwargs or {}),
        preflight_samples=args.kd_preflight_samples,
        teacher_fast=args.kd_teacher_fast,
        teacher_fast_bound=float(args.kd_teacher_fast_bound),
        teacher_compile=bool(args.kd_teacher_compile),
        soft_labels=soft_labels,
    )


def _check_fast(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.kd_teacher_fast_bound) and args.kd_teacher_fast_bound > 0):
        raise LskdError(
            f"--kd-teacher-fast-bound must be greater than 0, got {args.kd_teacher_fast_bound}; "
            f"it is a KL divergence in nats, {FAST_BOUND:g} by default."
        )
    if args.kd_teacher_fast == "none":
        if args.kd_teacher_compile:
            raise LskdError("--kd-teacher-compile compiles a fast teacher; add --kd-teacher-fast float32.")
        return
    if args.kd_teacher_dtype is not None:
        raise LskdError("--kd-teacher-fast has its own precision; drop --kd-teacher-dtype.")
    if args.kd_preflight_samples == 0:
        raise LskdError(
            "--kd-teacher-fast measures its error on at most --kd-preflight-samples training images; "
            "give more than 0."
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
