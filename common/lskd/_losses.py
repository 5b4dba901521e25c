"""The distillation loss (Eqs. 3 and 4 of Shen et al., ICLR 2021) and its three parts."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lskd._targets import Convention, check_labels, check_smoothing, check_temperature, target_values

Rest = Literal["renormalise", "spread"]


@dataclass(frozen=True)
class TopK:
    """A teacher of which only the ``k`` largest classes are known.

    Attributes:
        values: ``(..., k)``. Logits, or log-probabilities at temperature 1 where ``rest`` is ``"spread"``.
        ids: ``(..., k)`` integer class ids, distinct within a row.
        rest: what becomes of the other ``K - k`` classes. ``"renormalise"`` gives them nothing and lets the
            ``k`` sum to 1 (Tan et al., ICLR 2019); ``"spread"`` shares the missing mass equally among them
            (FKD, Shen and Xing, ECCV 2022), before the temperature is applied.

    Raises:
        ValueError: for shapes that differ, ids that are not integers, or an unknown ``rest``.

    >>> teacher = TopK(values=torch.tensor([[2.0, 2.0]]), ids=torch.tensor([[7, 3]]))
    >>> round(float(distillation_terms(torch.zeros(1, 10), teacher).cross_entropy), 4)  # ln 10
    2.3026
    """

    values: Tensor
    ids: Tensor
    rest: Rest = "renormalise"

    def __post_init__(self) -> None:
        """Check what can be checked without reading the data."""
        if self.values.shape != self.ids.shape:
            raise ValueError(
                f"top-K values have shape {tuple(self.values.shape)} and ids {tuple(self.ids.shape)}; "
                "they must be the same"
            )
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise ValueError(f"top-K ids have dtype {self.ids.dtype}; class ids are integers")
        if self.rest not in ("renormalise", "spread"):
            raise ValueError(f"rest is {self.rest!r}; it must be 'renormalise' or 'spread'")


class DistillationTerms(NamedTuple):
    """What :func:`distillation_terms` returns; each of shape ``(...)``, in nats."""

    cross_entropy: Tensor
    kl: Tensor
    teacher_entropy: Tensor


class LossComponents(NamedTuple):
    """What :meth:`DistillationLoss.components` returns: scalars, of which ``loss`` alone carries a graph."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    teacher_entropy: Tensor
    hard_cross_entropy: Tensor
    agreement: Tensor


def distillation_terms(
    student_logits: Tensor, teacher: Tensor | TopK, temperature: float = 1.0
) -> DistillationTerms:
    """Return cross-entropy, KL divergence and teacher entropy of each sample.

    ``KL(teacher || student) = H(teacher, student) - H(teacher)`` (Eq. 3): the paper's Property 1 holds for
    the gradients, the values differ by the teacher's entropy, so the three are given apart. No factor
    ``T^2`` is applied here. Half precision is computed in float32; no gradient reaches the teacher.

    Args:
        student_logits: ``(..., K)``.
        teacher: logits ``(..., K)``, or a :class:`TopK`.
        temperature: divides both logits.

    Returns:
        :class:`DistillationTerms`, each of shape ``(...)``, in nats.

    Raises:
        ValueError: for ``temperature <= 0``, shapes that do not match or ids outside ``0..K-1``.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> terms = distillation_terms(student, teacher)
    >>> [round(float(term), 4) for term in terms]
    [1.1269, 0.4338, 0.6931]
    """
    check_temperature(temperature)
    student = _log_probabilities(student_logits, temperature)
    if isinstance(teacher, TopK):
        return _top_k_terms(student, teacher, temperature)
    if teacher.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits have shape {tuple(teacher.shape)} and student logits "
            f"{tuple(student_logits.shape)}; both must cover the same samples and classes"
        )
    return _terms(student, _log_probabilities(teacher.detach().to(student.dtype), temperature))


