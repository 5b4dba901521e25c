"""How long a plan's runs take here: ``python -m lskd_study.study.own_measure PLAN SECONDS STARTED``.

A few real steps and evaluations of each kind of run, by the trainer's own parts on the real images, in a
process like that of a run. What it finds is one line of JSON.
"""

import contextlib
import io
import json
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd_study.base.extras import needs_study_extra
from lskd_study.plan.plan import CHECKPOINT, Plan, Run
from lskd_study.trainers import TIMM

with needs_study_extra():
    import torch
    import yaml

    from timm_ls_kd import inputs
    from timm_ls_kd.arguments import kd_config
    from timm_ls_kd.data import Loader, seed_all
    from timm_ls_kd.datacheck import check_data
    from timm_ls_kd.preflight import answer
    from timm_ls_kd.trainer import session as parts
    from timm_ls_kd.trainer.arguments import parse_arguments
    from timm_ls_kd.trainer.loop import train_one_epoch, validate
    from timm_ls_kd.trainer.main import precision, start_device

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of one run.

    Attributes:
        start: from the start of the process to its first step.
        step: a training step, with the loading of its batch.
        plain: the same without a teacher.
        loading: the loading of a batch alone.
        steps: how many there are in an epoch.
        evaluation: the whole validation set once.
        checkpoint: writing the weights of one epoch.
        epochs: how many there are.
    """

    start: float
    step: float
    plain: float
    loading: float
    steps: int
    evaluation: float
    checkpoint: float
    epochs: int

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.steps * self.step + self.evaluation + self.checkpoint

    @property
    def run(self) -> float:
        """Seconds of a run; the last weights are evaluated once more, for the page."""
        return self.start + self.epochs * self.epoch + self.evaluation

    @property
    def storing(self) -> float:
        """Seconds in which the teacher is asked about the images of all epochs, without a student."""
        return self.start + self.epochs * self.steps * (max(0.0, self.step - self.plain) + self.loading)

    def without_teacher(self) -> "Times":
        """Return the times of a student that reads what its teacher said."""
        return replace(self, step=self.plain)

    def describe(self) -> str:
        """Return what a run consists of."""
        return (
            f"{self.epochs} epochs of {self.steps} steps ({1000 * self.step:.3g} ms) and an evaluation "
            f"({self.evaluation:.2g} s)"
        )


def kinds(plan: Plan) -> dict[tuple[str, str, str], Run]:
    """Return one run of each kind: those that differ in seed, smoothing and temperature take as long."""
    found: dict[tuple[str, str, str], Run] = {}
    for run in plan.runs:
        found.setdefault(kind_of(plan, run), run)
    return found


def kind_of(plan: Plan, run: Run) -> tuple[str, str, str]:
    """Return what a run's time depends on: model, trainer's file, teacher's model."""
    return run.model, run.config, plan.run(run.teacher).model if run.teacher else ""


def main(arguments: list[str]) -> int:
    """Measure each kind of run of a plan."""
    path, seconds, started = arguments
    plan = Plan.read(Path(path))
    os.chdir(plan.cwd)
    importing = time.time() - float(started)
    try:
        with _quiet():
            found = [asdict(_times(plan, run, float(seconds), importing)) for run in kinds(plan).values()]
    except torch.OutOfMemoryError:
        print(json.dumps({"error": OUT_OF_MEMORY}))
        return 0
    except LskdError as error:
        print(json.dumps({"error": str(error)}))
        return 0
    print(json.dumps({"times": found}))
    return 0


