"""Measure teachers side by side: each teacher's numbers, and the intervals of their differences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd import LskdError, TeacherMeasures, measure_teacher, target_mass
from lskd.analysis.by_sample import Softmax, by_sample
from lskd.analysis.dark_knowledge import among_wrong
from lskd.analysis.selective import aurc_pseudo_values, largest_normalised
from lskd.targets import chance_like_mass
from lskd_study.base.text import first_of
from lskd_study.plan.plan import exact
from lskd_study.stats.bootstrap import Estimate, paired_differences
from lskd_study.stats.intervals import Array
from lskd_study.teachers.outputs import Outputs

Progress = Callable[[int], object]

# What differs between teachers with an interval. The calibration error that is left at the fitted temperature
# does not: it is near 0, where its bias is as large as it is.
QUANTITIES = {
    "top1": "top-1 accuracy, %",
    "top5": "top-5 accuracy, %",
    "nll": "cross-entropy with the labels, nats",
    "ece": "expected calibration error, 15 bins",
    "entropy": "mean entropy, nats",
    "calibrated_nll": "cross-entropy at the fitted temperature, nats",
    "aurc": "selective risk (AURC), %",
    "aurc_normalised": "selective risk (AURC) by normalised logits, %",
    "dark_knowledge": "dark knowledge: variance of the wrong classes' probabilities",
}
# What `TeacherMeasures` has not; of two classes, or of one sample, not all of it exists.
ONLY_MORE = frozenset({"aurc", "aurc_normalised", "dark_knowledge"})
# Compared by their ratio: e.g. of 1e-6 with a thousand classes.
RATIOS = frozenset({"dark_knowledge"})
DEFINITIONS = {
    "target_std": "1-S, std of the label's probability (Algorithm 1, Table 1)",
    "vector_l2": "1-S, distance from the class mean (Eq. 2)",
    "between_vector_l2": "1-S between classes, distance of class means (Eq. 5)",
    "between_target_std": "1-S between classes, std of class means (Table 10)",
}
ACCURACIES = frozenset({"top1", "top5"})
PERCENT = ACCURACIES | {"aurc", "aurc_normalised"}
FEW = 0.05  # share of classes without an error of their own that an interval can do without
SMALL_CLASS = 20


@dataclass(frozen=True)
class Mass:
    """What a teacher gives its own class at a temperature.

    ``measured``: mean probability of the label. ``ideal``: ``lskd.target_mass`` of a teacher that has learned
    targets of this one's equivalent smoothing exactly; lower than measured, because what a real teacher gives
    to other classes goes to a few of them. ``chance_like``: measured is below ``chance_like_mass``.
    """

    temperature: float
    measured: float
    ideal: float
    chance_like: bool


@dataclass(frozen=True)
class Teacher:
    """One teacher's measures, where its logits come from, and the names of classes and samples.

    ``more``: by quantity, contributions ``(N,)`` of what ``measures`` has not; their mean is the quantity.
    """

    name: str
    source: str
    measures: TeacherMeasures
    masses: list[Mass]
    more: Mapping[str, Array]
    class_names: Sequence[str] | None = None
    keys: Sequence[str] | None = None
    warnings: list[str] = field(default_factory=list)

    def value(self, quantity: str) -> float:
        """Return a quantity, accuracies and selective risk in percent; NaN where there is none."""
        m = self.measures
        if quantity in ONLY_MORE:
            scale = 100 if quantity in PERCENT else 1
            return scale * float(self.more[quantity].mean()) if quantity in self.more else np.nan
        if quantity in DEFINITIONS:
            return m.one_minus_stability(quantity)  # type: ignore[arg-type]
        values: dict[str, Callable[[], float]] = {
            "top1": lambda: 100 * m.topk(1),
            "top5": lambda: 100 * m.topk(5),
            "nll": lambda: float(m.nll.mean()),
            "ece": lambda: m.calibration_error,
            "entropy": lambda: float(m.entropy.mean()),
            "calibrated_nll": lambda: float(m.calibrated.nll.mean()),
            "calibrated_ece": lambda: m.calibrated_error,
        }
        return values[quantity]()


@dataclass(frozen=True)
class Comparison:
    """Teachers side by side.

    ``differences``: by the positions of two teachers (earlier, later), the later's less the earlier's
    quantities by name, accuracies in points; of those of ``RATIOS`` the later's over the earlier's.
    ``warnings`` concern the comparison as a whole.
    """

    teachers: list[Teacher]
    differences: dict[tuple[int, int], dict[str, Estimate]]
    replicates: int
    seed: int
    warnings: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[int, int, str, Estimate]]:
        """Yield all differences: positions of both teachers, quantity, estimate."""
        for (i, j), estimates in self.differences.items():
            for name, estimate in estimates.items():
                yield i, j, name, estimate


def measure(
    outputs: Outputs,
    source: str,
    temperatures: Sequence[float] = (1.0,),
    influence: bool = False,
    small_class_correction: bool = False,
    progress: Progress | None = None,
) -> Teacher:
    """Measure one teacher.

    Args:
        outputs: its logits and labels.
        source: where they come from, for the report.
        temperatures: at which to say what is left for its own class.
        influence: prepare for :func:`compare`.
        small_class_correction: correct the stabilities for the bias of small classes.
        progress: gets the number of samples just looked at; see :func:`looks` for their sum.

    Raises:
        LskdError: for outputs without logits, or logits that are not finite.
    """
    if outputs.logits is None:
        raise LskdError(
            f"{outputs.name} has no logits; stability needs the array 'logits' (samples, classes)"
        )
    try:
        measures = measure_teacher(
            outputs.logits,
            outputs.labels,
            influence=influence,
            small_class_correction=small_class_correction,
            progress=progress,
        )
    except ValueError as error:
        raise LskdError(f"{outputs.name}: {error}") from None
    alpha = measures.equivalent_smoothing("paper")
    masses = []
    for t in temperatures:
        own = measures.target_probability.numpy()
        if t != 1:

            def masses_of(z: Array, labels: NDArray[np.int64], t: float = t) -> Array:
                if progress:
                    progress(len(z))
                return Softmax(z / t).of(labels).exp().numpy()

            own = by_sample(masses_of, outputs.logits, labels=outputs.labels)
        ideal = target_mass(measures.num_classes, min(max(alpha, 0.0), 1 - 1e-9), t)
        measured = float(own.mean())
        masses.append(Mass(t, measured, ideal, measured < chance_like_mass(measures.num_classes)))
    more = _of_samples(outputs.logits, measures)
    teacher = Teacher(outputs.name, source, measures, masses, more, outputs.class_names, outputs.keys)
    rows = outputs.logits[:1000].double()
    if (rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all():
        teacher.warnings.append("its logits look like probabilities; store what comes before the softmax")
    teacher.warnings.extend(_warnings(teacher))
    return teacher


def _of_samples(logits: Tensor, measures: TeacherMeasures) -> dict[str, Array]:
    """Return contributions of selective risk and dark knowledge; nothing of one sample."""
    if measures.samples < 2:
        return {}

    def look(z: Array, labels: NDArray[np.int64]) -> Array:
        normalised = largest_normalised(torch.from_numpy(z))  # before the softmax takes its place
        own = Softmax(z)
        return np.stack([own.log_largest.numpy(), normalised, among_wrong(own, labels)])

    sure, normalised, dark = by_sample(look, logits, labels=measures.labels)
    correct = measures.correct.numpy()
    found = {"aurc": aurc_pseudo_values(sure, correct)}
    if measures.num_classes > 2:  # of two normalised logits every sample has the same
        found |= {"aurc_normalised": aurc_pseudo_values(normalised, correct), "dark_knowledge": dark}
    return found


def looks(samples: int, temperatures: Sequence[float], influence: bool) -> int:
    """Return how many samples :func:`measure` looks at, for a progress bar."""
    return samples * (2 + influence + sum(t != 1 for t in temperatures))


def compare(
    teachers: Sequence[Teacher],
    replicates: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare teachers that were measured with ``influence``, in pairs that saw the same samples.

    Samples are matched by their keys where both teachers have them, and by position elsewhere.

    Args:
        teachers: in the order of the report.
        replicates: bootstrap draws.
        seed: of the draws.
        progress: gets the number of draws just made.
    """
    groups: list[list[int]] = []
    orders: dict[int, NDArray[np.int64]] = {}
    for position, teacher in enumerate(teachers):
        for group in groups:
            order = _same_samples(teachers[group[0]], teacher)
            if order is not None:
                group.append(position)
                orders[position] = order
                break
        else:
            groups.append([position])
            orders[position] = np.arange(teacher.measures.samples)
    differences: dict[tuple[int, int], dict[str, Estimate]] = {}
    for group in groups:
        if len(group) == 1:
            continue
        # The interval is for the difference in large classes: that of these classes has their bias in it.
        exact = [replace(teachers[p].measures, small_class_correction=True) for p in group]
        more = teachers[group[0]].more
        names = [name for name in (*QUANTITIES, *DEFINITIONS) if name in more or name not in ONLY_MORE]
        bounded = [name in ACCURACIES for name in names]
        tables = [
            np.stack([_contributions(teachers[p], m, name)[orders[p]] for name in names], axis=1)
            for m, p in zip(exact, group, strict=True)
        ]
        found = paired_differences(tables, replicates, seed, bounded, progress)
        for (i, j), estimates in found.items():
            first, second = teachers[group[i]], teachers[group[j]]
            differences[group[i], group[j]] = {
                name: _difference(name, estimate, first, second)
                for name, estimate in zip(names, estimates, strict=True)
                if not (name == "top5" and first.measures.num_classes <= 5)
            }
    warnings = []
    if len(groups) > 1:
        parts = "; ".join(", ".join(teachers[p].name for p in group) for group in groups)
        warnings.append(f"not measured on the same samples, so there are no differences between: {parts}")
    return Comparison(list(teachers), dict(sorted(differences.items())), replicates, seed, warnings)


