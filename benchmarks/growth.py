"""How cost grows with batch, classes, vocabulary, samples and epochs: a CSV, and a figure with expectations.

python benchmarks/growth.py                     # or make bench-growth: about a minute on one core
"""

import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import timm
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.nn import functional

from lskd import DistillationLoss, SoftLabels, SoftLabelsWriter, TopK
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.terms import top_k_log_probabilities

CSV, FIGURE = (Path(__file__).with_suffix(suffix) for suffix in (".csv", ".png"))
TOP_K = 10


@dataclass(frozen=True)
class Curve:
    """A curve of a panel: what was measured, by size, and what is expected at any size."""

    panel: str
    name: str
    measured: dict[int, float]
    expected: Callable[[Any], Any]


PANELS = {
    "batch": ("images in a batch", "ms a step", "training step, ResNet-18 at 64 px"),
    "classes": ("classes", "ms", "loss, forward + backward, 256 images"),
    "vocabulary": ("words", "ms", "loss, forward + backward, 256 tokens"),
    "samples": ("images, one epoch", "bytes", f"store, top {TOP_K}"),
    "epochs": ("epochs of 10,000 images", "bytes", f"store, top {TOP_K}"),
    "reading": ("images, one epoch", "ms to read all, checked", f"store, top {TOP_K}, batches of 256"),
}


def main() -> None:
    torch.manual_seed(0)
    curves = [*batches(), *losses("classes", (10, 100, 1000, 5000, 10_000, 21_843))]
    curves += [*losses("vocabulary", (1000, 4000, 16_000, 32_000, 64_000, 128_000)), *stores()]
    with CSV.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["panel", "curve", "x", "y", "expected"])
        for curve in curves:
            for x, y in curve.measured.items():
                writer.writerow([curve.panel, curve.name, x, f"{y:.6g}", f"{curve.expected(x):.6g}"])
    draw(curves)
    print(f"{CSV}\n{FIGURE}")


def milliseconds(work: Callable[[], object], least: float = 0.3) -> float:
    """The median of some rounds, of which there are more where they are short."""
    work()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < least and len(times) < 50):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def linear(panel: str, name: str, measured: dict[int, float]) -> Curve:
    """Expected is a fixed part and one in proportion, as the smallest and the largest measurement say."""
    first, last = min(measured), max(measured)
    slope = (measured[last] - measured[first]) / (last - first)
    return Curve(panel, name, measured, lambda x: measured[first] + slope * (x - first))


def batches() -> Iterator[Curve]:
    student = timm.create_model("resnet18", num_classes=1000)
    teacher = timm.create_model("resnet18", num_classes=1000).eval().requires_grad_(False)
    loss = DistillationLoss()

    def measure(size: int) -> tuple[float, ...]:
        images, labels = torch.randn(size, 3, 64, 64), torch.randint(1000, (size,))
        rows = TopK(*top_k_log_probabilities(torch.randn(size, 1000), TOP_K))

        def ask() -> Tensor:
            with torch.inference_mode():
                logits: Tensor = teacher(images).clone()
            return logits

        def step(of: Callable[[Tensor], Tensor]) -> float:
            def work() -> None:
                student.zero_grad()
                of(student(images)).backward()

            return milliseconds(work)

        return (
            step(lambda z: loss(z, ask())),
            step(lambda z: loss(z, rows)),
            step(lambda z: functional.cross_entropy(z, labels)),
        )

    return side_by_side(
        "batch", ("online", "from the store", "cross-entropy"), (2, 4, 8, 16, 32, 64), measure
    )


def losses(panel: str, sizes: tuple[int, ...]) -> Iterator[Curve]:
    loss = DistillationLoss()

    def measure(size: int) -> tuple[float, ...]:
        student, teacher = torch.randn(256, size, requires_grad=True), torch.randn(256, size)
        rows = TopK(*top_k_log_probabilities(teacher, min(TOP_K, size - 1)))
        labels = torch.randint(size, (256,))

        def both_ways(of: Callable[[], Tensor]) -> float:
            def work() -> None:
                student.grad = None
                of().backward()

            return milliseconds(work)

        return (
            both_ways(lambda: loss(student, teacher)),
            both_ways(lambda: loss(student, rows)),
            both_ways(lambda: functional.cross_entropy(student, labels)),
        )

    names = ("all classes of the teacher", f"its top {TOP_K}", "cross-entropy")
    return side_by_side(panel, names, sizes, measure)


def side_by_side(
    panel: str, names: tuple[str, ...], sizes: tuple[int, ...], measure: Callable[[int], tuple[float, ...]]
) -> Iterator[Curve]:
    measured = {size: measure(size) for size in sizes}
    for number, name in enumerate(names):
        yield linear(panel, name, {size: times[number] for size, times in measured.items()})


def stores() -> Iterator[Curve]:
    """Sizes are expected to be 4 + 4 K bytes an image and epoch; times to be linear."""
    by_samples, by_epochs, reading = {}, {}, {}

    def read(path: Path, order: Any) -> None:
        labels = SoftLabels(path)
        for start in range(0, len(order), 256):
            labels.take(order[start : start + 256])

    with tempfile.TemporaryDirectory() as folder:
        for samples in (1000, 10_000, 100_000, 1_000_000):
            path = Path(folder) / f"samples{samples}"
            by_samples[samples] = write(path, samples, 1)
            order = np.random.default_rng(0).permutation(samples)
            reading[samples] = milliseconds(partial(read, path, order))
        for epochs in (1, 3, 10, 30, 100):
            by_epochs[epochs] = write(Path(folder) / f"epochs{epochs}", 10_000, epochs)
    yield Curve("samples", "on disk", by_samples, lambda samples: (4 + 4 * TOP_K) * samples)
    yield linear("reading", "SoftLabels.take", reading)
    yield Curve("epochs", "on disk", by_epochs, lambda epochs: (4 + 4 * TOP_K) * 10_000 * epochs)


def write(path: Path, samples: int, epochs: int) -> float:
    """Write random soft labels and return what they take on the disk."""
    layout = SoftLabelsLayout(1000, TOP_K, samples, epochs, rows_per_sample=1, seeds=True)
    generator = np.random.default_rng(0)
    with SoftLabelsWriter(path, layout, {}) as writer:
        for _ in range(epochs):
            ids = generator.integers(0, 1000, (samples, TOP_K))
            writer.append(-generator.random(ids.shape), ids, seeds=np.arange(samples))
    return sum(file.stat().st_size for file in path.iterdir())


def draw(curves: list[Curve]) -> None:
    """Panels of two logarithmic axes: dots are measured, lines expected."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (panel, (x_name, y_name, title)) in zip(axes.flat, PANELS.items(), strict=True):
        for number, curve in enumerate(curve for curve in curves if curve.panel == panel):
            colour, sizes = f"C{number}", list(curve.measured)
            axis.plot(sizes, list(curve.measured.values()), "o", color=colour, label=curve.name)
            # A straight line with a fixed part is a curve on logarithmic axes.
            x = np.geomspace(sizes[0], sizes[-1], 100)
            axis.plot(x, curve.expected(x), "-", color=colour, linewidth=1, alpha=0.7)
        axis.set(xscale="log", yscale="log", xlabel=x_name, ylabel=y_name, title=title)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, fontsize="small")
        axis.grid(alpha=0.25)
    figure.suptitle(
        "Dots: measured. Lines: expected (times: linear between the ends; bytes: 4 + 4K an image and epoch)"
    )
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
