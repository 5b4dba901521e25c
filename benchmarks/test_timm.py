"""Distilling with timm against timm's own distillation: a step at 224 px, from a store, and a small study."""

import copy
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lskd import DistillationLoss, FrozenTeacher, SoftLabels, SoftLabelsWriter, TopK
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.teachers.fast import FastMode, choose_fast
from lskd.teachers.frozen import Normalisation
from lskd.terms import top_k_log_probabilities
from timm_ls_kd.task import LsKdTask

BATCH, CLASSES, TOP_K = 16, 1000, 10
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CPU = torch.device("cpu")
ROUNDS = int(os.environ.get("LSKD_BENCH_ROUNDS", "5"))


@pytest.fixture(scope="module")
def work(device: torch.device) -> SimpleNamespace:
    """ResNet-50, ResNet-18 and a batch; random weights cost what trained ones do."""
    torch.manual_seed(0)
    teacher = timm.create_model("resnet50", num_classes=CLASSES).eval().to(device)
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    _batch_statistics(teacher, images)
    return SimpleNamespace(
        teacher=teacher,
        student=timm.create_model("resnet18", num_classes=CLASSES).to(device),
        images=images,
        labels=torch.randint(CLASSES, (BATCH,), device=device),
    )


def _batch_statistics(model: nn.Module, images: Tensor) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()


def _step(task: Any, images: Tensor, labels: Any) -> Callable[[], None]:
    student = task.trainable_module.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()

    return step


def _timms(student: nn.Module, teacher: nn.Module) -> LogitDistillationTask:
    """Return timm's task with the paper's loss: soft labels only, temperature 1."""
    return LogitDistillationTask(
        student,
        copy.deepcopy(teacher),
        criterion=nn.CrossEntropyLoss(),
        device=next(teacher.parameters()).device,
        task_loss_weight=0.0,
        distill_loss_weight=1.0,
        temperature=1.0,
        verbose=False,
    )


def _ours(
    student: nn.Module, model: nn.Module, mode: FastMode, images: Tensor, compiled: bool = False
) -> LsKdTask:
    teacher = FrozenTeacher(copy.deepcopy(model), IMAGENET, IMAGENET).to(images.device)
    if mode != "none":
        option = f"--kd-teacher-fast {mode}"
        print(
            "\n" + teacher.speed_up([images], mode, option=option, compiled=compiled, batch_size=len(images))
        )
    return LsKdTask(student, teacher, device=images.device)


@pytest.mark.parametrize(
    ("mode", "compiled", "channels_last", "bar"),
    [
        ("none", False, False, None),
        ("float32", False, False, None),
        ("float32", True, False, None),
        ("bfloat16", False, False, None),
        ("auto", False, False, 0.57),
        ("auto", False, True, None),
    ],
)
def test_step_online(ratio, work, mode, compiled, channels_last, bar):
    """The same flags on both sides; the teacher is ours."""
    students = [copy.deepcopy(work.student) for _ in range(2)]
    images, teacher = work.images, copy.deepcopy(work.teacher)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        for student in students:
            student.to(memory_format=torch.channels_last)
    ours = _ours(students[0], teacher, mode, images, compiled)
    how = f"{mode} teacher" + ", compiled" * compiled + "; --channels-last on both sides" * channels_last
    ratio(
        f"timm step, ResNet-50 -> ResNet-18 at 224 px, {how} / timm's LogitDistillationTask",
        _step(ours, images, work.labels),
        _step(_timms(students[1], teacher), images, work.labels),
        bar=bar,
        rounds=ROUNDS,
        least=images.device.type == "cpu",
    )


class _StoredTask:
    """The student's part of a distilling task, its teacher in a store."""

    def __init__(self, student: nn.Module) -> None:
        self.trainable_module = student
        self.loss = DistillationLoss()

    def __call__(self, images: Tensor, read: Callable[[], TopK]) -> dict[str, Tensor]:
        teacher = read()
        return {"loss": self.loss.components(self.trainable_module(images), teacher, None).loss}


