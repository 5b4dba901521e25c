"""Stored soft labels: reading them against NumPy reading the same bytes; size against FKD's files."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lskd import SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.teachers.replay import augmentation_seed

SAMPLES, BATCH, PROCESSES = 1_000_000, 256, 8
LAYOUT = SoftLabelsLayout(1000, 10, SAMPLES, rows_per_sample=1, seeds=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The top 10 of 1,000 classes of a million images, about one epoch of ImageNet."""
    return write(tmp_path_factory.mktemp("labels") / "s", LAYOUT)


def write(path: Path, layout: SoftLabelsLayout) -> Path:
    generator = np.random.default_rng(0)
    with SoftLabelsWriter(path, layout, {}) as writer:
        for epoch in range(layout.epochs):
            seeds = augmentation_seed(0, epoch, np.arange(layout.samples))
            values = -np.sort(generator.exponential(2, (layout.samples, layout.k)).astype(np.float32))
            ids = generator.integers(0, layout.num_classes, values.shape)
            writer.append(values, ids, seeds=seeds)
    return path


class Processes:
    """Eight processes that wait for work, each with an eighth of an epoch in random order.

    Args:
        read: given a list of batches of keys, reads them; its state is what the parent had when they forked.
    """

    def __init__(self, read: Callable[[list[NDArray[np.int64]]], None]) -> None:
        context = multiprocessing.get_context("fork")
        self.barrier = context.Barrier(PROCESSES + 1)
        self.ended = context.Value("b", False)

        def work(number: int) -> None:
            order = np.random.default_rng(1).permutation(SAMPLES)[number::PROCESSES]
            batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
            while True:
                self.barrier.wait()
                if self.ended.value:
                    return
                read(batches)
                self.barrier.wait()

        self.workers = [context.Process(target=work, args=(n,), daemon=True) for n in range(PROCESSES)]
        for worker in self.workers:
            worker.start()

    def read_an_epoch(self) -> None:
        self.barrier.wait()
        self.barrier.wait()

    def end(self) -> None:
        self.ended.value = True
        self.barrier.wait()
        for worker in self.workers:
            worker.join()


@pytest.fixture
def pair(store: Path) -> Iterator[Callable[..., tuple[Processes, Processes]]]:
    made: list[Processes] = []

    def make(*readers: Callable[[list[NDArray[np.int64]]], None]) -> tuple[Processes, ...]:
        made.extend(Processes(read) for read in readers)
        return tuple(made)

    yield make  # type: ignore[misc]
    for processes in made:
        processes.end()


@pytest.mark.parametrize(
    ("first", "how"),
    [(False, "in batches"), (True, "for the first time (checksums)")],
)
def test_reading_batches(ratio, store, pair, first, how):
    """For the first time every block is checked against its checksum: so in every epoch of a training."""
    labels = SoftLabels(store)
    rows = np.memmap(store / "rows.bin", LAYOUT.row, mode="r")

    def ours(batches: list[NDArray[np.int64]]) -> None:
        for keys in batches:
            labels.take(keys)

    def peer(batches: list[NDArray[np.int64]]) -> None:
        for keys in batches:
            there = rows[keys]
            _ = there["values"], there["ids"]

    one, other = pair(ours, peer)

    def read() -> None:
        if first:
            labels._rows_file._checked[:] = False  # shared with the processes
        one.read_an_epoch()

    name = f"store, 8 processes read an epoch {how} / NumPy: memmap[keys]"
    ratio(name, read, other.read_an_epoch, bar=1 / 0.7, rounds=11)


def test_reading_one_by_one(ratio, store, pair):
    labels = SoftLabels(store)
    rows = np.asarray(np.memmap(store / "rows.bin", LAYOUT.row, mode="r"))

    def ours(batches: list[NDArray[np.int64]]) -> None:
        for keys in batches:
            for key in keys.tolist():
                _ = labels[key]

    def peer(batches: list[NDArray[np.int64]]) -> None:
        for keys in batches:
            for key in keys.tolist():
                there = rows[key : key + 1]
                _ = there["values"], there["ids"], there["seed"]

    one, other = pair(ours, peer)
    ratio(
        "store, 8 processes read an epoch sample by sample / NumPy: memmap[key]",
        one.read_an_epoch,
        other.read_an_epoch,
        rounds=7,
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "bar"),
    [("float32", "float32", 0.5), ("float16", "float32", 0.5), ("float16", "float16", None)],
)
def test_size_against_fkd(quantity, tmp_path, ours, theirs, bar):
    """An image's 500 crops with the top 5, as FKD's generate_soft_label.py saves them (float32 by default).

    It saves a list of three NumPy arrays: coordinates (500, 4), flips (500,), and class ids and probabilities
    (500, 2, 5), by torch.save, in which bytes of arrays are text: half of them take two.
    """
    crops, k, images = 500, 5, 20
    dtype = np.dtype(theirs)
    numbers = np.random.default_rng(0)
    probabilities = np.sort(numbers.dirichlet(np.full(1000, 0.02), crops))[:, :-6:-1]
    ids = numbers.integers(0, 1000, (crops, k))
    state = [
        numbers.random((crops, 4)).astype(dtype),
        numbers.random(crops) < 0.5,
        np.stack([ids, probabilities], 1).astype(dtype),
    ]
    torch.save(state, tmp_path / "image.tar")
    fkd = (tmp_path / "image.tar").stat().st_size
    layout = SoftLabelsLayout(1000, k, images, crops, rows_per_sample=1, seeds=True, values=ours)  # type: ignore[arg-type]
    path = write(tmp_path / "s", layout)
    size = sum(file.stat().st_size for file in path.iterdir()) / images
    quantity(f"store on disk, {ours}, top 5 of 500 crops an image / FKD's file, {theirs}", [size / fkd], bar)
    print(f"\nbytes an image: {size:.0f} here, {fkd} in FKD's file")
