"""The task that takes the teacher's words from a store, and its teacher that is built only when asked."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lskd.soft_labels.forms import teacher_form
from lskd.soft_labels.run import image_layout
from lskd.teachers.replay import replayed
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.replay import ImageSource, ReplayedTargets
from timm_ls_kd.soft_label_identity import identity_of
from timm_ls_kd.store import SoftLabelsRun
from timm_ls_kd.task import LsKdTask
from timm_ls_kd.teacher import Teacher


class OnDemandTeacher(Teacher):
    """A teacher that is built when it is first asked something.

    Args:
        build: makes it, tries it, and says so.
    """

    def __init__(self, build: Callable[[], Teacher]) -> None:
        """Build nothing yet."""
        self._build = build
        self._built: Teacher | None = None
        self._device: torch.device | None = None
        self._compile: dict[str, Any] | None = None

    def load(self) -> Teacher:
        """Return the teacher, built now if it was not.

        Raises:
            LskdError: as :func:`timm_ls_kd.teacher.create_teacher`.
        """
        if self._built is None:
            # The run's own generators must not notice: a student that needs no teacher has the same ones.
            with replayed(0):
                self._built = self._build().to(self._device)
            if self._compile is not None:
                self._built.compile(**self._compile)
        return self._built

    def to(self, device: torch.device | None) -> "OnDemandTeacher":
        """Move the teacher, now or when it is built."""
        self._device = device
        if self._built is not None:
            self._built.to(device)
        return self

    def compile(self, **kwargs: Any) -> None:
        """Compile the teacher, now or when it is built."""
        self._compile = kwargs
        if self._built is not None:
            self._built.compile(**kwargs)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits, as the teacher itself."""
        return self.load()(batch)


class SoftLabelsTask(LsKdTask):
    """Distil from stored soft labels; from the teacher, and store what it says, where there are none.

    A student trains on the stored form in either case, so that the one that stores and those that read are
    trained alike.

    Args:
        student_model: the model to train.
        teacher: asked only where nothing is stored.
        run: the store.
        loss: as for :class:`timm_ls_kd.task.LsKdTask`, with device and dtype.
    """

    def __init__(self, student_model: nn.Module, teacher: Teacher, run: SoftLabelsRun, **loss: Any) -> None:
        """Keep the store beside the student."""
        super().__init__(student_model, teacher, **loss)
        self.run = run

    def ask_teacher(self, input: Tensor, target: ReplayedTargets) -> tuple[Any, Tensor]:
        """Return the stored words, or the teacher's, and the labels."""
        layout = self.run.layout
        labels = target.hard(layout.num_classes, self.loss.alpha, self.loss.convention)
        if target.values is not None and target.ids is not None:
            values, ids = target.values, target.ids
        else:
            values, ids = self.run.record(target.keys, self.teacher(input))
        return teacher_form(values, ids, layout.num_classes, self.run.config.rest), labels

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is trained next; every process must."""
        self.run.begin_epoch(epoch)

    def end_epoch(self) -> None:
        """Commit what the epoch brought; every process must."""
        self.run.end_epoch(self.teacher)


def open_run(
    args: Namespace,
    kd: KdConfig,
    num_classes: int,
    epochs: int,
    source: ImageSource,
    say: Callable[[str], None],
) -> SoftLabelsRun:
    """Open the store of a training run.

    Args:
        args: the run's arguments, of the bundled trainer or timm's script.
        kd: what the run distils.
        num_classes: class count.
        epochs: how many the run will train, as far as is known.
        source: makes the training images.
        say: prints a line, on the first process.

    Raises:
        LskdError: a store of something else, and whatever is wrong with it.
    """
    assert kd.soft_labels is not None
    store = kd.soft_labels
    layout = image_layout(store.path, num_classes, len(source.dataset), epochs, store.top_k, store.values)
    identity = identity_of(args, kd, layout, source.dataset, source.normalisation, source.collate.prefetch)
    run = SoftLabelsRun(
        kd.soft_labels,
        layout,
        identity,
        source,
        args.rank,
        args.world_size,
        say,
        kd.teacher_fast,
        kd.teacher_fast_bound,
    )
    say(run.describe())
    return run


def prepare(run: SoftLabelsRun, teacher: OnDemandTeacher, epochs: int, half: bool) -> Iterator[str]:
    """Do before the first step what can be done then: try the teacher, lock the store, verify.

    Yields:
        Lines for the user.

    Raises:
        LskdError: the teacher says something else, another run writes, or the teacher cannot be used.
    """
    if run.config.verify or run.epochs < epochs:
        teacher.load()  # first: a new store says in which form the teacher answers
    if run.epochs < epochs:
        run.open_writer()
    if run.config.verify:
        yield run.verify_by(teacher, half)
    if run.epochs < epochs:
        yield f"soft labels: epochs {run.epochs} to {epochs - 1} are to be stored"
    else:
        yield f"soft labels: all {epochs} epochs are read, the teacher is not asked"


def planned_epochs(args: Namespace) -> int:
    """Return how many epochs a run will train, as far as its arguments tell; the schedule may say more."""
    prefix = args.warmup_epochs if args.warmup_prefix else 0
    return int(args.epochs + args.cooldown_epochs + prefix)


def is_half(kd: KdConfig, args: Namespace) -> bool:
    """Tell whether the teacher computes in half precision."""
    return kd.teacher_dtype == "bfloat16" or (kd.teacher_dtype is None and bool(args.amp))
