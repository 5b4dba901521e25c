"""The distillation arguments, shared by the bundled trainer and the upstream script."""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_args

from lskd import Convention, LskdError
from lskd.soft_labels.format import ValueDtype
from lskd.soft_labels.settings import DEFAULT_SEED, DEFAULT_TOP_K, LARGEST_SEED, OnError, StoreSettings
from lskd.teachers.fast import FAST_BOUND, FAST_MODES, FastMode
from lskd.teachers.replay import MixingPolicy
from lskd.terms import Rest
from timm_ls_kd.run_settings import UPSTREAM_ONLY

DEFAULT_TEMPERATURE = 1.0
DEFAULT_PREFLIGHT_SAMPLES = 512
_LARGEST = 2**31 - 1  # of whole numbers but seeds: some become sizes of tensors
# Their defaults say something too, so only typing them tells that a teacher is meant.
ABOUT_A_TEACHER = ("kd_temperature", "kd_preflight_samples", "kd_teacher_fast_bound")
# timm's own distillation: what to say after a flag of it where --kd-teacher is given.
_LOGITS = "is timm's own; --kd-teacher distils logits, drop it"
_WEIGHT = "is timm's own; with --kd-teacher use --kd-hard-weight"
ABOUT_TIMMS_TEACHER = {
    "kd_distill_type": _LOGITS,
    "kd_loss_type": "is timm's own; --kd-teacher distils by the KL divergence, drop it",
    "kd_token_distill_type": _LOGITS,
    "kd_student_feature_dim": _LOGITS,
    "kd_teacher_feature_dim": _LOGITS,
    "distill_loss_weight": _WEIGHT,
    "task_loss_weight": _WEIGHT,
}
_OTHER_LOSS = (
    "changes the loss of the hard labels, which with --kd-teacher is the (smoothed) cross-entropy; drop it"
)
# What a distilling run cannot be combined with: (attribute, value when off, what to say after its flag).
_CONFLICTS: tuple[tuple[str, Any, str], ...] = (
    ("kd_model_name", None, "is timm's own distillation; give either it or --kd-teacher"),
    *((name, UPSTREAM_ONLY[name], message) for name, message in ABOUT_TIMMS_TEACHER.items()),
    ("bce_loss", False, _OTHER_LOSS),
    ("jsd_loss", False, _OTHER_LOSS),
    ("loss_pos_weight", None, _OTHER_LOSS),
    ("loss_class_weight", None, _OTHER_LOSS),
    ("class_stats", None, _OTHER_LOSS),
    ("naflex_loader", False, "gives patches, the teacher wants images; drop it"),
)
# What cannot be made again from a sample's seed: (attribute, values when off, what to say after its flag).
_NOT_REPLAYED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("aug_splits", (0,), "makes several images of one"),
    ("aug_repeats", (0,), "gives an image several times in an epoch"),
    ("resplit", (False,), "erases by place in the batch"),
    ("cutmix_minmax", (None,), "draws other boxes"),
    ("mixup_mode", ("batch", "elem"), "{value} mixes the images of a batch with one another"),
    ("use_multi_epochs_loader", (False,), "loads across the ends of epochs"),
    ("epoch_repeats", (0, 0.0), "is for data that is streamed"),
    ("train_img_sizes", (None,), "changes the image size from batch to batch"),
    ("train_batches_per_epoch", (None,), "leaves images out"),
    ("train_steps_per_epoch", (None,), "leaves images out"),
    ("model_dtype", (None,), "rounds the images; use --amp"),
)


@dataclass(frozen=True)
class SoftLabelsConfig(StoreSettings):
    """What a run does with stored soft labels: the flags of these names, whose help says what they mean.

    Attributes:
        mixing: mixup and CutMix.
        mixing_off_epoch: first epoch without mixing, 0: none.
    """

    shard: str = ""
    together: int = 1
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


