"""Smoothed targets in the two conventions of the field, and what temperature does to them."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lskd.base.tensors import all_finite

Convention = Literal["paper", "uniform"]
"""How ``alpha`` is spread over ``K`` classes.

``"paper"`` is Eq. 1 of Shen et al. (ICLR 2021): ``1 - alpha`` on the label and ``alpha / (K - 1)`` on each
other class; current fairseq does the same. ``"uniform"`` is Szegedy et al. (2016), torch, timm and mmcls:
``alpha / K`` on every class and ``1 - alpha`` more on the label.
"""


def check_smoothing(num_classes: int, alpha: float, convention: str) -> None:
    """Raise ``ValueError`` unless the three describe smoothed targets."""
    if convention not in get_args(Convention):
        raise ValueError(f"convention is {convention!r}; it must be 'paper' or 'uniform'")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; label smoothing takes 0 <= alpha < 1")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
    if num_classes == 1 and alpha > 0 and convention == "paper":
        raise ValueError("one class leaves no other class to smooth towards; use alpha=0")


def target_values(num_classes: int, alpha: float, convention: Convention = "paper") -> tuple[float, float]:
    """Return the target probability of the label and that of each other class.

    Args:
        alpha: smoothing, ``0 <= alpha < 1``.

    Raises:
        ValueError: for an alpha, class count or convention out of range.

    >>> target_values(5, 0.2)
    (0.8, 0.05)
    >>> on, off = target_values(5, 0.2, "uniform")
    >>> round(on, 4), round(off, 4)
    (0.84, 0.04)
    """
    check_smoothing(num_classes, alpha, convention)
    if convention == "uniform":
        return 1 - alpha + alpha / num_classes, alpha / num_classes
    return 1 - alpha, alpha / (num_classes - 1) if alpha else 0.0


def smooth_targets(
    labels: Tensor,
    num_classes: int,
    alpha: float,
    convention: Convention = "paper",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return smoothed one-hot rows (Eq. 1).

    Args:
        labels: integer class ids, any shape ``(...)``.
        alpha: smoothing, ``0 <= alpha < 1``.

    Returns:
        Probabilities of shape ``(..., K)`` on the device of ``labels``; each row sums to 1.

    Raises:
        ValueError: for labels that are not integers of ``0..K-1``, a dtype that is not floating, or arguments
            out of range.

    >>> smooth_targets(torch.tensor([2, 0]), num_classes=3, alpha=0.1)
    tensor([[0.0500, 0.0500, 0.9000],
            [0.9000, 0.0500, 0.0500]])
    """
    on, off = target_values(num_classes, alpha, convention)
    check_labels(labels, num_classes)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; probabilities need a floating dtype")
    targets = torch.full((*labels.shape, num_classes), off, dtype=dtype, device=labels.device)
    return targets.scatter_(-1, labels.long().unsqueeze(-1), on)


def smooth_probabilities(probabilities: Tensor, alpha: float, convention: Convention = "paper") -> Tensor:
    """Return probabilities of classes (of mixup, say), smoothed as the labels that they were made of.

    To smooth what was mixed is to mix what was smoothed, but for rounding.

    Args:
        probabilities: rows ``(..., K)`` that sum to 1; one-hot integers too.
        alpha: smoothing, ``0 <= alpha < 1``.

    Raises:
        ValueError: for arguments out of range.

    >>> smooth_probabilities(torch.tensor([0.75, 0.25, 0.0]), 0.3, "uniform")
    tensor([0.6250, 0.2750, 0.1000])
    """
    on, off = target_values(probabilities.shape[-1], alpha, convention)
    return off + probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)) * (on - off)


def binary_targets(labels: Tensor, alpha: float, convention: Convention = "uniform") -> Tensor:
    """Return smoothed targets of no and yes for classes that do not exclude one another (multi-label).

    Each class is a case of two classes: ``"uniform"`` moves its label towards 1/2 by ``alpha``, as timm's
    ``--task multilabel`` does, ``"paper"`` gives ``alpha`` to the other answer.

    Args:
        labels: ``(..., K)`` of 0 to 1, whether a sample is of a class.
        alpha: smoothing, ``0 <= alpha < 1``.

    Returns:
        Probabilities ``(..., K, 2)``, for logits as of :func:`lskd.terms.binary_logits`.

    Raises:
        ValueError: for arguments out of range.

    >>> binary_targets(torch.tensor([1.0, 0.0]), 0.2)
    tensor([[0.1000, 0.9000],
            [0.9000, 0.1000]])
    """
    on, off = target_values(2, alpha, convention)
    yes = off + labels.to(torch.promote_types(labels.dtype, torch.float32)) * (on - off)
    return torch.stack([1 - yes, yes], -1)


def convert_alpha(alpha: float, num_classes: int, source: Convention, target: Convention) -> float:
    """Return the alpha that gives in convention ``target`` what ``alpha`` gives in ``source``.

    ``uniform = paper * K / (K - 1)``.

    Raises:
        ValueError: for arguments out of range, or where no alpha below 1 gives the same targets.

    >>> round(convert_alpha(0.1, 10, "paper", "uniform"), 4)
    0.1111
    >>> round(convert_alpha(0.1, 1000, "uniform", "paper"), 4)
    0.0999
    """
    check_smoothing(num_classes, alpha, source)
    check_smoothing(num_classes, 0.0, target)
    if source == target or alpha == 0:
        return alpha
    if source == "uniform":
        return alpha * (num_classes - 1) / num_classes
    converted = alpha * num_classes / (num_classes - 1)
    if converted >= 1:
        raise ValueError(
            f"alpha {alpha} over {num_classes} classes puts no more on the label than on another; "
            "the uniform convention cannot express it, use a smaller alpha"
        )
    return converted


