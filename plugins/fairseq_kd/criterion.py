"""The criterion `ls_kd`: fairseq's label-smoothed cross-entropy with a teacher beside the labels."""

# ruff: noqa: UP045 - fairseq's parser does not know X | None

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Self, get_args

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn

from fairseq_kd.teacher import Teacher, best_checkpoint, split_paths
from lskd import AlphaSchedule, Convention, LskdError, TopK, convert_alpha, fused_distillation
from lskd.checkpoints import file_checksum
from lskd.kernel.fused import LossComponents
from lskd.teachers.outputs import selective_weight
from lskd.terms import Rest, top_k_log_probabilities

# What the papers say. What Shen et al. leave open is assumed, see docs/fairseq.md.
PRESETS: Mapping[str, dict[str, Any]] = {
    "shen2021": {
        "kd_weight": 0.9,
        "kd_temperature": 1.0,
        "kd_temperature_squared": False,
        "kd_top_k": 0,
        "kd_rest": "renormalise",
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

# Sums over the tokens of a batch, in nats, and their names in the core's terms; logged as means, in bits
# where fairseq's own losses are.
_TERMS = {
    "kd_ce": "cross_entropy",
    "kd_kl": "kl",
    "kd_teacher_entropy": "teacher_entropy",
    "kd_hard_ce": "hard_cross_entropy",
    "kd_agreement": "agreement",
}
_WITHOUT_TEACHER = ("kd_hard_ce", "kd_weight")  # that need no teacher's words


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
    kd_rest: Optional[str] = _flag(
        "the other words with top-K: renormalise (they get nothing) or spread (equal shares)"
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
    rest: Rest
    label_smoothing: float
    convention: Convention
    schedule: AlphaSchedule
    interval: int
    teacher_bleu: float | None


def resolve(cfg: LsKdConfig, classes: int) -> Distillation:
    """Fill in the preset and check every value.

    Args:
        cfg: the flags.
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
    found = Distillation(
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
    if not 0 <= found.weight <= 1:
        raise LskdError(f"--kd-weight is {found.weight}; it is the teacher's share of the loss, 0 to 1")
    if not 0 < found.temperature < math.inf:
        raise LskdError(f"--kd-temperature is {found.temperature}; it must be greater than 0, 1 is usual")
    if not 0 <= found.top_k <= classes:
        limits = f"0 (the whole vocabulary) to {classes}, the vocabulary's size"
        raise LskdError(f"--kd-top-k is {found.top_k}; it must be {limits}")
    if not 0 <= found.label_smoothing < 1:
        raise LskdError(f"--label-smoothing is {found.label_smoothing}; it must lie in [0, 1), 0.1 is usual")
    if found.interval < 1:
        raise LskdError(f"--kd-alpha-interval is {found.interval}; it is a number of epochs, 1 or more")
    return found


def _choice(flag: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise LskdError(f"{flag} is '{value}'; it must be {' or '.join(choices)}")
    return value


@register_criterion("ls_kd", dataclass=LsKdConfig)
class LsKdCriterion(LabelSmoothedCrossEntropyCriterion):
    """`(1 - kd_weight) * H(labels) + kd_weight * H(teacher, student)`, summed over the target tokens.

    The teacher is online (`--kd-teacher`) or stored (`--task translation_ls_kd --kd-soft-labels`). It is
    loaded when training begins, so that validation and generation do without it. Without a teacher's share -
    weight 0, validation - the criterion is fairseq's own.

    Raises:
        LskdError: for values out of range, when the criterion is built.
    """

    def __init__(self, cfg: LsKdConfig, task: Any) -> None:
        classes = len(task.target_dictionary)
        settings = resolve(cfg, classes)
        _check_task(settings, task)
        # fairseq's own formula is Eq. 1 of the paper; other conventions are converted to it.
        eps = convert_alpha(settings.label_smoothing, classes, settings.convention, "paper")
        super().__init__(task, cfg.sentence_avg, eps, cfg.ignore_prefix_size, cfg.report_accuracy)
        self.settings = settings
        # No nn.Module: not in the checkpoint, the optimiser, train() or DDP.
        self.teacher: Teacher | None = None
        self._ready = False

    @property
    def weight(self) -> float:
        """The teacher's share now: the schedule may have lowered it."""
        weight = getattr(self.task, "kd_weight", None)
        return self.settings.weight if weight is None else float(weight)

    def train(self, mode: bool = True) -> Self:
        """Load the teacher before the first update."""
        if mode and not self._ready:
            self._prepare()
            self._ready = True
        super().train(mode)
        return self

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return loss, sample size and what is logged, as fairseq's criteria do."""
        weight = self.weight
        if not model.training or weight == 0:
            loss, sample_size, log = super().forward(model, sample, reduce=reduce)
            if model.training and self.settings.weight > 0:  # the schedule asks the teacher no more
                tokens = self._tokens(sample)
                log |= {"kd_all_tokens": tokens, "kd_weight": 0 * tokens, "kd_hard_ce": log["loss"]}
            return loss, sample_size, log
        net_output = model(**sample["net_input"])
        terms = self._distil(net_output[0], sample, weight)
        tokens, sentences = self._tokens(sample), sample["target"].size(0)
        sample_size = sentences if self.sentence_avg else sample["ntokens"]
        log = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll,
            "ntokens": sample["ntokens"],
            "nsentences": sentences,
            "sample_size": sample_size,
            "kd_tokens": tokens,
            "kd_all_tokens": tokens,
            "kd_weight": weight * tokens,
        }
        log |= {name: getattr(terms, term) for name, term in _TERMS.items()}
        if self.report_accuracy:
            correct, total = self.compute_accuracy(model, net_output, sample)
            log |= {"n_correct": float(correct), "total": float(total)}
        return terms.loss, sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs: Iterable[Mapping[str, Any]]) -> None:
        """Log fairseq's numbers, and the teacher's where there are any."""
        logging_outputs = list(logging_outputs)
        super().reduce_metrics(logging_outputs)

        def total(name: str) -> float:
            return sum(float(log.get(name, 0)) for log in logging_outputs)

        asked, trained = total("kd_tokens"), total("kd_all_tokens")
        for name in (*_TERMS, "kd_weight"):
            tokens = trained if name in _WITHOUT_TEACHER else asked
            bits = 1 if name in ("kd_agreement", "kd_weight") else math.log(2)
            if tokens:
                metrics.log_scalar(name, total(name) / tokens / bits, tokens, round=3)
            elif trained:  # the column stays, and says that nothing was measured
                metrics.log_scalar(name, math.nan, 0, round=3)

    def check_student(self, model: nn.Module) -> None:
        """Check the student before the first update.

        Raises:
            LskdError: it has an adaptive softmax.
        """
        if self.settings.weight > 0 and getattr(getattr(model, "decoder", None), "adaptive_softmax", None):
            raise LskdError(
                "the student gives no logits over the target dictionary; drop --adaptive-softmax-cutoff"
            )

    def _tokens(self, sample: dict[str, Any]) -> Any:
        """Return how many target tokens the loss is of."""
        skip = self.ignore_prefix_size
        return sample["target"][:, skip:].ne(self.padding_idx).sum() if skip > 0 else sample["ntokens"]

    def _distil(self, logits: Tensor, sample: dict[str, Any], weight: float) -> LossComponents:
        skip, settings = max(self.ignore_prefix_size, 0), self.settings
        target = sample["target"][:, skip:]
        terms: LossComponents = fused_distillation(
            logits[:, skip:],
            self._teacher_of(sample, logits, skip),
            target,
            target.ne(self.padding_idx),
            hard_weight=1 - weight,
            reduction="sum",
            temperature=settings.temperature,
            temperature_squared=settings.temperature_squared,
            alpha=settings.label_smoothing,
            convention=settings.convention,
        )
        return terms

    def _teacher_of(self, sample: dict[str, Any], logits: Tensor, skip: int = 0) -> Tensor | TopK:
        stored = sample.get("soft_labels")
        if stored is not None:
            values, ids = stored[0].view(torch.float32), stored[1]
            k = self.settings.top_k or values.shape[-1]
            return TopK(values[:, skip:, :k], ids[:, skip:, :k], self.settings.rest)
        if self.teacher is None:
            raise RuntimeError("the criterion was not put into training mode: call criterion.train()")
        self.teacher.to(logits)
        spoken = self.teacher.logits(sample["net_input"])[:, skip:]
        if self.settings.top_k:
            return TopK(*top_k_log_probabilities(spoken, self.settings.top_k), self.settings.rest)
        return spoken

    def _prepare(self) -> None:
        """Load the teacher, or compare the stored one with the flags, and begin the schedule."""
        settings, known = self.settings, None
        if settings.weight == 0:
            return
        stored = getattr(self.task, "soft_labels", None)
        if stored is not None:
            if settings.top_k > stored.layout.k:
                raise LskdError(
                    f"--kd-top-k is {settings.top_k}, the soft labels in {stored.path} have "
                    f"{stored.layout.k}; write them with a larger --top-k"
                )
            if settings.teacher is not None:
                checksums = [file_checksum(best_checkpoint(path)) for path in split_paths(settings.teacher)]
                stored.require({"teacher": {"checksum": ":".join(checksums)}})
            known = stored.identity.get("teacher_bleu")
        elif settings.teacher is not None:
            cfg = self.task.cfg
            self.teacher = Teacher(split_paths(settings.teacher), cfg.data, cfg.source_lang, cfg.target_lang)
            self.teacher.check_sense(self.task.datasets.get(cfg.train_subset))
            known = self.teacher.bleu
        if settings.schedule == "fixed":
            return
        bleu = known if settings.teacher_bleu is None else settings.teacher_bleu
        if bleu is None:
            raise LskdError(
                f"--kd-alpha-schedule {settings.schedule} needs the teacher's validation BLEU, which "
                "its checkpoint does not say (it was chosen by another metric); give --kd-teacher-bleu"
            )
        self.task.begin_schedule(
            settings.interval,
            lambda student: selective_weight(settings.weight, settings.schedule, student, bleu),
        )


def _check_task(settings: Distillation, task: Any) -> None:
    if settings.weight == 0:
        return
    if not isinstance(task, TranslationTask):
        raise LskdError(
            f"--criterion ls_kd distils translation, and the task is {type(task).__name__}; "
            "give --task translation or translation_ls_kd, or --kd-weight 0"
        )
    if settings.teacher is None and not getattr(task.cfg, "kd_soft_labels", None):
        raise LskdError(
            "--criterion ls_kd has no teacher: give --kd-teacher FILE, or --task translation_ls_kd "
            "--kd-soft-labels DIR, or --kd-weight 0"
        )
    if settings.schedule == "fixed":
        return
    schedule = f"--kd-alpha-schedule {settings.schedule}"
    if not hasattr(task, "begin_schedule"):
        raise LskdError(f"{schedule} needs --task translation_ls_kd, which keeps its state in the checkpoint")
    if not task.cfg.eval_bleu:
        raise LskdError(f"{schedule} goes by validation BLEU; add --eval-bleu and its arguments")
    subset = task.cfg.valid_subset
    if "," in subset or subset.startswith("test"):
        raise LskdError(f"{schedule} goes by one validation set, never by test; --valid-subset is '{subset}'")
