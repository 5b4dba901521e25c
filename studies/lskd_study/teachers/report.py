"""A comparison of teachers as JSON, CSV and for the terminal."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lskd.teachers.preflight import at_chance
from lskd_study.base.text import csv_text
from lskd_study.paper.sources import SOURCES as ALL_SOURCES
from lskd_study.plan.plan import exact
from lskd_study.stats.bootstrap import METHOD
from lskd_study.teachers.compare import DEFINITIONS, PERCENT, QUANTITIES, RATIOS, Comparison, Teacher

LABELS = {**QUANTITIES, **DEFINITIONS}
# As on a study's page.
SOURCES = {name: source for name, source in ALL_SOURCES.items() if name in LABELS}
COMPARED = {**LABELS, **{name: f"{LABELS[name]} (ratio)" for name in RATIOS}}


def as_json(comparison: Comparison) -> str:
    """Return one JSON object for each teacher, in a list.

    Accuracies and selective risk are in percent, cross-entropy and entropy in nats. ``differences`` of a
    teacher are from the teachers before it: its value less theirs, or over theirs (``"ratio": true``).
    ``sources``: who proposed a quantity.
    """
    objects = [_teacher_object(comparison, position) for position in range(len(comparison.teachers))]
    return json.dumps(objects, indent=2, ensure_ascii=False) + "\n"


def _teacher_object(comparison: Comparison, position: int) -> dict[str, Any]:
    teacher = comparison.teachers[position]
    m = teacher.measures
    value = {name: _plain(teacher.value(name)) for name in (*QUANTITIES, "calibrated_ece", *DEFINITIONS)}
    return {
        "name": teacher.name,
        "source": teacher.source,
        "samples": m.samples,
        "num_classes": m.num_classes,
        **{name: value[name] for name in QUANTITIES if name != "calibrated_nll"},
        "calibrated": {
            "temperature": m.calibrated.temperature,
            "at_limit": m.calibrated.at_limit,
            "nll": value["calibrated_nll"],
            "ece": value["calibrated_ece"],
        },
        "one_minus_stability": {name: value[name] for name in DEFINITIONS},
        "small_class_correction": m.small_class_correction,
        "equivalent_smoothing": {name: m.equivalent_smoothing(name) for name in ("uniform", "paper")},
        "target_mass": [asdict(mass) for mass in teacher.masses],
        "class_counts": m.counts.tolist(),
        "classes_without_samples": (m.counts == 0).nonzero().flatten().tolist(),
        "classes_of_one_sample": (m.counts == 1).nonzero().flatten().tolist(),
        "differences": [
            {
                "from": comparison.teachers[i].name,
                "quantity": name,
                "estimate": _plain(e.value),
                "low": _plain(e.low),
                "high": _plain(e.high),
                "p_value": _plain(e.p_value),
                **({"ratio": True} if name in RATIOS else {}),
                **({"note": e.note} if e.note else {}),
            }
            for i, j, name, e in comparison.rows()
            if j == position
        ],
        "sources": SOURCES,
        "interval_method": f"{METHOD}; {comparison.replicates} draws, seed {comparison.seed}",
        "warnings": [*teacher.warnings, *comparison.warnings],
    }


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None


def as_csv(comparison: Comparison) -> str:
    """Return one line for each value and difference; ``compared_with`` is empty for a teacher's own value."""
    lines: list[list[object]] = []
    for teacher in comparison.teachers:
        for name, value, meaning in _values(teacher):
            lines.append(
                [teacher.name, "", name, _cell(value), "", "", "", meaning, SOURCES.get(name, ""), ""]
            )
    for i, j, name, e in comparison.rows():
        numbers = (_cell(number) for number in (e.value, e.low, e.high, e.p_value))
        names = (comparison.teachers[j].name, comparison.teachers[i].name)
        lines.append([*names, name, *numbers, COMPARED[name], SOURCES.get(name, ""), e.note])
    header = ["teacher", "compared_with", "quantity", "value", "low", "high", "p_value"]
    return csv_text([*header, "meaning", "source", "note"], lines)


