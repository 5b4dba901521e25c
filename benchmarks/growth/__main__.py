"""How cost grows: tables, and figures with what is expected.

python benchmarks/growth                  # or make bench-growth: all of it
python benchmarks/growth steps            # a minute: batch, classes, vocabulary, samples and epochs
python benchmarks/growth files page-runs  # of the parts in sizes.py those that are named; others' rows stay
"""

import csv
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import sizes
import steps
from curves import Curve, draw, linear

FOLDER = Path(__file__).parents[1]
STEPS = "Dots: measured. Lines: expected (times: linear between the ends; bytes: 4 + 4K an image and epoch)"
SIZES = "Dots: measured, in processes of their own. Lines: linear, by the least size and the last but one"


def main(names: Sequence[str]) -> None:
    """Measure the named parts, all where none is named."""
    parts = {panel.name: panel for panel in sizes.PANELS}
    if unknown := set(names) - {"steps", "imagenet", *parts}:
        raise SystemExit(
            f"no such part: {', '.join(sorted(unknown))}; there are steps, imagenet, {', '.join(parts)}"
        )
    wanted = list(names) or ["steps", *parts, "imagenet"]
    if "steps" in wanted:
        curves = list(steps.curves())
        write("growth", curves)
        draw(curves, steps.PANELS, STEPS, FOLDER / "growth.png")
    if chosen := [parts[name] for name in wanted if name in parts]:
        for panel in chosen:
            curves = [*others(panel), *measured(panel)]
            write("growth_sizes", curves)
        panels = {
            f"{panel.name} {what}": (panel.unit, unit, f"{panel.name}: {what}")
            for panel in sizes.PANELS
            for what, unit in (("time", "s of CPU"), ("memory", "MB beyond the imports"))
        }
        there = {curve.panel for curve in curves}
        panels = {name: texts for name, texts in panels.items() if name in there}
        draw(curves, panels, SIZES, FOLDER / "growth_sizes.png")
    if "imagenet" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            ((_, cost),) = sizes.page(Path(folder), **sizes.IMAGENET)
        bars = (
            f"{cost.wall / 60:.2f} of 60 s, {cost.cpu / 60:.2f} in CPU time, {cost.memory / 4000:.2f} of 4 GB"
        )
        print(f"page of an ImageNet study: {bars}; {cost}")


def measured(panel: sizes.Sizes) -> list[Curve]:
    """Measure a panel at its sizes; tell each, and which end was worse than linear."""
    time: dict[str, dict[int, float]] = defaultdict(dict)
    memory: dict[str, dict[int, float]] = defaultdict(dict)
    for size in panel.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for name, cost in panel.measure(Path(folder), size):
                # What cannot be measured is drawn at the least that can.
                time[name][size], memory[name][size] = max(cost.cpu, 1e-3), max(cost.memory, 0.1)
                print(f"{panel.name:16} {name:18} {size:9,}  {cost}", flush=True)
    found = []
    for what, costs in (("time", time), ("memory", memory)):
        for name, values in costs.items():
            found.append(expected(f"{panel.name} {what}", name, values))
            end = max(values)
            share = values[end] / found[-1].expected(end)
            print(f"{panel.name:16} {name:18} {what} at {end:,}: {share:.2f} of linear")
    return found


def expected(panel: str, name: str, values: dict[int, float]) -> Curve:
    """Return a curve with the straight line by the least size and the last but one."""
    return linear(panel, name, values, sorted(values)[-2])


def others(panel: sizes.Sizes) -> list[Curve]:
    """Return what an earlier command measured of the other panels."""
    path, found = FOLDER / "growth_sizes.csv", defaultdict[tuple[str, str], dict[int, float]](dict)
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found[row["panel"], row["curve"]][int(row["x"])] = float(row["y"])
    own = {f"{panel.name} {what}" for what in ("time", "memory")}
    return [expected(*names, values) for names, values in found.items() if names[0] not in own]


def write(name: str, curves: Sequence[Curve]) -> None:
    """Write what was measured as a table."""
    path = FOLDER / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["panel", "curve", "x", "y", "expected"])
        writer.writerows(row for curve in curves for row in curve.rows())
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
