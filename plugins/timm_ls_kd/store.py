"""A timm run's use of stored soft labels: how its images are made, and which epoch comes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lskd import SoftLabelsError
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.run import StoredRun
from lskd.teachers.fast import FAST_BOUND, FastMode
from timm_ls_kd.replay import ImageSource
from timm_ls_kd.soft_label_arguments import SoftLabelsConfig

# How far two answers to the same image may be apart, in nats per nat: other kernels, half precision.
TOLERANCE = {"float32": 0.01, "half": 0.1}


class SoftLabelsRun(StoredRun):
    """Stored soft labels as one process of a run sees them; see :class:`lskd.StoredRun`.

    Args:
        config: what was asked for.
        layout: of the store.
        identity: what it must belong to.
        source: makes the training images.
        rank: number of this process; the first one writes.
        world_size: number of processes.
        say: prints a line, on the first process.
        teacher: the form in which the teacher is asked for.
        bound: of its error.

    Raises:
        SoftLabelsError: the folder holds something else, or is damaged.
    """

    LOCK_SECONDS = 15.0  # the loading processes of a killed run may hold its lock for a few seconds
    STOP_ADVICE = (
        "; make room and go on by --resume, or train on without storing by --kd-soft-labels-on-error continue"
    )

    def __init__(
        self,
        config: SoftLabelsConfig,
        layout: SoftLabelsLayout,
        identity: dict[str, Any],
        source: ImageSource,
        rank: int,
        world_size: int,
        say: Callable[[str], None],
        teacher: FastMode = "none",
        bound: float = FAST_BOUND,
    ) -> None:
        """Look at what is there, and let the loader read it."""
        self.config, self.source = config, source
        self._epoch = 0
        super().__init__(
            config.path,
            layout,
            identity,
            seed=config.seed,
            on_error=config.on_error,
            rank=rank,
            processes=world_size,
            say=say,
            teacher=teacher,
            bound=bound,
        )
        if self.labels is not None:
            source.collate.labels = self.labels
            source.collate.stored = self.epochs * layout.samples

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
                f"{self.path} has {self.epochs} epoch(s) and training is at epoch {epoch}; epochs are "
                "stored in order: store those before it by timm soft-labels with the same arguments"
            )
        self.open_writer()

    def end_epoch(self, teacher: Callable[[Tensor], Tensor]) -> None:
        """Ask about images that the epoch left out (its last, incomplete batch), and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self.writing and self._epoch >= self.epochs:
            self.complete_by(teacher, (self._epoch + 1) * self.layout.samples)

    def complete_by(
        self, teacher: Callable[[Tensor], Tensor], stop: int, progress: Callable[[int], Any] = lambda n: None
    ) -> None:
        """Store all keys before `stop`; see :meth:`lskd.StoredRun.complete`."""
        self.complete(stop, partial(self.source.answers, teacher), progress)

    def verify_by(self, teacher: Callable[[Tensor], Tensor], half: bool) -> str:
        """Ask the teacher, which computes in half precision or not, about stored images again.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        tolerance = TOLERANCE["half" if half else "float32"]
        return self.verify(partial(self.source.answers, teacher), self.config.verify, tolerance)
