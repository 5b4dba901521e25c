"""The reference: the three parts of the distillation loss (Eqs. 3 and 4, Shen et al., ICLR 2021) by sample.

Below it, what is made of a teacher's logits before a student sees them.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lskd.base.tensors import widened
from lskd.targets import check_labels, check_temperature, transformed

Rest = Literal["renormalise", "spread", "lump", "restrict"]
"""What becomes of the classes that are not among a teacher's ``k``, see :class:`TopK`."""
Divergence = Literal["forward", "reverse", "jsd"]
"""Which divergence of teacher ``p`` and student ``q`` is minimised.

``"forward"`` is ``KL(p || q)`` of Eq. 3, with the gradient of the cross-entropy; ``"reverse"`` ``KL(q || p)``
(Gu et al., MiniLLM, ICLR 2024); ``"jsd"`` the Jensen-Shannon divergence, the mean of ``KL(p || m)`` and
``KL(q || m)`` for ``m = (p + q) / 2`` (Agarwal et al., GKD, ICLR 2024, beta 0.5), at most ln 2.
"""


@dataclass(frozen=True)
class TopK:
    """A teacher of which only ``k`` classes are known.

    Attributes:
        values: ``(..., k)``. Logits, or where ``rest`` is ``"spread"`` or ``"lump"`` log-probabilities at
            temperature 1.
        ids: ``(..., k)`` integer class ids, distinct within a row.
        rest: what becomes of the other ``K - k`` classes. ``"renormalise"`` gives them nothing and lets the
            ``k`` sum to 1 (Tan et al., ICLR 2019); ``"spread"`` shares the missing mass equally among them
            (FKD, Shen and Xing, ECCV 2022), before the temperature is applied. ``"lump"`` does as "spread",
            and then makes them one class, of the teacher and of the student: only their sum is learned.
            ``"restrict"`` leaves them out on both sides: the student's ``k`` sum to 1 too, so that nothing
            need be computed of the others.
        sampled: whether the values are log-weights of drawn classes, see :func:`sampled_log_probabilities`.
            Their cross-entropy is right in expectation; the teacher's entropy, the divergence and its largest
            class are not to be had of them, and come out as NaN.

    Raises:
        ValueError: for shapes that differ, ids that are not integers, an unknown ``rest``, or one beside
            drawn classes.

    >>> teacher = TopK(values=torch.tensor([[2.0, 2.0]]), ids=torch.tensor([[7, 3]]))
    >>> round(float(distillation_terms(torch.zeros(1, 10), teacher).cross_entropy), 4)  # ln 10
    2.3026
    """

    values: Tensor
    ids: Tensor
    rest: Rest = "renormalise"
    sampled: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading the data."""
        if self.values.shape != self.ids.shape:
            raise ValueError(
                f"top-K values have shape {tuple(self.values.shape)} and ids {tuple(self.ids.shape)}; "
                "they must be the same"
            )
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise ValueError(f"top-K ids have dtype {self.ids.dtype}; class ids are integers")
        if self.rest not in get_args(Rest):
            raise ValueError(f"rest is {self.rest!r}; it must be one of {', '.join(get_args(Rest))}")
        if self.sampled and self.rest != "renormalise":
            raise ValueError(f"rest is {self.rest!r}; drawn classes stand for all: it must be 'renormalise'")


class DistillationTerms(NamedTuple):
    """What :func:`distillation_terms` returns; each of shape ``(...)``, in nats."""

    cross_entropy: Tensor
    kl: Tensor
    teacher_entropy: Tensor


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
    check_teacher(student_logits, teacher)
    student = _log_probabilities(student_logits, temperature)
    if isinstance(teacher, TopK):
        terms = _top_k_terms(student, teacher, temperature)
        if teacher.sampled:
            unknown = torch.full_like(terms.kl, math.nan)
            terms = terms._replace(kl=unknown, teacher_entropy=unknown)
        return terms
    return _terms(student, _teacher_log_probabilities(teacher, student, temperature))


def divergence(student_logits: Tensor, teacher: Tensor, kind: Divergence, temperature: float = 1.0) -> Tensor:
    """Return a divergence of a teacher's and a student's distribution, by sample.

    No factor ``T^2`` is applied here. Half precision is computed in float32; no gradient reaches the teacher.

    Args:
        student_logits: ``(..., K)``.
        teacher: logits ``(..., K)``, of all classes.
        kind: see :data:`Divergence`.
        temperature: divides both logits.

    Returns:
        ``(...)``, in nats.

    Raises:
        ValueError: for an unknown ``kind``, ``temperature <= 0`` or shapes that differ.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> [round(float(divergence(student, teacher, kind)), 4) for kind in ("forward", "reverse", "jsd")]
    [0.4338, 0.3278, 0.0895]
    """
    if kind not in get_args(Divergence):
        raise ValueError(f"kind is {kind!r}; it must be {', '.join(get_args(Divergence))}")
    check_temperature(temperature)
    check_teacher(student_logits, teacher)
    log_q = _log_probabilities(student_logits, temperature)
    log_p = _teacher_log_probabilities(teacher, log_q, temperature)
    p = log_p.exp()
    if kind == "forward":
        return _kl(p, log_p, log_q)
    q = log_q.exp()
    # Two times: 0 * log 0 must be 0 in the value, and q gets a gradient from the logarithm too.
    if kind == "reverse":
        return _weighted(q, torch.where(q == 0, 0.0, log_q - log_p)).sum(-1)
    mixture = (p + q) / 2
    log_m = torch.where(mixture == 0, 1.0, mixture).log()
    own = _weighted(q, torch.where(q == 0, 0.0, log_q - log_m))
    return (_weighted(p, log_p - log_m) + own).sum(-1) / 2


def check_teacher(logits: Tensor, teacher: Tensor | TopK) -> None:
    """Raise ValueError unless a teacher is about the samples and classes of a student's ``logits``."""
    shape = logits.shape
    if isinstance(teacher, TopK):
        if teacher.ids.shape[:-1] != shape[:-1] or not 1 <= teacher.ids.shape[-1] <= shape[-1]:
            raise ValueError(
                f"top-K ids have shape {tuple(teacher.ids.shape)} and student logits {tuple(shape)}; "
                "they must cover the same samples, with 1 to all classes"
            )
    elif teacher.shape != shape:
        raise ValueError(
            f"teacher logits have shape {tuple(teacher.shape)} and student logits {tuple(shape)}; "
            "both must cover the same samples and classes"
        )


