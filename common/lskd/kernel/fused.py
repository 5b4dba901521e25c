"""The distillation loss and its gradient in one pass over chunks, without tensors of the logits' size."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lskd.kernel import native as _native
from lskd.kernel.chunks import (
    Implementation,
    KnownTeacher,
    Settings,
    Work,
    counting,
    flatten,
    gradient_like,
)
from lskd.targets import (
    Convention,
    check_labels,
    check_smoothing,
    check_temperature,
    target_values,
    transformed,
)
from lskd.terms import TopK, centred, check_one_per_sample, check_teacher, constant, distillation_terms

Reduction = Literal["mean", "sum"]


class LossComponents(NamedTuple):
    """The distillation loss and what it is made of: scalars, of which ``loss`` alone carries a graph.

    Attributes:
        loss: what is minimised.
        cross_entropy: of teacher and student at the temperature, without ``T^2``.
        kl: the divergence, cross-entropy minus teacher entropy.
        teacher_entropy: the part of the cross-entropy that no student can remove.
        hard_cross_entropy: of the smoothed labels and the student at temperature 1; NaN without labels.
        nll: of the labels as they are, unsmoothed; NaN without integer labels.
        agreement: share of the samples whose largest class is the teacher's; their number for a sum. Of a
            teacher with ``rest="restrict"`` the largest of its own classes. NaN of drawn classes, as ``kl``
            and ``teacher_entropy`` are.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    teacher_entropy: Tensor
    hard_cross_entropy: Tensor
    nll: Tensor
    agreement: Tensor


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
    impl: Implementation = "auto",
) -> LossComponents:
    """Return the distillation loss and its parts, with a gradient that is computed in the same pass.

    Chunk by chunk of the samples, terms and gradient are computed together in float32 (float64 for float64),
    and the only tensor of the logits' size is the gradient, in the logits' dtype (float32 for float16: a loss
    scale comes before it is rounded). No gradient reaches the teacher. On a GPU nothing waits for the device.
    NaN of a sample that counts is NaN in the loss and its gradient; a teacher of weight 0 has no influence.
    Under ``torch.compile`` it is one operator, ``lskd::fused_distillation``, with the same numbers.

    ``z`` and ``z - max(z)`` of a teacher give the same gradient bit for bit, and the same numbers to 1e-6;
    float32 rows that were stored and read again give both bit for bit.

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
        impl: what computes it, see :data:`lskd.kernel.chunks.Implementation`.

    Raises:
        ValueError: for shapes, dtypes or numbers that do not fit.
        RuntimeError: for ``impl="native"`` where it cannot run; in backward with ``create_graph=True``, and
            under ``torch.func``, where ``impl="reference"`` and :func:`lskd.distillation_terms` serve.

    >>> student = torch.zeros(1, 2, requires_grad=True)
    >>> terms = fused_distillation(student, torch.tensor([[0.0, 0.0]]))
    >>> terms.loss.backward()
    >>> round(float(terms.loss), 4), student.grad.tolist()
    (0.6931, [[0.0, 0.0]])
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(get_args(Implementation))}")
    if impl != "reference" and transformed():
        raise RuntimeError(
            "the fused distillation loss does not go through torch.func (grad, vmap, jacrev, jvp); "
            "build the loss from lskd.distillation_terms"
        )
    check_temperature(temperature)
    classes = student_logits.shape[-1]
    check_smoothing(max(classes, 2), alpha, convention)
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight is {hard_weight}; the weight of the hard labels is 0 to 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if labels is None and hard_weight > 0:
        raise ValueError(f"hard_weight is {hard_weight} but no labels were given; pass labels")
    _check_shapes(student_logits, teacher, labels, mask)
    on, off = target_values(classes, alpha, convention) if classes > 1 else (1.0, 0.0)
    settings = Settings(
        temperature=float(temperature),
        soft_weight=float((1 - hard_weight) * (temperature**2 if temperature_squared else 1)),
        hard_weight=float(hard_weight),
        on=on,
        off=off,
        rest=teacher.rest if isinstance(teacher, TopK) else "renormalise",
        mean=reduction == "mean",
        impl=impl,
    )
    if isinstance(teacher, TopK) and teacher.rest == "restrict":
        hard = {"hard_weight": 1.0, "alpha": alpha, "convention": convention}
        common: dict[str, Any] = {"reduction": reduction, "impl": impl}
        return _restricted(student_logits, teacher, labels, mask, settings, common, hard)
    if isinstance(teacher, TopK) and teacher.sampled:  # what the weights of drawn classes cannot say
        parts = _computed(student_logits, teacher, labels, mask, settings)
        unknown = torch.full_like(parts.kl, float("nan"))
        return parts._replace(kl=unknown, teacher_entropy=unknown, agreement=unknown)
    return _computed(student_logits, teacher, labels, mask, settings)


def _computed(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> LossComponents:
    if settings.impl == "reference":
        return _reference(student_logits, teacher, labels, mask, settings)
    values = (teacher.values if isinstance(teacher, TopK) else teacher).detach()
    if values.dtype == torch.float64 != student_logits.dtype and not isinstance(teacher, TopK):
        values = centred(values).float()
    labels = None if labels is None else labels.detach()
    ids = teacher.ids if isinstance(teacher, TopK) else None
    if torch.compiler.is_compiling():
        wanted = torch.is_grad_enabled() and student_logits.requires_grad
        terms, _ = _operator(student_logits, values, ids, labels, mask, *settings, wanted)
        loss, others = terms[0].clone(), terms[1:].detach()
    else:
        loss, others = _FusedLoss.apply(student_logits, values, ids, labels, mask, settings)
    return LossComponents(loss, *others.unbind())


def _restricted(
    logits: Tensor,
    teacher: TopK,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    common: dict[str, Any],
    hard: dict[str, Any],
) -> LossComponents:
    """Return the loss over a teacher's own classes; about the others nothing is computed but for labels."""
    ids = constant(teacher.ids, torch.int64)
    if mask is not None:  # what is outside may be anything
        ids = torch.where(mask.unsqueeze(-1), ids, 0)
    check_labels(ids, logits.shape[-1], "top-K ids")
    known = logits.gather(-1, ids)
    soft = fused_distillation(known, teacher.values, mask=mask, temperature=settings.temperature, **common)
    if labels is None:
        return soft._replace(loss=settings.loss(soft.loss, soft.hard_cross_entropy))
    taught = logits if settings.hard_weight > 0 else logits.detach()
    spoken = TopK(teacher.values, ids)
    parts = fused_distillation(taught, spoken, labels, mask, **common, **hard)
    return soft._replace(
        loss=settings.loss(soft.loss, parts.loss), hard_cross_entropy=parts.hard_cross_entropy, nll=parts.nll
    )


