"""The teacher's words from a store: read where they are there, asked for and stored where not."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dataset import default_collate
from mmengine.dist import get_dist_info
from mmengine.logging import MMLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lskd import SoftLabelsError, TopK
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import teacher_form
from lskd.soft_labels.run import StoredRun
from mmcls_bnn.distil.replay import KeyedImages, SeededPipeline, keys_of
from mmcls_bnn.distil.store import SoftLabelSettings

# How far two answers to one image may be apart, in nats per nat: other kernels, half precision.
TOLERANCE = {"float32": 0.01, "float16": 0.02, "autocast": 0.1}


class StoredTeacher(StoredRun):
    """What one process of a run has of a store; see :class:`lskd.StoredRun`.

    Args:
        settings: what the recipe says.
        layout: of the store.
        identity: what it must belong to.
        model: the student, an LsKdClassifier, which loads the teacher when it is needed.
        dataset: the training images, with a :class:`SeededPipeline`.
        amp: whether the teacher runs in mixed precision.

    Attributes:
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
        self.settings, self.dataset = settings, dataset
        self._model, self._amp = model, amp
        self.epoch = 0
        rank, processes = get_dist_info()
        super().__init__(
            settings.path,
            layout,
            identity,
            seed=settings.seed,
            on_error=settings.on_error,
            rank=rank,
            processes=processes,
            say=lambda line: MMLogger.get_current_instance().warning(line),
            teacher=model.fast_settings.mode,
            bound=model.fast_settings.bound,
        )
        self.needs_no_teacher = self.covers(layout.epochs) and not settings.verify

    def covers(self, epochs: int) -> bool:
        """Whether that many epochs are stored, so that no teacher is needed for them."""
        return self.epochs >= epochs

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is trained next; epochs before it that are not stored are asked for now.

        Raises:
            SoftLabelsError: the disk cannot take them, and the run is to stop then.
        """
        self.epoch = epoch
        self._pipeline.set_epoch(epoch)
        if self.covers(epoch + 1) or self.failed:
            return
        self.open_writer()
        if not self.covers(epoch):
            self.complete(epoch * self.layout.samples, self.answers)

    def answer(self, inputs: Tensor, data_samples: list[Any]) -> Tensor | TopK:
        """Return what the teacher says about a training batch, in the form that every student gets.

        Args:
            inputs: images `(B, C, H, W)`, normalised.
            data_samples: B samples of the seeded pipeline.

        Raises:
            SoftLabelsError: damaged rows, or the disk cannot take more, and the run is to stop then.
        """
        keys = keys_of(data_samples)
        if self.labels is not None and int(keys.max()) < len(self.labels):
            rows = self.labels.take(keys.numpy())
            if rows.seeds is None or not np.array_equal(rows.seeds, self.seeds(keys)):
                raise SoftLabelsError(
                    f"{self.path} has rows of other augmentation; write the soft labels again"
                )
            values = torch.from_numpy(np.ascontiguousarray(rows.values)).to(inputs.device)
            ids = torch.from_numpy(rows.ids.astype(np.int64)).to(inputs.device)
        else:
            values, ids = self.record(keys, self._model.speaking_teacher()(inputs))
        return teacher_form(values, ids, self.layout.num_classes, self.settings.rest)

    def end_epoch(self) -> None:
        """Ask about images that the epoch left out, and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self.writing and not self.covers(self.epoch + 1):
            self.complete((self.epoch + 1) * self.layout.samples, self.answers)

    def answers(self, keys: Any, batch_size: int = 64, workers: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Ask the teacher about keys: yields some of them `(n,)` and its logits `(n, K)`, until all are."""
        loader = DataLoader(
            KeyedImages(self.dataset, keys), batch_size, num_workers=workers, collate_fn=default_collate
        )
        preprocessor = self._model.data_preprocessor
        for batch in loader:
            data = preprocessor(batch, False)
            inputs = data["inputs"]
            count = len(inputs)
            if count < batch_size:  # a smaller batch would be rounded otherwise
                inputs = inputs[torch.arange(batch_size, device=inputs.device) % count]
            with torch.autocast(inputs.device.type, enabled=self._amp):
                logits = self._model.speaking_teacher()(inputs)[:count]
            yield keys_of(data["data_samples"]).numpy(), logits

    def verify_stored(self) -> str:
        """Ask the teacher again about some stored images; return a line about it.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        tolerance = TOLERANCE["autocast" if self._amp else self.layout.values]
        return self.verify(self.answers, self.settings.verify, tolerance)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTeacher":
        """Be the store of a student's copy (an averaged model, say) too."""
        return self

    @property
    def _pipeline(self) -> SeededPipeline:
        pipeline: SeededPipeline = self.dataset.pipeline
        return pipeline
