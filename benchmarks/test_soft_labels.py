"""Stored soft labels: reading them against NumPy reading the same bytes; size against FKD's files."""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lskd import SoftLabels, SoftLabelsWriter, TopK, fused_distillation
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import stored_form
from lskd.soft_labels.own_error import OwnErrorMeter
from lskd.teachers.replay import augmentation_seed
from lskd.terms import top_k_log_probabilities

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


@pytest.mark.parametrize(("values", "bar"), [("float16", 3.0), ("packed", 1.8)])
def test_bytes_of_imagenet_for_any_number_of_epochs(quantity, tmp_path, values, bar):
    """50 views of ImageNet-1K at the top 10, from the bytes of 100,000 rows and of all beside them."""
    layout = SoftLabelsLayout(1000, 10, 100_000, rows_per_sample=1, seeds=True, views=True, values=values)
    path = write(tmp_path / "s", layout)
    row = sum(file.stat().st_size for file in path.iterdir()) / layout.samples
    print(
        f"\n{values}: {row:.2f} bytes a row, 50 views of 1,281,167 images {row * 50 * 1_281_167 / 1e9:.2f} GB"
    )
    quantity(f"ImageNet-1K, top 10, 50 views, {values}, in GB", [row * 50 * 1_281_167 / 1e9], bar)


def test_gradient_of_drawn_classes_against_the_top_8(quantity):
    """16,384 tokens of 10,000 words in 32 bytes each: Zipf's frequencies, and contexts of 32 dimensions."""
    words, tokens, generator = 10_000, 4096, torch.Generator().manual_seed(0)
    weights = torch.randn(words, 32, generator=generator)
    frequencies = -torch.arange(1, words + 1).log()
    found = []
    for sampled in (False, True):
        layout = SoftLabelsLayout(words, 8, tokens, sampled=sampled)
        contexts = torch.Generator().manual_seed(1)
        meter = OwnErrorMeter(layout)
        for batch in range(64):
            logits = frequencies + 0.3 * torch.randn(256, 32, generator=contexts) @ weights.T
            meter.add(logits, *stored_form(logits, layout, np.arange(256) + 256 * batch))
        found.append(meter.read().angle)
    (top, drawn) = found
    print(f"\ndegrees off: top 8 {top}, 8 drawn {drawn}")
    for way in ("spread", "renormalise"):
        quantity(
            f"gradient's angle, 8 drawn / top 8 ({way}), 16,384 tokens", [drawn["drawn"] / top[way]], 0.25
        )


@pytest.mark.parametrize("words", [32_000, 128_000])
def test_the_top_k_alone_needs_no_softmax_of_all(ratio, words):
    """Forward and backward of 64 tokens, both sides over the top 8, against all of the student."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, words, generator=generator).requires_grad_()
    values, ids = top_k_log_probabilities(torch.randn(64, words, generator=generator), 8)

    def step(rest: str) -> Callable[[], None]:
        teacher = TopK(values, ids, rest)  # type: ignore[arg-type]

        def run() -> None:
            logits.grad = None
            fused_distillation(logits, teacher).loss.backward()

        return run

    name = f"loss over the top 8 of {words} words alone / student's softmax over all"
    ratio(name, step("restrict"), step("renormalise"), bar=0.5)
