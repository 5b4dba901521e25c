"""The distillation loss and its gradient in one pass over chunks, without tensors of the logits' size."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lskd._fused_chunks import KnownTeacher, Settings, Work, flatten
from lskd._losses import TopK, check_one_per_sample
from lskd._targets import Convention, check_labels, check_smoothing, check_temperature, target_values

Reduction = Literal["mean", "sum"]


class FusedTerms(NamedTuple):
    """What :func:`fused_distillation` returns: scalars, of which ``loss`` alone carries a graph.

    Attributes:
        loss: what is minimised.
        cross_entropy: of teacher and student at the temperature, without ``T^2``.
        kl: the divergence, cross-entropy minus teacher entropy.
        teacher_entropy: the part of the cross-entropy that no student can remove.
        hard_cross_entropy: of the smoothed labels and the student at temperature 1; NaN without labels.
        nll: of the labels as they are, unsmoothed; NaN without integer labels.
        agreement: samples whose largest class is the teacher's.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    teacher_entropy: Tensor
    hard_cross_entropy: Tensor
    nll: Tensor
    agreement: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo would unroll the chunks; a graph break costs nothing beside them
def fused_distillation(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    hard_weight: float = 0.0,
    alpha: float = 0.0,
    convention: Convention = "paper",
    reduction: Reduction = "mean",
) -> FusedTerms:
    """Return the loss of :class:`lskd.DistillationLoss` and its parts, and keep the gradient for backward.

    The same numbers as ``DistillationLoss.components``, in a fraction of its time and memory: chunk by chunk
    of the samples, terms and gradient are computed together in float32, and the only tensor of the logits'
    size is the gradient, in the logits' dtype (float32 for float16: a loss scale comes before it is rounded).
    No gradient reaches the teacher.

    Args:
        student_logits: ``(..., K)``.
        teacher: logits ``(..., K)``, or a :class:`TopK`.
        labels: integer ids ``(...)``, smoothed by ``alpha``; or probabilities ``(..., K)``, as they are.
        mask: bool ``(...)``, true where a sample counts. What is outside, NaN too, has no influence.
        temperature: ``T``, divides both logits in the soft part.
        temperature_squared: multiply the soft part by ``T^2``.
        hard_weight: the weight of the labels, 0 to 1; the teacher has the rest.
        alpha: smoothing of integer labels, under ``convention``.
        convention: see :data:`lskd.Convention`.
        reduction: ``"mean"`` over the samples that count, or their ``"sum"``.

    Raises:
        ValueError: for shapes, dtypes or numbers that do not fit.
        RuntimeError: in backward with ``create_graph=True``, or a second time: the gradient is used up.

    >>> student = torch.zeros(1, 2, requires_grad=True)
    >>> terms = fused_distillation(student, torch.tensor([[0.0, 0.0]]))
    >>> terms.loss.backward()
    >>> round(float(terms.loss), 4), student.grad.tolist()
    (0.6931, [[0.0, 0.0]])
    """
    check_temperature(temperature)
    classes = student_logits.shape[-1]
    check_smoothing(max(classes, 2), alpha, convention)
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight is {hard_weight}; the weight of the hard labels is 0 to 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if labels is None and hard_weight > 0:
        raise ValueError(f"hard_weight is {hard_weight} but no labels were given; pass labels")
    rows = _counted_rows(student_logits, mask)
    samples = student_logits.shape[:-1].numel() if rows is None else len(rows)
    probabilities = labels is not None and labels.is_floating_point()
    _check_shapes(student_logits, teacher, labels)
    flat_labels = None
    if labels is not None:
        flat_labels = flatten(labels, rows, 1 if probabilities else 0)
        if not probabilities:
            check_labels(flat_labels, classes)
            flat_labels = flat_labels.long()
    on, off = target_values(classes, alpha, convention) if classes > 1 else (1.0, 0.0)
    settings = Settings(
        temperature=temperature,
        soft_weight=(1 - hard_weight) * (temperature**2 if temperature_squared else 1.0),
        hard_weight=hard_weight,
        on=on,
        off=off,
        scale=1 / max(samples, 1) if reduction == "mean" else 1.0,
    )
    ready: Tensor | KnownTeacher = (
        KnownTeacher(teacher, rows, classes, temperature) if isinstance(teacher, TopK) else teacher
    )
    outputs: tuple[Tensor, ...] = _FusedLoss.apply(student_logits, ready, flat_labels, rows, settings)
    return FusedTerms(*outputs)


class _FusedLoss(torch.autograd.Function):
    """Seven scalars from logits; the gradient of the first is ready when forward ends."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        teacher: Tensor | KnownTeacher,
        labels: Tensor | None,
        rows: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Compute the terms and, where it is asked for, the gradient."""
        wanted = bool(ctx.needs_input_grad[0])  # type: ignore[attr-defined]
        work = Work(logits.detach(), teacher, labels, rows, settings, wanted)
        work.run()
        ctx.dtype = logits.dtype  # type: ignore[attr-defined]
        ctx.gradient = None  # type: ignore[attr-defined]
        if work.gradient is not None:
            ctx.gradient = work.gradient.view(logits.shape)  # type: ignore[attr-defined]
        terms = work.terms()
        # A part of weight 0 must not reach the loss: where it is infinite, 0 times it would be NaN.
        loss = torch.zeros_like(terms[0])
        if settings.soft_weight > 0:
            loss = loss + settings.soft_weight * terms[0]
        if settings.hard_weight > 0:
            loss = loss + settings.hard_weight * terms[3]
        ctx.mark_non_differentiable(*terms)
        return (loss, *terms)

    @staticmethod
    def backward(ctx: FunctionCtx, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradient that forward left."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused distillation loss has no second derivative; use lskd.DistillationLoss where "
                "backward runs with create_graph=True"
            )
        gradient: Tensor | None = ctx.gradient  # type: ignore[attr-defined]
        if gradient is None:
            raise RuntimeError(
                "backward ran through the fused distillation loss before and used its gradient up; "
                "compute the loss again, or use lskd.DistillationLoss with retain_graph=True"
            )
        ctx.gradient = None  # type: ignore[attr-defined]
        factor = outer[0]
        if factor.device.type != "cpu" or factor != 1:
            gradient.mul_(factor)
        return (gradient.to(ctx.dtype), *[None] * 4)  # type: ignore[attr-defined]


def _counted_rows(logits: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    check_one_per_sample("mask", mask, logits)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool, true where a sample counts")
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    return None if len(rows) == mask.numel() else rows


def _check_shapes(logits: Tensor, teacher: Tensor | TopK, labels: Tensor | None) -> None:
    shape = logits.shape
    if isinstance(teacher, TopK):
        k = teacher.ids.shape[-1]
        if teacher.ids.shape[:-1] != shape[:-1] or not 1 <= k <= shape[-1]:
            raise ValueError(
                f"top-K ids have shape {tuple(teacher.ids.shape)} and student logits {tuple(shape)}; "
                "they must cover the same samples, with 1 to all classes"
            )
    elif teacher.shape != shape:
        raise ValueError(
            f"teacher logits have shape {tuple(teacher.shape)} and student logits {tuple(shape)}; "
            "both must cover the same samples and classes"
        )
    if labels is None:
        return
    if not labels.is_floating_point():
        check_one_per_sample("labels", labels, logits)
    elif labels.shape != shape:
        raise ValueError(
            f"label probabilities have shape {tuple(labels.shape)}; they must have the logits' shape "
            f"{tuple(shape)}"
        )
