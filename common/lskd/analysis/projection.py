"""Mueller's projection of activations, and the distances between clusters that Fig. 1 points at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lskd.errors import LskdError

# Relative to the longer side of the triangle of templates; float32 weights are exact to 1e-7.
_COLLINEAR = 1e-6
_NEAREST, _FARTHEST = 0.05, 0.95
_BLOCK = 1 << 22  # numbers of a block of resampled distances


def project(features: Tensor, templates: Tensor) -> Tensor:
    """Return activations in the plane of Mueller et al. (NeurIPS 2019, Sec. 2) through three templates.

    By an orthonormal basis of ``[w2 - w1, w3 - w1]`` from a QR decomposition, with signs that no library can
    turn: the first template is left of the origin, the second right at the same height, the third above.
    ``w`` are the *named* classes' own rows of the classifier's weight matrix; the bias is no part of them.

    Args:
        features: ``(N, D)``.
        templates: ``(3, D)``: two similar classes and the third, dissimilar one; floating point.

    Returns:
        Coordinates ``(N, 2)``, float64.

    Raises:
        ValueError: for other shapes.
        LskdError: for templates on one line, which span no plane, or that are not finite.

    >>> templates = torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 5.0], [3.0, 4.0, 5.0]])
    >>> project(templates, templates).tolist()
    [[-1.0, 0.0], [1.0, 0.0], [2.0, 4.0]]
    """
    if templates.ndim != 2 or len(templates) != 3 or not templates.is_floating_point():
        raise ValueError(f"templates have shape {tuple(templates.shape)}; the plane takes three, (3, D)")
    if features.ndim != 2 or features.shape[1] != templates.shape[1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; templates of width {templates.shape[1]} "
            f"project (N, {templates.shape[1]})"
        )
    w = templates.double()
    if not bool(torch.isfinite(w).all()):
        raise LskdError("the templates are not all finite; fix the teacher's classifier")
    sides = torch.stack([w[1] - w[0], w[2] - w[0]], dim=1)  # (D, 2)
    basis, triangle = torch.linalg.qr(sides)
    sizes = triangle.diagonal().abs()
    if len(sizes) < 2 or bool(sizes.min() <= _COLLINEAR * sides.norm(dim=0).max()):
        raise LskdError(
            "the templates of the three classes lie on one line, so they span no plane; name others"
        )
    points: Tensor = (features.double() - (w[0] + w[1]) / 2) @ (basis * triangle.diagonal().sign())
    return points


@dataclass(frozen=True)
class ClusterDistances:
    """What Fig. 1 of Shen et al. (ICLR 2021) points at, as numbers; float64, ``()`` or ``(B,)``.

    The paper draws D1, D2 and Dc and measures none of them. This is how they are read here.

    Attributes:
        centre_distance: Dc, the distance between the centres of the two similar classes. Centres of few
            examples stray, in many dimensions mostly apart: the squared distance is on average larger by
            each class's mean squared radius over its number of examples, which is taken off.
        nearest: D1, how near the dissimilar class comes: the 5 % quantile of its examples' distances from
            the point midway between the two centres.
        farthest: D2, how far it goes: the 95 % quantile of the same distances.
        relative_spread: ``(D2 - D1) /`` mean of these distances: what smoothing is said to erase, free of
            the scale of the features, which smoothing changes.
        separation: Dc divided by the root-mean-square distance of the similar classes' examples from their
            own centre (unbiased, both classes alike): what smoothing is said to enlarge, free of the scale.
    """

    centre_distance: Tensor
    nearest: Tensor
    farthest: Tensor
    relative_spread: Tensor
    separation: Tensor


def cluster_distances(
    first: Tensor,
    second: Tensor,
    dissimilar: Tensor,
    resamples: Sequence[Tensor] | None = None,
    population: bool = False,
) -> ClusterDistances:
    """Measure Dc, D1 and D2 between the examples of two similar classes and a dissimilar one.

    Args:
        first: ``(N1, D)``, examples of a class: activations, or their coordinates in a plane.
        second: ``(N2, D)``, examples of the class that is similar to it.
        dissimilar: ``(N3, D)``.
        resamples: for a bootstrap, three tensors ``(B, N1)``, ``(B, N2)``, ``(B, N3)`` of row numbers: the
            results are then those of the ``B`` resamples, ``(B,)``, with memory ``O(B (N + D))``.
        population: the examples are all that there are, as a bootstrap's are to its resamples: nothing is
            corrected for their number.

    Raises:
        ValueError: for shapes that do not fit.
        LskdError: for a class with fewer than two examples.

    >>> left, right = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> found = cluster_distances(left, right, torch.tensor([[0.0, 4.0], [0.0, 6.0]]))
    >>> [round(float(d), 2) for d in (found.centre_distance, found.nearest, found.farthest)]
    [1.41, 4.1, 5.9]
    >>> float(cluster_distances(left, right, left, population=True).centre_distance)
    2.0
    """
    groups = (first, second, dissimilar)
    if any(group.ndim != 2 or group.shape[1] != first.shape[-1] for group in groups):
        raise ValueError(
            f"examples have shapes {[tuple(g.shape) for g in groups]}; they must be (N, D), one D"
        )
    if any(len(group) < 2 for group in groups):
        raise LskdError(
            f"the three classes have {', '.join(str(len(group)) for group in groups)} examples; "
            "each needs at least 2"
        )
    if resamples is None:
        found = _measure(groups, [torch.arange(len(group))[None] for group in groups], population)
        return ClusterDistances(*found.squeeze(1))
    if len(resamples) != 3 or any(r.ndim != 2 or r.shape[0] != resamples[0].shape[0] for r in resamples):
        raise ValueError("resamples are three tensors of row numbers, (B, N1), (B, N2) and (B, N3)")
    step = max(_BLOCK // max(*(len(group) for group in groups), first.shape[1]), 1)
    starts = range(0, len(resamples[0]), step)
    blocks = ([rows[start : start + step] for rows in resamples] for start in starts)
    measured = [_measure(groups, block, population) for block in blocks]
    return ClusterDistances(*torch.cat(measured, dim=1))


def _measure(groups: Sequence[Tensor], rows: Sequence[Tensor], population: bool) -> Tensor:
    """Return the five quantities, ``(5, B)``."""
    shift = torch.cat([group.double().mean(0, keepdim=True) for group in groups]).mean(0)
    points = [group.double() - shift for group in groups]
    centres, squared_radii, stray = [], [], torch.zeros(len(rows[0]), dtype=torch.float64)
    for group, chosen in zip(points[:2], rows[:2], strict=True):
        size = chosen.shape[1]
        counts = torch.zeros(len(chosen), len(group), dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        centre = counts @ group / size
        squared_radius = (counts @ group.square().sum(1) / size - centre.square().sum(1)).clamp(min=0)
        if not population:
            squared_radius *= size / (size - 1)
            stray += squared_radius / size
        centres.append(centre)
        squared_radii.append(squared_radius)
    between = ((centres[0] - centres[1]).square().sum(1) - stray).clamp(min=0).sqrt()
    distances = torch.cdist((centres[0] + centres[1]) / 2, points[2]).gather(1, rows[2])
    nearest, farthest = distances.quantile(torch.tensor([_NEAREST, _FARTHEST], dtype=torch.float64), dim=1)
    spread = (farthest - nearest) / distances.mean(1)
    radius = ((squared_radii[0] + squared_radii[1]) / 2).sqrt()
    return torch.stack([between, nearest, farthest, spread, between / radius])
