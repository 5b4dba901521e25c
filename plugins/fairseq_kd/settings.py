"""The criterion's settings: command line, presets, and what is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Optional, cast, get_args

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig

from lskd import AlphaSchedule, Convention, LskdError
from lskd.terms import Rest

# What the papers say. What Shen et al. leave open is assumed, see docs/fairseq.md.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "shen2021": MappingProxyType(
            {
                "kd_weight": 0.9,
                "kd_temperature": 1.0,
                "kd_temperature_squared": False,
                "kd_top_k": 0,
                "kd_rest": "renormalise",
                "label_smoothing": 0.0,
            }
        ),
        "tan2019": MappingProxyType(
            {
                "kd_weight": 0.9,
                "kd_temperature": 0.6,
                "kd_temperature_squared": True,
                "kd_top_k": 8,
                "kd_rest": "renormalise",
                "label_smoothing": 0.1,
                "smoothing_convention": "uniform",
            }
        ),
    }
)
_DEFAULTS = MappingProxyType({**PRESETS["shen2021"], "smoothing_convention": "paper"})
_TRUE, _FALSE = ("true", "yes", "1", ""), ("false", "no", "0")


@dataclass
class LsKdConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Flags of `--criterion ls_kd`; None is "as the preset says"."""

    label_smoothing: Optional[float] = field(  # noqa: UP045 - fairseq's parser does not know X | None
        default=None, metadata={"help": "epsilon of the hard term's labels (default: 0, or the preset's)"}
    )
    smoothing_convention: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "paper: eps/(V-1) to every other entry, as fairseq (default); uniform: eps/V to each"
        },
    )
    kd_teacher: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "the teacher's checkpoint, several as A:B; a folder: its best"}
    )
    kd_preset: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "shen2021 or tan2019; each value can be overridden"}
    )
    kd_weight: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "weight of the teacher, Tan's alpha; the labels have the rest"}
    )
    kd_temperature: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "divides both logits"}
    )
    kd_temperature_squared: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "multiply the soft term by T^2; 'false' takes a preset's back",
            "argparse_const": "true",
        },
    )
    kd_top_k: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "only the teacher's K likeliest words; 0: the whole vocabulary"}
    )
    kd_rest: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "the other words with top-K: renormalise (they get nothing) or spread (equal shares)"
        },
    )
    kd_alpha_schedule: str = field(
        default="fixed", metadata={"help": "fixed, threshold or adaptive: the weight by validation BLEU"}
    )
    kd_alpha_interval: int = field(
        default=3, metadata={"help": "epochs between two looks at the validation BLEU (Tan et al.: 3)"}
    )
    kd_teacher_bleu: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "the teacher's validation BLEU (default: what its checkpoint was chosen by)"},
    )


@dataclass(frozen=True)
class Settings:
    """Checked values."""

    teacher: str | None
    weight: float
    temperature: float
    temperature_squared: bool
    top_k: int
    rest: Rest
    label_smoothing: float
    convention: Convention
    schedule: AlphaSchedule
    interval: int
    teacher_bleu: float | None

    def loss_arguments(self) -> dict[str, Any]:
        """Return what the core's loss needs beside the weight."""
        return {
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
            "alpha": self.label_smoothing,
            "convention": self.convention,
        }


def resolve(cfg: LsKdConfig, classes: int) -> Settings:
    """Fill in the preset and check every value.

    Args:
        cfg: the flags.
        classes: entries of the target dictionary.

    Raises:
        LskdError: with the flag, what is wrong and what to do.
    """
    if cfg.kd_preset is not None and cfg.kd_preset not in PRESETS:
        raise LskdError(
            f"--kd-preset '{cfg.kd_preset}' does not exist; there are {' and '.join(sorted(PRESETS))}"
        )
    values = dict(_DEFAULTS) | dict(PRESETS[cfg.kd_preset] if cfg.kd_preset else {})
    for name in values:
        given = getattr(cfg, name)
        if given is not None:
            values[name] = given
    squared = str(values["kd_temperature_squared"]).lower()
    if squared not in _TRUE + _FALSE:
        raise LskdError(f"--kd-temperature-squared is '{squared}'; give it alone, or with true or false")
    settings = Settings(
        teacher=cfg.kd_teacher,
        weight=float(values["kd_weight"]),
        temperature=float(values["kd_temperature"]),
        temperature_squared=squared in _TRUE,
        top_k=int(values["kd_top_k"]),
        rest=_choice("--kd-rest", values["kd_rest"], get_args(Rest)),
        label_smoothing=float(values["label_smoothing"]),
        convention=_choice("--smoothing-convention", values["smoothing_convention"], get_args(Convention)),
        schedule=_choice("--kd-alpha-schedule", cfg.kd_alpha_schedule, get_args(AlphaSchedule)),
        interval=int(cfg.kd_alpha_interval),
        teacher_bleu=cfg.kd_teacher_bleu,
    )
    if not 0 <= settings.weight <= 1:
        raise LskdError(f"--kd-weight is {settings.weight}; it is the teacher's share of the loss, 0 to 1")
    if not (math.isfinite(settings.temperature) and settings.temperature > 0):
        raise LskdError(f"--kd-temperature is {settings.temperature}; it must be greater than 0, 1 is usual")
    if not 0 <= settings.top_k <= classes:
        raise LskdError(
            f"--kd-top-k is {settings.top_k}; it must be 0 (the whole vocabulary) to {classes}, the "
            "vocabulary's size"
        )
    if not 0 <= settings.label_smoothing < 1:
        raise LskdError(
            f"--label-smoothing is {settings.label_smoothing}; it must lie in [0, 1), 0.1 is usual"
        )
    if settings.interval < 1:
        raise LskdError(f"--kd-alpha-interval is {settings.interval}; it is a number of epochs, 1 or more")
    return settings


def _choice(flag: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise LskdError(f"{flag} is '{value}'; it must be {' or '.join(choices)}")
    return cast(Any, value)