class KeyValues(argparse.Action):
    """Collect `key=value` arguments into a dict of plain numbers, booleans and strings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the dict on the namespace."""
        from timm.utils import ParseKwargs

        given = [values] if isinstance(values, str) else list(values or ())
        for text in given:
            if "=" not in text:
                parser.error(f"argument {option_string}: expected key=value, got '{text}'")
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, given, option_string)


def number(
    kind: type[int] | type[float],
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    hint: str = "",
    largest: int = _LARGEST,
) -> Callable[[str], Any]:
    """Return an argparse type: a finite number of a kind, from `low` to `high` and greater than `above`.

    A whole one is `largest` at most.
    """
    wanted = "be a whole number" if kind is int else "be a number"
    within = f"lie in [{low:g}, {high:g}]" if math.isfinite(high) else f"be at least {low:g}"
    if low == 0 and not math.isfinite(high):
        within = "not be negative"
    if math.isfinite(above):
        within = f"be greater than {above:g}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must {wanted}, got {text!r}") from None
        if kind is int and value > largest:
            raise argparse.ArgumentTypeError(f"must be at most {largest}, got {text}{hint}")
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}{hint}")
        if not (low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"must {within}, got {text}{hint}")
        return value

    return read


def parser_error(message: str, command: str) -> LskdError:
    """Return argparse's error as one clear line."""
    found = re.match(r"argument (?:-\w+/)?(--[\w-]+)[^:]*: (must .*)", message)
    return LskdError(f"{found[1]} {found[2]}." if found else f"{message.rstrip('.')}; see {command} --help.")


class Flag(NamedTuple):
    """An argument of a command line.

    Attributes:
        flags: its names, the first one counts.
        default: False: it takes no value.
        options: for argparse.
        help: says what it does; a default that it does not name is added.
    """

    flags: str
    default: Any
    options: Mapping[str, Any]
    help: str