def _times(plan: Plan, run: Run, seconds: float, importing: float) -> Times:
    begun = time.perf_counter()
    words = TIMM.command(plan, run)[2:]
    if run.teacher:
        _write_teacher(plan, plan.run(run.teacher))
        words += ["--kd-preflight-samples", "0"]  # it has learnt nothing
        begun = time.perf_counter()
    args = parse_arguments(words)
    kd = kd_config(args)
    device = start_device(args)
    splits = [args.train_split, args.val_split]
    check_data(args.dataset, args.data_dir, splits, num_classes=args.num_classes)
    seed_all(args.seed)
    model = parts.create_student(args)
    data = inputs.resolve_data(vars(args), model)
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    parts.try_student(model, data, args, device)
    channels = data.input_size[0]
    smoothing = parts.uniform_smoothing(args, args.num_classes)
    training = inputs.open_dataset(vars(args), args.train_split, channels, args.num_classes, training=True)
    loader = inputs.train_loader(training, data, args, device, smoothing)
    validation = inputs.open_dataset(vars(args), args.val_split, channels, args.num_classes)
    loader_eval = inputs.eval_loader(validation, data, args, device)
    autocast, scaler = precision(args, device)
    task = parts.create_task(args, kd, model, data, smoothing, device)
    if kd is not None:
        parts.run_preflight(kd, task.teacher, validation, training, data, args, device, autocast)
    optimizer = parts.create_optimizer(args, model)
    start = importing + time.perf_counter() - begun

    steps = _Timed(loader, seconds)
    train_one_epoch(0, task, steps, optimizer, args, autocast=autocast, scaler=scaler)  # type: ignore[arg-type]
    plain, loading = _without_teacher(task, steps, seconds / 2, args, optimizer, autocast, scaler, device)
    evaluation = _Timed(loader_eval, seconds / 2)
    validate(task.get_eval_model(), evaluation, args, autocast)  # type: ignore[arg-type]
    images = min(len(validation), 512)
    if kd is not None:  # the preflight that was left out: the teacher on up to 512 images
        preflight = _Timed(loader_eval, seconds / 4)
        with torch.inference_mode(), autocast():
            for batch, _ in preflight:
                answer(task.teacher, batch, kd.teacher)
        start += images * preflight.seconds / preflight.images
    begun = time.perf_counter()
    _save(plan.folder(run), model, args, optimizer.state_dict())
    saving = time.perf_counter() - begun
    return Times(
        start=start,
        step=steps.seconds / steps.batches,
        plain=plain,
        loading=loading,
        steps=len(loader),
        evaluation=len(validation) * evaluation.seconds / evaluation.images,
        checkpoint=saving,
        epochs=args.epochs + args.cooldown_epochs,
    )


def _without_teacher(
    task: Any,
    steps: "_Timed",
    seconds: float,
    args: Namespace,
    optimizer: Any,
    autocast: Any,
    scaler: Any,
    device: torch.device,
) -> tuple[float, float]:
    """Return the seconds of a step that reads the teacher's answers, and those of loading its batch."""
    loading = _Timed(steps.loader, seconds / 2)
    for _ in loading:
        pass
    each = loading.seconds / loading.batches
    if args.kd_teacher is None:
        return steps.seconds / steps.batches, each
    alone = parts.PlainTask(
        task.get_trainable_module(), criterion=torch.nn.CrossEntropyLoss(), device=device, verbose=False
    )
    plain = _Timed(steps.loader, seconds)
    train_one_epoch(0, alone, plain, optimizer, args, autocast=autocast, scaler=scaler)  # type: ignore[arg-type]
    return plain.seconds / plain.batches, each


class _Timed:
    """Batches of a loader until the time is over; the first one, which warms up, is not counted.

    Attributes:
        batches: how many were counted.
        images: how many were in them.
        seconds: what they took, from the request for a batch to the request for the next.
    """

    def __init__(self, loader: Loader, limit: float) -> None:
        self.device = loader.device
        self.batches, self.images, self.seconds = 0, 0, 0.0
        self.loader, self._limit = loader, limit

    def __len__(self) -> int:
        return 10**9  # of an epoch that is broken off

    def __iter__(self) -> Iterator[Any]:
        started = self._now()
        warm = False
        while True:
            for images, targets in self.loader:
                yield images, targets
                now = self._now()
                if not warm:
                    # A first batch that took this long is warm enough.
                    warm = True
                    if now - started < self._limit:
                        started = now
                        continue
                self.batches += 1
                self.images += len(images)
                self.seconds = now - started
                if self.seconds >= self._limit:
                    return

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _write_teacher(plan: Plan, teacher: Run) -> None:
    """Leave a teacher where its student's command looks for it, unless its own trial has left one there."""
    if not (plan.folder(teacher) / CHECKPOINT).exists():
        args = TIMM.arguments(plan, teacher)
        _save(plan.folder(teacher), parts.create_student(args), args, {})


def _save(folder: Path, model: torch.nn.Module, args: Namespace, optimizer: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer}, folder / CHECKPOINT)
    (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)), encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the trainer's own progress to itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
