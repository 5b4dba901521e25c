"""timm training task: distil a teacher into a student."""

import inspect
import math
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from lskd import Convention, DistillationLoss, target_values
from lskd.base.tensors import accumulator_dtype
from lskd.teachers.outputs import logits_of
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
