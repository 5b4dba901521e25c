"""The bundled trainer's command line: timm's flag names, one clear line for whatever is wrong."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lskd import LskdError
from timm_ls_kd.arguments import (
    ABOUT_A_TEACHER,
    COUNT,
    DIR,
    FILE,
    KEY_VALUES,
    NUMBER,
    REAL,
    WHOLE,
    Flag,
    add_flags,
    add_kd_arguments,
    apply_kd_defaults,
    given_arguments,
    number,
    parser_error,
    require_teacher,
    scheduled_epochs,
)
from timm_ls_kd.run_settings import UPSTREAM_ONLY, apply_config, read_config

SCHEDULES_OF_1_0_31 = ("wsd", "rsqrt", "constant")  # unknown to earlier timms, which say nothing
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_COMPILE_MODES = {"choices": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")}

_NAME, _MODULES = {"metavar": "NAME"}, {"nargs": "+", "metavar": "MODULE"}
_BACKEND = {"nargs": "?", "const": "inductor", "metavar": "BACKEND"}
_METRICS = {"choices": ("top1", "top5", "loss")}
_REAL: dict[str, Any] = {"type": REAL}
_REALS: dict[str, Any] = {"type": REAL, "nargs": "+"}
_SHARE: dict[str, Any] = {"type": number(float, 0, 1)}
_POSITIVE: dict[str, Any] = {"type": number(float, above=0)}
_POSITIVES: dict[str, Any] = {**_POSITIVE, "nargs": "+"}
_NOT_NEGATIVE: dict[str, Any] = {"type": number(float, low=0)}
_COUNT: dict[str, Any] = {"type": COUNT["type"]}

_DATA = (
    Flag("--data-dir", None, DIR, "the data folder, when not given as the positional argument"),
    Flag("--dataset", "", _NAME, "timm data set '<type>/<name>' (default: folder with one folder per class)"),
    Flag("--train-split", "train", _NAME, "split to train on"),
    Flag("--val-split", "validation", _NAME, "split to validate on, '' for none"),
    Flag("--class-map", "", FILE, "text file with one class name per line, in order of the labels"),
    Flag(
        "--input-size",
        None,
        {"type": number(int, above=0), "nargs": 3, "metavar": "N"},
        "channels, height, width of the input",
    ),
    Flag("--img-size", None, COUNT, "height and width of the input (default: the model's)"),
    Flag("--in-chans", None, COUNT, "channels of the input (default: 3)"),
    Flag("--mean", None, _REALS, "mean to subtract, of pixels in [0, 1] (default: the model's)"),
    Flag("--std", None, _POSITIVES, "deviation to divide by (default: the model's)"),
    Flag(
        "--interpolation",
        "",
        {"choices": ("", *_INTERPOLATIONS)},
        "resize method in validation (default: the model's)",
    ),
    Flag(
        "--crop-pct", None, _POSITIVE, "share of the resized image kept in validation (default: the model's)"
    ),
    Flag("-b --batch-size", 128, COUNT, "batch size of each process"),
    Flag("-vb --validation-batch-size", None, COUNT, "batch size in validation (default: same)"),
    Flag("-j --workers", 4, NUMBER, "loading processes, 0: load in the training process"),
    Flag(
        "--persistent-workers",
        True,
        {"action": argparse.BooleanOptionalAction},
        "keep the loading processes between epochs (the default)",
    ),
    Flag("--pin-mem", False, {}, "pin memory for faster copies to the GPU"),
    Flag("--no-prefetcher", False, {}, "normalise on the CPU instead of on the device"),
)
_MODEL = (
    Flag("--model", "resnet50", {"metavar": "MODEL"}, "timm model to train"),
    Flag("--pretrained", False, {}, "start from timm's pretrained weights"),
    Flag("--initial-checkpoint", "", FILE, "start from these weights"),
    Flag("--num-classes", None, COUNT, "number of classes (default: the model's)"),
    Flag("--drop", 0.0, _SHARE, "dropout rate"),
    Flag("--drop-path", None, _SHARE, "stochastic depth rate"),
    Flag("--bn-momentum", None, _REAL, "BatchNorm momentum"),
    Flag("--model-kwargs", {}, KEY_VALUES, "more arguments for create_model"),
    Flag(
        "--train-only",
        None,
        _MODULES,
        "train these modules, such as fc, and freeze the rest with its BatchNorm statistics",
    ),
    Flag(
        "--train-statistics",
        None,
        _MODULES,
        "with --train-only: BatchNorm layers whose statistics move nevertheless",
    ),
    Flag(
        "--grad-checkpointing", False, {}, "save memory by computing activations again in the backward pass"
    ),
    Flag("--channels-last", False, {}, "use the channels-last memory layout"),
    Flag("--torchcompile", None, _BACKEND, "compile the models"),
    Flag("--torchcompile-mode", None, _COMPILE_MODES, "mode of torch.compile (default: its own)"),
)
_OPTIMISER = (
    Flag("--opt", "sgd", {}, "optimiser, any name that timm knows"),
    Flag("--opt-eps", None, _REAL, "epsilon of the optimiser"),
    Flag("--opt-betas", None, _REALS, "betas of the optimiser"),
    Flag("--momentum", 0.9, _REAL, "momentum of the optimiser"),
    Flag("--weight-decay", 2e-5, _REAL, "weight decay"),
    Flag("--opt-kwargs", {}, KEY_VALUES, "more arguments for the optimiser"),
    Flag("--clip-grad", None, {"type": REAL, "metavar": "NORM"}, "clip gradients at this value"),
    Flag("--clip-mode", "norm", {"choices": ("norm", "value", "agc")}, "how to clip"),
    Flag("--grad-accum-steps", 1, COUNT, "batches per optimiser step"),
)
_SCHEDULE = (
    Flag(
        "--sched",
        "cosine",
        {"choices": ("cosine", "tanh", "step", "multistep", "poly", *SCHEDULES_OF_1_0_31, "none")},
        "schedule of the learning rate; wsd: warm-up, stable, decay",
    ),
    Flag("--sched-on-updates", False, {}, "move the schedule with every optimiser step, not every epoch"),
    Flag("--lr", None, _NOT_NEGATIVE, "learning rate (default: from --lr-base)"),
    Flag("--lr-base", 0.1, _NOT_NEGATIVE, "learning rate for a global batch of --lr-base-size"),
    Flag("--lr-base-size", 256, _COUNT, "global batch size that --lr-base is meant for"),
    Flag("--lr-base-scale", "", {"choices": ("", "linear", "sqrt")}, "how --lr-base grows with the batch"),
    Flag("--min-lr", 0.0, _NOT_NEGATIVE, "lowest learning rate"),
    Flag("--warmup-lr", 1e-5, _NOT_NEGATIVE, "learning rate at the start of the warm-up"),
    Flag("--warmup-epochs", 5, NUMBER, "epochs of warm-up"),
    Flag("--warmup-prefix", False, {}, "add the warm-up before the schedule instead of within it"),
    Flag("--decay-milestones", [90, 180, 270], {"type": WHOLE, "nargs": "+"}, "epochs of decay (multistep)"),
    Flag(
        "--decay-epochs",
        None,
        _POSITIVE,
        "epochs between decays (step; default: 90), or of the decay at the end, below 1 a share of all (wsd, "
        "rsqrt; default: 0.2)",
    ),
    Flag(
        "--lr-decay-fn",
        None,
        {"choices": ("linear", "1-sqrt", "cosine", "power", "exp")},
        "shape of the decay at the end (default: 1-sqrt for wsd, linear for rsqrt)",
    ),
    Flag("--lr-stable-timescale", None, _POSITIVE, "timescale of rsqrt in epochs (default: --warmup-epochs)"),
    Flag("--decay-rate --dr", 0.1, _REAL, "factor of one decay"),
    Flag("--epochs", 300, COUNT, "epochs to train"),
    Flag("--stop-epoch", None, COUNT, "stop after so many epochs, the schedule being that of --epochs"),
    Flag("--cooldown-epochs", 0, NUMBER, "epochs at the lowest rate after the schedule"),
    Flag("--start-epoch", None, NUMBER, "number of the first epoch (default: where --resume ended)"),
)
_AUGMENTATION = (
    Flag("--no-aug", False, {}, "train on the validation transform"),
    Flag("--train-crop-mode", None, {"choices": ("rrc", "rkrc", "rkrr")}, "random crop mode (default: rrc)"),
    Flag("--scale", [0.08, 1.0], _POSITIVES, "area of the random crop"),
    Flag("--ratio", [3.0 / 4.0, 4.0 / 3.0], _POSITIVES, "aspect ratio of the random crop"),
    Flag("--hflip", 0.5, _SHARE, "probability of a horizontal flip"),
    Flag("--vflip", 0.0, _SHARE, "probability of a vertical flip"),
    Flag("--color-jitter", 0.4, _NOT_NEGATIVE, "strength of colour jitter"),
    Flag("--aa", None, {"metavar": "POLICY"}, "AutoAugment or RandAugment policy, such as rand-m9-mstd0.5"),
    Flag("--reprob", 0.0, _SHARE, "probability of random erasing"),
    Flag("--remode", "pixel", {"choices": ("const", "rand", "pixel")}, "what erased pixels become"),
    Flag("--recount", 1, _COUNT, "erased regions per image"),
    Flag(
        "--train-interpolation",
        "random",
        {"choices": ("", "random", *_INTERPOLATIONS)},
        "resize method in training",
    ),
    Flag("--mixup", 0.0, _NOT_NEGATIVE, "alpha of mixup, 0: none"),
    Flag("--cutmix", 0.0, _NOT_NEGATIVE, "alpha of cutmix, 0: none"),
    Flag("--mixup-prob", 1.0, _SHARE, "probability of mixing at all"),
    Flag("--mixup-switch-prob", 0.5, _SHARE, "probability of cutmix when both are on"),
    Flag("--mixup-mode", "batch", {"choices": ("batch", "pair", "elem")}, "mix per batch, pair or element"),
    Flag("--mixup-off-epoch", 0, NUMBER, "epoch from which nothing is mixed, 0: never"),
    Flag(
        "--smoothing",
        0.1,
        {"type": REAL, "metavar": "A"},
        "label smoothing (default: 0.1; 0 with --kd-teacher)",
    ),
    Flag(
        "--loss",
        None,
        {"choices": ("ce", "bce")},
        "loss of the labels: cross-entropy or binary cross-entropy (default: ce)",
    ),
    Flag("--bce-loss", False, {}, "the same as --loss bce"),
)
_RUN = (
    Flag("--device", None, {}, "cuda, cuda:1, cpu, ... (default: cuda where there is one)"),
    Flag("--amp", False, {}, "mixed precision"),
    Flag("--amp-dtype", "float16", {"choices": ("float16", "bfloat16")}, "precision under --amp"),
    Flag("--sync-bn", False, {}, "synchronise BatchNorm over processes"),
    Flag(
        "--dist-bn",
        "reduce",
        {"choices": ("reduce", "broadcast", "")},
        "bring BatchNorm together after each epoch",
    ),
    Flag("--no-ddp-bb", False, {}, "do not broadcast buffers at each step"),
    Flag("--model-ema", False, {}, "keep a moving average of the weights and validate it"),
    Flag("--model-ema-force-cpu", False, {}, "keep the average on the CPU, without validating it"),
    Flag("--model-ema-decay", 0.9998, _SHARE, "decay of the average"),
    Flag("--model-ema-warmup", False, {}, "let the decay grow at the start"),
    Flag(
        "--seed",
        42,
        {"type": number(int, low=0, largest=2**32 - 1)},
        "seed of weights, data order and augmentation",
    ),
    Flag("--output", "", DIR, "folder for runs (default: ./output/train)"),
    Flag("--experiment", "", _NAME, "the run's folder in --output (default: date, model, size)"),
    Flag(
        "--resume",
        "",
        FILE,
        "go on from this checkpoint; auto: from the last of --experiment, if there is one",
    ),
    Flag("--no-resume-opt", False, {}, "do not take the optimiser's state from --resume"),
    Flag(
        "--save-epochs",
        None,
        {**COUNT, "nargs": "+"},
        "keep the checkpoints after so many epochs, as milestone-N",
    ),
    Flag("--checkpoint-hist", 10, COUNT, "best checkpoints to keep"),
    Flag("--log-interval", 50, COUNT, "batches between progress lines"),
    Flag("--eval-metric", "top1", _METRICS, "what the best checkpoint is best at"),
    Flag("--val-interval", 1, COUNT, "epochs between validations"),
)
_TRACKERS = (
    Flag("--log-wandb", False, {}, "log each epoch to wandb, which sends it as WANDB_MODE and its login say"),
    Flag("--wandb-project", None, _NAME, "wandb project (default: wandb's own)"),
    Flag("--wandb-tags", [], {"nargs": "+", "metavar": "TAG"}, "tags of the run in wandb"),
    Flag(
        "--wandb-resume-id",
        "",
        {"metavar": "ID"},
        "with --resume: wandb's id of the run (default: the one that the run's folder remembers)",
    ),
    Flag("--log-tensorboard", False, {}, "log each epoch to TensorBoard's files in the run's folder"),
    Flag("--log-trackio", False, {}, "log each epoch to Trackio, on this machine"),
    Flag("--trackio-project", None, _NAME, "Trackio's project (default: name of the folder of runs)"),
)
_GROUPS = {
    "Data": _DATA,
    "Model": _MODEL,
    "Optimiser": _OPTIMISER,
    "Learning rate": _SCHEDULE,
    "Augmentation and targets": _AUGMENTATION,
    "Run": _RUN,
    "Trackers": _TRACKERS,
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one `LskdError` instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as the one clear line."""
        raise parser_error(message, "timm train.py")