WHOLE, REAL = number(int), number(float)
COUNT: dict[str, Any] = {"type": number(int, low=1), "metavar": "N"}
NUMBER: dict[str, Any] = {"type": number(int, low=0), "metavar": "N"}
KEY_VALUES: dict[str, Any] = {"nargs": "*", "action": KeyValues, "metavar": "KEY=VALUE"}
FILE, DIR = {"metavar": "FILE"}, {"metavar": "DIR"}


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add a group of arguments to `parser`; one that it has already is left alone."""
    group = parser.add_argument_group(title)
    for names, default, options, text in flags:
        if names.split()[0] in parser._option_string_actions:
            continue
        valueless: dict[str, Any] = {"action": "store_true"} if default is False else {}
        shown = "" if default in (None, "", False, {}) or "default" in text else f" (default: {default})"
        group.add_argument(*names.split(), default=default, help=text + shown, **valueless, **options)


_TEACHER = (
    Flag(
        "--smoothing-convention",
        "uniform",
        {"choices": get_args(Convention)},
        "what --smoothing A means: 'uniform' (timm) gives A/K to every class, "
        "'paper' A/(K-1) to every class but the label's (default: uniform)",
    ),
    Flag("--kd-teacher", None, {"metavar": "MODEL"}, "distil from this timm model"),
    Flag(
        "--kd-teacher-checkpoint",
        None,
        FILE,
        "the teacher's weights (timm checkpoint, state dict or safetensors); "
        "without it timm's pretrained weights of that model",
    ),
    Flag(
        "--kd-temperature",
        DEFAULT_TEMPERATURE,
        {"type": REAL, "metavar": "T"},
        "divides both logits before the softmax (default: 1.0)",
    ),
    Flag("--kd-temperature-squared", False, {}, "multiply the soft term by T^2, as Hinton et al. do"),
    Flag(
        "--kd-hard-weight",
        0.0,
        {"type": number(float, 0, 1, hint="; it is the hard labels' share of the loss"), "metavar": "L"},
        "lambda: weight L of the hard labels' loss, 1-L of the teacher's (default: 0, soft labels only)",
    ),
    Flag(
        "--kd-teacher-dtype",
        None,
        {"choices": ("float32", "bfloat16")},
        "precision of the teacher's weights and forward pass "
        "(default: float32 weights, and under --amp the same mixed precision as the student)",
    ),
    Flag(
        "--kd-teacher-img-size",
        None,
        COUNT,
        "resize the student's batch to N x N for the teacher (default: the size that the run beside its "
        "checkpoint, its pretrained weights or its fixed input size name; the student's where none does)",
    ),
    Flag(
        "--kd-teacher-kwargs",
        {},
        KEY_VALUES,
        "more arguments for the teacher's create_model, such as img_size=32",
    ),
    Flag(
        "--kd-preflight-samples",
        DEFAULT_PREFLIGHT_SAMPLES,
        {"type": number(int, low=0, hint="; 0 is no check"), "metavar": "N"},
        "validation images on which the teacher must beat chance before training starts "
        "(default: 512, 0: no check)",
    ),
    Flag(
        "--kd-teacher-fast",
        "none",
        {"choices": FAST_MODES},
        "a faster teacher: batch norm folded, channels-last, and in this precision; auto: the fastest "
        "within the bound, as timed before training (default: none, the exact teacher); with a store "
        "a run takes what is stored in its form or a closer one",
    ),
    Flag(
        "--kd-teacher-fast-bound",
        FAST_BOUND,
        {"type": number(float, above=0, hint="; it is a KL divergence in nats"), "metavar": "NATS"},
        "refuse a fast teacher whose mean KL(exact || fast) on training images is above this "
        f"(default: {FAST_BOUND:g})",
    ),
    Flag(
        "--kd-teacher-compile",
        False,
        {},
        "compile the fast teacher too; takes about a minute, on the CPU with a C++ compiler",
    ),
)
_STORE = (
    Flag(
        "--kd-soft-labels",
        None,
        DIR,
        "store what the teacher says in DIR, and read what is stored there instead of asking it again (or "
        "at a URL, e.g. s3://BUCKET/DIR, if fsspec knows it); augmentation and mixing then follow from "
        "--kd-soft-labels-seed",
    ),
    Flag(
        "--kd-soft-labels-top-k",
        None,
        {**NUMBER, "metavar": "K"},
        f"classes kept of each image, 0: all (default: as stored, {DEFAULT_TOP_K} in a new store)",
    ),
    Flag(
        "--kd-soft-labels-sampled",
        None,
        COUNT,
        "keep N classes of each image that are drawn, so that their weights are the teacher's probabilities "
        "in expectation; at temperature 1, and instead of the largest K (default: as stored)",
    ),
    Flag(
        "--kd-soft-labels-views",
        0,
        {**NUMBER, "metavar": "M"},
        "store M views of each image, that any number of epochs read in turn: the teacher is asked M times, "
        "and not in every epoch (default: 0, every epoch has its own)",
    ),
    Flag(
        "--kd-soft-labels-values",
        None,
        {"choices": get_args(ValueDtype)},
        "how they are stored; packed: ids in as few bits as they need and log-probabilities in 8 "
        "(default: as stored; in a new store float16, for all classes float32)",
    ),
    Flag(
        "--kd-soft-labels-shard",
        "",
        {"metavar": "I/N"},
        "timm soft-labels: write the I-th of N shards, which as many jobs write at once; "
        "`lskd soft-labels merge DIR` then makes the store of them",
    ),
    Flag(
        "--kd-soft-labels-cache",
        None,
        DIR,
        "where --kd-soft-labels URL is copied to, once (default: in the user's cache folder)",
    ),
    Flag(
        "--kd-soft-labels-seed",
        DEFAULT_SEED,
        {**NUMBER, "type": number(int, low=0, largest=LARGEST_SEED)},
        "seed of the augmentation that the students share; --seed is each student's own (default: 42)",
    ),
    Flag(
        "--kd-soft-labels-verify",
        0,
        NUMBER,
        "ask the teacher again about N stored images and stop where it says something else (default: 0)",
    ),
    Flag(
        "--kd-soft-labels-together",
        1,
        {**COUNT, "metavar": "V"},
        "show V views of an image, those of V epochs, one after another, made of one decoding; all must be "
        "stored (default: 1, the order of training without a store)",
    ),
    Flag(
        "--kd-soft-labels-on-error",
        "stop",
        {"choices": get_args(OnError)},
        "when the disk fails in training: stop, or continue with the teacher and store nothing "
        "(default: stop)",
    ),
    Flag(
        "--kd-rest",
        "spread",
        {"choices": get_args(Rest)},
        "what becomes of the probability of classes that are not stored: spread evenly over them, lump "
        "them into one class of teacher and student, renormalise the stored ones, or restrict the student "
        "to these too (default: spread)",
    ),
)


def add_kd_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of distillation to `parser`; `--kd-temperature` may be there already."""
    add_flags(parser, "Label smoothing and distillation (lskd)", _TEACHER)
    add_flags(parser, "Stored soft labels (lskd)", _STORE)