def _reference(
    logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> LossComponents:
    """Return the loss by the plain formulas, sample by sample, of which those that count are added up."""
    if mask is None:
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    student = logits[mask].to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(teacher, TopK):
        teacher = TopK(teacher.values[mask], teacher.ids[mask], teacher.rest)
        best = teacher.ids.gather(-1, teacher.values.argmax(-1, keepdim=True)).squeeze(-1)
    else:
        teacher = teacher[mask]
        best = teacher.argmax(-1)
    soft = distillation_terms(student, teacher, settings.temperature)
    hard = nll = torch.full_like(soft.kl, float("nan"))
    if labels is not None:
        targets, logs = labels[mask].detach(), student.log_softmax(-1)
        if not targets.is_floating_point():
            check_labels(targets, logits.shape[-1])
            targets = targets.long().unsqueeze(-1)
            nll = -logs.gather(-1, targets).squeeze(-1)
            targets = torch.full_like(logs, settings.off).scatter_(-1, targets, settings.on)
        hard = -torch.where(targets == 0, 0.0, targets * logs).sum(-1)
    loss = settings.loss(soft.cross_entropy, hard)
    terms = [loss, *soft, hard, nll, (student.argmax(-1) == best).to(loss.dtype)]
    totals = torch.stack(terms).sum(-1) / (max(len(student), 1) if settings.mean else 1)
    return LossComponents(totals[0], *totals[1:].detach().unbind())


def _compute(
    logits: Tensor,
    values: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the seven terms in one vector, and the gradient of the first where it is wanted."""
    classes = logits.shape[-1]
    samples = counting(mask, logits.shape[:-1].numel(), settings.mean)
    if labels is not None:
        own = int(labels.is_floating_point())
        labels = flatten(labels, samples, own, 0)
        if not own:
            check_labels(labels, classes)
            labels = labels.long()
    takes = ids is None and _native.takes(logits, values, labels)
    if settings.impl == "native" and not takes:
        raise RuntimeError(
            "impl='native' takes contiguous float32 logits of a dense teacher and integer labels, on the CPU"
            + ("" if _native.has_compiled_loss() else "; and this installation has no compiled code")
        )
    if takes and settings.impl != "chunks":
        gradient = gradient_like(logits, zeros=samples.rows is not None) if wanted else None
        return _native.compute(logits, values, labels, samples, settings, gradient), gradient
    teacher: Tensor | KnownTeacher = values.detach()
    if ids is not None:
        teacher = KnownTeacher(TopK(values, ids, settings.rest), samples, classes, settings.temperature)
    work = Work(logits.detach(), teacher, labels, samples, settings, wanted)
    work.run()
    gradient = work.gradient
    return work.terms(), None if gradient is None else gradient.view(logits.shape)


class _FusedLoss(torch.autograd.Function):
    """The loss, and its parts in a vector; the gradient of the loss is ready when forward ends."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        values: Tensor,
        ids: Tensor | None,
        labels: Tensor | None,
        mask: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        """Compute the terms and, where it is asked for, the gradient."""
        wanted = bool(ctx.needs_input_grad[0])  # type: ignore[attr-defined]
        terms, gradient = _compute(logits, values, ids, labels, mask, settings, wanted)
        if wanted:
            # Kept by autograd's own rules: gone after backward unless retain_graph, an error if changed.
            given = [_ordinary(tensor) for tensor in (values, ids, labels, mask)]
            ctx.save_for_backward(logits, *given)  # type: ignore[arg-type]  # None may be kept too
            ctx.settings = settings  # type: ignore[attr-defined]
            ctx.gradient = gradient  # type: ignore[attr-defined]
        loss, others = terms[0].clone(), terms[1:]
        ctx.mark_non_differentiable(others)
        ctx.set_materialize_grads(False)
        return loss, others

    @staticmethod
    def backward(ctx: FunctionCtx, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradient that forward left, or compute it again: it is handed out once."""
        _refuse_second_derivative()
        factor: Tensor | None = outer[0]
        if factor is None:  # nothing came back to the loss
            return (None,) * 6
        logits, values, ids, labels, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient: Tensor | None = ctx.gradient  # type: ignore[attr-defined]
        ctx.gradient = None  # type: ignore[attr-defined]
        if gradient is None:
            settings: Settings = ctx.settings  # type: ignore[attr-defined]
            _, gradient = _compute(logits, values, ids, labels, mask, settings, True)
            assert gradient is not None
        if factor.device.type != "cpu" or factor.item() != 1:
            gradient.mul_(factor)
        return (gradient.to(logits.dtype), *[None] * 5)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused distillation loss has no second derivative; where backward runs with "
            "create_graph=True, build the loss from lskd.distillation_terms"
        )


def _ordinary(tensor: Tensor | None) -> Tensor | None:
    """Return the same memory as a tensor that autograd can keep: what inference mode gave, it cannot."""
    if tensor is None or not tensor.is_inference():
        return tensor
    return tensor.new_empty(0).set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    )


@torch.library.custom_op("lskd::fused_distillation", mutates_args=())
def _operator(
    logits: Tensor,
    values: Tensor,
    ids: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    on: float,
    off: float,
    rest: str,
    mean: bool,
    impl: str,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    # What a compiled graph calls: dynamo would unroll the chunks. Without a graph it would cost 0.1 ms.
    options: Any = temperature, soft_weight, hard_weight, on, off, rest, mean, impl
    terms, gradient = _compute(logits, values, ids, labels, mask, Settings(*options), wanted)
    return terms, terms.new_empty(0) if gradient is None else gradient


@_operator.register_fake
def _shapes_of_operator(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not others[-1]:
        return logits.new_empty(7, dtype=dtype), logits.new_empty(0, dtype=dtype)
    kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return logits.new_empty(7, dtype=dtype), logits.new_empty(logits.shape, dtype=kept)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])


def _backward_of_operator(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    (gradient,) = ctx.saved_tensors
    return ((gradient * outer[0]).to(ctx.dtype), *[None] * 13)


_operator.register_autograd(_backward_of_operator, setup_context=_keep_gradient)


def _check_shapes(logits: Tensor, teacher: Tensor | TopK, labels: Tensor | None, mask: Tensor | None) -> None:
    check_teacher(logits, teacher)
    if mask is not None:
        check_one_per_sample("mask", mask, logits)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}; it must be bool, true where a sample counts")
    if labels is None:
        return
    if not labels.is_floating_point():
        check_one_per_sample("labels", labels, logits)
    elif labels.shape != logits.shape:
        raise ValueError(
            f"label probabilities have shape {tuple(labels.shape)}; they must have the logits' shape "
            f"{tuple(logits.shape)}"
        )
