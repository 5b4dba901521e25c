"""Stability: how much a teacher's predictions vary within a class, or between classes.

Four definitions go by that name in Shen et al. (ICLR 2021). The text has two (Eq. 2 and Eq. 5), the code
and the tables have two others; a number means little without the name of its definition.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from lskd.base.tensors import accumulator_dtype, widened
from lskd.targets import check_finite, check_samples
from lskd.terms import centred

Definition = Literal["target_std", "vector_l2", "between_vector_l2", "between_target_std"]

_CHUNK = 1 << 18  # numbers of a block of logits, so that it stays in a CPU's cache
_FEWEST_ROWS = 64  # of a block: each has a cost of its own, which grows with the classes too


class Stability(Metric):
    """Stability ``S`` of a teacher; the paper's tables print ``1 - S`` (lower = more stable).

    ``Stability(num_classes, definition=...)`` makes one of

    ========================  ==============================================================  ===============
    definition                ``1 - S``, a mean over classes                                  paper
    ========================  ==============================================================  ===============
    ``"target_std"``          unbiased std of the label's probability within the class        Alg. 1, Table 1
    ``"vector_l2"``           mean L2 distance of the probabilities from their class mean     Eq. 2
    ``"between_vector_l2"``   L2 distance of the class mean from the mean of all samples      Eq. 5
    ``"between_target_std"``  std over classes of the class mean of the label's probability   fits Table 10
    ========================  ==============================================================  ===============

    Samples come in any order, classes in any size and on any number of ranks. A class that cannot count
    (no sample; within classes also one sample, which deviates from nothing) is left out and named in a
    warning. Memory is ``O(K)``
    for the definitions about the label's probability, ``O(K^2)`` for ``"between_vector_l2"`` and ``O(N K)``
    for ``"vector_l2"``, whose distances cannot be known before the class means are.

    Args:
        num_classes: number of classes ``K``.
        definition: see the table; Algorithm 1 is the default.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for an unknown definition, and from ``update`` for labels out of range, shapes that do
            not match or logits that are not finite.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> metric = Stability(num_classes=2)
    >>> metric.update(logits, torch.tensor([0, 0, 1, 1]))
    >>> round(1 - float(metric.compute()), 4)
    0.1346
    >>> metric.counts.tolist()
    [2, 2]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    definition: ClassVar[Definition]
    """Name of what is computed."""

    def __new__(
        cls, num_classes: int = 0, definition: str | None = None, *args: Any, **kwargs: Any
    ) -> "Stability":
        """Pick the class that computes ``definition``."""
        # Unpickling a torchmetrics.Metric calls this with other arguments, but then the class is known.
        return super().__new__(_metric_class(definition or "target_std") if cls is Stability else cls)

    def __init__(self, num_classes: int, definition: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.num_classes = num_classes

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add samples: logits ``(N, K)`` before softmax, and integer labels ``(N,)``."""
        # The next check waits for the device anyway.
        check_samples(logits, labels, self.num_classes, any_device=True)
        check_finite(logits, where=" of this batch")
        rows = max(_CHUNK // self.num_classes, _FEWEST_ROWS)
        for chunk, ids in zip(torch.split(logits, rows), torch.split(labels.long(), rows), strict=True):
            self._add(centred(chunk), ids)

    def compute(self) -> Tensor:
        """Return ``S``, a scalar; NaN where no class can count."""
        values = self.class_values()
        warn_of_left_out(values, self.counts)
        return 1 - over_classes(values, self.definition)

    @property
    def counts(self) -> Tensor:
        """Samples of each class that this process has seen, ``(K,)`` int64."""
        return self._counts().round().long()

    def class_values(self) -> Tensor:
        """Return each class' value on this process, ``(K,)`` float64; NaN where it has too few samples."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move to a device, which may have no float64."""
        dtype = accumulator_dtype(fn(torch.empty(0, device=self.device)).device)
        for name, default in self._defaults.items():
            if isinstance(default, Tensor) and default.dtype == torch.float64 != dtype:
                self._defaults[name] = default.to(dtype)
                setattr(self, name, getattr(self, name).to(dtype))
        return super()._apply(fn, exclude_state)

    def __repr__(self) -> str:
        """Show what is computed; the class is private."""
        return f"Stability({self.num_classes}, definition={self.definition!r})"

    def _counts(self) -> Tensor:
        raise NotImplementedError

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        """Add samples whose largest logit is 0, a copy: a model may reuse the memory of its output."""
        raise NotImplementedError


class _TargetProbability(Stability):
    """Shared by the two definitions that need only the mean and spread of the label's probability."""

    moments: Tensor

    def __init__(self, num_classes: int, definition: str | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, definition, **kwargs)
        # One state, because ranks can be merged only with count, mean and squares of each side by side.
        self.add_state(
            "moments", torch.zeros(3, num_classes, dtype=torch.float64), dist_reduce_fx=reduce_moments
        )

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        probability = (own - logits.logsumexp(1)).to(self.moments.dtype).exp()
        batch = class_moments(probability, labels, self.num_classes)
        self.moments = merge_moments(self.moments, batch)

    def _counts(self) -> Tensor:
        return self.moments[0]


class _TargetStd(_TargetProbability):
    definition = "target_std"

    def class_values(self) -> Tensor:
        return class_deviations(self.moments)


class _BetweenTargetStd(_TargetProbability):
    definition = "between_target_std"

    def class_values(self) -> Tensor:
        count, mean, _ = self.moments
        return torch.where(count >= 1, mean, torch.nan)


class _VectorL2(Stability):
    definition = "vector_l2"

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, definition: str | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, definition, **kwargs)
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        # float32 on every rank, because ranks can exchange only equal dtypes.
        self.logits.append(logits.float())
        self.labels.append(labels.clone())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Exchange the samples between ranks; one that has seen none takes part with no rows."""
        if len(self.labels) == 0:
            self._add(
                torch.empty(0, self.num_classes, device=self.device),
                torch.empty(0, dtype=torch.long, device=self.device),
            )
        super().sync(*args, **kwargs)

    def _samples(self) -> tuple[Tensor, Tensor]:
        if len(self.labels) == 0:  # not `if self.labels`: after an exchange between ranks it is a tensor
            return torch.empty(0, self.num_classes), torch.empty(0, dtype=torch.long)
        return dim_zero_cat(self.logits), dim_zero_cat(self.labels)

    def _counts(self) -> Tensor:
        return widened(torch.bincount(self._samples()[1], minlength=self.num_classes))

    def class_values(self) -> Tensor:
        logits, labels = self._samples()
        counts = torch.bincount(labels, minlength=self.num_classes)
        order = labels.argsort(stable=True)
        values = []
        for rows in torch.split(order, counts.tolist()):
            probabilities = widened(logits[rows]).softmax(1)
            distance = (probabilities - probabilities.mean(0)).norm(dim=1).mean()
            # One sample is its class's mean: its distance of 0 would pass for perfect stability.
            values.append(distance if len(rows) > 1 else distance * torch.nan)
        return torch.stack(values)


class _BetweenVectorL2(Stability):
    definition = "between_vector_l2"

    sums: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, definition: str | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, definition, **kwargs)
        self.add_state(
            "sums", torch.zeros(num_classes, num_classes, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("samples", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, logits.to(self.sums.dtype).softmax(1))
        self.samples += torch.bincount(labels, minlength=self.num_classes)

    def _counts(self) -> Tensor:
        return self.samples

    def class_values(self) -> Tensor:
        overall = self.sums.sum(0) / self.samples.sum()
        distances = (self.sums / self.samples.unsqueeze(1) - overall).norm(dim=1)
        return torch.where(self.samples >= 1, distances, torch.nan)


def class_moments(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the moments of one batch.

    Args:
        values: ``(N,)`` floating point.
        labels: ``(N,)`` int64.

    Returns:
        ``(3, K)``: count, mean, and sum of squared deviations from that mean; zeros for an absent class.
    """
    count = torch.bincount(labels, minlength=num_classes).to(values.dtype)
    sums = torch.zeros_like(count).index_add_(0, labels, values)
    mean = sums / count.clamp(min=1)
    squares = torch.zeros_like(count).index_add_(0, labels, (values - mean[labels]) ** 2)
    return torch.stack([count, mean, squares])