def _store(path: Path, logits: Tensor) -> SoftLabels:
    with SoftLabelsWriter(path, SoftLabelsLayout(logits.shape[1], TOP_K, len(logits)), {}) as writer:
        values, ids = top_k_log_probabilities(logits, TOP_K)
        writer.append(values.numpy(), ids.numpy(), [1] * len(logits))
    return SoftLabels(path)


def _rows(store: SoftLabels, indices: Iterable[Any], device: torch.device = CPU) -> TopK:
    """Read a batch of rows as the trainers do."""
    rows = store.take(np.array([int(index) for index in indices]))
    values, ids = torch.from_numpy(rows.values.astype("float32")), torch.from_numpy(rows.ids.astype("int64"))
    return TopK(values.to(device), ids.to(device))


def test_step_from_the_store(ratio, work, device, tmp_path):
    store = _store(tmp_path / "s", torch.randn(BATCH, CLASSES))
    ours = _StoredTask(copy.deepcopy(work.student))
    plain = ClassificationTask(copy.deepcopy(work.student), criterion=nn.CrossEntropyLoss(), verbose=False)
    ratio(
        "timm step, ResNet-18 at 224 px, stored top-10 / timm's ClassificationTask (cross-entropy)",
        _step(ours, work.images, lambda: _rows(store, range(BATCH), device)),
        _step(plain, work.images, work.labels),
        bar=1.02,
        rounds=ROUNDS + 2,
        least=device.type == "cpu",
    )


PIXELS, STEPS, STUDY_CLASSES = 96, 4, 100
TEACHERS, SEEDS = 2, 3
STUDENTS = ("resnet10t", "mobilenetv2_050", "test_resnet")


def test_study(ratio, tmp_path):
    """2 teachers x 3 students x 3 seeds, each run of a few steps with its data loading.

    As in the study engine, a teacher is a checkpoint of one smoothing and one seed, and teaches the three
    students of that seed: 6 checkpoints. Timm's own task runs its teacher in each of the 18 runs. Ours runs
    each checkpoint once, fast, and stores the top-K. Not timed: making and measuring the fast teacher, which
    does not grow with the length of a run, and training the teachers, which is the same on both sides.
    """
    torch.manual_seed(0)
    samples = STEPS * BATCH
    images, labels = torch.randn(samples, 3, PIXELS, PIXELS), torch.randint(STUDY_CLASSES, (samples,))
    data, numbered = TensorDataset(images, labels), TensorDataset(images, torch.arange(samples))
    teacher = timm.create_model("resnet50", num_classes=STUDY_CLASSES)
    _batch_statistics(teacher, images[:BATCH])
    fast, line = choose_fast(teacher.requires_grad_(False), images, "auto")
    print(f"\nstudy: {line}")
    counter = iter(range(1_000_000))

    def run(task: Any, loader: Iterable[Any], labels: Callable[[Tensor], Any]) -> None:
        student = task.trainable_module.train()
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
        for images, target in loader:
            optimizer.zero_grad()
            task(images, labels(target))["loss"].backward()
            optimizer.step()

    def student(name: str) -> nn.Module:
        return timm.create_model(name, num_classes=STUDY_CLASSES)  # type: ignore[no-any-return]

    def ours() -> None:
        for _ in range(TEACHERS * SEEDS):
            with torch.inference_mode():
                logits = torch.cat([fast(images) for images, _ in DataLoader(data, BATCH)])
            store = _store(tmp_path / str(next(counter)), logits)
            for name in STUDENTS:
                loader = DataLoader(numbered, BATCH, shuffle=True)
                run(_StoredTask(student(name)), loader, partial(partial, _rows, store))

    def peer() -> None:
        for _ in range(TEACHERS * SEEDS):
            for name in STUDENTS:
                task = _timms(student(name), teacher)
                run(task, DataLoader(data, BATCH, shuffle=True), lambda target: target)

    ratio(
        f"study of {TEACHERS} teachers x {len(STUDENTS)} students x {SEEDS} seeds, ResNet-50 at {PIXELS} px "
        f"-> {', '.join(STUDENTS)} / timm's LogitDistillationTask run by run",
        ours,
        peer,
        bar=0.60,
        rounds=1,
    )
