"""Passes over logits that may lie in a file: what they leave of each sample and class."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Progress = Callable[[int], object]

_CHUNK = 1 << 18  # numbers of a block of logits: a block and its temporaries stay in a processor's cache
_KEPT = 1 << 22  # numbers of a class's probabilities that are kept for a second look


class Look:
    """The passes over the logits: what they leave for each sample and class."""

    def __init__(self, logits: Tensor, labels: Tensor, progress: Progress) -> None:
        self.logits, self.labels, self.progress = logits, labels, progress
        samples, classes = logits.shape
        self.counts = torch.bincount(labels, minlength=classes)
        # Rows that lie sorted are read as slices of the file, without a copy.
        self.order = None if bool((labels[1:] >= labels[:-1]).all()) else labels.argsort(stable=True)
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.scalars = torch.empty(3, samples, dtype=torch.float64)  # nll, entropy, confidence
        self.largest = torch.empty(samples, dtype=self.dtype)
        self.log_sum = torch.empty(samples, dtype=self.dtype)  # of exponentials, over the largest
        self.rank = torch.empty(samples, dtype=torch.long)
        self.distance = torch.empty(samples, dtype=torch.float64)
        self.influence = torch.zeros(samples, dtype=torch.float64)
        # Only of classes that have samples: with 21,843 classes all of them take 1.9 GB.
        self.present = self.counts.nonzero().flatten()
        self.means = torch.empty(len(self.present), classes, dtype=self.dtype)
        self.overall = torch.zeros(classes, dtype=torch.float64)

    def at_classes(self, influence: bool) -> None:
        """Look at every sample, and at its distance from the mean of its class."""
        for row, (c, members) in enumerate(self._classes()):
            mean, kept = self._first(c, members)
            self.means[row] = mean
            self.overall += mean.double() * self.counts[c]
            direction = torch.zeros_like(mean)
            for rows, probabilities in self._probabilities(members, kept):
                deviations = probabilities.sub_(mean)
                distance = torch.linalg.vector_norm(deviations, dim=1)
                self.distance[rows] = distance.double()
                if influence:
                    direction += torch.where(distance > 0, 1 / distance, 0.0) @ deviations
            if influence:
                # Moving a sample moves the class mean too, which every distance is taken from.
                direction /= self.counts[c]
                for rows, deviations in self._probabilities(members, kept):
                    if kept is None:
                        deviations = deviations.sub_(mean)
                    own = self.distance[rows] - (deviations @ direction).double()
                    self.influence[rows] = own
                self._centre(self.influence, members)
        self.overall /= len(self.labels)

    def at_class_means(self, influence: bool) -> tuple[Tensor, Tensor]:
        """Return the classes' distances from the mean of all, and each sample's influence on their mean."""
        step = max(_CHUNK // len(self.counts), 1)
        lengths = torch.cat(
            [torch.linalg.vector_norm(self._away(rows), dim=1) for rows in torch.split(self.means, step)]
        )
        distances = torch.full((len(self.counts),), torch.nan, dtype=torch.float64)
        distances[self.present] = lengths
        by_sample = torch.zeros(len(self.labels), dtype=torch.float64)
        if not influence:
            return distances, by_sample
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0) / len(self.present)
        directions = torch.zeros(len(self.counts), dtype=torch.float64)
        for means, factors in zip(torch.split(self.means, step), torch.split(inverse, step), strict=True):
            directions += factors @ self._away(means)
        for row, (c, members) in enumerate(self._classes()):
            share = float(self.counts[c]) / len(self.labels)
            weight = inverse[row] * self._away(self.means[row]) - share * directions
            weight = weight.to(self.dtype)
            for rows, probabilities in self._probabilities(members, None):
                by_sample[rows] = (probabilities @ weight).double()
            self._centre(by_sample, members)
            self.progress(len(members))
        return distances, by_sample

    def _away(self, means: Tensor) -> Tensor:
        return means.double() - self.overall

    def _first(self, c: int, members: "_Members") -> tuple[Tensor, list[Tensor] | None]:
        """Note the numbers of each sample; return the class mean and, unless too large, the probabilities."""
        keep = len(members) * len(self.counts) <= _KEPT
        kept: list[Tensor] = []
        total = torch.zeros(len(self.counts), dtype=torch.float64)
        for rows in members.blocks():
            z = self._read(rows)
            self.rank[rows] = _rank(z, c)
            largest = z.amax(1, keepdim=True)
            z = z - largest
            own = z[:, c].clone()
            exponentials = z.exp()
            sums = exponentials.sum(1)
            logarithm = sums.log()
            expected = torch.linalg.vecdot(exponentials, z) / sums
            entropy = (logarithm - expected).double()
            # Zero times minus infinity is NaN: every logit that is not finite shows here.
            if not bool(entropy.isfinite().all()):
                self._refuse()
            self.scalars[0, rows] = (logarithm - own).double()
            self.scalars[1, rows] = entropy.clamp(min=0)
            self.scalars[2, rows] = (1 / sums).double()
            self.largest[rows] = largest.squeeze(1)
            self.log_sum[rows] = logarithm
            probabilities = exponentials.div_(sums.unsqueeze(1))
            total += probabilities.sum(0)
            if keep:
                kept.append(probabilities)
        self.progress(len(members))
        return (total / len(members)).to(self.dtype), kept if keep else None

    def _probabilities(
        self, members: "_Members", kept: list[Tensor] | None
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        if kept is not None:
            yield from zip(members.blocks(), kept, strict=True)
            return
        for rows in members.blocks():
            # One after the other: their sum would round away the small one beside a logit of 1e4.
            z = self._read(rows) - self.largest[rows].unsqueeze(1)
            yield rows, z.sub_(self.log_sum[rows].unsqueeze(1)).exp_()

    def _read(self, rows: slice | Tensor) -> Tensor:
        return self.logits[rows].to(self.dtype)

    def _centre(self, values: Tensor, members: "_Members") -> None:
        rows = members.all()
        values[rows] -= values[rows].mean()

    def _classes(self) -> Iterator[tuple[int, "_Members"]]:
        start = 0
        for c, count in enumerate(self.counts.tolist()):
            if count:
                yield c, _Members(self.order, start, count, max(_CHUNK // len(self.counts), 1))
            start += count

    def _refuse(self) -> None:
        for start in range(0, len(self.labels), 1024):
            finite = torch.isfinite(self.logits[start : start + 1024]).all(1)
            if not bool(finite.all()):
                raise ValueError(
                    f"the logits of sample {start + int((~finite).nonzero()[0])} are not all finite; "
                    "leave the sample out or mend the teacher"
                )
        raise ValueError("the logits are too large for float32")


@dataclass(frozen=True)
class _Members:
    """Where the samples of one class are."""

    order: Tensor | None
    start: int
    count: int
    step: int

    def __len__(self) -> int:
        return self.count

    def all(self) -> slice | Tensor:
        here = slice(self.start, self.start + self.count)
        return here if self.order is None else self.order[here]

    def blocks(self) -> Iterator[slice | Tensor]:
        end = self.start + self.count
        for start in range(self.start, end, self.step):
            here = slice(start, min(start + self.step, end))
            yield here if self.order is None else self.order[here]


def _rank(logits: Tensor, c: int) -> Tensor:
    """Return how many classes come before class ``c`` in each row; of equal logits the lower class first."""
    own = logits[:, c : c + 1]
    # Into floats, because booleans are slow to add.
    before = torch.ge(logits[:, :c], own, out=logits.new_empty(len(logits), c))
    after = torch.gt(logits[:, c + 1 :], own, out=logits.new_empty(len(logits), logits.shape[1] - c - 1))
    return (before.sum(1) + after.sum(1)).long()
