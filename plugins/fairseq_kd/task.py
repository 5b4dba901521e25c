"""The task `translation_ls_kd`: translation that reads soft labels and keeps the teacher's weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import BaseWrapperDataset, LanguagePairDataset, data_utils
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from fairseq_kd.schedule import ScheduledTask
from lskd import LskdError, SoftLabels, SoftLabelsError
from lskd.checkpoints import file_checksum
from lskd.soft_labels.remote import local_folder


class SteadyPairs(BaseWrapperDataset):
    """Sentence pairs whose batches are the same ones in every epoch, also in a run that goes on.

    fairseq composes the batches of a new run once, and those of a continued run anew from its epoch's number:
    its curve is another one then.

    Attributes:
        order_seed: set by the task when batches are asked for.
    """

    order_seed = 1

    def ordered_indices(self) -> Any:
        """Return the sentences in the order of which batches are cut."""
        with data_utils.numpy_seed(self.order_seed):
            return self.dataset.ordered_indices()

    def num_tokens_vec(self, indices: Any) -> Any:
        """Return the number of tokens of each, as the pairs do."""
        return self.dataset.num_tokens_vec(indices)


class SoftLabelledPairs(SteadyPairs):
    """A :class:`LanguagePairDataset` whose batches have ``soft_labels``, padded to the target's shape.

    Args:
        labels: soft labels of the sentence pairs; the key is the sentence's place in the data-bin.

    Raises:
        SoftLabelsError: unfinished, or of sentences of other lengths.
    """

    def __init__(self, dataset: LanguagePairDataset, labels: SoftLabels) -> None:
        super().__init__(dataset)
        self.labels = labels
        about = f"the soft labels in {labels.path} are"
        if not labels.complete:
            raise SoftLabelsError(
                f"{about} unfinished: {len(labels)} of {labels.layout.samples} sentences; run "
                "python -m fairseq_kd.soft_labels again, it goes on from there"
            )
        if len(labels) != len(dataset):
            other = f"of {len(labels)} sentences, this data-bin has {len(dataset)}"
            raise SoftLabelsError(f"{about} {other}; write them for this one")
        lengths = labels.lengths()
        self._unread = lengths == 0
        if ((lengths != dataset.tgt_sizes) & ~self._unread).any():
            raise SoftLabelsError(f"{about} of other sentences; write them for these")

    def filter_indices_by_size(self, indices: Any, max_sizes: Any) -> tuple[Any, list[int]]:
        """Leave out sentences that are too long, as the pairs do.

        Raises:
            SoftLabelsError: one that is left was too long for the teacher.
        """
        kept, ignored = super().filter_indices_by_size(indices, max_sizes)
        if len(unread := kept[self._unread[kept]]):
            limit = self.sizes[unread].max(1).min() - 1
            raise SoftLabelsError(
                f"{len(unread)} training sentences were too long for the teacher of {self.labels.path}; "
                f"leave them out: --max-source-positions {limit} --max-target-positions {limit}"
            )
        return kept, ignored

    def collater(self, samples: Sequence[dict[str, Any]], pad_to_length: Any = None) -> dict[str, Any]:
        """Collate as fairseq does, and add ``soft_labels``: values and ids ``(batch, target length, k)``.

        The values are float32, seen as int32: fairseq casts a batch's float32 to the student's precision.
        """
        batch: dict[str, Any] = self.dataset.collater(samples, pad_to_length=pad_to_length)
        if batch.get("target") is None:
            return batch
        shape = (*batch["target"].shape, self.labels.layout.k)
        values, ids = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for row, key in enumerate(batch["id"].tolist()):
            stored = self.labels[key]
            length = len(stored.ids)
            place = slice(-length, None) if self.dataset.left_pad_target else slice(0, length)
            values[row, place], ids[row, place] = stored.values, stored.ids
        batch["soft_labels"] = torch.from_numpy(values).view(torch.int32), torch.from_numpy(ids)
        return batch


def language_pair(data: str, subset: str, source: str, target: str) -> str:
    """Return the languages as a data-bin's files of a subset name them: "de-en", or the other way round.

    Raises:
        SoftLabelsError: for several data-bins, or files that are not there.
    """
    if ":" in data:
        raise SoftLabelsError(f"soft labels are of one data-bin; '{data}' names several")
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        if Path(data, f"{subset}.{pair}.{source}.bin").is_file():
            return pair
    raise SoftLabelsError(
        f"{Path(data)} has no {subset}.{source}-{target}.{source}.bin; check data-bin and subset"
    )


def data_identity(data: str, subset: str, source: str, target: str) -> dict[str, Any]:
    """Return what soft labels must agree in with a data-bin: languages, dictionaries, sentences.

    Raises:
        SoftLabelsError: for several data-bins, or files that are not there.
    """
    pair = language_pair(data, subset, source, target)
    identity: dict[str, Any] = {"subset": subset, "source": source, "target": target}
    for what, name in (("dictionary", "dict.{}.txt"), ("sentences", f"{subset}.{pair}.{{}}.bin")):
        for side, language in (("source", source), ("target", target)):
            identity[f"{side}_{what}"] = file_checksum(Path(data, name.format(language)))
    return identity


@dataclass
class TranslationLsKdConfig(TranslationConfig):
    """Flags of `--task translation_ls_kd`, beside those of `translation`."""

    kd_soft_labels: Optional[str] = field(  # noqa: UP045 - fairseq's parser does not know X | None
        default=None,
        metadata={
            "help": "folder that python -m fairseq_kd.soft_labels wrote for the training set, or its URL"
        },
    )
    kd_soft_labels_cache: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "where --kd-soft-labels URL is copied to (default: in the user's cache folder)"},
    )
    valid_subset: str = II("dataset.valid_subset")


@register_task("translation_ls_kd", dataclass=TranslationLsKdConfig)
class TranslationLsKdTask(ScheduledTask, TranslationTask):
    """Translation whose training set may have soft labels, and whose checkpoint has the schedule's state.

    Attributes:
        soft_labels: of the training set, when it is loaded.
    """

    def __init__(self, cfg: TranslationLsKdConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self.soft_labels: SoftLabels | None = None

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load a split; the training set of a training run with its soft labels.

        Raises:
            LskdError: soft labels that are missing, damaged, unfinished or of something else.
        """
        training = split == self.cfg.train_subset and "task_cfg" not in kwargs  # which evaluation passes
        if not (training and self.cfg.kd_soft_labels):
            super().load_dataset(split, epoch, combine, **kwargs)
            if training:
                self.datasets[split] = SteadyPairs(self.datasets[split])
            return
        # Soft labels are of one file of sentences; train1, train2, ... would follow under the same numbers.
        super().load_dataset(split, epoch, False, **kwargs)
        if self.soft_labels is None:
            cfg = self.cfg
            expected = {"data": data_identity(cfg.data, split, cfg.source_lang, cfg.target_lang)}
            if cfg.truncate_source:
                raise LskdError(
                    "--truncate-source changes what the teacher read; soft labels are of whole sentences"
                )
            folder = local_folder(cfg.kd_soft_labels, cfg.kd_soft_labels_cache)
            self.soft_labels = SoftLabels(folder, expected)
        self.datasets[split] = SoftLabelledPairs(self.datasets[split], self.soft_labels)

    def get_batch_iterator(self, dataset: Any, *args: Any, seed: int = 1, **kwargs: Any) -> Any:
        """Return batches as fairseq does; a run that goes on gets those of an unbroken one."""
        if isinstance(dataset, SteadyPairs):
            dataset.order_seed = seed + 1  # what fairseq orders a new run's first epoch with
        return super().get_batch_iterator(dataset, *args, seed=seed, **kwargs)