class DistillationLoss(nn.Module):
    """The paper's distillation loss; as it stands soft labels only, temperature 1, mean over the batch.

    ``hard_weight * H(y, p_student) + (1 - hard_weight) * H(p_teacher / T, p_student / T)`` (Sec. 2, where the
    paper writes the arguments the other way round); ``y`` are the hard labels, smoothed by ``alpha``. The
    soft part is the cross-entropy of Eq. 4, which has the gradients of the KL divergence.

    Args:
        temperature: ``T``, divides both logits in the soft part.
        temperature_squared: multiply the soft part by ``T^2`` (Hinton et al., 2015), which keeps the size
            of its gradients when ``T`` changes.
        hard_weight: the paper's lambda, 0 to 1: the weight of the hard labels.
        alpha: smoothing of integer hard labels. It is 0 unless asked for.
        convention: how ``alpha`` is meant, see :data:`lskd.Convention`.

    Raises:
        ValueError: for arguments out of range.

    >>> loss = DistillationLoss()
    >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    >>> round(float(loss(torch.zeros(2, 3), teacher)), 4)
    1.0986
    """

    def __init__(
        self,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        alpha: float = 0.0,
        convention: Convention = "paper",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_smoothing(2, alpha, convention)
        if not 0 <= hard_weight <= 1:
            raise ValueError(f"hard_weight is {hard_weight}; the weight of the hard labels is 0 to 1")
        self.temperature = temperature
        self.temperature_squared = temperature_squared
        self.hard_weight = hard_weight
        self.alpha = alpha
        self.convention = convention

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | TopK,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in nats. Arguments as in :meth:`components`."""
        return self.components(student_logits, teacher, labels, mask).loss

    def components(
        self,
        student_logits: Tensor,
        teacher: Tensor | TopK,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossComponents:
        """Return the loss and what it is made of, means over the samples that count.

        Args:
            student_logits: ``(..., K)``.
            teacher: logits ``(..., K)``, or a :class:`TopK`.
            labels: integer ids ``(...)``, smoothed here; or probabilities ``(..., K)`` (of mixup, say), taken
                as they are. Needed when ``hard_weight > 0``; otherwise only for the log.
            mask: bool ``(...)``, true where a sample counts (not padding). The mean is over these;
                with none left everything is 0. What is outside the mask, labels and logits, may be anything.

        Returns:
            :class:`LossComponents`. Cross-entropy, KL and entropy are at the loss' temperature and without
            ``T^2``; ``hard_cross_entropy`` is at temperature 1 and NaN without labels; ``agreement`` is the
            share of samples whose largest class is the teacher's.

        Raises:
            ValueError: for shapes or dtypes that do not fit, or missing labels.

        >>> parts = DistillationLoss().components(torch.zeros(1, 2), torch.tensor([[0.0, 0.0]]))
        >>> round(float(parts.cross_entropy), 4), float(parts.kl), round(float(parts.teacher_entropy), 4)
        (0.6931, 0.0, 0.6931)
        """
        if mask is not None:
            check_one_per_sample("mask", mask, student_logits)
            if mask.dtype != torch.bool:
                raise ValueError(f"mask has dtype {mask.dtype}; it must be bool, true where a sample counts")
            # Not only the loss but also its gradient must be free of what stands in the padding.
            student_logits = torch.where(mask.unsqueeze(-1), student_logits, 0.0)
            teacher = _without_padding(teacher, mask)
        soft = distillation_terms(student_logits, teacher, self.temperature)
        cross_entropy = _mean(soft.cross_entropy, mask)
        soft_weight = (1 - self.hard_weight) * (self.temperature**2 if self.temperature_squared else 1.0)
        # A part of weight 0 must not reach the loss: where it is infinite, 0 times it would be NaN.
        loss = soft_weight * cross_entropy if soft_weight > 0 else torch.zeros_like(cross_entropy)
        if labels is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.hard_weight > 0):
                hard = _mean(self._hard_terms(student_logits, labels, mask), mask)
            if self.hard_weight > 0:
                loss = loss + self.hard_weight * hard
        elif self.hard_weight > 0:
            raise ValueError(f"hard_weight is {self.hard_weight} but no labels were given; pass labels")
        else:
            hard = torch.full_like(cross_entropy, math.nan)
        with torch.no_grad():
            agree = (student_logits.argmax(-1) == _largest_class(teacher)).to(cross_entropy.dtype)
        return LossComponents(
            loss=loss,
            cross_entropy=cross_entropy.detach(),
            kl=_mean(soft.kl, mask).detach(),
            teacher_entropy=_mean(soft.teacher_entropy, mask).detach(),
            hard_cross_entropy=hard.detach(),
            agreement=_mean(agree, mask),
        )

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return (
            f"temperature={self.temperature}, temperature_squared={self.temperature_squared}, "
            f"hard_weight={self.hard_weight}, alpha={self.alpha}, convention={self.convention!r}"
        )

    def _hard_terms(self, student_logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        num_classes = student_logits.shape[-1]
        student = _log_probabilities(student_logits, 1.0)
        if labels.is_floating_point():
            if labels.shape != student_logits.shape:
                raise ValueError(
                    f"label probabilities have shape {tuple(labels.shape)}; they must have the logits' shape "
                    f"{tuple(student_logits.shape)}"
                )
            rows = _constant(labels, student.dtype)
            if mask is not None:
                rows = torch.where(mask.unsqueeze(-1), rows, 0.0)
            return -_weighted(rows, student).sum(-1)
        check_one_per_sample("labels", labels, student_logits)
        if mask is not None:
            labels = torch.where(mask, labels, 0)  # padding ids such as -100 are no classes
        check_labels(labels, num_classes)
        on, off = target_values(num_classes, self.alpha, self.convention)
        own = student.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
        if off == 0:
            return -own
        return -(on - off) * own - off * student.sum(-1)


def check_one_per_sample(name: str, entries: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless ``entries`` has one entry for each sample of ``logits``."""
    if entries.shape != logits.shape[:-1]:
        raise ValueError(
            f"the shape of {name} is {tuple(entries.shape)}; with logits of shape {tuple(logits.shape)} "
            f"it must be {tuple(logits.shape[:-1])}, one for each sample"
        )


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy, because autograd cannot keep for its backward what a teacher gave under torch.inference_mode.
    return tensor.detach().to(dtype, copy=True)


def _without_padding(teacher: Tensor | TopK, mask: Tensor) -> Tensor | TopK:
    mask = mask.unsqueeze(-1)
    if not isinstance(teacher, TopK):
        # A shape that does not fit is for the check that follows to name.
        return torch.where(mask, teacher, 0.0) if teacher.shape[:-1] == mask.shape[:-1] else teacher
    if teacher.ids.shape[:-1] != mask.shape[:-1]:
        return teacher
    k = teacher.ids.shape[-1]
    values = torch.where(mask, teacher.values, -math.log(2 * k))  # log-probabilities as good as any
    return TopK(values, torch.where(mask, teacher.ids, torch.arange(k, device=mask.device)), teacher.rest)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    # Half precision overflows in the sum and loses the small classes that distillation is about.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _weighted(probabilities: Tensor, log_values: Tensor) -> Tensor:
    """``p * log q`` with ``0 * log 0 = 0``, which logits of -inf (a masked class) ask for; NaN stays NaN."""
    return torch.where(probabilities == 0, 0.0, probabilities * log_values)


def _terms(student: Tensor, teacher: Tensor) -> DistillationTerms:
    """Return the terms from two tensors of log-probabilities of the same shape."""
    probabilities = teacher.exp()
    return DistillationTerms(
        cross_entropy=-_weighted(probabilities, student).sum(-1),
        # Not cross-entropy minus entropy: the difference of two large numbers would not be 0 for p = q.
        kl=_weighted(probabilities, teacher - student).sum(-1),
        teacher_entropy=-_weighted(probabilities, teacher).sum(-1),
    )


def _top_k_terms(student: Tensor, teacher: TopK, temperature: float) -> DistillationTerms:
    num_classes, k = student.shape[-1], teacher.ids.shape[-1]
    if teacher.ids.shape[:-1] != student.shape[:-1] or not 1 <= k <= num_classes:
        raise ValueError(
            f"top-K ids have shape {tuple(teacher.ids.shape)} and student logits {tuple(student.shape)}; "
            "they must cover the same samples, with 1 to all classes"
        )
    check_labels(teacher.ids, num_classes, "top-K ids")
    ids = _constant(teacher.ids, torch.int64)
    values = teacher.values.detach().to(student.dtype)
    known = student.gather(-1, ids)
    if teacher.rest == "renormalise" or k == num_classes:
        return _terms(known, _log_probabilities(values, temperature))

    log_teacher, counts = completed(values, num_classes, temperature)
    mean_other = student.scatter(-1, ids, 0.0).sum(-1, keepdim=True) / (num_classes - k)
    log_student = torch.cat([known, mean_other], -1)
    probabilities = counts * log_teacher.exp()
    return DistillationTerms(
        cross_entropy=-_weighted(probabilities, log_student).sum(-1),
        kl=_weighted(probabilities, log_teacher - log_student).sum(-1),
        teacher_entropy=-_weighted(probabilities, log_teacher).sum(-1),
    )


def completed(values: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``(..., k + 1)`` log-probabilities at the temperature, and of how many classes each is.

    The completed distribution has k known classes and ``num_classes - k`` equal ones, which the last column
    stands for.
    """
    k = values.shape[-1]
    others = num_classes - k
    _check_log_probabilities(values)
    # In float64: beside a sum near 1 a small rest is all rounding, and a high temperature makes it large.
    rest = (1 - values.double().exp().sum(-1, keepdim=True)).clamp(min=0.0)
    missing = (rest.log() - math.log(others)).to(values.dtype)
    tempered = torch.cat([values, missing], -1) / temperature
    counts = torch.tensor([1.0] * k + [float(others)], dtype=values.dtype, device=values.device)
    return tempered - (tempered + counts.log()).logsumexp(-1, keepdim=True), counts


def _check_log_probabilities(values: Tensor) -> None:
    if torch.compiler.is_compiling() or values.device.type != "cpu" or values.numel() == 0:
        return
    mass = float(values.exp().sum(-1).max())
    if mass > 1.05:  # log-probabilities kept in half precision may sum to a little more than 1
        raise ValueError(
            f"top-K values sum to a probability of {mass:.4g}; 'spread' takes log-probabilities, not logits"
        )


def _largest_class(teacher: Tensor | TopK) -> Tensor:
    if isinstance(teacher, TopK):
        best = teacher.values.argmax(-1, keepdim=True)
        return teacher.ids.gather(-1, best).squeeze(-1)
    return teacher.argmax(-1)


def _mean(terms: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return terms.mean() if terms.numel() else terms.sum()
    return torch.where(mask, terms, 0.0).sum() / mask.sum().clamp(min=1)
