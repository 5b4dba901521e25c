"""A comparison of teachers as JSON, CSV and for the terminal."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lskd_study.base.text import csv_text
from lskd_study.plan.plan import exact
from lskd_study.stats.bootstrap import METHOD
from lskd_study.teachers.compare import DEFINITIONS, PERCENT, QUANTITIES, Comparison, Teacher

LABELS = {**QUANTITIES, **DEFINITIONS}


def as_json(comparison: Comparison) -> str:
    """Return one JSON object for each teacher, in a list.

    Accuracies are in percent, cross-entropy and entropy in nats. ``differences`` of a teacher are from the
    teachers before it: its value less theirs.
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
        **{name: value[name] for name in ("top1", "top5", "nll", "ece", "entropy")},
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
                **({"note": e.note} if e.note else {}),
            }
            for i, j, name, e in comparison.rows()
            if j == position
        ],
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
            lines.append([teacher.name, "", name, _cell(value), "", "", "", meaning, ""])
    for i, j, name, e in comparison.rows():
        numbers = (_cell(number) for number in (e.value, e.low, e.high, e.p_value))
        names = (comparison.teachers[j].name, comparison.teachers[i].name)
        lines.append([*names, name, *numbers, LABELS[name], e.note])
    header = ["teacher", "compared_with", "quantity", "value", "low", "high", "p_value", "meaning", "note"]
    return csv_text(header, lines)


def _cell(number: float) -> str:
    return f"{number:.10g}" if math.isfinite(number) else ""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the teachers side by side, their differences and the warnings."""
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
        for line in reading(comparison):
            console.print(line, markup=False, highlight=False, style="bold")
    for line in warning_lines(comparison):
        console.print(f"warning: {line}", markup=False, highlight=False, style="yellow")


def reading(comparison: Comparison) -> list[str]:
    """Return which teacher is the most accurate and whether that could be chance; one line for each data set.

    Of a teacher's measures, accuracy is what its students' accuracy follows best in the paper's own Table 8
    (errata E12), so it is the one that is put into words.
    """
    teachers, lines = comparison.teachers, []
    paired: dict[int, set[int]] = {}
    for i, j in comparison.differences:
        paired.setdefault(i, {i}).add(j)
    # The first of a group is paired with all others of it.
    groups = [group for i, group in paired.items() if not any(i in paired[k] for k in paired if k < i)]
    for group in groups:
        best, second = sorted(group, key=lambda p: -teachers[p].value("top1"))[:2]
        e = comparison.differences[min(best, second), max(best, second)]["top1"]
        low, high = (e.low, e.high) if best > second else (-e.high, -e.low)
        interval = f"95 % interval {low:+.2f} to {high:+.2f}".replace("-", "−")
        name, other = f"{teachers[best].name} ({teachers[best].value('top1'):.2f} %)", teachers[second].name
        lead = f"{abs(e.value):.2f}"
        if low > 0:
            of = f" of {len(group)}" if len(group) > 2 else ""
            lines.append(f"most accurate{of}: {name}, {lead} points above {other} ({interval})")
        elif float(lead) == 0:
            lines.append(
                f"no teacher is the most accurate: {name} and {other} show no difference ({interval})"
            )
        else:
            lines.append(
                f"no teacher is clearly the most accurate: {name} is {lead} points above {other}, which may "
                f"be chance ({interval})"
            )
    return lines


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
    digits = 3 if name in PERCENT or name == "fitted_temperature" else 4
    return f"{value:{sign}.{digits}f}"


def difference_rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yield each difference as texts: quantity, of which teacher, from which, value, interval, p-value."""
    for i, j, name, e in comparison.rows():
        of, origin = comparison.teachers[j].name, comparison.teachers[i].name
        value, low, high = (_text(name, x, "+").replace("-", "−") for x in (e.value, e.low, e.high))
        ends = f"{low} to {high}" if math.isfinite(e.low) else "–"
        p_value = f"{e.p_value:.2g}" if math.isfinite(e.p_value) else "–"
        yield [LABELS[name], of, origin, value, ends, p_value]
