"""The flags of `--criterion ls_kd`, the presets, and what they come to."""

# ruff: noqa: UP045 - fairseq's parser does not know X | None

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, get_args

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig

from lskd import AlphaSchedule, Convention, LskdError
from lskd.terms import Divergence, Rest

# What the papers say. What Shen et al. leave open is assumed, see docs/fairseq.md.
PRESETS: Mapping[str, dict[str, Any]] = {
    "shen2021": {
        "kd_weight": 0.9,
        "kd_temperature": 1.0,
        "kd_temperature_squared": False,
        "kd_top_k": 0,
        "kd_rest": "lump",
        "label_smoothing": 0.0,
        "smoothing_convention": "paper",
    },
    "tan2019": {
        "kd_weight": 0.9,
        "kd_temperature": 0.6,
        "kd_temperature_squared": True,
        "kd_top_k": 8,
        "kd_rest": "renormalise",
        "label_smoothing": 0.1,
        "smoothing_convention": "uniform",
    },
}
_TRUE, _FALSE = ("true", "yes", "1", ""), ("false", "no", "0")


def _flag(help: str, default: Any = None, **metadata: Any) -> Any:
    """Return a flag; None is "as the preset says"."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class LsKdConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Flags of `--criterion ls_kd`."""

    label_smoothing: Optional[float] = _flag(
        "epsilon of the hard term's labels (default: 0, or the preset's)"
    )
    smoothing_convention: Optional[str] = _flag(
        "paper: eps/(V-1) to every other entry, as fairseq (default); uniform: eps/V to each"
    )
    kd_teacher: Optional[str] = _flag("the teacher's checkpoint, several as A:B; a folder: its best")
    kd_preset: Optional[str] = _flag("shen2021 or tan2019; each value can be overridden")
    kd_weight: Optional[float] = _flag("weight of the teacher, Tan's alpha; the labels have the rest")
    kd_temperature: Optional[float] = _flag("divides both logits")
    kd_temperature_squared: Optional[str] = _flag(
        "multiply the soft term by T^2; 'false' takes a preset's back", argparse_const="true"
    )
    kd_top_k: Optional[int] = _flag("only the teacher's K likeliest words; 0: the whole vocabulary")
    kd_sampled: int = _flag(
        "instead of --kd-top-k, N words drawn from the teacher's own (0: none)", default=0
    )
    kd_rest: Optional[str] = _flag(
        "the other words with top-K: renormalise (they get nothing), spread (equal shares), lump (they "
        "are one word, of the student too) or restrict (the student has none either)"
    )
    kd_divergence: str = _flag(
        "forward: KL(teacher, student), as usual; reverse: KL(student, teacher); jsd: Jensen-Shannon",
        default="forward",
    )
    kd_on_policy: float = _flag(
        "share of the updates in which the teacher judges the student's own sentences, 0 to 1", default=0.0
    )
    kd_alpha_schedule: str = _flag(
        "fixed, threshold or adaptive: the weight by validation BLEU", default="fixed"
    )
    kd_alpha_interval: int = _flag(
        "epochs between two looks at the validation BLEU (Tan et al.: 3)", default=3
    )
    kd_teacher_bleu: Optional[float] = _flag(
        "the teacher's validation BLEU (default: what its checkpoint was chosen by)"
    )


@dataclass(frozen=True)
class Distillation:
    """What the flags come to with their preset, checked."""

    teacher: str | None
    weight: float
    temperature: float
    temperature_squared: bool
    top_k: int
    sampled: int
    rest: Rest
    label_smoothing: float
    convention: Convention
    divergence: Divergence
    on_policy: float
    schedule: AlphaSchedule
    interval: int
    teacher_bleu: float | None

    @property
    def needs_all_words(self) -> str | None:
        """The flag that needs an online teacher and all its words; None where there is none."""
        if self.divergence != "forward":
            return f"--kd-divergence {self.divergence}"
        return "--kd-on-policy" if self.on_policy else None