def _cell(number: float) -> str:
    return f"{number:.10g}" if math.isfinite(number) else ""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what to take and why, the teachers side by side, their differences and the warnings."""
    sentence, *rest = advice(comparison)
    console.print(sentence, markup=False, highlight=False, style="bold")
    for line in filter(None, (*reading(comparison), *rest)):
        console.print(line, markup=False, highlight=False)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for teacher in comparison.teachers:
        table.add_column(teacher.name, justify="right", overflow="fold")
    for label, cells in measure_rows(comparison):
        table.add_row(label, *cells)
    console.print(table, markup=False)
    if comparison.differences:
        gaps = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("difference", "of", "from"):
            gaps.add_column(column, overflow="fold")
        for column in ("value", "95 % interval", "p"):
            gaps.add_column(column, justify="right", no_wrap=True)
        for cells in difference_rows(comparison):
            gaps.add_row(*cells)
        console.print()
        console.print(gaps, markup=False)
        console.print(method_line(comparison), markup=False, highlight=False)
    for line in warning_lines(comparison):
        console.print(f"warning: {line}", markup=False, highlight=False, style="yellow")


# What to take of a group of teachers on the same samples, by its state, and how their accuracies lie.
ADVICE = {
    "at chance": "Distil from none: {best} is right on {top1} %, no better than guessing",
    "alone": "{best} is right on {top1} %; to choose takes another teacher on the same samples",
    "clear": "Distil from {best}, the {most} accurate{of}",
    "open": "{rivals} will do: which of them is the {most} accurate cannot be told",
}
READING = {
    "clear": "most accurate{of}: {best} ({top1} %), {lead} points above {nearest} (95 % interval {interval})",
    "open": "no teacher is clearly the most accurate: {best} ({top1} %) is {lead} points above {nearest}, "
    "which may be chance (95 % interval {interval})",
}
WHY = "In the paper’s Table 8 students follow a teacher’s accuracy more closely than its 1-S (errata E12)."
UNKNOWN = "Each teacher is one training run, and whether students differ only `lskd study` can tell."
MANY = 4  # teachers: more are counted, not listed


class Advice(NamedTuple):
    """What the report opens with, why, and what is not known."""

    sentence: str
    reason: str
    unknown: str


def advice(comparison: Comparison) -> Advice:
    """Return which teacher to distil from, a sentence for each group that saw the same samples."""
    sentences = [f"{ADVICE[state].format(**words)}." for state, words in _standings(comparison)]
    return Advice(" ".join(sentences), WHY if comparison.differences else "", UNKNOWN)


def reading(comparison: Comparison) -> list[str]:
    """Return which teacher is the most accurate and whether that could be chance, by group."""
    found = [(READING["clear" if words["clear"] else "open"], words) for _, words in _standings(comparison)]
    return [template.format(**words) for template, words in found if words["nearest"]]


def _standings(comparison: Comparison) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the state of each group and the words for it.

    The most accurate is held against the one that comes nearest, by the interval of their difference, and
    against all others for whether it is the most accurate for certain.
    """
    teachers = comparison.teachers
    for best, *others in _groups(comparison):
        leads = {other: _lead(comparison, best, other) for other in others}
        nearest = min(leads, key=lambda other: leads[other], default=best)
        rivals = [teachers[p].name for p in (best, *others) if p == best or leads[p][0] <= 0]
        top1 = teachers[best].value("top1")
        state = "open" if rivals[1:] else "clear" if others else "alone"
        yield (
            "at chance" if _at_chance(teachers[best]) else state,
            {
                "best": teachers[best].name,
                "top1": f"{top1:.2f}",
                "most": "most" if others[1:] else "more",
                "of": f" of {1 + len(others)}" if others[1:] else "",
                "rivals": f"{len(rivals)} of them" if len(rivals) > MANY else " or ".join(rivals),
                "clear": state if state == "clear" else "",
                "nearest": teachers[nearest].name if others else "",
                "lead": f"{top1 - teachers[nearest].value('top1'):.2f}",
                "interval": "{:+.2f} to {:+.2f}".format(*leads.get(nearest, (0.0, 0.0))).replace("-", "−"),
            },
        )


def _at_chance(teacher: Teacher) -> bool:
    m = teacher.measures
    return bool(at_chance(round(m.topk(1) * m.samples), m.counts.tolist()))


def _groups(comparison: Comparison) -> list[list[int]]:
    """Return the teachers by the samples that they saw, in each group the most accurate first."""
    teachers = range(len(comparison.teachers))
    paired = {
        frozenset({i, *(j for j in teachers if {(i, j), (j, i)} & set(comparison.differences))})
        for i in teachers
    }
    return [
        sorted(group, key=lambda p: -comparison.teachers[p].value("top1"))
        for group in sorted(paired, key=min)
    ]


