"""What one look at a teacher's logits tells: accuracy, calibration, entropy and the four stabilities."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd.analysis.calibration import Progress, TemperatureFit, calibration_contributions, fit_temperature
from lskd.base.tensors import row_blocks
from lskd.stability import Definition, class_deviations, class_moments, over_classes, small_class_factor
from lskd.targets import check_finite, check_samples, check_smoothing

Rows = slice | Tensor
"""Some of the samples: neighbours, which are read without a copy, or any."""

_KEPT = 1 << 22  # numbers of a class's probabilities that are kept for a second look


@dataclass(frozen=True)
class TeacherMeasures:
    """What a teacher says about ``N`` samples of ``K`` classes, reduced to a few numbers for each sample.

    Attributes:
        num_classes: ``K``.
        labels: ``(N,)`` int64.
        nll: ``(N,)`` cross-entropy with the label, nats.
        entropy: ``(N,)`` entropy of the prediction, nats.
        confidence: ``(N,)`` largest probability.
        rank: ``(N,)`` int64, how many classes come before the label; of equal logits the lower class first.
        distance: ``(N,)`` L2 distance of the probabilities from the mean of their class (Eq. 2).
        between_distance: ``(K,)`` L2 distance of the class mean from the mean of all samples (Eq. 5); NaN for
            a class without samples.
        calibrated: the fitted temperature, and what it changes.
        mean_influence: ``(2, N)`` first-order influence of each sample on its class's mean distance and on
            ``between_distance``, averaged over classes; None unless asked for.
        small_class_correction: whether the stabilities are corrected for small classes.

    All but ``labels`` and ``rank`` are float64.
    """

    num_classes: int
    labels: Tensor
    nll: Tensor
    entropy: Tensor
    confidence: Tensor
    rank: Tensor
    distance: Tensor
    between_distance: Tensor
    calibrated: TemperatureFit
    mean_influence: Tensor | None = None
    small_class_correction: bool = False

    @property
    def samples(self) -> int:
        """Number of samples ``N``."""
        return len(self.labels)

    @cached_property
    def counts(self) -> Tensor:
        """Samples of each class, ``(K,)`` int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @property
    def target_probability(self) -> Tensor:
        """Probability of the label, ``(N,)``."""
        return (-self.nll).exp()

    @property
    def correct(self) -> Tensor:
        """Whether the label comes first, ``(N,)`` float64."""
        return (self.rank < 1).double()

    def topk(self, k: int) -> float:
        """Return the share of samples whose label is among the first ``k`` classes."""
        return float((self.rank < k).double().mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017)."""
        return float(self.contributions("ece").mean())

    @property
    def calibrated_error(self) -> float:
        """Expected calibration error at the fitted temperature."""
        return float(self.contributions("calibrated_ece").mean())

    def equivalent_smoothing(self, convention: str = "uniform") -> float:
        """Return the label smoothing that puts as much on the other classes as the teacher does on average.

        It is the ``gamma`` of Mueller et al. (NeurIPS 2019, Sec. 4), ``K / (K - 1)`` times the mean
        probability that is not the label's; there over the training data. What a teacher gets wrong counts
        as smoothing too, so on other data it is an upper bound.

        Args:
            convention: of the smoothing that is returned, ``"uniform"`` (as Mueller et al.) or ``"paper"``.

        Raises:
            ValueError: for a convention that does not exist or fewer than two classes.
        """
        check_smoothing(2, 0.0, convention)
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; smoothing needs at least 2")
        others = 1 - float(self.target_probability.mean())
        return others * self.num_classes / (self.num_classes - 1) if convention == "uniform" else others

    def class_values(self, definition: Definition) -> Tensor:
        """Return the value of each class, ``(K,)`` float64; NaN where it has too few samples.

        Raises:
            ValueError: for an unknown definition.
        """
        if definition not in get_args(Definition):
            raise ValueError(f"definition is {definition!r}; it must be one of {get_args(Definition)}")
        if definition == "between_vector_l2":
            return self.between_distance
        if definition == "vector_l2":
            sums = torch.zeros(self.num_classes, dtype=torch.float64).index_add_(
                0, self.labels, self.distance
            )
            values = torch.where(self.counts >= 2, sums / self.counts, torch.nan)
        elif definition == "target_std":
            values = class_deviations(self._moments)
        else:
            return torch.where(self.counts >= 1, self._moments[1], torch.nan)
        return values * small_class_factor(self.counts, definition) if self.small_class_correction else values

    def one_minus_stability(self, definition: Definition = "target_std") -> float:
        """Return ``1 - S`` by a definition of :class:`~lskd.Stability`; NaN where no class can count."""
        value = float(over_classes(self.class_values(definition), definition))
        if self.small_class_correction and definition.startswith("between"):
            value -= self._small_class_bias(definition)
        return value

    def _small_class_bias(self, definition: Definition) -> float:
        """Return what small classes add between classes to ``1 - S``, to first order, before any correction.

        The mean of ``n`` samples varies by their variance over ``n`` beside what the classes vary; a class of
        one sample is taken to vary as the others do.
        """
        counted = self.counts >= 1
        if definition == "between_target_std":
            if int(counted.sum()) < 2:
                return math.nan
            squares = self._moments[2]
            values = self._moments[1][counted].std() ** 2
        else:
            squares = class_moments(self.distance, self.labels, self.num_classes)
            squares = squares[2] + self.counts * squares[1] ** 2
            values = self.between_distance[counted] ** 2
        n = self.counts.double()
        variance = torch.where(n >= 2, squares / (n - 1).clamp(min=1), torch.nan)
        variance = torch.where(n >= 2, variance, variance.nanmean()).nan_to_num()
        noise = (variance / n)[counted]
        if definition == "between_target_std":
            noise = noise.mean()
        return float((values.sqrt() - (values - noise).clamp(min=0).sqrt()).mean())

    def contributions(self, quantity: str) -> Tensor:
        """Return one number per sample, ``(N,)``, whose mean is the quantity; for its sampling error.

        For means over samples it is the sample's own value. For the stabilities, means over classes of
        functions of a class's samples, it is the first-order influence of the sample, centred within its
        class (classes are fixed, they are not drawn) and widened by ``sqrt(n / (n - 1))``, because the
        deviations of ``n`` samples are taken from their own mean. ``"target_std"`` uses the jackknife.

        Args:
            quantity: ``"top1"``, ``"top5"``, ``"nll"``, ``"entropy"``, ``"ece"``, ``"calibrated_nll"``,
                ``"calibrated_ece"`` or a definition of stability.

        Raises:
            ValueError: for another name, or a stability between vectors when the influence was not asked for.
        """
        simple: dict[str, Callable[[], Tensor]] = {
            "top1": lambda: self.correct,
            "top5": lambda: (self.rank < 5).double(),
            "nll": lambda: self.nll,
            "entropy": lambda: self.entropy,
            "ece": lambda: calibration_contributions(self.confidence, self.correct),
            "calibrated_nll": lambda: self.calibrated.nll,
            "calibrated_ece": lambda: calibration_contributions(self.calibrated.confidence, self.correct),
        }
        if quantity in simple:
            return simple[quantity]()
        if quantity not in get_args(Definition):
            raise ValueError(
                f"no quantity {quantity!r}; there are {', '.join([*simple, *get_args(Definition)])}"
            )
        return self._stability_contributions(quantity)  # type: ignore[arg-type]

    @cached_property
    def _moments(self) -> Tensor:
        return class_moments(self.target_probability, self.labels, self.num_classes)

    def _stability_contributions(self, definition: Definition) -> Tensor:
        value, classes = self.one_minus_stability(definition), self.class_values(definition)
        if definition in ("vector_l2", "between_vector_l2"):
            if self.mean_influence is None:
                raise ValueError(f"{definition}: measure with influence=True for its sampling error")
            by_sample = self.mean_influence[1 if definition == "between_vector_l2" else 0]
        elif definition == "target_std":
            _, pseudo = deviation_pseudo_values(
                self.target_probability.numpy(), self.labels.numpy(), self.num_classes
            )
            by_sample = torch.from_numpy(pseudo)
        else:
            centred = self.target_probability - self._moments[1][self.labels]
            counted = ~classes.isnan()
            spread = float(classes[counted].std()) if int(counted.sum()) > 1 else 0.0
            slope = (classes - classes[counted].mean()) / (spread or math.inf)
            by_sample = centred * (slope / max(int(counted.sum()) - 1, 1))[self.labels]
        counted = ~classes.isnan()
        if definition in ("target_std", "vector_l2"):
            weight = torch.full_like(classes, 1 / max(int(counted.sum()), 1))
            if self.small_class_correction:
                weight *= small_class_factor(self.counts, definition)
            by_sample = by_sample * weight[self.labels]
        n = self.counts.double()
        widened = (n / (n - 1).clamp(min=1)).sqrt() / n.clamp(min=1) * self.samples
        if self.small_class_correction and definition.startswith("between"):
            # Taking the noise out of a length makes what is left as much more sensitive as it is shorter.
            widened *= (value + self._small_class_bias(definition)) / value if value > 0 else math.nan
        return value + torch.where(counted[self.labels], by_sample * widened[self.labels], 0.0)


def measure_teacher(
    logits: Tensor,
    labels: Tensor,
    *,
    influence: bool = False,
    small_class_correction: bool = False,
    fitted: bool = True,
    progress: Progress | None = None,
) -> TeacherMeasures:
    """Measure a teacher from its logits on a labelled data set.

    The logits may be mapped from a file: they are read class by class, and of them only blocks are in memory
    at once. Beside the numbers per sample it keeps the means of the classes that have samples, each ``(K,)``
    float32.

    Args:
        logits: ``(N, K)`` before softmax, floating point, on the CPU.
        labels: integer class ids ``(N,)``, in any order.
        influence: look once more, for the sampling error of the two stabilities of probability vectors.
        small_class_correction: correct the stabilities for the bias of small classes.
        fitted: whether to look for the temperature that fits best; else it is 1.
        progress: called with the number of samples that were just looked at, at most
            ``N * (2 + influence)`` in all.

    Raises:
        ValueError: for shapes or dtypes that do not fit, labels out of range, no samples, or logits that are
            not finite (naming the sample).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> measures = measure_teacher(logits, torch.tensor([0, 0, 1, 1]))
    >>> measures.topk(1), round(measures.one_minus_stability("target_std"), 4)
    (1.0, 0.1346)
    """
    check_samples(logits, labels, least=1)
    with torch.inference_mode():
        labels = labels.long()
        look = _Look(logits, labels, progress or (lambda samples: None))
        look.at_classes(influence)
        between, influence_between = look.at_class_means(influence)
        nll, entropy, confidence = look.scalars
        calibrated = TemperatureFit(1.0, False, nll, confidence)
        if fitted:
            calibrated = fit_temperature(logits, labels, progress=_at_most(len(labels), progress))
    return TeacherMeasures(
        num_classes=logits.shape[1],
        labels=labels,
        nll=nll,
        entropy=entropy,
        confidence=confidence,
        rank=look.rank,
        distance=look.distance,
        between_distance=between,
        calibrated=calibrated,
        mean_influence=torch.stack([look.influence, influence_between]) if influence else None,
        small_class_correction=small_class_correction,
    )


class _Look:
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
        for row, (c, members, blocks) in enumerate(self._classes()):
            mean, kept = self._first(c, blocks)
            self.means[row] = mean
            self.overall += mean.double() * self.counts[c]
            direction = torch.zeros_like(mean)
            for rows, probabilities in self._probabilities(blocks, kept):
                deviations = probabilities.sub_(mean)
                distance = torch.linalg.vector_norm(deviations, dim=1)
                self.distance[rows] = distance.double()
                if influence:
                    direction += torch.where(distance > 0, 1 / distance, 0.0) @ deviations
            if influence:
                # Moving a sample moves the class mean too, which every distance is taken from.
                direction /= self.counts[c]
                for rows, deviations in self._probabilities(blocks, kept):
                    if kept is None:
                        deviations = deviations.sub_(mean)
                    self.influence[rows] = self.distance[rows] - (deviations @ direction).double()
                self.influence[members] -= self.influence[members].mean()
        self.overall /= len(self.labels)

    def at_class_means(self, influence: bool) -> tuple[Tensor, Tensor]:
        """Return the classes' distances from the mean of all, and each sample's influence on their mean."""
        parts = list(row_blocks(*self.means.shape))
        lengths = torch.cat([torch.linalg.vector_norm(self._away(part), dim=1) for part in parts])
        distances = torch.full((len(self.counts),), torch.nan, dtype=torch.float64)
        distances[self.present] = lengths
        by_sample = torch.zeros(len(self.labels), dtype=torch.float64)
        if not influence:
            return distances, by_sample
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0) / len(self.present)
        directions = torch.zeros(len(self.counts), dtype=torch.float64)
        for part in parts:
            directions += inverse[part] @ self._away(part)
        for row, (c, members, blocks) in enumerate(self._classes()):
            share = float(self.counts[c]) / len(self.labels)
            weight = (inverse[row] * self._away(row) - share * directions).to(self.dtype)
            for rows, probabilities in self._probabilities(blocks, None):
                by_sample[rows] = (probabilities @ weight).double()
            by_sample[members] -= by_sample[members].mean()
            self.progress(int(self.counts[c]))
        return distances, by_sample

    def _away(self, rows: int | slice) -> Tensor:
        return self.means[rows].double() - self.overall

    def _first(self, c: int, blocks: list[Rows]) -> tuple[Tensor, list[Tensor] | None]:
        """Note the numbers of each sample; return the class mean and, unless too large, the probabilities."""
        count, kept = int(self.counts[c]), list[Tensor]()
        keep = count * len(self.counts) <= _KEPT
        total = torch.zeros(len(self.counts), dtype=torch.float64)
        for rows in blocks:
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
                for start in range(0, len(self.labels), 1024):
                    check_finite(self.logits[start : start + 1024], start)
                raise ValueError("the logits are too large for float32")
            self.scalars[0, rows] = (logarithm - own).double()
            self.scalars[1, rows] = entropy.clamp(min=0)
            self.scalars[2, rows] = (1 / sums).double()
            self.largest[rows] = largest.squeeze(1)
            self.log_sum[rows] = logarithm
            probabilities = exponentials.div_(sums.unsqueeze(1))
            total += probabilities.sum(0)
            if keep:
                kept.append(probabilities)
        self.progress(count)
        return (total / count).to(self.dtype), kept if keep else None

    def _probabilities(self, blocks: list[Rows], kept: list[Tensor] | None) -> Iterator[tuple[Rows, Tensor]]:
        if kept is not None:
            yield from zip(blocks, kept, strict=True)
            return
        for rows in blocks:
            # One after the other: their sum would round away the small one beside a logit of 1e4.
            z = self._read(rows) - self.largest[rows].unsqueeze(1)
            yield rows, z.sub_(self.log_sum[rows].unsqueeze(1)).exp_()

    def _read(self, rows: Rows) -> Tensor:
        return self.logits[rows].to(self.dtype)

    def _classes(self) -> Iterator[tuple[int, Rows, list[Rows]]]:
        """Yield each class that has samples, where these are, and the blocks in which they are read."""
        start = 0
        for c, count in enumerate(self.counts.tolist()):
            stop = start + count
            if count:
                blocks = row_blocks(stop, len(self.counts), start)
                yield c, self._rows(slice(start, stop)), [self._rows(block) for block in blocks]
            start = stop

    def _rows(self, places: slice) -> Rows:
        return places if self.order is None else self.order[places]


def _rank(logits: Tensor, c: int) -> Tensor:
    """Return how many classes come before class ``c`` in each row; of equal logits the lower class first."""
    own = logits[:, c : c + 1]
    # Into floats, because booleans are slow to add.
    before = torch.ge(logits[:, :c], own, out=logits.new_empty(len(logits), c))
    after = torch.gt(logits[:, c + 1 :], own, out=logits.new_empty(len(logits), logits.shape[1] - c - 1))
    return (before.sum(1) + after.sum(1)).long()


def _at_most(samples: int, progress: Progress | None) -> Progress | None:
    """Report no more than that: how often the search for a temperature must look is not known before."""
    left = samples

    def report(looked_at: int) -> None:
        nonlocal left
        shown = min(looked_at, left)
        left -= shown
        if shown and progress:
            progress(shown)

    return report if progress else None


def deviation_pseudo_values(
    values: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each class's unbiased standard deviation, and its pseudo-values, centred within the class.

    The jackknife makes a standard deviation a mean over samples: ``n s - (n - 1) s_without_i``, in closed
    form, because leaving ``x`` out of ``n`` values lowers their sum of squares by
    ``n / (n - 1) (x - mean)^2``. Two values leave one, which has no deviation: such a class says nothing.

    Returns:
        ``(num_classes,)``, NaN below 2 samples, and ``(N,)``, 0 in a class of fewer than 3.
    """
    n = np.bincount(labels, minlength=num_classes).astype(np.float64)
    deviation = values - (np.bincount(labels, values, num_classes) / np.maximum(n, 1))[labels]
    squares = np.bincount(labels, deviation**2, num_classes)
    std = np.where(n >= 2, np.sqrt(squares / np.maximum(n - 1, 1)), np.nan)
    m = n[labels]
    left = np.maximum(squares[labels] - m / np.maximum(m - 1, 1) * deviation**2, 0.0)
    pseudo = m * std[labels] - (m - 1) * np.sqrt(left / np.maximum(m - 2, 1))
    pseudo = np.where(m >= 3, pseudo, 0.0)
    return std, pseudo - (np.bincount(labels, pseudo, num_classes) / np.maximum(n, 1))[labels]
