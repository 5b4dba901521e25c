"""The criterion `ls_kd`: fairseq's label-smoothed cross-entropy with a teacher beside the labels."""

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import data_utils
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn

from fairseq_kd.multilingual import TranslationMultiLsKdTask, rows_of
from fairseq_kd.schedule import ScheduledTask
from fairseq_kd.settings import Distillation, LsKdConfig, resolve
from fairseq_kd.teacher import Teacher, best_checkpoint, split_paths
from lskd import LskdError, TopK, convert_alpha, fused_distillation
from lskd.checkpoints import file_checksum
from lskd.kernel.fused import LossComponents
from lskd.soft_labels.forms import check_reading
from lskd.terms import divergence, sampled_log_probabilities, top_k_log_probabilities

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
        self._rest_is_default = cfg.kd_rest is None
        self._weights = {"": settings.weight}  # to begin with, by language pair
        if isinstance(task, TranslationMultiLsKdTask) and task.training:
            self._weights = task.pair_weights(settings.weight)
            settings = replace(settings, weight=max(self._weights.values()))
        _check_task(settings, task)
        # fairseq's own formula is Eq. 1 of the paper; other conventions are converted to it.
        eps = convert_alpha(settings.label_smoothing, classes, settings.convention, "paper")
        super().__init__(task, cfg.sentence_avg, eps, cfg.ignore_prefix_size, cfg.report_accuracy)
        self.settings = settings
        self.drawn = 0 < settings.sampled < classes
        # No nn.Module: not in the checkpoint, the optimiser, train() or DDP.
        self.teacher: Teacher | None = None
        self.pair_teachers: dict[str, Teacher] = {}  # of a multilingual student
        self._longest: tuple[int, int] | None = None
        self._ready = False

    @property
    def weights(self) -> dict[str, float]:
        """The teachers' shares by language pair, `""` for the only one; a schedule may have lowered them."""
        return self._weights | getattr(self.task, "kd_weights", {})

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
        weights = self.weights if model.training else {}
        if not any(weights.values()):
            loss, sample_size, log = super().forward(model, sample, reduce=reduce)
            if model.training and self.settings.weight > 0:  # the schedule asks the teacher no more
                tokens = self._tokens(sample)
                log |= {"kd_all_tokens": tokens, "kd_weight": 0 * tokens, "kd_hard_ce": log["loss"]}
            return loss, sample_size, log
        net_output = model(**sample["net_input"])
        like = next(model.parameters())  # under autocast the logits are narrower than the weights
        tokens, sentences = self._tokens(sample), sample["target"].size(0)
        if isinstance(self.task, TranslationMultiLsKdTask):
            terms, taught_tokens, shares = self._distil_pairs(model, net_output[0], sample, weights, like)
        else:
            weight, taught = weights[""], self._teacher_of(sample, like)
            terms = self._terms(net_output[0], sample, weight, taught)
            taught_tokens, shares = tokens, weight * tokens
        own_log = {}
        if self.settings.needs_all_words:  # the terms are of the labels alone
            soft = self._divergence(model, net_output[0], sample, taught)
            terms = terms._replace(loss=weight * soft + (1 - weight) * terms.loss)
            own_log = {"kd_divergence": soft.data}
        sample_size = sentences if self.sentence_avg else sample["ntokens"]
        log = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll,
            "ntokens": sample["ntokens"],
            "nsentences": sentences,
            "sample_size": sample_size,
            "kd_tokens": taught_tokens,
            "kd_all_tokens": tokens,
            "kd_weight": shares,
        }
        log |= {name: getattr(terms, term) for name, term in _TERMS.items()} | own_log
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
        own = ["kd_divergence"] if any("kd_divergence" in log for log in logging_outputs) else []
        for name in (*_TERMS, *own, "kd_weight"):
            tokens = trained if name in _WITHOUT_TEACHER else asked
            bits = 1 if name in ("kd_agreement", "kd_weight") else math.log(2)
            if tokens:
                metrics.log_scalar(name, total(name) / tokens / bits, tokens, round=3)
            elif trained:  # the column stays, and says that nothing was measured
                metrics.log_scalar(name, math.nan, 0, round=3)

    def check_student(self, model: nn.Module, longest: tuple[int, int] | None) -> None:
        """Check the student before the first update, and note the longest sentences that it trains on.

        Raises:
            LskdError: it has an adaptive softmax.
        """
        if self.settings.weight > 0 and getattr(getattr(model, "decoder", None), "adaptive_softmax", None):
            raise LskdError(
                "the student gives no logits over the target dictionary; drop --adaptive-softmax-cutoff"
            )
        self._longest = longest

    def _tokens(self, sample: dict[str, Any]) -> Any:
        """Return how many target tokens the loss is of."""
        skip = self.ignore_prefix_size
        return sample["target"][:, skip:].ne(self.padding_idx).sum() if skip > 0 else sample["ntokens"]

    def _distil_pairs(
        self,
        model: nn.Module,
        logits: Tensor,
        sample: dict[str, Any],
        weights: dict[str, float],
        like: Tensor,
    ) -> tuple[LossComponents, Any, Any]:
        """Return the terms, summed over the tokens, how many are taught, and the teachers' shares of all."""
        parts, taught_tokens, shares = [], 0, 0.0
        for pair, rows in self.task.by_pair(sample):
            own, share = rows_of(sample, rows, self.padding_idx), weights[pair]
            said = logits.index_select(0, rows)
            own["ntokens"] = own["target"].ne(self.padding_idx).sum()
            tokens = self._tokens(own)
            taught_tokens, shares = taught_tokens + (share > 0) * tokens, shares + share * tokens
            if share > 0:
                taught = self._online(self.pair_teachers[pair], own, like)
                parts.append(self._terms(said, own, share, taught))
            else:
                loss, nll = self.compute_loss(model, (said, None), own)
                none = torch.zeros_like(nll)
                parts.append(LossComponents(loss, none, none, none, loss.detach(), nll.detach(), none))
        terms = LossComponents(*(torch.stack(term).sum() for term in zip(*parts, strict=True)))
        return terms, taught_tokens, shares

    def _terms(
        self, logits: Tensor, sample: dict[str, Any], weight: float, teacher: Tensor | TopK
    ) -> LossComponents:
        skip, settings = max(self.ignore_prefix_size, 0), self.settings
        target = sample["target"][:, skip:]
        terms: LossComponents = fused_distillation(
            logits[:, skip:],
            teacher,
            target,
            target.ne(self.padding_idx),
            hard_weight=1.0 if settings.needs_all_words else 1 - weight,
            reduction="sum",
            temperature=settings.temperature,
            temperature_squared=settings.temperature_squared,
            alpha=settings.label_smoothing,
            convention=settings.convention,
        )
        return terms

    def _divergence(
        self, model: nn.Module, logits: Tensor, sample: dict[str, Any], teacher: Tensor | TopK
    ) -> Tensor:
        """Return the divergence that is minimised, its sum over the target tokens.

        Of the student's own sentences it is their mean, taken as often: the weight keeps its meaning.
        """
        settings, skip, share = self.settings, max(self.ignore_prefix_size, 0), 1.0
        if settings.on_policy and float(torch.rand(())) < settings.on_policy:
            own = self._own_sentences(model, sample)
            share, sample = sample["ntokens"] / own["ntokens"], own
            logits = model(**own["net_input"])[0]
            teacher = self._teacher_of(sample, next(model.parameters()))
        assert not isinstance(teacher, TopK)
        counts = sample["target"][:, skip:].ne(self.padding_idx)
        # Picked out before: NaN of padding that is masked after it is NaN in the gradient.
        student, teacher = logits[:, skip:][counts], teacher[counts]
        squared = settings.temperature**2 if settings.temperature_squared else 1.0
        kind, temperature = settings.divergence, settings.temperature
        return share * squared * divergence(student, teacher, kind, temperature).sum()

    def _own_sentences(self, model: nn.Module, sample: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of what the student says to a batch's sources, its words drawn at temperature 1."""
        modes = [(module, module.training) for module in model.modules()]
        drawing = Namespace(beam=1, sampling=True, max_len_a=1.2, max_len_b=10)
        generator = self.task.build_generator([model], drawing)  # puts the student into eval mode
        assert self.teacher is not None  # _check_task
        generator.max_len = min(generator.max_len, self.teacher.longest[1])  # which reads them
        with torch.no_grad():
            said = generator.generate([model], sample)
        for module, training in modes:
            module.training = training
        sentences = [best[0]["tokens"] for best in said]
        pad, eos = self.padding_idx, self.task.target_dictionary.eos()
        target = data_utils.collate_tokens(sentences, pad, eos)
        before = data_utils.collate_tokens(sentences, pad, eos, move_eos_to_beginning=True)
        net_input = {**sample["net_input"], "prev_output_tokens": before}
        return {"target": target, "net_input": net_input, "ntokens": sum(map(len, sentences))}

    def _teacher_of(self, sample: dict[str, Any], like: Tensor) -> Tensor | TopK:
        stored = sample.get("soft_labels")
        if stored is not None:
            skip = max(self.ignore_prefix_size, 0)
            values, ids = stored[0].view(torch.float32), stored[1]
            k = self.settings.top_k or values.shape[-1]
            return TopK(values[:, skip:, :k], ids[:, skip:, :k], self.settings.rest, self.drawn)
        if self.teacher is None:
            raise RuntimeError("the criterion was not put into training mode: call criterion.train()")
        return self._online(self.teacher, sample, like)

    def _online(self, teacher: Teacher, sample: dict[str, Any], like: Tensor) -> Tensor | TopK:
        teacher.to(like)
        spoken = teacher.logits(sample["net_input"])[:, max(self.ignore_prefix_size, 0) :]
        if self.settings.sampled:
            points = torch.rand(spoken.shape[:-1], device=spoken.device)
            return TopK(*sampled_log_probabilities(spoken, self.settings.sampled, points), sampled=self.drawn)
        if self.settings.top_k:
            return TopK(*top_k_log_probabilities(spoken, self.settings.top_k), self.settings.rest)
        return spoken

    def _prepare(self) -> None:
        """Load the teacher, or compare the stored one with the flags, and begin the schedule."""
        settings, known = self.settings, None
        if settings.weight == 0:
            return
        if isinstance(self.task, TranslationMultiLsKdTask):
            assert settings.teacher is not None  # _check_task
            taught = [pair for pair, weight in self._weights.items() if weight]
            self.pair_teachers = self.task.load_teachers(settings.teacher, taught, self._longest)
            if settings.schedule != "fixed":
                for pair, teacher in self.pair_teachers.items():
                    self.task.begin_schedule(
                        self._weights[pair],
                        settings.schedule,
                        settings.interval,
                        pair=pair,
                        teacher=teacher.checksum,
                    )
            return
        stored = getattr(self.task, "soft_labels", None)
        if stored is not None:
            drawn = stored.layout.k if stored.layout.sampled else 0
            if drawn and self._rest_is_default:
                self.settings = settings = replace(settings, rest="renormalise")
            check_reading(stored.path, stored.layout, settings.temperature, settings.rest)
            if settings.sampled not in (0, drawn) or (
                drawn and (settings.top_k or settings.rest != "renormalise")
            ):
                raise LskdError(
                    f"the soft labels in {stored.path} are {stored.layout.kept}; drop --kd-sampled, "
                    "--kd-top-k and --kd-rest, or write others"
                )
            self.drawn = 0 < drawn < stored.layout.num_classes
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
            pairs = self.task.datasets[cfg.train_subset]
            self.teacher.check_lengths(pairs, self._longest)
            self.teacher.check_sense(pairs)
            known = self.teacher.bleu
        if settings.schedule == "fixed":
            return
        bleu = known if settings.teacher_bleu is None else settings.teacher_bleu
        if bleu is None:
            raise LskdError(
                f"--kd-alpha-schedule {settings.schedule} needs the teacher's validation BLEU, which "
                "its checkpoint does not say (it was chosen by another metric); give --kd-teacher-bleu"
            )
        self.task.begin_schedule(settings.weight, settings.schedule, settings.interval, teacher_bleu=bleu)


def _check_task(settings: Distillation, task: Any) -> None:
    if settings.weight == 0:
        return
    if isinstance(task, TranslationMultiLsKdTask):
        if settings.teacher is None:
            raise LskdError(
                "--task translation_multi_ls_kd needs --kd-teacher de-en=FILE,..., or --kd-weight 0"
            )
        if settings.needs_all_words:
            raise LskdError(f"--task translation_multi_ls_kd has no {settings.needs_all_words}; leave it out")
        if settings.teacher_bleu is not None:
            raise LskdError(
                "--task translation_multi_ls_kd measures its teachers in the first validation; "
                "leave out --kd-teacher-bleu"
            )
        _check_schedule(settings, task.args)
        return
    if not isinstance(task, TranslationTask):
        raise LskdError(
            f"--criterion ls_kd distils translation, and the task is {type(task).__name__}; "
            "give --task translation, translation_ls_kd or translation_multi_ls_kd, or --kd-weight 0"
        )
    if settings.teacher is None and not getattr(task.cfg, "kd_soft_labels", None):
        raise LskdError(
            "--criterion ls_kd has no teacher: give --kd-teacher FILE, or --task translation_ls_kd "
            "--kd-soft-labels DIR, or --kd-weight 0"
        )
    if settings.needs_all_words and getattr(task.cfg, "kd_soft_labels", None):
        raise LskdError(
            f"{settings.needs_all_words} needs all of the teacher's words; give --kd-teacher in the place of "
            "--kd-soft-labels"
        )
    if settings.schedule != "fixed" and not isinstance(task, ScheduledTask):
        raise LskdError(
            f"--kd-alpha-schedule {settings.schedule} needs --task translation_ls_kd, which keeps its state "
            "in the checkpoint"
        )
    _check_schedule(settings, task.cfg)


def _check_schedule(settings: Distillation, flags: Any) -> None:
    """Check the flags of a task whose weight a schedule lowers."""
    if settings.schedule == "fixed":
        return
    schedule = f"--kd-alpha-schedule {settings.schedule}"
    if not flags.eval_bleu:
        raise LskdError(f"{schedule} goes by validation BLEU; add --eval-bleu and its arguments")
    subset = flags.valid_subset
    if "," in subset or subset.startswith("test"):
        raise LskdError(f"{schedule} goes by one validation set, never by test; --valid-subset is '{subset}'")
