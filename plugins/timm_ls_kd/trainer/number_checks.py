"""Ranges of the bundled trainer's numbers, which timm and torch check late or not at all."""

import math
from argparse import Namespace

from lskd import LskdError

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