def merge_moments(first: Tensor, second: Tensor) -> Tensor:
    """Return the moments ``(3, K)`` of two disjoint sets of samples taken together."""
    count = first[0] + second[0]
    share = second[0] / count.clamp(min=1)
    difference = second[1] - first[1]
    mean = first[1] + difference * share
    squares = first[2] + second[2] + difference**2 * first[0] * share
    return torch.stack([count, mean, squares])


def reduce_moments(moments: Tensor) -> Tensor:
    """Merge moments stacked over ranks, ``(ranks, 3, K)``, as torchmetrics hands them over."""
    merged = moments[0]
    for other in moments[1:]:
        merged = merge_moments(merged, other)
    return merged


def class_deviations(moments: Tensor) -> Tensor:
    """Return each class's unbiased standard deviation from the moments ``(3, K)``; NaN below 2 samples."""
    count, _, squares = moments
    return torch.where(count >= 2, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def over_classes(values: Tensor, definition: Definition) -> Tensor:
    """Return ``1 - S`` from the classes' values ``(K,)``, of which those count that are not NaN."""
    values = values[~values.isnan()]
    if definition != "between_target_std":
        return values.mean()
    return values.std() if values.numel() > 1 else values.new_tensor(torch.nan)


def small_class_factor(counts: Tensor, definition: Definition) -> Tensor:
    """Return what the value of a class of ``n`` samples must be multiplied by to lose its small-sample bias.

    The square root of an unbiased variance is too small, for normal values by the factor ``c4(n)``: 0.995
    with the 50 images of an ImageNet class, 0.886 with the 3 of an iNaturalist class. Distances from the
    class's own mean are too small by ``sqrt((n - 1) / n)``. The definitions between classes have no such
    factor.

    Args:
        counts: ``(K,)`` samples of each class.

    Returns:
        ``(K,)`` float64; 1 for ``n`` below 2 and for the definitions between classes.

    >>> small_class_factor(torch.tensor([3, 50]), "target_std").round(decimals=3)
    tensor([1.1280, 1.0050], dtype=torch.float64)
    """
    n = widened(counts)
    if definition == "target_std":
        c4 = (2 / (n - 1)).sqrt() * (torch.lgamma(n / 2) - torch.lgamma((n - 1) / 2)).exp()
        factor = 1 / c4
    elif definition == "vector_l2":
        factor = (n / (n - 1)).sqrt()
    else:
        factor = torch.ones_like(n)
    return torch.where(n >= 2, factor, 1.0)


def _metric_class(definition: str) -> type[Stability]:
    classes: tuple[type[Stability], ...] = (_TargetStd, _VectorL2, _BetweenVectorL2, _BetweenTargetStd)
    for metric in classes:
        if metric.definition == definition:
            return metric
    names = ", ".join(repr(metric.definition) for metric in classes)
    raise ValueError(f"definition is {definition!r}; it must be one of {names}")


def warn_of_left_out(values: Tensor, counts: Tensor) -> None:
    """Name the classes ``(K,)`` without a value, which :func:`over_classes` leaves out, in a warning."""
    if not bool(values.isnan().any()):
        return
    empty = (counts == 0).nonzero().flatten().tolist()
    single = (values.isnan() & (counts == 1)).nonzero().flatten().tolist()
    parts = []
    if empty:
        parts.append(f"without samples: {_shortened(empty)}")
    if single:
        parts.append(f"with one sample, which has no deviation: {_shortened(single)}")
    rank_zero_warn(f"stability leaves out classes {'; '.join(parts)}", UserWarning)


def _shortened(classes: list[int]) -> str:
    names = ", ".join(map(str, classes[:20]))
    return names if len(classes) <= 20 else f"{names} and {len(classes) - 20} more"
