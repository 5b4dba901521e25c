"""The bundled trainer's command line: timm's flag names, one clear line for whatever is wrong."""

import argparse
import difflib
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from lskd import LskdError
from timm_ls_kd.arguments import (
    ABOUT_A_TEACHER,
    add_kd_arguments,
    apply_kd_defaults,
    given_arguments,
    require_teacher,
)
from timm_ls_kd.run_settings import UPSTREAM_ONLY, apply_config, read_config

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
EVAL_METRICS = ("top1", "top5", "loss")

# (flags, default, options, help)
_Row = tuple[str, Any, dict[str, Any], str]

_DATA: tuple[_Row, ...] = (
    ("--data-dir", None, {"metavar": "DIR"}, "the data folder, when not given as the positional argument"),
    (
        "--dataset",
        "",
        {"metavar": "NAME"},
        "timm data set '<type>/<name>' (default: folder with one folder per class)",
    ),
    ("--train-split", "train", {"metavar": "NAME"}, "split to train on"),
    ("--val-split", "validation", {"metavar": "NAME"}, "split to validate on, '' for none"),
    (
        "--class-map",
        "",
        {"metavar": "FILE"},
        "text file with one class name per line, in order of the labels",
    ),
    ("--input-size", None, {"type": int, "nargs": 3, "metavar": "N"}, "channels, height, width of the input"),
    (
        "--img-size",
        None,
        {"type": int, "metavar": "N"},
        "height and width of the input (default: the model's)",
    ),
    ("--in-chans", None, {"type": int, "metavar": "N"}, "channels of the input (default: 3)"),
    (
        "--mean",
        None,
        {"type": float, "nargs": "+"},
        "mean to subtract, of pixels in [0, 1] (default: the model's)",
    ),
    ("--std", None, {"type": float, "nargs": "+"}, "deviation to divide by (default: the model's)"),
    (
        "--interpolation",
        "",
        {"choices": ("", *INTERPOLATIONS)},
        "resize method in validation (default: the model's)",
    ),
    (
        "--crop-pct",
        None,
        {"type": float},
        "share of the resized image kept in validation (default: the model's)",
    ),
    ("-b --batch-size", 128, {"type": int, "metavar": "N"}, "batch size of each process"),
    (
        "-vb --validation-batch-size",
        None,
        {"type": int, "metavar": "N"},
        "batch size in validation (default: same)",
    ),
    ("-j --workers", 4, {"type": int, "metavar": "N"}, "loading processes, 0: load in the training process"),
    ("--pin-mem", False, {}, "pin memory for faster copies to the GPU"),
    ("--no-prefetcher", False, {}, "normalise on the CPU instead of on the device"),
)
_MODEL: tuple[_Row, ...] = (
    ("--model", "resnet50", {"metavar": "MODEL"}, "timm model to train"),
    ("--pretrained", False, {}, "start from timm's pretrained weights"),
    ("--initial-checkpoint", "", {"metavar": "FILE"}, "start from these weights"),
    ("--num-classes", None, {"type": int, "metavar": "N"}, "number of classes (default: the model's)"),
    ("--drop", 0.0, {"type": float}, "dropout rate"),
    ("--drop-path", None, {"type": float}, "stochastic depth rate"),
    ("--bn-momentum", None, {"type": float}, "BatchNorm momentum"),
    ("--model-kwargs", {}, {"keyvalues": True}, "more arguments for create_model"),
    (
        "--train-only",
        None,
        {"nargs": "+", "metavar": "MODULE"},
        "train these modules, such as fc, and freeze the rest with its BatchNorm statistics",
    ),
    (
        "--train-statistics",
        None,
        {"nargs": "+", "metavar": "MODULE"},
        "with --train-only: BatchNorm layers whose statistics move nevertheless",
    ),
    ("--grad-checkpointing", False, {}, "save memory by computing activations again in the backward pass"),
    ("--channels-last", False, {}, "use the channels-last memory layout"),
    ("--torchcompile", None, {"nargs": "?", "const": "inductor", "metavar": "BACKEND"}, "compile the models"),
    ("--torchcompile-mode", None, {"choices": COMPILE_MODES}, "mode of torch.compile (default: its own)"),
)
_OPTIMISER: tuple[_Row, ...] = (
    ("--opt", "sgd", {}, "optimiser, any name that timm knows"),
    ("--opt-eps", None, {"type": float}, "epsilon of the optimiser"),
    ("--opt-betas", None, {"type": float, "nargs": "+"}, "betas of the optimiser"),
    ("--momentum", 0.9, {"type": float}, "momentum of the optimiser"),
    ("--weight-decay", 2e-5, {"type": float}, "weight decay"),
    ("--opt-kwargs", {}, {"keyvalues": True}, "more arguments for the optimiser"),
    ("--clip-grad", None, {"type": float, "metavar": "NORM"}, "clip gradients at this value"),
    ("--clip-mode", "norm", {"choices": ("norm", "value", "agc")}, "how to clip"),
    ("--grad-accum-steps", 1, {"type": int, "metavar": "N"}, "batches per optimiser step"),
)
_SCHEDULE: tuple[_Row, ...] = (
    ("--sched", "cosine", {"choices": SCHEDULES}, "schedule of the learning rate"),
    ("--sched-on-updates", False, {}, "move the schedule with every optimiser step, not every epoch"),
    ("--lr", None, {"type": float}, "learning rate (default: from --lr-base)"),
    ("--lr-base", 0.1, {"type": float}, "learning rate for a global batch of --lr-base-size"),
    ("--lr-base-size", 256, {"type": int}, "global batch size that --lr-base is meant for"),
    ("--lr-base-scale", "", {"choices": ("", "linear", "sqrt")}, "how --lr-base grows with the batch"),
    ("--min-lr", 0.0, {"type": float}, "lowest learning rate"),
    ("--warmup-lr", 1e-5, {"type": float}, "learning rate at the start of the warm-up"),
    ("--warmup-epochs", 5, {"type": int, "metavar": "N"}, "epochs of warm-up"),
    ("--warmup-prefix", False, {}, "add the warm-up before the schedule instead of within it"),
    ("--decay-milestones", [90, 180, 270], {"type": int, "nargs": "+"}, "epochs of decay (multistep)"),
    ("--decay-epochs", 90.0, {"type": float}, "epochs between decays (step)"),
    ("--decay-rate --dr", 0.1, {"type": float}, "factor of one decay"),
    ("--epochs", 300, {"type": int, "metavar": "N"}, "epochs to train"),
    ("--cooldown-epochs", 0, {"type": int, "metavar": "N"}, "epochs at the lowest rate after the schedule"),
    (
        "--start-epoch",
        None,
        {"type": int, "metavar": "N"},
        "number of the first epoch (default: where --resume ended)",
    ),
)
_AUGMENTATION: tuple[_Row, ...] = (
    ("--no-aug", False, {}, "train on the validation transform"),
    ("--train-crop-mode", None, {"choices": ("rrc", "rkrc", "rkrr")}, "random crop mode (default: rrc)"),
    ("--scale", [0.08, 1.0], {"type": float, "nargs": "+"}, "area of the random crop"),
    ("--ratio", [3.0 / 4.0, 4.0 / 3.0], {"type": float, "nargs": "+"}, "aspect ratio of the random crop"),
    ("--hflip", 0.5, {"type": float}, "probability of a horizontal flip"),
    ("--vflip", 0.0, {"type": float}, "probability of a vertical flip"),
    ("--color-jitter", 0.4, {"type": float}, "strength of colour jitter"),
    ("--aa", None, {"metavar": "POLICY"}, "AutoAugment or RandAugment policy, such as rand-m9-mstd0.5"),
    ("--reprob", 0.0, {"type": float}, "probability of random erasing"),
    ("--remode", "pixel", {"choices": ("const", "rand", "pixel")}, "what erased pixels become"),
    ("--recount", 1, {"type": int}, "erased regions per image"),
    (
        "--train-interpolation",
        "random",
        {"choices": ("", "random", *INTERPOLATIONS)},
        "resize method in training",
    ),
    ("--mixup", 0.0, {"type": float}, "alpha of mixup, 0: none"),
    ("--cutmix", 0.0, {"type": float}, "alpha of cutmix, 0: none"),
    ("--mixup-prob", 1.0, {"type": float}, "probability of mixing at all"),
    ("--mixup-switch-prob", 0.5, {"type": float}, "probability of cutmix when both are on"),
    ("--mixup-mode", "batch", {"choices": ("batch", "pair", "elem")}, "mix per batch, pair or element"),
    ("--mixup-off-epoch", 0, {"type": int, "metavar": "N"}, "epoch from which nothing is mixed, 0: never"),
    (
        "--smoothing",
        0.1,
        {"type": float, "metavar": "A"},
        "label smoothing (default: 0.1; 0 with --kd-teacher)",
    ),
    ("--bce-loss", False, {}, "binary cross-entropy instead of cross-entropy"),
)
_RUN: tuple[_Row, ...] = (
    ("--device", None, {}, "cuda, cuda:1, cpu, ... (default: cuda where there is one)"),
    ("--amp", False, {}, "mixed precision"),
    ("--amp-dtype", "float16", {"choices": ("float16", "bfloat16")}, "precision under --amp"),
    ("--sync-bn", False, {}, "synchronise BatchNorm over processes"),
    (
        "--dist-bn",
        "reduce",
        {"choices": ("reduce", "broadcast", "")},
        "bring BatchNorm together after each epoch",
    ),
    ("--no-ddp-bb", False, {}, "do not broadcast buffers at each step"),
    ("--model-ema", False, {}, "keep a moving average of the weights and validate it"),
    ("--model-ema-force-cpu", False, {}, "keep the average on the CPU, without validating it"),
    ("--model-ema-decay", 0.9998, {"type": float}, "decay of the average"),
    ("--model-ema-warmup", False, {}, "let the decay grow at the start"),
    ("--seed", 42, {"type": int}, "seed of weights, data order and augmentation"),
    ("--output", "", {"metavar": "DIR"}, "folder for runs (default: ./output/train)"),
    ("--experiment", "", {"metavar": "NAME"}, "the run's folder in --output (default: date, model, size)"),
    ("--resume", "", {"metavar": "FILE"}, "go on from this checkpoint"),
    ("--no-resume-opt", False, {}, "do not take the optimiser's state from --resume"),
    ("--checkpoint-hist", 10, {"type": int, "metavar": "N"}, "best checkpoints to keep"),
    ("--log-interval", 50, {"type": int, "metavar": "N"}, "batches between progress lines"),
    ("--eval-metric", "top1", {"choices": EVAL_METRICS}, "what the best checkpoint is best at"),
    ("--val-interval", 1, {"type": int, "metavar": "N"}, "epochs between validations"),
)
_GROUPS = (
    ("Data", _DATA),
    ("Model", _MODEL),
    ("Optimiser", _OPTIMISER),
    ("Learning rate", _SCHEDULE),
    ("Augmentation and targets", _AUGMENTATION),
    ("Run", _RUN),
)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one `LskdError` instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as the one clear line."""
        raise LskdError(f"{message.rstrip('.')}; see timm train.py --help.")


def create_parser() -> argparse.ArgumentParser:
    """Build the parser of `timm train.py`."""
    from timm_ls_kd.arguments import KeyValues

    parser = OneLineParser(
        prog="timm train.py",
        allow_abbrev=False,  # an abbreviated --config would pass unread
        description="Train an image classifier with timm's parts, from labels or from a teacher.",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", default="", help="YAML file with defaults for these arguments"
    )
    parser.add_argument("data", nargs="?", metavar="DIR", default=None, help="the data folder")
    for title, rows in _GROUPS:
        group = parser.add_argument_group(title)
        for flags, default, options, text in rows:
            options = dict(options)
            if options.pop("keyvalues", False):
                options.update(nargs="*", action=KeyValues, metavar="KEY=VALUE")
            elif default is False:
                options["action"] = "store_true"
            shown = "" if default in (None, "", False, {}) or "default" in text else f" (default: {default})"
            group.add_argument(*flags.split(), default=default, help=text + shown, **options)
    add_kd_arguments(parser)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of the bundled trainer and the YAML file it names.

    Raises:
        LskdError: an unknown flag, a value out of range, or a config file that cannot be used.
    """
    parser = create_parser()
    typed = parser.parse_known_args(list(argv))[0]
    path = typed.config
    config = read_config(path) if path else {}
    warnings = apply_config(parser, config, path)
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise LskdError(_unknown(parser, unknown[0]))
    for line in warnings:
        print(f"timm: warning: {line}", file=sys.stderr)
    require_teacher(args, given_arguments(parser, argv, {}, ABOUT_A_TEACHER))
    apply_kd_defaults(args, given_arguments(parser, argv, config, ("kd_temperature", "smoothing")))
    args.data_dir = _data_dir(typed, args)
    del args.data, args.config
    check_ranges(args)
    return args