def _contributions(teacher: Teacher, measures: TeacherMeasures, name: str) -> Array:
    if name not in teacher.more:
        return measures.contributions(name).numpy()
    values = teacher.more[name]
    if name not in RATIOS:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN, so without an interval, where all are 0
        # Of a ratio those of its logarithm, to first order.
        return np.asarray(values / values.mean() - 1 + np.log(values.mean()))


def _difference(name: str, estimate: Estimate, first: Teacher, second: Teacher) -> Estimate:
    if name in RATIOS:
        middle, low, high = (float(np.exp(end)) for end in (estimate.value, estimate.low, estimate.high))
        return Estimate(middle, low, high, estimate.p_value, estimate.note)
    value = second.value(name) - first.value(name)
    if name in DEFINITIONS:
        unknown = max(_without_error(teacher.measures, name) for teacher in (first, second))
        if unknown > FEW:
            note = f"no interval: {unknown:.0%} of the classes have too few samples to show their own error"
            return Estimate(value, np.nan, np.nan, np.nan, note)
        if not np.isfinite(estimate.low):
            note = "no interval: the classes differ by no more than their samples explain"
            return Estimate(value, np.nan, np.nan, np.nan, note)
    return replace(estimate.scaled(100 if name in PERCENT else 1), value=value)


