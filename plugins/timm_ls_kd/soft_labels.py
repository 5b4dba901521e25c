"""A training run's use of stored soft labels: reads epochs that are there, stores those that are not."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lskd import (
    RowCollector,
    SoftLabels,
    SoftLabelsError,
    SoftLabelsLayout,
    SoftLabelsWriter,
    augmentation_seed,
    stored_form,
)
from timm_ls_kd.replay import ImageSource
from timm_ls_kd.soft_label_arguments import SoftLabelsConfig

LOCK_SECONDS = 15.0  # the loading processes of a killed run hold its lock for a few seconds
# How far two answers to the same image may be apart, in nats per nat: other kernels, half precision.
TOLERANCE = {"float32": 0.01, "half": 0.1}
_LEAST = -15.0  # log-probabilities below are as good as none


class SoftLabelsRun:
    """Stored soft labels as one process of a run sees them.

    Every process makes one and calls the same methods in the same order.

    Args:
        config: what was asked for.
        layout: of the store.
        identity: what it must belong to.
        source: makes the training images.
        rank: number of this process; the first one writes.
        world_size: number of processes.
        say: prints a line, on the first process.

    Attributes:
        keys: how many are stored.

    Raises:
        SoftLabelsError: the folder holds something else, or is damaged.
    """

    def __init__(
        self,
        config: SoftLabelsConfig,
        layout: SoftLabelsLayout,
        identity: dict[str, Any],
        source: ImageSource,
        rank: int,
        world_size: int,
        say: Callable[[str], None],
    ) -> None:
        """Look at what is there."""
        self.config, self.layout, self.identity, self.source = config, layout, identity, source
        self.rank, self.world_size, self._say = rank, world_size, say
        self.keys = 0
        self.failed = False
        self._epoch = 0
        self._writer: SoftLabelsWriter | None = None
        self._collector: RowCollector | None = None
        if (config.path / "manifest.json").exists():
            labels = SoftLabels(config.path, expected=identity)
            self.keys = len(labels)
            source.collate.labels = labels
            source.collate.stored = self.epochs * layout.samples
        self._agree(None)  # nobody writes before all have looked

    @property
    def epochs(self) -> int:
        """How many epochs are stored, whole ones."""
        return self.keys // self.layout.samples

    @property
    def read_epochs(self) -> int:
        """How many epochs were there when the run began: these are read."""
        return self.source.collate.stored // self.layout.samples

    def describe(self) -> str:
        """Say in one line what is there."""
        layout = self.layout
        kept = "all" if layout.k == layout.num_classes else f"top {layout.k} of"
        there = f"{self.epochs} epoch(s) of {layout.samples} images are" if self.epochs else "no epoch is"
        return (
            f"soft labels {self.config.path}: {kept} {layout.num_classes} classes, {layout.values}; {there} "
            f"stored; augmentation from seed {self.config.seed}"
        )

    def open_writer(self) -> None:
        """Become the one who writes, or fail.

        Raises:
            SoftLabelsError: another run writes, or the folder cannot be written.
        """
        if self._collector is not None:
            return
        error = None
        collector = RowCollector(self.config.path, self.layout, self.rank)
        if self.rank == 0:
            try:
                self._writer = self._locked_writer()
                collector.clear()
                if self._writer.keys != self.keys:
                    error = f"{self.config.path} was written by another run meanwhile; start again"
            except SoftLabelsError as caught:
                error = str(caught)
        if error := self._agree(error):
            self.close()
            raise SoftLabelsError(error)
        self._collector = collector

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is trained next.

        Raises:
            SoftLabelsError: it is not stored, nor is one before it.
        """
        self._epoch = epoch
        if epoch < self.epochs or self.failed:
            return
        if epoch > self.epochs:
            raise SoftLabelsError(
                f"{self.config.path} has {self.epochs} epoch(s) and training is at epoch {epoch}; epochs are "
                "stored in order: store those before it by timm soft-labels with the same arguments"
            )
        self.open_writer()

    def record(self, keys: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Store what the teacher said about a batch; return it in the form in which it is stored.

        Args:
            keys: `(B,)`.
            logits: `(B, K)`.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        values, ids = stored_form(logits, self.layout)
        if self._collector is not None and not self.failed:
            try:
                self._add(self._collector, keys, values, ids)
            except SoftLabelsError as error:
                self._fail(str(error))
        return values, ids

    def end_epoch(self, teacher: Callable[[Tensor], Tensor]) -> None:
        """Ask about images that the epoch left out (its last, incomplete batch), and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self._collector is not None and self._epoch >= self.epochs:
            self.complete((self._epoch + 1) * self.layout.samples, teacher)

    def complete(
        self, stop: int, teacher: Callable[[Tensor], Tensor], progress: Callable[[int], Any] = lambda n: None
    ) -> None:
        """Store all keys before `stop`: what was recorded, and what the teacher now says about the rest.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        collector = self._collector
        assert collector is not None
        if self._any_failed():
            return
        missing = collector.missing(self.keys, stop)[self.rank :: self.world_size]
        self._agree(None)  # nobody adds what is missing before all have looked
        try:
            for keys, logits in self.source.answers(teacher, missing.tolist()):
                self._add(collector, keys, *stored_form(logits, self.layout))
                progress(len(keys))
        except SoftLabelsError as caught:
            self._fail(str(caught))
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

    def verify(self, teacher: Callable[[Tensor], Tensor], half: bool) -> str:
        """Ask the teacher again about some stored images; return a line about it.

        Args:
            teacher: the teacher.
            half: whether it computes in half precision.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        labels = self.source.collate.labels
        if labels is None or not len(labels):
            return "soft labels: nothing is stored yet, nothing to verify"
        count = min(self.config.verify, len(labels))
        chosen = np.random.default_rng().choice(len(labels), count, replace=False)
        tolerance = TOLERANCE["half" if half else "float32"]
        worst, error = 0.0, None
        for keys, logits in self.source.answers(teacher, chosen[self.rank :: self.world_size].tolist()):
            apart = _difference(labels, keys, logits)
            worst = max(worst, float(apart.max()))
            if worst > tolerance:
                epoch, sample = divmod(int(keys[apart.argmax()]), self.layout.samples)
                error = (
                    f"the soft labels in {self.config.path} are not what the teacher says: of image {sample} "
                    f"in epoch {epoch} they are {worst:.3g} apart, {tolerance} is allowed; write them again"
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
            if self._collector is not None:
                with suppress(SoftLabelsError):  # what is left there counts for nothing
                    self._collector.clear()
            self._writer.close()
        self._writer = self._collector = None

    def _locked_writer(self) -> SoftLabelsWriter:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return SoftLabelsWriter(self.config.path, self.layout, self.identity)
            except SoftLabelsError as error:
                if "being written" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _add(self, collector: RowCollector, keys: Tensor, values: Tensor, ids: Tensor) -> None:
        epochs, samples = np.divmod(keys.numpy(), self.layout.samples)
        seeds = augmentation_seed(self.config.seed, epochs, samples)
        collector.add(keys.numpy(), values.cpu().numpy(), ids.cpu().numpy(), seeds)

    def _fail(self, error: str) -> None:
        """Stop, or note that nothing is stored from now on; the epochs that were committed stay."""
        if self.config.on_error == "stop":
            raise SoftLabelsError(
                f"{error}; make room and go on by --resume, or train on without storing by "
                "--kd-soft-labels-on-error continue"
            )
        if not self.failed:
            self._say(f"soft labels: {error}; training goes on with the teacher and stores nothing more")
        self.failed = True

    def _any_failed(self) -> bool:
        if self._agree("failed" if self.failed else None):
            self.failed = True
        return self.failed

    def _agree(self, error: str | None) -> str | None:
        """Return the first error of any process, None where none has one; all wait for each other."""
        if self.world_size == 1:
            return error
        errors: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(errors, error)
        return next((found for found in errors if found), None)


def _difference(labels: SoftLabels, keys: Tensor, logits: Tensor) -> Tensor:
    """Return how far answers are from stored ones `(n,)`: the largest difference of log-probabilities.

    In units of ``1 + |log-probability|``: the rounding of stored values and of logits grows with it.
    """
    rows = labels.take(keys.numpy())
    stored = torch.from_numpy(rows.values.astype(np.float64))
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    if ids.shape[-1] == labels.layout.num_classes:
        stored = stored.log_softmax(-1)
    said = logits.double().cpu().log_softmax(-1).gather(-1, ids).clamp(min=_LEAST)
    stored = stored.clamp(min=_LEAST)
    apart: Tensor = ((said - stored).abs() / (1 + stored.abs())).nan_to_num(nan=torch.inf).amax(-1)
    return apart