def _data_dir(typed: argparse.Namespace, args: argparse.Namespace) -> str | None:
    """Return the data folder: what the command line names, under either name, beats the config file."""
    for source in (typed, args):
        named = [folder for folder in (source.data, source.data_dir) if folder]
        if len(set(named)) > 1:
            raise LskdError(f"two data folders are named, {named[0]} and {named[1]}; give one.")
        if named:
            return str(named[0])
    return None


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse values that no training can use."""
    check_numbers(args)
    for name in (
        "batch_size",
        "epochs",
        "log_interval",
        "val_interval",
        "checkpoint_hist",
        "grad_accum_steps",
        "lr_base_size",
        "recount",
    ):
        if getattr(args, name) < 1:
            raise LskdError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("workers", "seed", "warmup_epochs", "cooldown_epochs", "mixup", "cutmix"):
        if getattr(args, name) < 0:
            raise LskdError(f"--{name} must not be negative, got {getattr(args, name)}.".replace("_", "-"))
    for name in ("img_size", "in_chans", "num_classes", "validation_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LskdError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2:
        raise LskdError(f"mixup and cutmix pair images: --batch-size must be even, got {args.batch_size}.")
    if args.eval_metric != "loss" and not args.val_split:
        raise LskdError("without a validation split only --eval-metric loss can be tracked; add it.")


def _unknown(parser: argparse.ArgumentParser, word: str) -> str:
    flag = word.split("=", 1)[0]
    if not flag.startswith("-"):
        return f"unexpected argument '{word}'; see timm train.py --help."
    if flag.lstrip("-").replace("-", "_") in UPSTREAM_ONLY:
        return (
            f"{flag} is a flag of timm's upstream train.py only; pass that script's path: "
            "timm /path/to/train.py ..."
        )
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.6)
    return f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else "see timm train.py --help.")


_SHARES = (
    "hflip",
    "vflip",
    "reprob",
    "mixup_prob",
    "mixup_switch_prob",
    "drop",
    "drop_path",
    "model_ema_decay",
)
_NOT_NEGATIVE = ("lr", "lr_base", "min_lr", "warmup_lr", "color_jitter", "start_epoch", "mixup_off_epoch")
_POSITIVE = ("std", "crop_pct", "decay_epochs", "input_size", "scale", "ratio")


def check_numbers(args: Namespace) -> None:
    """Refuse numbers that are not finite or lie outside their argument's range.

    Raises:
        LskdError: naming the flag, its range and the value.
    """
    for name, value in vars(args).items():
        if not all(math.isfinite(number) for number in _numbers(value)):
            raise _refusal(name, "be finite", value)
    for names, low, high, range_text in (
        (_SHARES, 0.0, 1.0, "lie in [0, 1]"),
        (_NOT_NEGATIVE, 0.0, math.inf, "not be negative"),
        (_POSITIVE, math.ulp(0.0), math.inf, "be greater than 0"),
    ):
        for name in names:
            value = getattr(args, name)
            if not all(low <= number <= high for number in _numbers(value)):
                raise _refusal(name, range_text, value)
    for name in ("scale", "ratio"):
        bounds = getattr(args, name)
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise LskdError(f"--{name} takes a lower and an upper bound, got {_shown(bounds)}.")


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [number for number in values if isinstance(number, int | float)]


def _refusal(name: str, range_text: str, value: object) -> LskdError:
    return LskdError(f"--{name.replace('_', '-')} must {range_text}, got {_shown(value)}.")


def _shown(value: object) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)