def resolve(cfg: LsKdConfig, classes: int) -> Distillation:
    """Fill in the preset and check every value.

    Args:
        classes: entries of the target dictionary.

    Raises:
        LskdError: with the flag, what is wrong and what to do.
    """
    preset = "shen2021" if cfg.kd_preset is None else cfg.kd_preset
    if preset not in PRESETS:
        raise LskdError(f"--kd-preset '{preset}' does not exist; there are {' and '.join(sorted(PRESETS))}")
    own = {name: getattr(cfg, name) for name in PRESETS[preset]}
    values = PRESETS[preset] | {name: value for name, value in own.items() if value is not None}
    squared = str(values["kd_temperature_squared"]).lower()
    if squared not in _TRUE + _FALSE:
        raise LskdError(f"--kd-temperature-squared is '{squared}'; give it alone, or with true or false")
    rest = own["kd_rest"] or default_rest(preset, int(cfg.kd_sampled))
    found = Distillation(
        teacher=cfg.kd_teacher,
        weight=float(values["kd_weight"]),
        temperature=float(values["kd_temperature"]),
        temperature_squared=squared in _TRUE,
        top_k=int(values["kd_top_k"]),
        sampled=int(cfg.kd_sampled),
        rest=_choice("--kd-rest", rest, get_args(Rest)),
        label_smoothing=float(values["label_smoothing"]),
        convention=_choice("--smoothing-convention", values["smoothing_convention"], get_args(Convention)),
        divergence=_choice("--kd-divergence", cfg.kd_divergence, get_args(Divergence)),
        on_policy=float(cfg.kd_on_policy),
        schedule=_choice("--kd-alpha-schedule", cfg.kd_alpha_schedule, get_args(AlphaSchedule)),
        interval=int(cfg.kd_alpha_interval),
        teacher_bleu=cfg.kd_teacher_bleu,
    )
    if not 0 <= found.weight <= 1:
        raise LskdError(f"--kd-weight is {found.weight}; it is the teacher's share of the loss, 0 to 1")
    if not 0 < found.temperature < math.inf:
        raise LskdError(f"--kd-temperature is {found.temperature}; it must be greater than 0, 1 is usual")
    if not 0 <= found.top_k <= classes:
        limits = f"0 (the whole vocabulary) to {classes}, the vocabulary's size"
        raise LskdError(f"--kd-top-k is {found.top_k}; it must be {limits}")
    if not 0 <= found.sampled <= classes:
        raise LskdError(f"--kd-sampled is {found.sampled}; it must be 0 (none) to {classes}")
    if found.sampled and (found.top_k or found.temperature != 1):
        raise LskdError("--kd-sampled draws words at --kd-temperature 1, without --kd-top-k; give these so")
    if found.sampled and found.rest != "renormalise":
        raise LskdError("--kd-sampled leaves no other words; drop --kd-rest")
    if not 0 <= found.label_smoothing < 1:
        raise LskdError(f"--label-smoothing is {found.label_smoothing}; it must lie in [0, 1), 0.1 is usual")
    if not 0 <= found.on_policy <= 1:
        raise LskdError(f"--kd-on-policy is {found.on_policy}; it is a share of the updates, 0 to 1")
    if found.needs_all_words and (found.top_k or found.sampled):
        flag = "--kd-sampled" if found.sampled else "--kd-top-k"
        raise LskdError(
            f"{found.needs_all_words} needs all of the teacher's words, and {flag} (or the preset's) is "
            f"{found.sampled or found.top_k}; add {flag} 0"
        )
    if found.on_policy and cfg.ignore_prefix_size > 0:
        raise LskdError("--kd-on-policy has no prefix to ignore; leave out --ignore-prefix-size")
    if found.interval < 1:
        raise LskdError(f"--kd-alpha-interval is {found.interval}; it is a number of epochs, 1 or more")
    return found


def default_rest(preset: str, sampled: int) -> Rest:
    """Return what becomes of the other words where `--kd-rest` is not given; drawn words leave none."""
    rest: Rest = "renormalise" if sampled else PRESETS[preset]["kd_rest"]
    return rest


def _choice(flag: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise LskdError(f"{flag} is '{value}'; it must be {' or '.join(choices)}")
    return value
