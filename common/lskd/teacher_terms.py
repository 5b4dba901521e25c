"""What is made of teachers' logits before a student sees them, and how much a student listens."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AlphaSchedule = Literal["fixed", "threshold", "adaptive"]


def centred(logits: Tensor) -> Tensor:
    """Return logits less the largest of their row: the same distribution, without an offset.

    It comes before every rounding to a narrower dtype, because the steps of floating point grow with the
    distance from 0: beside 1e6 those of float32 are 0.06, beside 30 those of float16 0.016.

    Args:
        logits: ``(..., K)``.

    Returns:
        ``(..., K)``, float32 or wider; the largest of a row is 0.

    >>> centred(torch.tensor([[1e6, 1e6 - 0.01]], dtype=torch.float64)).half()
    tensor([[ 0.0000, -0.0100]], dtype=torch.float16)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.amax(-1, keepdim=True)


def top_k_log_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest log-probabilities at temperature 1, and their classes.

    They serve both ways of :class:`lskd.TopK` at any temperature: for ``"renormalise"`` a constant beside the
    logits does not count, and ``"spread"`` needs to know what is missing to 1.

    Args:
        logits: ``(..., K)``; half precision is normalised in float32.
        k: 1 to K.

    Returns:
        values ``(..., k)`` in nats, largest first, and int64 ids ``(..., k)``.

    Raises:
        ValueError: for a ``k`` out of range.

    >>> values, ids = top_k_log_probabilities(torch.tensor([[0.0, 1.0, 0.0]]), 1)
    >>> round(float(values), 4), int(ids)
    (-0.5514, 1)
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}; it must be 1 to {logits.shape[-1]}, the number of classes")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, ids = logits.topk(k, dim=-1)
    return values - logits.logsumexp(-1, keepdim=True), ids


def ensemble_logits(members: Sequence[Tensor]) -> Tensor:
    """Return logits of an ensemble: one teacher's as they are, several teachers' mean probabilities as logs.

    Args:
        members: one or more tensors ``(..., K)`` of logits.

    Raises:
        ValueError: for no member.

    >>> ensemble_logits([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])]).exp().tolist()
    [0.75, 0.25]
    """
    if not members:
        raise ValueError("an ensemble needs at least one member")
    if len(members) == 1:
        return members[0]
    logs = [centred(member).log_softmax(-1) for member in members]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def selective_weight(
    weight: float, schedule: AlphaSchedule, student_bleu: float | None, teacher_bleu: float | None
) -> float:
    """Return the weight of the teacher after a validation (selective distillation, Tan et al., ICLR 2019).

    ``"fixed"``: always ``weight``. ``"threshold"``: ``weight`` while the student's BLEU is below the
    teacher's plus 1, then 0. ``"adaptive"``: ``weight`` while it is below the teacher's minus 2, from there
    on halved with every point of BLEU: ``weight * 0.5 ** (student - teacher + 2)``.

    Args:
        weight: 0 to 1, the weight to begin with.
        schedule: which of the three.
        student_bleu: validation BLEU in points, 0 to 100; None before the first validation.
        teacher_bleu: the teacher's on the same sentences.

    Raises:
        ValueError: for an unknown schedule, or no BLEU of the teacher where one is needed.

    >>> selective_weight(0.8, "adaptive", 31.0, 32.0), selective_weight(0.8, "threshold", 33.0, 32.0)
    (0.4, 0.0)
    """
    if schedule not in ("fixed", "threshold", "adaptive"):
        raise ValueError(f"schedule is {schedule!r}; it must be fixed, threshold or adaptive")
    if schedule == "fixed":
        return weight
    if teacher_bleu is None:
        raise ValueError(f"the schedule {schedule} needs the teacher's BLEU")
    if student_bleu is None:
        return weight
    if schedule == "threshold":
        return weight if student_bleu < teacher_bleu + 1 else 0.0
    return weight * math.pow(0.5, max(student_bleu - teacher_bleu + 2, 0.0))
