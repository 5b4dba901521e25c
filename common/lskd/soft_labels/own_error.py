"""What is lost between a teacher's answers and their stored form: a store's own error."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lskd.base.tensors import widened
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.terms import completed

ROWS = 4096
"""About so many of a store's are measured."""
_WAYS: tuple[str, ...] = ("spread", "renormalise", "restrict")
_AT_ONCE = 256  # rows, of which several copies in float64 are held
_LEAST = -87.0  # a stored probability below, or of 0, counts as the least of float32 in the divergence


@dataclass(frozen=True)
class OwnError:
    """How far stored answers are from the teacher's, on some of the rows that were stored.

    The gradients are those of the loss with respect to the logits of a student that knows nothing (each class
    has 1/K), at temperature 1, for each way in which the store is read (:data:`lskd.terms.Rest`). Each row's
    are sorted by the full teacher's probabilities, and their mean over the rows is taken: how its first, its
    second, ... choice is pulled. Chance averages out in it whatever the classes of the rows are, and what is
    biased does not. By class, both would: over rows of all classes the whole mean gradient is near 0. What a
    student's own derivatives make of it is not in it.

    Attributes:
        rows: how many they are.
        mass: probability of the classes that are stored, its mean.
        kl: mean KL(full || stored) in nats, with the missing mass spread over the other classes; None of
            drawn classes, which leave none for the others.
        angle: between the full teacher's mean gradient and the stored one's, in degrees. To this student
            "lump" is as "spread".
        error: standard error of the angle, in degrees; an unbiased store's angle is about that large.
        length: of the stored one's, as a multiple of the full one's.
    """

    rows: int
    mass: float
    kl: float | None
    angle: Mapping[str, float]
    error: Mapping[str, float]
    length: Mapping[str, float]

    @classmethod
    def of_json(cls, content: Any) -> "OwnError":
        """Return what a manifest says.

        Raises:
            AttributeError, TypeError, ValueError: it says something else.
        """
        found = cls(**content)
        numbers = [found.mass, *([] if found.kl is None else [found.kl])]
        for each in (found.angle, found.error, found.length):
            if each.keys() != found.angle.keys() or not each.keys() <= {*_WAYS, "drawn", "all"}:
                raise ValueError("forged")
            numbers += each.values()
        if type(found.rows) is not int or not all(type(x) is float and math.isfinite(x) for x in numbers):
            raise ValueError("forged")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`of_json` reads."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it in words."""
        gradients = [
            f"gradient {angle:.2f} ± {self.error[way]:.2f} degrees off and {self.length[way]:.3f} as long"
            + (f" ({way})" if way in _WAYS else "")
            for way, angle in self.angle.items()
        ]
        divergence = [] if self.kl is None else [f"KL(full || stored) {self.kl:.3g} nats"]
        parts = [f"{100 * self.mass:.2f} % of the mass kept", *divergence, *gradients]
        return f"on {self.rows} rows {', '.join(parts)}"


class OwnErrorMeter:
    """Measures :class:`OwnError` on the rows that it is given."""

    def __init__(self, layout: SoftLabelsLayout) -> None:
        self.layout, self.rows = layout, 0
        ways = _WAYS
        if layout.k == layout.num_classes or layout.sampled:
            ways = ("all" if layout.k == layout.num_classes else "drawn",)
        self._mass, self._kl, self._full = 0.0, 0.0, torch.zeros(layout.num_classes, dtype=torch.float64)
        self._apart = {way: torch.zeros_like(self._full) for way in ways}
        self._squares = dict.fromkeys(ways, 0.0)

    def add(self, logits: Tensor, values: Tensor, ids: Tensor) -> None:
        """Measure rows: logits ``(n, K)``, and values and ids ``(n, k)`` as stored."""
        for start in range(0, len(logits), _AT_ONCE):
            self._add(*(part[start : start + _AT_ONCE].detach() for part in (logits, values, ids)))

    def _add(self, logits: Tensor, values: Tensor, ids: Tensor) -> None:
        log_p, ids = widened(logits).log_softmax(-1), ids.long()
        p, classes, k = log_p.exp(), self.layout.num_classes, self.layout.k
        order = log_p.argsort(-1, descending=True)
        self.rows += len(p)
        self._mass += float(p.gather(-1, ids).sum())
        self._full += (1 / classes - p.gather(-1, order)).sum(0).cpu()
        for way in self._apart:
            if way == "spread":
                log_stored = completed(widened(values), classes, 1.0)[0]
                stored = log_stored[..., k:].expand(p.shape).scatter(-1, ids, log_stored[..., :k])
            else:
                known = widened(values).log_softmax(-1)
                stored = torch.full_like(log_p, -math.inf).scatter(-1, ids, known)
            if way in ("spread", "all"):
                self._kl += float(torch.where(p > 0, p * (log_p - stored.clamp(min=_LEAST)), 0.0).sum())
            student = torch.full_like(p, 1 / classes)
            if way == "restrict":
                student = torch.zeros_like(p).scatter(-1, ids, 1 / k)
            apart = ((student - stored.exp()) - (1 / classes - p)).gather(-1, order)
            self._apart[way] += apart.sum(0).cpu()
            self._squares[way] += float(apart.square().sum())

    def read(self) -> OwnError | None:
        """Return what was found; None where there were no rows."""
        if not self.rows:
            return None
        full = self._full / self.rows
        angle, error, length = {}, {}, {}
        for way, total in self._apart.items():
            apart = total / self.rows
            stored, size = full + apart, full.norm().clamp(min=1e-300)
            # From the difference: the cosine of a small angle says nothing about it.
            one, other = full / size, stored / stored.norm().clamp(min=1e-300)
            angle[way] = math.degrees(
                2 * math.atan2(float((one - other).norm()), float((one + other).norm()))
            )
            variance = max(self._squares[way] / self.rows - float(apart.square().sum()), 0.0)
            error[way] = math.degrees(math.atan(math.sqrt(variance / max(self.rows - 1, 1)) / float(size)))
            length[way] = float(stored.norm() / size)
        kl = None if "drawn" in angle else max(self._kl / self.rows, 0.0)
        return OwnError(self.rows, self._mass / self.rows, kl, angle, error, length)