def target_mass(
    num_classes: int, alpha: float, temperature: float, convention: Convention = "paper"
) -> float:
    """Return what an ideal smoothed teacher puts on its own class at a temperature.

    A teacher that has learned its smoothed targets exactly gives, at temperature ``T``,
    ``p(T) = on^(1/T) / (on^(1/T) + (K - 1) off^(1/T))``: the closed form behind the fall of smoothed
    teachers at high temperature (Chandrasegaran et al., ICML 2022).

    Raises:
        ValueError: for arguments out of range.

    >>> [round(target_mass(1000, 0.1, t), 3) for t in (1, 2, 3)]
    [0.9, 0.087, 0.02]
    """
    on, off = target_values(num_classes, alpha, convention)
    check_temperature(temperature)
    if off == 0 or num_classes == 1:
        return 1.0
    log_odds = math.log(num_classes - 1) + (math.log(off) - math.log(on)) / temperature
    return 1 / (1 + math.exp(log_odds)) if log_odds < 700 else 0.0


def chance_like_mass(num_classes: int) -> float:
    """Return the mass on a teacher's own class below which its target is hardly more than the uniform one.

    At it the target is one part of the label in ten and nine parts of the uniform distribution:
    ``0.1 + 0.9 / K``. It is our line, drawn between what Chandrasegaran et al. (ICML 2022) report: smoothed
    teachers did no worse where the ideal mass was 0.9, lost little where it was 0.175 (CUB, T = 2) and two
    points or more where it was 0.087 or less (ImageNet at T = 2 and above, CUB at T = 3).

    >>> chance_like_mass(1000)
    0.1009
    """
    check_smoothing(num_classes, 0.0, "paper")
    return 0.1 + 0.9 / num_classes


def target_entropy(
    num_classes: int, alpha: float, temperature: float = 1.0, convention: Convention = "paper"
) -> float:
    """Return the entropy in nats of an ideal smoothed teacher at a temperature.

    It is the part of the distillation loss (Eq. 4) that no student can remove, so a smoothed teacher's
    larger loss is partly just this.

    Raises:
        ValueError: for arguments out of range.

    >>> round(target_entropy(1000, 0.1), 3)
    1.016
    """
    on = target_mass(num_classes, alpha, temperature, convention)
    rest = 1 - on
    entropy = 0.0
    if on > 0:
        entropy -= on * math.log(on)
    if rest > 0:
        entropy -= rest * math.log(rest / (num_classes - 1))
    return entropy


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless the temperature is a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")


def transformed() -> bool:
    """Return whether ``torch.func`` (grad, vmap, ...) is at work: numbers cannot be looked at then."""
    return torch._C._are_functorch_transforms_active()


def check_samples(
    logits: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    least: int = 0,
    any_device: bool = False,
) -> None:
    """Raise ``ValueError`` unless logits are floating ``(N, K)``, and labels ``(N,)`` integers of ``0..K-1``.

    Args:
        num_classes: ``K``; None: any.
        least: the smallest ``N``.
        any_device: see :func:`check_labels`.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or num_classes not in (None, logits.shape[1]):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            f"they must be (N, {num_classes or 'K'}) and (N,)"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits have dtype {logits.dtype}; they must be floating point")
    if len(labels) < least:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; there must be at least one sample")
    check_labels(labels, logits.shape[1], any_device=any_device)


def check_finite(logits: Tensor, samples: int | Tensor = 0, where: str = "") -> None:
    """Raise ``ValueError`` unless the logits ``(n, K)`` of some samples are finite, naming the first.

    Args:
        samples: their numbers ``(n,)``, or that of the first.
        where: what they are numbered in, `` of this batch``; nothing: the whole data set.
    """
    if not all_finite(logits):
        place = int((~torch.isfinite(logits).all(1)).nonzero()[0])
        number = samples + place if isinstance(samples, int) else int(samples[place])
        raise ValueError(
            f"the logits of sample {number}{where} are not all finite; "
            "leave the sample out or fix the network"
        )


def check_labels(labels: Tensor, num_classes: int, name: str = "labels", any_device: bool = False) -> None:
    """Raise ``ValueError`` unless labels are integers of ``0..num_classes-1``.

    Unless ``any_device``, the values are looked at on the CPU only: elsewhere the look would make the device
    wait in every step, and the gather that follows has the device's own assertion.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} have dtype {labels.dtype}; class ids are integers")
    if torch.compiler.is_compiling() or transformed() or labels.numel() == 0:
        return
    if labels.device.type != "cpu" and not any_device:
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        wrong = ((labels < 0) | (labels >= num_classes)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{', '.join(str(i) for i in wrong)}] is {int(labels[tuple(wrong)])}; "
            f"with {num_classes} classes they are 0 to {num_classes - 1}"
        )
