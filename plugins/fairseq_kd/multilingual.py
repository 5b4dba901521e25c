"""The task `translation_multi_ls_kd`: several language pairs, a teacher, a weight and a schedule for each.

What Tan et al. (ICLR 2019) distil: one bilingual teacher per pair, one multilingual student.
"""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import BaseWrapperDataset, encoders
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation import EVAL_BLEU_ORDER, TranslationConfig, TranslationTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from torch import Tensor

from fairseq_kd.safe_loading import setting
from fairseq_kd.schedule import ScheduledTask
from fairseq_kd.teacher import Teacher
from lskd import CheckpointError, LskdError
from lskd.base.files import parse_json
from lskd.errors import one_line

# What decides which words a model reads beside the sentence.
_READ = ("langs", "encoder_langtok", "decoder_langtok", "lang_tok_style", "lang_tok_replacing_bos_eos")

_BleuConfig = make_dataclass(  # those flags of `translation` that are about BLEU
    "_BleuConfig",
    [
        (flag.name, flag.type, field(default=flag.default, metadata=flag.metadata))
        for flag in fields(TranslationConfig)
        if flag.name.startswith("eval_")
    ],
    bases=(FairseqDataclass,),
)


class PairNumbered(BaseWrapperDataset):
    """Sentences of one language pair; batches mix pairs, and ids say which: ``id * pairs + number``."""

    def __init__(self, dataset: Any, number: int, pairs: int) -> None:
        super().__init__(dataset)
        self.number, self.pairs = number, pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sentence pair with its number."""
        sentence = dict(self.dataset[index])
        sentence["id"] = int(sentence["id"]) * self.pairs + self.number
        return sentence

    def collater(self, samples: list[dict[str, Any]], **extra: Any) -> Any:
        """Collate as the pairs do, with `pad_to_length` too."""
        return self.dataset.collater(samples, **extra)


@register_task("translation_multi_ls_kd")
class TranslationMultiLsKdTask(ScheduledTask, TranslationMultiSimpleEpochTask):
    """`translation_multi_simple_epoch` whose batches say of which language pair each sentence is.

    Validation has the BLEU of each pair, and once that of its teacher where a schedule waits for it.
    """

    @staticmethod
    def add_args(parser: Any) -> None:
        """Add the task's flags, those of `translation` for BLEU, and a weight for each pair."""
        TranslationMultiSimpleEpochTask.add_args(parser)
        gen_parser_from_dataclass(parser, _BleuConfig())
        parser.add_argument(
            "--kd-pair-weights",
            default=None,
            metavar="de-en=W,...",
            help="the teacher's share of the loss by language pair (default: --kd-weight for all)",
        )

    def __init__(self, args: Any, langs: Any, dicts: Any, training: bool) -> None:
        super().__init__(args, langs, dicts, training)
        others = sorted(set(self.data_manager.extra_lang_pairs) - set(self.lang_pairs))
        if training and others:
            raise LskdError(
                f"--extra-lang-pairs has {', '.join(others)}, which --lang-pairs has not; add them there, "
                "each with its teacher"
            )
        if args.eval_bleu:
            try:
                self._search = Namespace(**parse_json(args.eval_bleu_args))
                own = Namespace(tokenizer=args.eval_bleu_detok, **parse_json(args.eval_bleu_detok_args))
            except (TypeError, ValueError) as error:
                raise LskdError(
                    f"--eval-bleu-args or --eval-bleu-detok-args is no JSON object ({one_line(error)}); "
                    "write it as '{\"beam\": 4}'"
                ) from None
            self._detokeniser = encoders.build_tokenizer(own)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load a split, and in training number its sentences by pair."""
        super().load_dataset(split, epoch, combine, **kwargs)
        if not self.training:
            return
        mixed: Any = self.datasets[split]
        keys: list[str] = getattr(mixed, "keys", None) or self.lang_pairs  # "main:de-en", or the pairs alone
        pairs = [key.rpartition(":")[2] for key in keys]
        mixed.datasets = [
            one
            if isinstance(one, PairNumbered)
            else PairNumbered(one, self.lang_pairs.index(pair), len(self.lang_pairs))
            for pair, one in zip(pairs, mixed.datasets, strict=True)
        ]

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Return loss, sample size and what is logged, with what each pair's BLEU is made of."""
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        if not self.args.eval_bleu:
            return loss, sample_size, log
        said = {pair: {"": [model]} for pair in self.lang_pairs}
        for pair, teacher in getattr(criterion, "pair_teachers", {}).items():
            if pair in self.kd_state and "teacher_bleu" not in self.kd_state[pair]:
                teacher.to(next(model.parameters()))
                said[pair]["_teacher"] = teacher.models
        # The same names in every process, whatever pairs its batch has.
        none = torch.zeros(2 * EVAL_BLEU_ORDER + 2)
        log |= {f"_bleu_{pair}{whose}": none for pair in said for whose in said[pair]}
        for pair, rows in self.by_pair(sample):
            own = rows_of(sample, rows, self.source_dictionary.pad())
            for whose, models in said[pair].items():
                found = self._bleu(own, pair, models)
                parts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
                log[f"_bleu_{pair}{whose}"] = torch.tensor(parts, dtype=none.dtype)
        return loss, sample_size, log

    def reduce_metrics(self, logging_outputs: Iterable[Mapping[str, Any]], criterion: Any) -> None:
        """Log as fairseq does; in validation each pair's BLEU, in training the weights of the schedules."""
        logging_outputs = list(logging_outputs)
        super().reduce_metrics(logging_outputs, criterion)
        parts = {name for log in logging_outputs for name in log if name.startswith("_bleu_")}
        for name in sorted(parts):  # fairseq shows none that begins so
            total = torch.stack([log[name] for log in logging_outputs]).sum(0)
            if not total[-1]:  # no word to translate into: no sentence of the pair
                continue
            metrics.log_scalar(name, total.double().cpu().numpy())
            metrics.log_derived(name[1:], partial(_bleu_of, name))
        if not parts:
            for pair, weight in self.kd_weights.items():
                metrics.log_scalar(f"kd_weight_{pair}", weight, round=3)

    def _bleu(self, sample: dict[str, Any], pair: str, models: Sequence[Any]) -> Any:
        """Return sacrebleu's score of a batch of one pair, decoded as `translation` decodes in validation."""
        dictionary = self.target_dictionary
        self.args.target_lang = pair.partition("-")[2]  # what fairseq decodes into; None in training
        try:
            generator = self.build_generator(models, self._search)
            string = partial(
                dictionary.string, extra_symbols_to_ignore=generator.symbols_to_strip_from_output
            )
            translation = SimpleNamespace(
                cfg=self.args,
                tgt_dict=SimpleNamespace(string=string, pad=dictionary.pad),
                tokenizer=self._detokeniser,
                inference_step=self.inference_step,
            )
            return TranslationTask._inference_with_bleu(translation, generator, sample, models[0])
        finally:
            self.args.target_lang = None

    def by_pair(self, sample: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the language pairs of a batch, and the rows that are of each."""
        numbers = sample["id"] % len(self.lang_pairs)
        for number, pair in enumerate(self.lang_pairs):
            rows = (numbers == number).nonzero().squeeze(-1)
            if len(rows):
                yield pair, rows

    def pair_weights(self, weight: float) -> dict[str, float]:
        """Return the teacher's share by language pair.

        Args:
            weight: of the pairs that `--kd-pair-weights` does not name.

        Raises:
            LskdError: a pair that is not trained, or a weight that is none.
        """
        weights = dict.fromkeys(self.lang_pairs, weight)
        given = self._by_name("--kd-pair-weights", self.args.kd_pair_weights or "")
        for pair, text in given.items():
            try:
                weights[pair] = float(text)
            except ValueError:
                weights[pair] = -1.0
            if not 0 <= weights[pair] <= 1:
                raise LskdError(f"--kd-pair-weights has {pair}={text}; a weight is a number from 0 to 1")
        return weights

    def load_teachers(
        self, text: str, taught: Sequence[str], longest: tuple[int, int] | None
    ) -> dict[str, Teacher]:
        """Load a teacher for each language pair that is taught.

        Args:
            text: `--kd-teacher`, as `de-en=FILE,fr-en=FILE`.
            taught: the pairs in which a teacher has a share.
            longest: the source and the target that the student trains on; None: of any length.

        Raises:
            LskdError: a pair without a teacher, or a teacher that cannot teach it.
        """
        paths = self._by_name("--kd-teacher", text)
        if missing := [pair for pair in taught if pair not in paths]:
            raise LskdError(
                f"--kd-teacher names none for {', '.join(missing)}; give one for each language pair, as "
                f"{','.join(f'{pair}=FILE' for pair in taught)}"
            )
        teachers = {}
        for pair in taught:
            check = partial(self._check_reading, pair)
            teachers[pair] = Teacher([paths[pair]], self.args.data, None, None, task=self, check=check)
        mixed = self.datasets[self.args.train_subset]
        for key, sentences in zip(mixed.keys, mixed.datasets, strict=True):
            if teacher := teachers.get(key.rpartition(":")[2]):
                teacher.check_lengths(sentences, longest)
                teacher.check_sense(sentences)
        return teachers

    def _check_reading(self, pair: str, path: Path, theirs: Any) -> None:
        """Compare a checkpoint's settings; before its dictionary, to which their language tokens belong."""
        trained = setting(theirs, "lang_pairs") or ()
        trained = trained.split(",") if isinstance(trained, str) else list(trained)
        if pair not in trained:
            raise CheckpointError(
                f"teacher {path} was trained on {', '.join(trained) or 'no --lang-pairs'}, "
                f"not on {pair}; give one of translation_multi_simple_epoch for it"
            )
        for name in _READ:
            one, other = setting(theirs, name), getattr(self.args, name)
            if name == "langs" and isinstance(one, Sequence) and not isinstance(one, str):
                one = list(one)
            if one != other:
                flag = "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"teacher {path} was trained with {flag} {one}, the student has {other}: "
                    "they would read other words; train it by translation_multi_simple_epoch with these flags"
                )

    def _by_name(self, flag: str, text: str) -> dict[str, str]:
        """Split `de-en=A,fr-en=B`."""
        found = {}
        for part in filter(None, text.split(",")):
            pair, _, value = part.partition("=")
            if pair not in self.lang_pairs or not value or pair in found:
                raise LskdError(
                    f"{flag} has '{part}'; give each of {', '.join(self.lang_pairs)} once, as "
                    f"{self.lang_pairs[0]}=..., separated by commas"
                )
            found[pair] = value
        return found


def rows_of(sample: Mapping[str, Any], rows: Tensor, pad: int) -> dict[str, Any]:
    """Return what the teacher and the loss read of a batch, of some of its rows.

    Their sources are as wide as the longest of them, not of the batch: fairseq's LSTM reads no others.
    """
    net_input = {
        name: part.index_select(0, rows) if torch.is_tensor(part) else part
        for name, part in sample["net_input"].items()
    }
    sources = net_input["src_tokens"]
    net_input["src_tokens"] = sources[:, sources.ne(pad).any(0)]
    return {"target": sample["target"].index_select(0, rows), "net_input": net_input}


def _bleu_of(name: str, meters: Mapping[str, Any]) -> float:
    """Return BLEU from what is added up for it, rounded as fairseq's own."""
    from sacrebleu.metrics.bleu import BLEU

    *sums, said, wanted = (int(part) for part in meters[name].sum)
    counts, totals = sums[:EVAL_BLEU_ORDER], sums[EVAL_BLEU_ORDER:]
    return round(float(BLEU.compute_bleu(counts, totals, said, wanted, smooth_method="exp").score), 2)