def given_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Return the destinations of `names` that a command line sets, with their values."""
    unset = object()
    # argparse fills a default in only where the namespace has no such attribute yet.
    probe = argparse.Namespace(**dict.fromkeys(names, unset))
    parser.parse_known_args(list(argv), namespace=probe)
    return {name: value for name in names if (value := getattr(probe, name)) is not unset}


def apply_kd_defaults(args: argparse.Namespace, given: Iterable[str]) -> None:
    """With a teacher: temperature 1 and no smoothing, unless the user asked for something else."""
    if args.kd_teacher is None:
        return
    if "kd_temperature" not in given:
        args.kd_temperature = DEFAULT_TEMPERATURE
    if "smoothing" not in given:
        args.smoothing = 0.0
    if args.kd_soft_labels is not None and args.reprob > 0 and not args.no_aug:
        # Normalise and erase in the transform: on the device erasing draws from what no seed gives back.
        args.no_prefetcher = True


def require_teacher(args: argparse.Namespace, typed: Iterable[str]) -> None:
    """Refuse flags that are about a teacher and were typed without one; a file of another run may name them.

    Raises:
        LskdError: naming the flag.
    """
    if args.kd_teacher is None and getattr(args, "kd_model_name", None) is None:
        for name in ABOUT_A_TEACHER:
            if name in typed:
                raise LskdError(f"{_flag(name)} needs --kd-teacher MODEL; add it.")
        for name in ABOUT_TIMMS_TEACHER:
            if name in typed:
                raise LskdError(f"{_flag(name)} needs a teacher, timm's own --kd-model-name MODEL; add it.")


def kd_config(args: argparse.Namespace) -> KdConfig | None:
    """Check the distillation arguments together; None when the run does not distil.

    Raises:
        LskdError: a value that only the run's other arguments put out of range, or options that exclude
            each other.
    """
    if not (isinstance(args.smoothing, int | float) and 0.0 <= args.smoothing < 1.0):
        raise LskdError(f"--smoothing must lie in [0, 1), got {args.smoothing}; 0.1 is the usual value.")
    soft_labels = soft_labels_config(args)
    if args.kd_teacher is None:
        _refuse_alone(args, _TEACHER[2:], "--kd-teacher MODEL", but=ABOUT_A_TEACHER)
        return None
    for name, off, message in _CONFLICTS:
        if getattr(args, name, off) not in (off, None):
            raise LskdError(f"{_flag(name)} {message}.")
    several = multi_label(args)
    usual = "bce" if several else "ce"
    if (getattr(args, "loss", None) or usual) != usual:
        raise LskdError(f"--loss {args.loss} {_OTHER_LOSS}.")
    if several and (soft_labels is not None or args.kd_teacher_fast != "none"):
        raise LskdError(
            "--task multilabel distils the exact teacher's sigmoids, of which nothing is stored; "
            "drop --kd-soft-labels and --kd-teacher-fast."
        )
    if not (math.isfinite(args.kd_temperature) and args.kd_temperature > 0):
        raise LskdError(
            f"--kd-temperature must be greater than 0, got {args.kd_temperature}; 1 is the paper's value."
        )
    if args.kd_teacher_fast == "none":
        if args.kd_teacher_compile:
            raise LskdError("--kd-teacher-compile compiles a fast teacher; add --kd-teacher-fast float32.")
    elif args.kd_teacher_dtype is not None:
        raise LskdError("--kd-teacher-fast has its own precision; drop --kd-teacher-dtype.")
    elif args.kd_preflight_samples == 0:
        raise LskdError(
            "--kd-teacher-fast measures its error on at most --kd-preflight-samples training images; "
            "give more than 0."
        )
    other = ("teacher", "checkpoint", "alpha", "convention", "soft_labels")
    named = [each.name for each in fields(KdConfig) if each.name not in other]
    return KdConfig(
        args.kd_teacher,
        args.kd_teacher_checkpoint,
        alpha=float(args.smoothing),
        convention=args.smoothing_convention,
        soft_labels=soft_labels,
        **{name: getattr(args, f"kd_{name}") for name in named},
    )


def scheduled_epochs(args: argparse.Namespace) -> int:
    """Return how many epochs the schedule of a run lasts, as far as its arguments tell."""
    prefix = args.warmup_epochs if args.warmup_prefix else 0
    return int(args.epochs + args.cooldown_epochs + prefix)


def multi_label(args: argparse.Namespace) -> bool:
    """Return whether a run of timm's own script has classes that do not exclude one another."""
    return getattr(args, "task", None) == "multilabel"


