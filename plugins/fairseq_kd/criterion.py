"""The criterion `ls_kd`: fairseq's label-smoothed cross-entropy with a teacher beside the labels."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn

from fairseq_kd.settings import LsKdConfig, resolve
from fairseq_kd.teacher import Teacher, best_checkpoint, split_paths
from lskd import LskdError, TopK, convert_alpha, fused_distillation
from lskd.checkpoints import file_checksum
from lskd.kernel.fused import LossComponents
from lskd.terms import selective_weight, top_k_log_probabilities

# Sums over the tokens of a batch, in nats; logged as means, in bits where fairseq's own losses are.
_TERMS = ("kd_ce", "kd_kl", "kd_teacher_entropy", "kd_hard_ce", "kd_agreement")
_WITHOUT_TEACHER = ("kd_hard_ce", "kd_weight")  # that need no teacher's words


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
        """Check the flags; nothing is loaded yet."""
        self_settings = resolve(cfg, len(task.target_dictionary))
        _check_task(self_settings.weight, self_settings.teacher, task)
        _check_schedule(self_settings, task)
        super().__init__(
            task,
            cfg.sentence_avg,
            # fairseq's own formula is Eq. 1 of the paper; other conventions are converted to it.
            convert_alpha(
                self_settings.label_smoothing, len(task.target_dictionary), self_settings.convention, "paper"
            ),
            cfg.ignore_prefix_size,
            cfg.report_accuracy,
        )
        self.settings = self_settings
        self.teacher: Teacher | None = (
            None  # no nn.Module: not in the checkpoint, the optimiser, train() or DDP
        )
        self._ready = False

    @classmethod
    def build_criterion(cls, cfg: LsKdConfig, task: Any) -> Self:
        """Build it from fairseq's configuration."""
        return cls(cfg, task)

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
        logits, target = net_output[0], sample["target"]
        terms = self._distil(logits, target, sample, weight)
        tokens = self._tokens(sample)
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        log = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
            "kd_tokens": tokens,
            "kd_all_tokens": tokens,
            "kd_weight": weight * tokens,
        }
        soft = (
            terms.cross_entropy,
            terms.kl,
            terms.teacher_entropy,
            terms.hard_cross_entropy,
            terms.agreement,
        )
        log |= dict(zip(_TERMS, soft, strict=True))
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

    def _distil(
        self, logits: Tensor, target: Tensor, sample: dict[str, Any], weight: float
    ) -> LossComponents:
        skip = self.ignore_prefix_size
        teacher = self._teacher_of(sample, logits)
        if skip > 0:
            logits, target = logits[:, skip:], target[:, skip:]
            teacher = (
                TopK(teacher.values[:, skip:], teacher.ids[:, skip:], teacher.rest)
                if isinstance(teacher, TopK)
                else teacher[:, skip:]
            )
        terms: LossComponents = fused_distillation(
            logits,
            teacher,
            target,
            target.ne(self.padding_idx),
            hard_weight=1 - weight,
            reduction="sum",
            **self.settings.loss_arguments(),
        )
        return terms

    def _teacher_of(self, sample: dict[str, Any], logits: Tensor) -> Tensor | TopK:
        stored = sample.get("soft_labels")
        if stored is not None:
            values, ids = stored[0].view(torch.float32), stored[1]
            k = self.settings.top_k or values.shape[-1]
            return TopK(values[..., :k], ids[..., :k], self.settings.rest)
        if self.teacher is None:
            raise RuntimeError("the criterion was not put into training mode: call criterion.train()")
        self.teacher.to(logits)
        spoken = self.teacher.logits(sample["net_input"])
        if self.settings.top_k:
            return TopK(*top_k_log_probabilities(spoken, self.settings.top_k), self.settings.rest)
        return spoken

    def _prepare(self) -> None:
        settings = self.settings
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
        elif settings.teacher is not None:
            cfg = self.task.cfg
            self.teacher = Teacher(split_paths(settings.teacher), cfg.data, cfg.source_lang, cfg.target_lang)
            self.teacher.check_sense(self.task.datasets.get(cfg.train_subset))
        self._check_bleu()

    def _check_bleu(self) -> None:
        if self.settings.schedule == "fixed":
            return
        bleu = self.settings.teacher_bleu
        if bleu is None and self.teacher is not None:
            bleu = self.teacher.bleu
        if bleu is None and getattr(self.task, "soft_labels", None) is not None:
            bleu = self.task.soft_labels.identity.get("teacher_bleu")
        if bleu is None:
            raise LskdError(
                f"--kd-alpha-schedule {self.settings.schedule} needs the teacher's validation BLEU, which "
                "its checkpoint does not say (it was chosen by another metric); give --kd-teacher-bleu"
            )
        settings = self.settings
        self.task.begin_schedule(
            settings.interval,
            lambda student: selective_weight(settings.weight, settings.schedule, student, bleu),
        )


def _check_task(weight: float, teacher: str | None, task: Any) -> None:
    if weight == 0:
        return
    if not isinstance(task, TranslationTask):
        raise LskdError(
            f"--criterion ls_kd distils translation, and the task is {type(task).__name__}; "
            "give --task translation or translation_ls_kd, or --kd-weight 0"
        )
    if teacher is None and not getattr(task.cfg, "kd_soft_labels", None):
        raise LskdError(
            "--criterion ls_kd has no teacher: give --kd-teacher FILE, or --task translation_ls_kd "
            "--kd-soft-labels DIR, or --kd-weight 0"
        )


def _check_schedule(settings: Any, task: Any) -> None:
    if settings.schedule == "fixed" or settings.weight == 0:
        return
    schedule = f"--kd-alpha-schedule {settings.schedule}"
    if not hasattr(task, "begin_schedule"):
        raise LskdError(f"{schedule} needs --task translation_ls_kd, which keeps its state in the checkpoint")
    if not task.cfg.eval_bleu:
        raise LskdError(f"{schedule} goes by validation BLEU; add --eval-bleu and its arguments")
    subset = task.cfg.valid_subset
    if "," in subset or subset.startswith("test"):
        raise LskdError(f"{schedule} goes by one validation set, never by test; --valid-subset is '{subset}'")