def create_parser() -> argparse.ArgumentParser:
    """Build the parser of `timm train.py`."""
    parser = OneLineParser(
        prog="timm train.py",
        allow_abbrev=False,  # an abbreviated --config would pass unread
        description="Train an image classifier with timm's parts, from labels or from a teacher.",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", default="", help="YAML file with defaults for these arguments"
    )
    parser.add_argument("data", nargs="?", metavar="DIR", default=None, help="the data folder")
    for title, flags in _GROUPS.items():
        add_flags(parser, title, flags)
    add_kd_arguments(parser)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of the bundled trainer and the YAML file it names.

    Raises:
        LskdError: an unknown flag, a value out of range, or a config file that cannot be used.
    """
    parser = create_parser()
    typed = parser.parse_known_args(list(argv))[0]
    config = read_config(typed.config) if typed.config else {}
    warnings = apply_config(parser, config, typed.config)
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise LskdError(_unknown(parser, unknown[0]))
    for line in warnings:
        print(f"timm: warning: {line}", file=sys.stderr)
    given = given_arguments(parser, argv, (*ABOUT_A_TEACHER, "smoothing"))
    require_teacher(args, given)
    apply_kd_defaults(args, given.keys() | {key for key, value in config.items() if value is not None})
    args.data_dir = _data_dir(typed, args)
    del args.data, args.config
    check_together(args)
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


def check_together(args: argparse.Namespace) -> None:
    """Refuse values that no training can use together.

    Raises:
        LskdError: naming the flag.
    """
    for name, bounds in (("scale", args.scale), ("ratio", args.ratio)):
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            given = " ".join(map(str, bounds))
            raise LskdError(f"--{name} takes a lower and an upper bound, got {given}.")
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2:
        raise LskdError(f"mixup and cutmix pair images: --batch-size must be even, got {args.batch_size}.")
    for name in ("lr_decay_fn", "lr_stable_timescale"):
        if getattr(args, name) is not None and args.sched not in ("wsd", "rsqrt"):
            raise LskdError(f"--{name.replace('_', '-')} belongs to --sched wsd and rsqrt, not {args.sched}.")
    if args.bce_loss and args.loss == "ce":
        raise LskdError("--bce-loss is --loss bce, and --loss ce is given too; drop one of them.")
    epochs = scheduled_epochs(args)
    for flag, last in (("--stop-epoch", args.stop_epoch), ("--save-epochs", max(args.save_epochs or [0]))):
        if (last or 0) > epochs:
            raise LskdError(f"{flag} {last} is beyond the run's {epochs} epochs; raise --epochs or drop it.")
    if args.wandb_resume_id and not args.resume:
        raise LskdError("--wandb-resume-id goes on with a run and needs its --resume CHECKPOINT too; add it.")
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
