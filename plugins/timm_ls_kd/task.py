"""timm training tasks: distil a teacher into a student, from its answers or from stored ones."""

import inspect
from typing import Any, Self

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from lskd import Convention, DistillationLoss, FrozenTeacher, LossComponents, LskdError, target_values
from lskd.base.tensors import SampleMeans
from lskd.soft_labels.forms import teacher_form
from lskd.targets import binary_targets
from lskd.teachers.outputs import logits_of
from lskd.terms import binary_logits
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.store import OnDemandTeacher, ReplayedTargets, SoftLabelsRun
from timm_ls_kd.teacher import StudentRun, make_teacher

# Columns of summary.csv (with timm's prefix train_), and where the loss's parts come from.
COLUMNS = {
    "ce": "cross_entropy",
    "kl": "kl",
    "teacher_entropy": "teacher_entropy",
    "hard_ce": "hard_cross_entropy",
    "agreement": "agreement",
}


class AnyDeviceTask(TrainingTask):
    """A task that can be distributed on the CPU too."""

    trainable_module: nn.Module

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> Self:
        """Wrap the trained module in DistributedDataParallel, on whatever device its parameters are."""
        module = self.trainable_module
        if next(module.parameters()).device.type == "cpu":
            device_ids = None
        distributed = nn.parallel.DistributedDataParallel
        # True is the default of every torch, and naming it is deprecated where there is the newer argument.
        if not ddp_kwargs.pop("broadcast_buffers", True):
            newer = "forward_sync_buffers" in inspect.signature(distributed.__init__).parameters
            ddp_kwargs["forward_sync_buffers" if newer else "broadcast_buffers"] = False
        self.trainable_module = distributed(module, device_ids=device_ids, **ddp_kwargs)
        return self


class HardLoss(nn.Module):
    """The hard labels' share of a distillation loss, alone: what `criterion` is in a task of timm's."""

    def __init__(self, alpha: float, convention: Convention) -> None:
        super().__init__()
        self.loss = DistillationLoss(hard_weight=1.0, alpha=alpha, convention=convention)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the smoothed cross-entropy of logits `(..., K)` and ids `(...)` or probabilities."""
        loss: Tensor = self.loss(output, output.detach(), target)
        return loss


class LsKdTask(AnyDeviceTask):
    """Train a student on a teacher's soft labels, the paper's way: temperature 1, no hard labels, by default.

    The teacher is no submodule: `state_dict`, `parameters`, EMA, DistributedDataParallel and the optimiser
    see the student alone, and `train()` leaves the teacher in eval mode.

    Args:
        student_model: the model to train; logits `(B, K)`, or a tuple that starts with them.
        verbose: kept for timm's factories.
        criterion: the hard term, in place of the smoothed cross-entropy that `loss` describes.
        loss: keyword arguments of :class:`lskd.DistillationLoss`: temperature, hard_weight, alpha, ...; alpha
            smooths integer labels by default as timm does, float targets (mixup) are used as they are.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher: FrozenTeacher,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        criterion: nn.Module | None = None,
        **loss: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = student_model
        self.teacher = teacher.to(self.device)
        self.loss = DistillationLoss(**{"convention": "uniform", **loss})
        self._weight = 0.0  # of a criterion that is not the loss's own hard term
        if criterion is None:
            criterion = HardLoss(self.loss.alpha, self.loss.convention)
        else:
            self._weight, self.loss.hard_weight = self.loss.hard_weight, 0.0
        self.criterion = criterion.to(self.device)
        self._means = SampleMeans(COLUMNS)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        result: nn.Module = super()._apply(fn, *args, **kwargs)
        # timm 1.0.27 tracks the device in `to` only, later versions here; ask the conversion itself.
        self.teacher.to(fn(torch.empty(0, device=self.device)).device)
        return result

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
            parts = self.compare(logits, teacher_logits, target)
            loss = parts.loss
            if self._weight:
                hard = self.criterion(logits.to(loss.dtype), target)
                loss = (1 - self._weight) * loss + self._weight * hard
        named = {column: getattr(parts, field) for column, field in COLUMNS.items()}
        if torch.is_grad_enabled():
            self._means.add(named.values(), len(logits))
        return {"loss": loss, "output": logits, **named}

    def compare(self, logits: Tensor, teacher: Any, target: Tensor) -> LossComponents:
        """Return the loss of a batch and its parts, from the logits of both and the labels."""
        return self.loss.components(logits, teacher, target)

    def ask_teacher(self, input: Tensor, target: Any) -> tuple[Any, Tensor]:
        """Return what the teacher says about a batch, and the labels in `target`."""
        return self.teacher(input), target

    @property
    def stepped(self) -> bool:
        """Whether a training step was taken since `epoch_metrics` was last called."""
        return bool(self._means)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the sample means of `COLUMNS` since the last call, over all processes, and start anew.

        Every process of a distributed run must call it.
        """
        return self._means.read(self.device)


class MultiLabelKdTask(LsKdTask):
    """Distil the sigmoids of a teacher whose classes do not exclude one another, as in `--task multilabel`.

    Every term is a mean over samples and classes: of the binary cross-entropy with the teacher's sigmoids at
    the temperature, and with the labels, as timm's `BinaryCrossEntropy` takes it.

    Args:
        student_model: the model to train; logits `(B, K)`.
        threshold: of a sigmoid, for timm's F1 in validation.
        loss: as for :class:`timm_ls_kd.task.LsKdTask`; alpha smooths the labels of each class by itself.
    """

    multi_label = True

    def __init__(
        self, student_model: nn.Module, teacher: FrozenTeacher, threshold: float = 0.5, **loss: Any
    ) -> None:
        super().__init__(student_model, teacher, **loss)
        self.threshold = threshold

    def compare(self, logits: Tensor, teacher: Any, target: Tensor) -> LossComponents:
        """Return the loss and its parts, of labels `(B, K)` from 0 to 1."""
        labels = binary_targets(target, self.loss.alpha, self.loss.convention)
        return super().compare(binary_logits(logits), binary_logits(teacher), labels)

    def create_evaluator(self, **kwargs: Any) -> Any:
        """Create timm's evaluator of mean average precision and F1."""
        from timm.task import MultiLabelClassificationEvaluator  # timm 1.0.31

        return MultiLabelClassificationEvaluator(device=self.device, threshold=self.threshold, **kwargs)


