"""The task `translation_multi_ls_kd`: a student of several language pairs, a teacher and a weight for each.

What Tan et al. (ICLR 2019) distil: one bilingual teacher per pair, one multilingual student.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fairseq.data import BaseWrapperDataset
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from torch import Tensor

from fairseq_kd.safe_loading import setting
from fairseq_kd.teacher import Teacher
from lskd import CheckpointError, LskdError

# What decides which words a model reads beside the sentence.
_READ = ("langs", "encoder_langtok", "decoder_langtok", "lang_tok_style", "lang_tok_replacing_bos_eos")


class PairNumbered(BaseWrapperDataset):
    """Sentences of one language pair whose ids are ``id * pairs + number``: batches mix pairs.

    Args:
        dataset: the sentence pairs.
        number: of the language pair.
        pairs: how many there are.
    """

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
class TranslationMultiLsKdTask(TranslationMultiSimpleEpochTask):
    """`translation_multi_simple_epoch` whose training batches say of which language pair each sentence is."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Add the task's flags, and a weight for each pair."""
        TranslationMultiSimpleEpochTask.add_args(parser)
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

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load a split, and number the training set's sentences by pair."""
        super().load_dataset(split, epoch, combine, **kwargs)
        if not self.training or split != self.args.train_subset:
            return
        mixed = self.datasets[split]
        mixed.datasets = [
            one
            if isinstance(one, PairNumbered)
            else PairNumbered(one, self.lang_pairs.index(key.rpartition(":")[2]), len(self.lang_pairs))
            for key, one in zip(mixed.keys, mixed.datasets, strict=True)
        ]

    def by_pair(self, sample: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the language pairs of a training batch, and the rows that are of each."""
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

    def load_teachers(self, text: str, taught: Sequence[str]) -> dict[str, Teacher]:
        """Load a teacher for each language pair that is taught.

        Args:
            text: `--kd-teacher`, as `de-en=FILE,fr-en=FILE`.
            taught: the pairs in which a teacher has a share.

        Raises:
            LskdError: a pair without a teacher, or a teacher that cannot teach it.
        """
        paths = self._by_name("--kd-teacher", text)
        if missing := [pair for pair in taught if pair not in paths]:
            raise LskdError(
                f"--kd-teacher names none for {', '.join(missing)}; give one for each language pair, as "
                f"{','.join(f'{pair}=FILE' for pair in taught)}"
            )
        mixed = self.datasets[self.args.train_subset]
        sentences = {key.rpartition(":")[2]: one for key, one in zip(mixed.keys, mixed.datasets, strict=True)}
        teachers = {}
        for pair in taught:
            teachers[pair] = teacher = Teacher([paths[pair]], self.args.data, None, None, task=self)
            self._check_reading(teacher, pair)
            teacher.check_sense(sentences[pair])
        return teachers

    def _check_reading(self, teacher: Teacher, pair: str) -> None:
        theirs = teacher.settings.task
        trained = setting(theirs, "lang_pairs") or ()
        trained = trained.split(",") if isinstance(trained, str) else list(trained)
        if pair not in trained:
            raise CheckpointError(
                f"teacher {teacher.paths[0]} was trained on {', '.join(trained) or 'no --lang-pairs'}, "
                f"not on {pair}; give one of translation_multi_simple_epoch for it"
            )
        for name in _READ:
            one, other = setting(theirs, name), getattr(self.args, name)
            if name == "langs" and isinstance(one, Sequence) and not isinstance(one, str):
                one = list(one)
            if one != other:
                flag = "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"teacher {teacher.paths[0]} was trained with {flag} {one}, the student has {other}: "
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


def rows_of(sample: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return what the teacher and the loss read of a batch, of some of its rows."""
    net_input = {
        name: part.index_select(0, rows) if torch.is_tensor(part) else part
        for name, part in sample["net_input"].items()
    }
    return {"target": sample["target"].index_select(0, rows), "net_input": net_input}
