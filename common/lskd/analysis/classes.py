"""Mean predictions of each class (Fig. 4), and which classes a teacher confuses."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lskd.base.tensors import row_blocks
from lskd.errors import LskdError
from lskd.targets import check_finite, check_labels, check_samples

_SMALLEST = 3  # examples of a class: fewer leave no deviation without each one of them


def class_mean_probabilities(
    logits: Tensor, labels: Tensor, num_classes: int, classes: Sequence[int] | None = None
) -> Tensor:
    """Return each class's mean probability vector over its examples (Fig. 4, Sec. 3).

    Logits may be mapped from a file: they are read in blocks, so that memory is a block and the result.

    Args:
        logits: ``(N, K)`` before softmax, floating point.
        labels: ``(N,)`` int64, in any order.
        classes: ids of the ``C`` classes wanted; all by default.

    Returns:
        ``(C, K)`` float64; row ``i`` belongs to ``classes[i]`` and is NaN if the class has no example.

    Raises:
        ValueError: for shapes or dtypes that do not fit, labels or classes out of range, or a logit of a
            wanted class that is not finite (naming the sample).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> class_mean_probabilities(logits, torch.tensor([0, 0, 1]), num_classes=2).round(decimals=3)
    tensor([[0.6900, 0.3100],
            [0.2690, 0.7310]], dtype=torch.float64)
    """
    check_samples(logits, labels, num_classes)
    wanted = torch.arange(num_classes) if classes is None else torch.tensor(list(classes), dtype=torch.long)
    check_labels(wanted, num_classes, "classes")
    if len(set(wanted.tolist())) < len(wanted):
        raise ValueError(f"classes {wanted.tolist()} name one class twice")
    place = torch.full((num_classes,), -1, dtype=torch.long)
    place[wanted] = torch.arange(len(wanted))
    rows = place[labels]
    counts = torch.bincount(rows[rows >= 0], minlength=len(wanted))
    means = torch.zeros(len(wanted), num_classes, dtype=torch.float64)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chosen = (rows >= 0).nonzero().flatten()
    for places in row_blocks(len(chosen), num_classes):
        block = chosen[places]
        values = logits[block].to(dtype)
        check_finite(values, block)
        means.index_add_(0, rows[block], values.softmax(1).double())
    means /= counts.clamp(min=1)[:, None]
    means[counts == 0] = torch.nan
    return means


def minor_probabilities(means: Tensor, classes: Sequence[int] | None = None) -> Tensor:
    """Return class means without the classes' own entries (Fig. 4 (2), Appendix F).

    Args:
        means: ``(C, K)`` as from :func:`class_mean_probabilities`.
        classes: ids of the ``C`` classes; all ``K`` by default.

    Returns:
        ``(C, K - 1)``, the other classes in their order.

    Raises:
        ValueError: for classes that do not belong to the rows.

    >>> minor_probabilities(torch.tensor([[0.7, 0.2, 0.1]]), [0])
    tensor([[0.2000, 0.1000]])
    """
    every = range(means.shape[-1]) if classes is None else classes
    own = torch.tensor(list(every), dtype=torch.long)
    if means.ndim != 2 or len(own) != len(means):
        raise ValueError(f"means have shape {tuple(means.shape)}; {len(own)} classes go with ({len(own)}, K)")
    check_labels(own, means.shape[1], "classes")
    others = torch.ones_like(means, dtype=torch.bool)
    others[torch.arange(len(means)), own] = False
    return means[others].reshape(len(means), means.shape[1] - 1)


def class_confusion(means: Iterable[Tensor]) -> Tensor:
    """Return how much classes are taken for each other, ``(K, K)`` float64, symmetric.

    Entry ``(a, b)`` is the mean probability that ``a``'s examples give to ``b`` and ``b``'s to ``a``,
    averaged over teachers; the diagonal is NaN, and so is a class without examples.

    Args:
        means: of each teacher, ``(K, K)`` as from :func:`class_mean_probabilities`; taken one by one, because
            of many classes each is large.

    Raises:
        ValueError: for no teacher or shapes that differ.

    >>> class_confusion([torch.tensor([[0.7, 0.3], [0.1, 0.9]])])[0, 1].round(decimals=4)
    tensor(0.2000, dtype=torch.float64)
    """
    total, teachers = torch.empty(0, 0, dtype=torch.float64), 0
    for teachers, own in enumerate(means, start=1):
        if own.ndim != 2 or own.shape != (len(own), len(own)) or (teachers > 1 and own.shape != total.shape):
            raise ValueError(f"class means have shape {tuple(own.shape)}; they must be (K, K), one K")
        total = own.to(torch.float64, copy=True) if teachers == 1 else total.add_(own)
    if not teachers:
        raise ValueError("there are no class means; they must be (K, K), of one teacher or more")
    return (total + total.T).div_(2 * teachers).fill_diagonal_(torch.nan)


def propose_classes(confusion: Tensor) -> tuple[int, int, int]:
    """Return the two classes taken for each other most, and the one taken least for either (for Fig. 1).

    Of equals the lower ids win.

    Args:
        confusion: ``(K, K)`` as from :func:`class_confusion`; NaN where nothing is known.

    Raises:
        LskdError: for fewer than three classes with examples.

    >>> propose_classes(class_confusion([torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.9, 0.1], [0.2, 0.1, 0.7]])]))
    (0, 2, 1)
    """
    known = (~confusion.isnan()).any(1)
    if int(known.sum()) < 3:
        raise LskdError(f"only {int(known.sum())} classes have examples; the projection needs three")
    pairs = confusion.nan_to_num(nan=-1.0)
    a, b = divmod(int(pairs.argmax()), len(confusion))
    with_both = confusion[a] + confusion[b]
    return a, b, int(with_both.nan_to_num(nan=torch.inf).argmin())


def class_separation(logits: Tensor, labels: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return how far apart the examples of similar classes lie, free of the scale of the logits.

    For a pair ``(a, b)`` the difference of the two logits, ``z_a - z_b``, is the coordinate of an example on
    the line between the two classes' templates, the first axis of Fig. 1, up to scale and origin:
    ``z = W h + bias``. The separation is the distance between the two classes' means there, Dc, in units of
    the spread about them: the pooled unbiased standard deviation within the classes. Smoothing shrinks all
    logits, so a distance with a scale would say nothing. In small classes it is too large, by about
    ``3 / (4 df)`` of itself.

    Args:
        logits: ``(N, K)`` before softmax, floating point.
        labels: ``(N,)`` int64.
        pairs: ids of two different classes each, at least one pair.

    Returns:
        ``(N,)`` float64, one value per sample whose mean is the mean over pairs, to first order (the sample's
        influence), for an interval.

    Raises:
        ValueError: for shapes or dtypes that do not fit, no pair, or classes out of range.
        LskdError: for a class of fewer than 3 examples or without spread, or logits that are not finite.

    >>> logits = torch.tensor([[3.0, 0, 0], [4.0, 0, 0], [5.0, 0, 0], [0, 1.0, 0], [0, 2.0, 0], [0, 3.0, 0]])
    >>> float(class_separation(logits, torch.tensor([0, 0, 0, 1, 1, 1]), [(0, 1)]).mean())
    6.0
    """
    check_samples(logits, labels)
    if not pairs or any(a == b for a, b in pairs):
        raise ValueError("pairs are two different classes each, and there must be one")
    check_labels(torch.tensor(list(pairs)).flatten(), logits.shape[1], "pairs")
    check_separable(labels, {c for pair in pairs for c in pair})
    rows = torch.split(labels.argsort(stable=True), labels.bincount(minlength=logits.shape[1]).tolist())
    samples = len(labels)
    contributions = torch.zeros(samples, dtype=torch.float64)
    separations = []
    for a, b in pairs:
        first, second = ((logits[rows[c], a].double() - logits[rows[c], b].double()) for c in (a, b))
        df = len(first) + len(second) - 2
        deviations = [side - side.mean() for side in (first, second)]
        variance = float(sum(d.square().sum() for d in deviations)) / df
        distance = float(first.mean() - second.mean())
        if not 0 < variance < float("inf"):
            what = "do not differ" if variance == 0 else "are not all finite"
            raise LskdError(f"the logits of classes {a} and {b} {what}; they have no separation")
        separation = distance / variance**0.5
        separations.append(separation)
        for c, sign, deviation in ((a, 1, deviations[0]), (b, -1, deviations[1])):
            size = len(deviation)
            spread = (deviation.square() - deviation.square().mean()) * size / df
            moved = sign * deviation / variance**0.5 - separation / (2 * variance) * spread
            contributions[rows[c]] += moved * samples / size
    return torch.tensor(separations, dtype=torch.float64).mean() + contributions / len(pairs)


def check_separable(labels: Tensor, classes: Iterable[int]) -> None:
    """Raise LskdError unless each of these classes has enough examples for :func:`class_separation`."""
    sizes = labels.bincount().tolist()
    for c in sorted(classes):
        size = sizes[c] if c < len(sizes) else 0
        if size < _SMALLEST:
            raise LskdError(f"class {c} has {size} examples; its separation from another needs {_SMALLEST}")


def nearest_classes(confusion: Tensor) -> list[tuple[int, int]]:
    """Return each class with the one it is taken for most, without repeating a pair.

    Args:
        confusion: ``(K, K)`` as from :func:`class_confusion`; a class of NaN, without examples, has none.

    >>> nearest_classes(torch.tensor([[torch.nan, 0.3, 0.1], [0.3, torch.nan, 0.2], [0.1, 0.2, torch.nan]]))
    [(0, 1), (1, 2)]
    """
    largest, nearest = confusion.nan_to_num(nan=-1.0).max(1)
    known = (largest >= 0).tolist()
    pairs = [(c, other) for c, other in enumerate(nearest.tolist()) if known[c]]
    return list(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
