"""Sentence pairs with what the teacher said about each target token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import BaseWrapperDataset, LanguagePairDataset, data_utils
from torch import Tensor

from lskd import SoftLabels, SoftLabelsError
from lskd.checkpoints import file_checksum


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
        dataset: the sentence pairs.
        labels: their soft labels; the key is the sentence's place in the data-bin.

    Raises:
        SoftLabelsError: unfinished, or of sentences of other lengths.
    """

    def __init__(self, dataset: LanguagePairDataset, labels: SoftLabels) -> None:
        """Check that the labels are of these sentences."""
        super().__init__(dataset)
        self.labels = labels
        if not labels.complete:
            raise SoftLabelsError(
                f"the soft labels in {labels.path} are unfinished: {len(labels)} of {labels.layout.samples} "
                "sentences; run python -m fairseq_kd.soft_labels again, it goes on from there"
            )
        if len(labels) != len(dataset):
            raise SoftLabelsError(
                f"the soft labels in {labels.path} are of {len(labels)} sentences, this data-bin has "
                f"{len(dataset)}; write them for this one"
            )
        lengths = labels.lengths()
        if ((lengths != dataset.tgt_sizes) & (lengths != 0)).any():
            raise SoftLabelsError(
                f"the soft labels in {labels.path} are of other sentences; write them for these"
            )

    def collater(self, samples: Sequence[dict[str, Any]], pad_to_length: Any = None) -> dict[str, Any]:
        """Collate as fairseq does, and add ``soft_labels``: values and ids ``(batch, target length, k)``.

        The values are float32, seen as int32: fairseq casts a batch's float32 to the student's precision.
        """
        batch: dict[str, Any] = self.dataset.collater(samples, pad_to_length=pad_to_length)
        if batch.get("target") is not None:
            batch["soft_labels"] = self._rows_of(batch["id"].tolist(), batch["target"])
        return batch

    def _rows_of(self, keys: list[int], target: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*target.shape, self.labels.layout.k)
        values = np.zeros(shape, np.float32)
        ids = np.zeros(shape, np.int64)
        for row, key in enumerate(keys):
            stored = self.labels[key]
            length = len(stored.ids)
            if length == 0:
                raise SoftLabelsError(
                    f"sentence {key} was too long for the teacher of {self.labels.path}; train with its "
                    "--max-source-positions and --max-target-positions"
                )
            place = slice(-length, None) if self.dataset.left_pad_target else slice(0, length)
            values[row, place], ids[row, place] = stored.values, stored.ids
        return torch.from_numpy(values).view(torch.int32), torch.from_numpy(ids)


def data_identity(data: str, subset: str, source: str, target: str) -> dict[str, Any]:
    """Return what soft labels must agree in with a data-bin: languages, dictionaries, sentences.

    Raises:
        SoftLabelsError: for several data-bins, or files that are not there.
    """
    if ":" in data:
        raise SoftLabelsError(f"soft labels are of one data-bin; '{data}' names several")
    folder = Path(data)
    pair = next(
        (
            pair
            for pair in (f"{source}-{target}", f"{target}-{source}")
            if _files(folder, subset, pair, source)
        ),
        None,
    )
    if pair is None:
        raise SoftLabelsError(
            f"{folder} has no {subset}.{source}-{target}.{source}.bin; check data-bin and subset"
        )
    files = {
        "source_dictionary": folder / f"dict.{source}.txt",
        "target_dictionary": folder / f"dict.{target}.txt",
        "source_sentences": folder / f"{subset}.{pair}.{source}.bin",
        "target_sentences": folder / f"{subset}.{pair}.{target}.bin",
    }
    checksums = {name: file_checksum(path) for name, path in files.items()}
    return {"subset": subset, "source": source, "target": target} | checksums


def _files(folder: Path, subset: str, pair: str, language: str) -> bool:
    return (folder / f"{subset}.{pair}.{language}.bin").is_file()