def _lead(comparison: Comparison, best: int, other: int) -> tuple[float, float]:
    """Return the interval of what a teacher's accuracy is above another's; no lead where there is none."""
    e = comparison.differences[min(best, other), max(best, other)]["top1"]
    low, high = (e.low, e.high) if best > other else (-e.high, -e.low)
    return (low, high) if math.isfinite(low) else (-math.inf, math.inf)


def method_line(comparison: Comparison) -> str:
    """Return how the intervals were made, and why some are missing."""
    text = f"95 % intervals: {METHOD}, {comparison.replicates} draws; each one alone, not all at once."
    if not all(teacher.measures.small_class_correction for teacher in comparison.teachers):
        text += " Those of 1-S are for large classes; the values beside them have small classes' bias."
    notes = []
    for i, j, name, e in comparison.rows():
        if e.note:
            pair = f" ({comparison.teachers[j].name}, {comparison.teachers[i].name})"
            notes.append(f"{LABELS[name]}{pair if len(comparison.teachers) > 2 else ''}: {e.note}")
    return text + "".join(f" {note}." for note in dict.fromkeys(notes))


def warning_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the warnings, each with its teacher's name."""
    for teacher in comparison.teachers:
        yield from (f"{teacher.name}: {line}" for line in teacher.warnings)
    yield from comparison.warnings


def _values(teacher: Teacher) -> Iterator[tuple[str, float, str]]:
    m = teacher.measures
    yield "samples", m.samples, "number of samples"
    yield "num_classes", m.num_classes, "number of classes"
    counted = m.counts[m.counts > 0]
    yield "smallest_class", int(counted.min()), "samples of the smallest class that has any"
    yield "largest_class", int(counted.max()), "samples of the largest class"
    for name, label in QUANTITIES.items():
        if name != "calibrated_nll":
            yield name, teacher.value(name), label
    yield "fitted_temperature", m.calibrated.temperature, "temperature that fits the labels best"
    yield "calibrated_nll", teacher.value("calibrated_nll"), QUANTITIES["calibrated_nll"]
    yield "calibrated_ece", teacher.value("calibrated_ece"), "calibration error at the fitted temperature"
    for name, label in DEFINITIONS.items():
        corrected = m.small_class_correction and not name.startswith("between")
        yield name, teacher.value(name), label + (", corrected for small classes" if corrected else "")
    yield "equivalent_smoothing", m.equivalent_smoothing(), "smoothing it looks trained with (alpha/K to all)"
    yield "equivalent_smoothing_paper", m.equivalent_smoothing("paper"), "the same, alpha/(K-1) to the others"
    for mass in teacher.masses:
        t = f"{exact(mass.temperature)}"
        yield f"own_class_mass_T{t}", mass.measured, f"mean probability of the label at T = {t}"
        if mass.temperature != 1:  # at 1 they are the same, it is where the smoothing is read from
            yield f"ideal_mass_T{t}", mass.ideal, f"the same of an ideal teacher so smoothed, T = {t}"


def measure_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Yield what is measured and each teacher's value, as texts."""
    columns = [list(_values(teacher)) for teacher in comparison.teachers]
    for cells in zip(*columns, strict=True):
        yield cells[0][2], [_text(name, value) for name, value, _ in cells]


def _text(name: str, value: float, sign: str = "") -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–"
    if name in RATIOS:
        return f"{value:.3g}"
    digits = 3 if name in PERCENT or name == "fitted_temperature" else 4
    return f"{value:{sign}.{digits}f}"


def difference_rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yield each difference as texts: quantity, of which teacher, from which, value, interval, p-value."""
    for i, j, name, e in comparison.rows():
        of, origin = comparison.teachers[j].name, comparison.teachers[i].name
        value, low, high = (_text(name, x, "+").replace("-", "−") for x in (e.value, e.low, e.high))
        ends = f"{low} to {high}" if math.isfinite(e.low) else "–"
        p_value = f"{e.p_value:.2g}" if math.isfinite(e.p_value) else "–"
        yield [COMPARED[name], of, origin, f"× {value}" if name in RATIOS else value, ends, p_value]
