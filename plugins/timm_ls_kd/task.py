"""timm training task: distil a teacher into a student."""

import inspect
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from lskd import Convention, DistillationLoss, target_values
from lskd.base.tensors import accumulator_dtype
from lskd.soft_labels.forms import teacher_form
from lskd.soft_labels.run import image_layout
from lskd.teachers.outputs import logits_of
from lskd.teachers.replay import replayed
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.store import ImageSource, ReplayedTargets, SoftLabelsRun, identity_of
from timm_ls_kd.teacher import Teacher

# Columns of summary.csv (with timm's prefix train_), and where the loss's parts come from.
COLUMNS = {
    "ce": "cross_entropy",
    "kl": "kl",
    "teacher_entropy": "teacher_entropy",
    "hard_ce": "hard_cross_entropy",
    "agreement": "agreement",
}


class LsKdTask(TrainingTask):
    """Train a student on a teacher's soft labels, the paper's way: temperature 1, no hard labels, by default.

    The teacher is no submodule: `state_dict`, `parameters`, EMA, DistributedDataParallel and the optimiser
    see the student alone, and `train()` leaves the teacher in eval mode.

    Args:
        student_model: the model to train; logits `(B, K)`, or a tuple that starts with them.
        teacher: frozen teacher, see `timm_ls_kd.teacher.Teacher`.
        temperature: divides both logits.
        temperature_squared: multiply the soft term by its square.
        hard_weight: the paper's lambda, in [0, 1].
        alpha: smoothing of integer labels in the hard term; float targets (mixup) are used as they are.
        convention: what alpha means, 'uniform' (timm) or 'paper' (Eq. 1).
        device: device of the task.
        dtype: dtype of the task.
        verbose: kept for timm's factories.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher: Teacher,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        alpha: float = 0.0,
        convention: Convention = "uniform",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        """Keep the student as trainable module, the teacher beside it."""
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = student_model
        self.teacher = teacher.to(self.device)
        self.loss = DistillationLoss(
            temperature=temperature,
            temperature_squared=temperature_squared,
            hard_weight=hard_weight,
            alpha=alpha,
            convention=convention,
        )
        self._sums: Tensor | None = None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        result: nn.Module = super()._apply(fn, *args, **kwargs)
        # timm 1.0.27 tracks the device in `to` only, later versions here; ask the conversion itself.
        self.teacher.to(fn(torch.empty(0, device=self.device)).device)
        return result

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "LsKdTask":
        """Wrap the student in DistributedDataParallel, on the CPU too."""
        prepare_distributed(self, device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile student and teacher, before distributed wrapping."""
        compiled: nn.Module = torch.compile(
            self.trainable_module, backend=backend, mode=mode, **compile_kwargs
        )  # type: ignore[assignment]
        self.trainable_module = compiled
        self.eval_model = compiled
        self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return compiled

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return 'loss' and 'output', and the parts of the loss under the names in `COLUMNS`.

        Args:
            input: images `(B, C, H, W)` in the student's normalisation.
            target: labels `(B,)`, or probabilities `(B, K)` under mixup.
        """
        teacher_logits, target = self.ask_teacher(input, target)
        logits = logits_of(self.trainable_module(input))
        # Autocast off: the loss is computed in float32 whatever the networks ran in.
        with torch.autocast(logits.device.type, enabled=False):
            parts = self.loss.components(logits, teacher_logits, target)
        named = {column: getattr(parts, field) for column, field in COLUMNS.items()}
        if torch.is_grad_enabled():
            self._accumulate(torch.stack(list(named.values())), logits.shape[0])
        return {"loss": parts.loss, "output": logits, **named}

    def ask_teacher(self, input: Tensor, target: Any) -> tuple[Any, Tensor]:
        """Return what the teacher says about a batch, and the labels in `target`."""
        return self.teacher(input), target

    @property
    def stepped(self) -> bool:
        """Whether a training step was taken since `epoch_metrics` was last called."""
        return self._sums is not None

    def _accumulate(self, means: Tensor, samples: int) -> None:
        # Kept on the device: reading a number at every step would wait for the device at every step.
        means = means.detach().to(accumulator_dtype(means.device))
        row = torch.cat([means * samples, means.new_full((1,), samples)])
        self._sums = row if self._sums is None else self._sums + row

    def epoch_metrics(self) -> dict[str, float]:
        """Return the sample means of `COLUMNS` since the last call, over all processes, and start anew.

        Every process of a distributed run must call it.
        """
        sums = self._sums
        self._sums = None
        if sums is None:
            dtype = accumulator_dtype(self.device)
            sums = torch.zeros(len(COLUMNS) + 1, dtype=dtype, device=self.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, samples = sums.tolist()
        return {
            column: total / samples if samples else math.nan
            for column, total in zip(COLUMNS, totals, strict=True)
        }


def prepare_distributed(task: TrainingTask, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> None:
    """Wrap a task's trainable module in DistributedDataParallel, on whatever device its parameters are."""
    module = task.trainable_module
    if next(module.parameters()).device.type == "cpu":
        device_ids = None
    # True is the default of every torch, and naming it is deprecated where there is the newer argument.
    if not ddp_kwargs.pop("broadcast_buffers", True):
        known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        ddp_kwargs["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    task.trainable_module = nn.parallel.DistributedDataParallel(module, device_ids=device_ids, **ddp_kwargs)


def describe_targets(loss: DistillationLoss, num_classes: int, mixing: bool = False) -> str:
    """Say in one line what the student is trained on."""
    factor = " x T^2" if loss.temperature_squared else ""
    soft = f"soft term: weight {1 - loss.hard_weight:g}{factor}, teacher's labels at T = {loss.temperature:g}"
    if loss.hard_weight == 0:
        return f"{soft}; hard term: weight 0, the labels are not trained on"
    on, off = target_values(num_classes, loss.alpha, loss.convention)
    mixed = " before mixing" if mixing else ""
    target = f"target {on:.4f} on the label and {off:.4f} on each other class{mixed}"
    return f"{soft}; hard term: weight {loss.hard_weight:g}, {target}"


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