def check_one_per_sample(name: str, entries: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless ``entries`` has one entry for each sample of ``logits``."""
    if entries.shape != logits.shape[:-1]:
        raise ValueError(
            f"the shape of {name} is {tuple(entries.shape)}; with logits of shape {tuple(logits.shape)} "
            f"it must be {tuple(logits.shape[:-1])}, one for each sample"
        )


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy: autograd cannot keep for its backward what a teacher gave under `inference_mode`."""
    return tensor.detach().to(dtype, copy=True)


def _teacher_log_probabilities(values: Tensor, student: Tensor, temperature: float) -> Tensor:
    # In the wider of the two dtypes: a float64 teacher's offset comes off before it is rounded.
    values = values.detach().to(torch.promote_types(values.dtype, student.dtype))
    return _log_probabilities(values, temperature).to(student.dtype)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    # Half precision overflows in the sum and loses the small classes that distillation is about.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _weighted(probabilities: Tensor, log_values: Tensor) -> Tensor:
    """``p * log q`` with ``0 * log 0 = 0``, which logits of -inf (a masked class) ask for; NaN stays NaN."""
    return torch.where(probabilities == 0, 0.0, probabilities * log_values)


def _kl(probabilities: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    # Not cross-entropy minus entropy: the difference of two large numbers would not be 0 for p = q.
    return _weighted(probabilities, teacher - student).sum(-1)


def _terms(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> DistillationTerms:
    """Return the terms from two tensors of log-probabilities, and of how many classes each column is."""
    probabilities = teacher.exp() if counts is None else counts * teacher.exp()
    return DistillationTerms(
        cross_entropy=-_weighted(probabilities, student).sum(-1),
        kl=_kl(probabilities, teacher, student),
        teacher_entropy=-_weighted(probabilities, teacher).sum(-1),
    )


def _top_k_terms(student: Tensor, teacher: TopK, temperature: float) -> DistillationTerms:
    num_classes, k = student.shape[-1], teacher.ids.shape[-1]
    check_labels(teacher.ids, num_classes, "top-K ids")
    ids = constant(teacher.ids, torch.int64)
    known = student.gather(-1, ids)
    if teacher.rest == "restrict":
        known = known.log_softmax(-1)
    if teacher.rest in ("renormalise", "restrict") or k == num_classes:
        return _terms(known, _teacher_log_probabilities(teacher.values, student, temperature))

    values = teacher.values.detach().to(student.dtype)
    log_teacher, counts = completed(values, num_classes, temperature)
    if teacher.rest == "lump":
        others = student.scatter(-1, ids, -math.inf)
        # Where all are masked their sum has a gradient of NaN, which a weight of 0 does not hide.
        none = others.amax(-1, keepdim=True) == -math.inf
        others = others.masked_fill(none, -math.inf).logsumexp(-1, keepdim=True)
        return _terms(torch.cat([known, others], -1), log_teacher + counts.log())
    mean_other = student.scatter(-1, ids, 0.0).sum(-1, keepdim=True) / (num_classes - k)
    return _terms(torch.cat([known, mean_other], -1), log_teacher, counts)


def completed(values: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``(..., k + 1)`` log-probabilities at the temperature, and of how many classes each is.

    The completed distribution has k known classes and ``num_classes - k`` equal ones, which the last column
    stands for.
    """
    k = values.shape[-1]
    others = num_classes - k
    _check_log_probabilities(values)
    # Widened: beside a sum near 1 a small rest is all rounding, and a high temperature makes it large.
    rest = (1 - widened(values).exp().sum(-1, keepdim=True)).clamp(min=0.0)
    missing = (rest.log() - math.log(others)).to(values.dtype)
    tempered = torch.cat([values, missing], -1) / temperature
    counts = values.new_ones(k + 1)
    counts[k:].fill_(others)  # not from a list: to copy one to a GPU would wait for it
    return tempered - (tempered + counts.log()).logsumexp(-1, keepdim=True), counts


def _check_log_probabilities(values: Tensor) -> None:
    if torch.compiler.is_compiling() or transformed() or values.device.type != "cpu" or not values.numel():
        return
    mass = float(values.exp().sum(-1).max())
    if mass > 1.05:  # log-probabilities kept in half precision may sum to a little more than 1
        raise ValueError(
            f"top-K values sum to a probability of {mass:.4g}; 'spread' and 'lump' take log-probabilities, "
            "not logits"
        )


def binary_logits(logits: Tensor) -> Tensor:
    """Return the logits of no and yes for classes that do not exclude one another (multi-label).

    The softmax of ``(0, z)`` is ``(1 - sigmoid(z), sigmoid(z))`` at every temperature. So every loss and
    measure of two such tensors is about the K binary decisions of a sample: the binary cross-entropy, KL
    divergence and entropy of each class's sigmoid. Their targets are :func:`lskd.targets.binary_targets`.

    Args:
        logits: ``(..., K)``.

    Returns:
        ``(..., K, 2)``, of the same dtype.

    >>> round(float(binary_logits(torch.tensor([2.0])).softmax(-1)[0, 1]), 4)  # sigmoid(2)
    0.8808
    """
    return torch.stack([torch.zeros_like(logits), logits], -1)


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


def sampled_log_probabilities(logits: Tensor, k: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``k`` classes drawn so that their weights are the probabilities in expectation, for each class.

    What :func:`top_k_log_probabilities` keeps is biased: what it leaves out is never learned. Here a class
    that is larger than its share of the places keeps its probability, and the others are drawn without
    replacement in proportion to theirs, each with the same weight (variance-optimal sampling, Cohen et al.,
    SIAM J. Comput. 2011; drawn systematically, Madow 1949). The weights of a row sum to 1, so
    ``rest="renormalise"`` serves, at temperature 1 alone: a power of them is biased.

    Args:
        logits: ``(..., K)``.
        k: 1 to K.
        points: ``(...)``, uniform in [0, 1): equal ones draw the same classes.

    Returns:
        log-weights ``(..., k)``, largest first, and int64 ids ``(..., k)``.

    Raises:
        ValueError: for a ``k`` out of range.

    >>> logits = torch.tensor([0.6, 0.1, 0.1, 0.2]).log()
    >>> weights, ids = sampled_log_probabilities(logits, 2, torch.tensor(0.6))
    >>> [round(float(weight), 4) for weight in weights.exp()], ids.tolist()  # the other 0.4 on one of them
    ([0.6, 0.4], [0, 3])
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}; it must be 1 to {logits.shape[-1]}, the number of classes")
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    top, ids = p.topk(k, dim=-1)
    place, largest = torch.arange(k, device=p.device), widened(top)
    outside = p.scatter(-1, ids, 0.0)
    rest = outside.sum(-1, keepdim=True, dtype=largest.dtype)
    left = largest.flip(-1).cumsum(-1).flip(-1) + rest  # for a class and all that are smaller
    shares = left / (k - place)  # of each place, were those before it kept
    sure = ((largest <= shares).cumsum(-1) == 0).sum(-1, keepdim=True).clamp(max=k - 1)
    share = shares.gather(-1, sure)
    kept = (place < sure) | (share == 0)  # where nothing is left, all are
    # Over the others, places of equal width; in the wider dtype, or the last of many small ones had none.
    ends = outside.scatter(-1, ids, torch.where(kept, 0.0, top)).cumsum(-1, dtype=largest.dtype)
    at = (place - sure + widened(points).unsqueeze(-1)).clamp(min=0.0) / (k - sure) * ends[..., -1:]
    drawn = torch.searchsorted(ends, at, right=True).clamp(max=p.shape[-1] - 1)
    return torch.where(kept, largest, share).log().to(p.dtype), torch.where(kept, ids, drawn)