def soft_labels_config(args: argparse.Namespace) -> SoftLabelsConfig | None:
    """Check the arguments of stored soft labels; None when nothing is stored.

    Raises:
        LskdError: without a teacher, or with augmentation that no seed gives back.
    """
    if args.kd_soft_labels is None:
        _refuse_alone(args, _STORE[1:], "--kd-soft-labels DIR")
        return None
    if args.kd_teacher is None:
        raise LskdError("--kd-soft-labels needs --kd-teacher MODEL, which says whose they are; add it.")
    for name, off, text in _NOT_REPLAYED:
        value = getattr(args, name, off[0])
        if value not in off:
            text = f"{_flag(name)} {text.format(value=value)}"
            raise LskdError(f"{text}, which --kd-soft-labels cannot repeat; drop one of them.")
    if args.kd_soft_labels_sampled is not None:
        if args.kd_soft_labels_top_k is not None:
            raise LskdError(
                "--kd-soft-labels-sampled draws the classes, --kd-soft-labels-top-k takes the largest; "
                "give one."
            )
        if args.kd_rest != "spread":
            raise LskdError("--kd-soft-labels-sampled leaves no rest; drop --kd-rest.")
    if args.kd_soft_labels_views and args.mixup_off_epoch:
        raise LskdError(
            "--mixup-off-epoch changes the images between epochs that read the same view; drop it or "
            "--kd-soft-labels-views."
        )
    other = ("path", "rest", "mixing", "mixing_off_epoch")
    named = [each.name for each in fields(SoftLabelsConfig) if each.name not in other]
    return SoftLabelsConfig(
        args.kd_soft_labels,
        rest=args.kd_rest,
        mixing=MixingPolicy(args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob),
        mixing_off_epoch=args.mixup_off_epoch,
        **{name: getattr(args, f"kd_soft_labels_{name}") for name in named},
    )


def _refuse_alone(
    args: argparse.Namespace, flags: Iterable[Flag], needed: str, but: Sequence[str] = ()
) -> None:
    """Refuse flags about what is not asked for, unless they have their default value."""
    for flag, default, _, _ in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if name not in but and getattr(args, name) != default:
            raise LskdError(f"{flag} needs {needed}; add it.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
