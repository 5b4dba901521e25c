"""The teacher's words from a store: read where they are there, asked for and stored where not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import default_collate
from mmengine.dist import get_dist_info
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lskd import (
    RowCollector,
    SoftLabels,
    SoftLabelsError,
    SoftLabelsLayout,
    SoftLabelsWriter,
    TopK,
    augmentation_seed,
    stored_form,
    teacher_form,
)
from mmcls_bnn.replay import KeyedImages, SeededPipeline, keys_of
from mmcls_bnn.soft_label_settings import SoftLabelSettings

# How far two answers to one image may be apart, in nats per nat: other kernels, half precision.
TOLERANCE = {"float32": 0.01, "float16": 0.02, "autocast": 0.1}
_LEAST = -15.0  # log-probabilities below are as good as none


class StoredTeacher:
    """What one process of a run has of a store. Every process calls the same methods in the same order.

    Args:
        settings: what the recipe says.
        layout: of the store.
        identity: what it must belong to.
        model: the student, an LsKdClassifier, which loads the teacher when it is needed.
        dataset: the training images, with a :class:`SeededPipeline`.
        amp: whether the teacher runs in mixed precision.

    Attributes:
        keys: how many are stored.
        needs_no_teacher: all that this run asks for is stored.

    Raises:
        SoftLabelsError: the store belongs to another run, or is damaged.
    """

    def __init__(
        self,
        settings: SoftLabelSettings,
        layout: SoftLabelsLayout,
        identity: dict[str, Any],
        model: Any,
        dataset: Any,
        amp: bool = False,
    ) -> None:
        """Look at what is there."""
        self.settings, self.layout, self.identity = settings, layout, identity
        self.dataset, self._model, self._amp = dataset, model, amp
        self.rank, self.processes = get_dist_info()
        self.path = Path(settings.path)
        self.keys, self.epoch = 0, 0
        self._failed = False
        self._labels: SoftLabels | None = None
        self._writer: SoftLabelsWriter | None = None
        self._collector: RowCollector | None = None
        if (self.path / "manifest.json").exists():
            self._labels = SoftLabels(self.path, expected=identity)
            self.keys = len(self._labels)
        self.needs_no_teacher = self.covers(layout.epochs) and not settings.verify
        self._agree(None)  # nobody writes before all have looked

    @property
    def epochs(self) -> int:
        """How many epochs are stored, whole ones."""
        return self.keys // max(self.layout.samples, 1)

    def covers(self, epochs: int) -> bool:
        """Whether that many epochs are stored, so that no teacher is needed for them."""
        return self.epochs >= epochs

    def describe(self) -> str:
        """Say in one line what is there."""
        layout = self.layout
        kept = "all" if layout.k == layout.num_classes else f"top {layout.k} of"
        return (
            f"soft labels {self.path}: {kept} {layout.num_classes} classes, {layout.values}; {self.epochs} "
            f"epoch(s) of {layout.samples} images stored; augmentation from seed {self.settings.seed}"
        )

    def open_writer(self) -> None:
        """Become the one who writes, or fail.

        Raises:
            SoftLabelsError: another run writes, or the folder cannot be written.
        """
        if self._collector is not None:
            return
        error = None
        if self.rank == 0:
            try:
                self._writer = SoftLabelsWriter(self.path, self.layout, self.identity)
                RowCollector(self.path, self.layout).clear()
                if self._writer.keys != self.keys:
                    error = f"{self.path} was written by another run meanwhile; start again"
            except SoftLabelsError as caught:
                error = str(caught)
        if error := self._agree(error):
            self.close()
            raise SoftLabelsError(error)
        self._collector = RowCollector(self.path, self.layout, self.rank)

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is trained next; epochs before it that are not stored are asked for now.

        Raises:
            SoftLabelsError: the disk cannot take them, and the run is to stop then.
        """
        self.epoch = epoch
        self._pipeline.set_epoch(epoch)
        if self.covers(epoch + 1) or self._failed:
            return
        self.open_writer()
        if not self.covers(epoch):
            self.complete(epoch * self.layout.samples)

    def answer(self, inputs: Tensor, data_samples: list[Any]) -> Tensor | TopK:
        """Return what the teacher says about a training batch, in the form that every student gets.

        Args:
            inputs: images `(B, C, H, W)`, normalised.
            data_samples: B samples of the seeded pipeline.

        Raises:
            SoftLabelsError: damaged rows, or the disk cannot take more, and the run is to stop then.
        """
        keys = keys_of(data_samples)
        if self._labels is not None and int(keys.max()) < len(self._labels):
            rows = self._labels.take(keys.numpy())
            self._check_seeds(keys.numpy(), rows.seeds)
            values = torch.from_numpy(np.ascontiguousarray(rows.values))
            ids = torch.from_numpy(rows.ids.astype(np.int64))
            values, ids = values.to(inputs.device), ids.to(inputs.device)
        else:
            values, ids = stored_form(self._model.load_teacher()(inputs), self.layout)
            if self._collector is not None and not self._failed:
                try:
                    self._add(self._collector, keys.numpy(), values, ids)
                except SoftLabelsError as error:
                    self._fail(str(error))
        return teacher_form(values, ids, self.layout.num_classes, self.settings.rest)

    def end_epoch(self) -> None:
        """Ask about images that the epoch left out, and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self._collector is not None and not self.covers(self.epoch + 1):
            self.complete((self.epoch + 1) * self.layout.samples)

    def complete(self, stop: int, batch_size: int = 64, workers: int = 0) -> None:
        """Store all keys before `stop`: what was collected, and what the teacher now says about the rest.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        collector = self._collector
        assert collector is not None
        self._flush(collector)
        if self._any_failed():
            return
        missing = collector.missing(self.keys, stop)[self.rank :: self.processes]
        self._agree(None)  # nobody adds what is missing before all have looked
        try:
            for keys, values, ids in self.answers(missing, batch_size, workers):
                self._add(collector, keys, values, ids)
        except SoftLabelsError as caught:
            self._fail(str(caught))
        self._flush(collector)
        if self._any_failed():
            return
        error = None
        if self._writer is not None:
            try:
                collector.append_to(self._writer, stop)
            except SoftLabelsError as caught:
                error = str(caught)
        if error := self._agree(error):
            self._fail(error)
            return
        collector.restart()
        self.keys = stop

    def write_ahead(
        self, stop: int, batch_size: int, workers: int, progress: Callable[[int], Any] = lambda n: None
    ) -> None:
        """Store all keys before `stop` in their order, without training; one process.

        Raises:
            SoftLabelsError: the disk cannot take it; what was committed stays.
        """
        self.open_writer()
        writer = self._writer
        assert writer is not None
        for keys, values, ids in self.answers(np.arange(writer.keys, stop), batch_size, workers):
            writer.append(values.cpu().numpy(), ids.cpu().numpy(), seeds=self._seeds(keys))
            progress(len(keys))
        writer.commit()
        self.keys = writer.keys

    def answers(
        self, keys: Any, batch_size: int = 64, workers: int = 0
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Ask the teacher about keys: yields some of them `(n,)`, and values and ids `(n, k)` as stored."""
        if not len(keys):
            return
        loader = DataLoader(
            KeyedImages(self.dataset, keys), batch_size, num_workers=workers, collate_fn=default_collate
        )
        preprocessor = self._model.data_preprocessor
        for batch in loader:
            data = preprocessor(batch, False)
            with torch.autocast(data["inputs"].device.type, enabled=self._amp):
                logits = self._model.load_teacher()(data["inputs"])
            yield keys_of(data["data_samples"]).numpy(), *stored_form(logits, self.layout)

    def verify(self) -> str:
        """Ask the teacher again about some stored images; return a line about it.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        labels = self._labels
        if labels is None or not len(labels):
            return "soft labels: nothing is stored yet, nothing to verify"
        count = min(self.settings.verify, len(labels))
        chosen = np.random.default_rng().choice(len(labels), count, replace=False)
        tolerance = TOLERANCE["autocast" if self._amp else self.layout.values]
        worst, error = 0.0, None
        for keys, values, ids in self.answers(chosen[self.rank :: self.processes]):
            apart = _difference(labels.take(keys), values.cpu(), ids.cpu(), self.layout.num_classes)
            worst = max(worst, float(apart.max()))
            if worst > tolerance:
                epoch, sample = divmod(int(keys[int(apart.argmax())]), self.layout.samples)
                error = (
                    f"the soft labels in {self.path} are not what the teacher says: of image {sample} in "
                    f"epoch {epoch} they are {worst:.3g} apart, {tolerance} is allowed; write them again"
                )
                break
        if error := self._agree(error):
            raise SoftLabelsError(error)
        return f"soft labels: {count} images verified, at most {worst:.2g} apart ({tolerance} is allowed)"

    def close(self) -> None:
        """Let others write; what is not committed does not count."""
        if self._collector is not None:
            self._collector.close()
        if self._writer is not None:
            self._writer.close()
        self._writer = self._collector = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTeacher":
        """Be the store of a student's copy (an averaged model, say) too."""
        return self

    @property
    def _pipeline(self) -> SeededPipeline:
        pipeline: SeededPipeline = self.dataset.pipeline
        return pipeline

    def _add(self, collector: RowCollector, keys: Any, values: Tensor, ids: Tensor) -> None:
        collector.add(keys, values.cpu().numpy(), ids.cpu().numpy(), self._seeds(keys))

    def _seeds(self, keys: Any) -> Any:
        epochs, samples = np.divmod(keys, self.layout.samples)
        seeds = np.empty(len(keys), np.uint32)
        for epoch in np.unique(epochs):
            there = epochs == epoch
            seeds[there] = augmentation_seed(self.settings.seed, int(epoch), samples[there])
        return seeds

    def _check_seeds(self, keys: Any, stored: Any) -> None:
        if (stored != self._seeds(keys)).any():
            raise SoftLabelsError(f"{self.path} has rows of other augmentation; write the soft labels again")

    def _flush(self, collector: RowCollector) -> None:
        try:
            if not self._failed:
                collector.flush()
        except SoftLabelsError as error:
            self._fail(str(error))

    def _fail(self, error: str) -> None:
        """Stop, or go on with the teacher alone, as asked."""
        if self.settings.on_error == "stop":
            raise SoftLabelsError(error)
        if not self._failed:
            MMLogger.get_current_instance().warning(
                f"{error}; training goes on with the teacher, and nothing more is stored"
            )
        self._failed = True

    def _any_failed(self) -> bool:
        failed = self._agree("failed" if self._failed else None) is not None
        self._failed = self._failed or failed
        return failed

    def _agree(self, error: str | None) -> str | None:
        """Wait for all processes, and return the first one's error that has any."""
        if self.processes == 1:
            return error
        errors: list[str | None] = [None] * self.processes
        torch.distributed.all_gather_object(errors, error)
        return next((found for found in errors if found is not None), None)


def _difference(stored: Any, values: Tensor, ids: Tensor, classes: int) -> Tensor:
    """Return for each image how far what is stored and what is said now are apart: nats, over 1 + nats."""
    there = _dense(torch.from_numpy(stored.values.astype(np.float32)), stored.ids.astype(np.int64), classes)
    now = _dense(values.float(), ids.numpy(), classes)
    return ((there - now).abs() / (1 + now.abs())).amax(-1)


def _dense(values: Tensor, ids: Any, classes: int) -> Tensor:
    if values.shape[-1] == classes:
        values = values.log_softmax(-1)
    values = values.clamp(min=_LEAST)
    # A class that is not kept has at most what the least that is kept has.
    least = values.min(-1, keepdim=True).values.repeat(1, classes)
    return least.scatter(-1, torch.from_numpy(ids), values)