class SoftLabelsTask(LsKdTask):
    """Distil from stored soft labels; from the teacher, and store what it says, where there are none.

    A student trains on the stored form in either case, so that the one that stores and those that read are
    trained alike.

    Args:
        teacher: asked only where nothing is stored.
        run: the store; whoever trains calls its `begin_epoch` and `end_epoch`.
        loss: as for :class:`timm_ls_kd.task.LsKdTask`, with device and dtype.
    """

    def __init__(
        self, student_model: nn.Module, teacher: FrozenTeacher, run: SoftLabelsRun, **loss: Any
    ) -> None:
        super().__init__(student_model, teacher, **loss)
        self.run = run

    def ask_teacher(self, input: Tensor, target: ReplayedTargets) -> tuple[Any, Tensor]:
        """Return the stored answers, or the teacher's, and the labels."""
        layout = self.run.layout
        labels = target.hard(layout.num_classes, self.loss.alpha, self.loss.convention)
        if target.values is not None and target.ids is not None:
            values, ids = target.values, target.ids
        elif (found := self.run.stored(target.keys)) is not None:  # a view that this run has stored itself
            values, ids = (part.to(input.device) for part in found)
        else:
            values, ids = self.run.record(target.keys, self.teacher(input))
        return teacher_form(values, ids, layout, self.run.config.rest), labels


def create_kd_task(
    model: nn.Module, run: StudentRun, dtype: torch.dtype | None = None, threshold: float = 0.5
) -> LsKdTask:
    """Create the task that a run distils with: its teacher made and tried, or its store opened; and say so.

    Args:
        threshold: of a sigmoid, where classes do not exclude one another.
    """
    loss = ("temperature", "temperature_squared", "hard_weight", "alpha", "convention")
    options: dict[str, Any] = {name: getattr(run.kd, name) for name in loss}
    options |= {"device": run.device, "dtype": dtype}
    if run.multi_label:
        if run.mixes:  # timm's mixing has smoothed the labels
            options["alpha"] = 0.0
        run.say(describe_targets(run.kd, 2, run.mixes) + "; of the sigmoid of each class")
        return MultiLabelKdTask(model, make_teacher(run, "none"), threshold=threshold, **options)
    if run.images is None:
        run.say(describe_targets(run.kd, run.args.num_classes, run.mixes))
        return LsKdTask(model, make_teacher(run, run.kd.teacher_fast), **options)
    if run.stored[0].shard:
        raise LskdError(
            "--kd-soft-labels-shard writes one shard by timm soft-labels; training reads all of them, "
            "merged: drop the flag."
        )
    store = SoftLabelsRun(run)
    try:
        teacher = OnDemandTeacher(store)
        task = SoftLabelsTask(model, teacher, store, **options)
        run.say(describe_targets(run.kd, run.args.num_classes, run.mixes))
        store.prepare(teacher)
    except BaseException:
        store.close()
        raise
    return task


def describe_targets(kd: KdConfig, num_classes: int, mixing: bool) -> str:
    """Return in one line what the student is trained on."""
    factor = " x T^2" if kd.temperature_squared else ""
    soft = f"soft term: weight {1 - kd.hard_weight:g}{factor}, teacher's labels at T = {kd.temperature:g}"
    if kd.hard_weight == 0:
        return f"{soft}; hard term: weight 0, the labels are not trained on"
    labels = describe_labels(num_classes, kd.alpha, kd.convention, mixing)
    return f"{soft}; hard term: weight {kd.hard_weight:g}, {labels}"


def describe_labels(num_classes: int, alpha: float, convention: Convention, mixing: bool) -> str:
    """Return what smoothing makes of the hard labels."""
    on, off = target_values(num_classes, alpha, convention)
    mixed = " before mixing" * mixing
    return f"target {on:.4f} on the label and {off:.4f} on each other class{mixed}"