def _without_error(measures: TeacherMeasures, definition: str) -> float:
    """Return the share of the classes that count, but are too small to show how much they would vary."""
    counted = measures.counts[~measures.class_values(definition).isnan()]  # type: ignore[arg-type]
    needed = 2 if definition.startswith("between") else 3
    return float((counted < needed).double().mean()) if len(counted) else 1.0


def _same_samples(first: Teacher, second: Teacher) -> NDArray[np.int64] | None:
    """Return the positions of the first's samples in the second's; None where they are not the same."""
    one, two = first.measures, second.measures
    if one.samples != two.samples or one.num_classes != two.num_classes:
        return None
    order = np.arange(one.samples)
    if first.keys is not None and second.keys is not None:
        places = {key: place for place, key in enumerate(second.keys)}
        if len(places) != len(second.keys) or places.keys() != set(first.keys):
            return None
        order = np.array([places[key] for key in first.keys])
    labels = two.labels.numpy()[order]
    return order if np.array_equal(one.labels.numpy(), labels) else None


def _warnings(teacher: Teacher) -> list[str]:
    m, lines = teacher.measures, []
    empty, single = ((m.counts == n).nonzero().flatten().tolist() for n in (0, 1))
    if empty:
        lines.append(f"classes without samples, left out: {_names(teacher, empty)}")
    if single:
        lines.append(
            f"classes of one sample, which has no deviation; left out of target_std and vector_l2: "
            f"{_names(teacher, single)}"
        )
    sizes = m.counts[m.counts >= 2]
    if len(sizes) and int(sizes.min()) < SMALL_CLASS:
        how = "corrected" if m.small_class_correction else "not corrected"
        lines.append(
            f"the smallest class counted has {int(sizes.min())} samples: target_std and vector_l2 are biased "
            f"low in small classes ({how}), those between classes high; do not compare data sets by them"
        )
    for mass in teacher.masses:
        if mass.chance_like:
            lines.append(
                f"at temperature {exact(mass.temperature)} its own class gets {mass.measured:.3f} on "
                "average, hardly more than chance: such targets have harmed students; use a lower temperature"
            )
    if m.calibrated.at_limit:
        lines.append(f"no temperature fits: the search ended at {m.calibrated.temperature:g}")
    return lines


def _names(teacher: Teacher, classes: Sequence[int]) -> str:
    return first_of((teacher.class_names[c] if teacher.class_names else str(c) for c in classes), 10)
