"""What a step, a loss and a store cost over batch, classes, vocabulary, samples and epochs."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from curves import Curve, linear
from torch import Tensor
from torch.nn import functional

from lskd import DistillationLoss, SoftLabels, SoftLabelsWriter, TopK
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.terms import top_k_log_probabilities

TOP_K = 10
PANELS = {
    "batch": ("images in a batch", "ms a step", "training step, ResNet-18 at 64 px"),
    "classes": ("classes", "ms", "loss, forward + backward, 256 images"),
    "vocabulary": ("words", "ms", "loss, forward + backward, 256 tokens"),
    "samples": ("images, one epoch", "bytes", f"store, top {TOP_K}"),
    "epochs": ("epochs of 10,000 images", "bytes", f"store, top {TOP_K}"),
    "reading": ("images, one epoch", "ms to read all, checked", f"store, top {TOP_K}, batches of 256"),
}


def curves() -> Iterator[Curve]:
    """Measure all of them."""
    torch.manual_seed(0)
    yield from batches()
    yield from losses("classes", (10, 100, 1000, 5000, 10_000, 21_843))
    yield from losses("vocabulary", (1000, 4000, 16_000, 32_000, 64_000, 128_000))
    yield from stores()


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


def read(path: Path, order: Any) -> None:
    """Read all of a store, in batches of 256."""
    labels = SoftLabels(path)
    for start in range(0, len(order), 256):
        labels.take(order[start : start + 256])


def write(path: Path, samples: int, epochs: int) -> float:
    """Write random soft labels and return what they take on the disk."""
    layout = SoftLabelsLayout(1000, TOP_K, samples, epochs, rows_per_sample=1, seeds=True)
    generator = np.random.default_rng(0)
    with SoftLabelsWriter(path, layout, {}) as writer:
        for _ in range(epochs):
            ids = generator.integers(0, 1000, (samples, TOP_K))
            writer.append(-generator.random(ids.shape), ids, seeds=np.arange(samples))
    return sum(file.stat().st_size for file in path.iterdir())
