"""How long a study will take here, by a few real steps of each kind of run, before anything is trained."""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lskd import LskdError
from lskd.errors import one_line
from lskd.teachers.preflight import ask
from lskd_study.base import gpus
from lskd_study.base.text import duration
from lskd_study.plan.plan import CHECKPOINT, JOB, Plan, Run
from lskd_study.stores.decide import with_stores
from lskd_study.trainers import TIMM
from lskd_study.trainers.trainer import quiet
from timm_ls_kd.loader import Loader
from timm_ls_kd.trainer.loop import train_one_epoch, validate
from timm_ls_kd.trainer.session import Session, create_student

SECONDS = 2.0  # of training steps that are timed for each kind of run
_PROCESS = 6.0  # what a run's process takes to start, and the scheduler to start it
_AROUND_RUNS = 25.0  # the scheduler's own start, and the page with its figures


@dataclass(frozen=True)
class RunTime:
    """Seconds that runs of one kind take, or stores of soft labels.

    Attributes:
        name: what they are, with their networks.
        count: how many there are to do.
        start: before the first step.
        step: a training step, with the loading of its batch.
        steps: how many there are in an epoch.
        evaluation: the whole validation set once; 0 where there is none.
        epochs: how many there are.
    """

    name: str
    count: int
    start: float
    step: float
    steps: int
    evaluation: float
    epochs: int

    @property
    def each(self) -> float:
        """Seconds of one of them; the last weights are evaluated once more, for the page."""
        return self.start + self.epochs * (self.steps * self.step + self.evaluation) + self.evaluation

    def line(self) -> str:
        """Return it in one line."""
        evaluation = f" and an evaluation ({self.evaluation:.2g} s)" * (self.evaluation > 0)
        return (
            f"{self.count:4d} x {self.name}, {self.epochs} epochs of {self.steps} steps "
            f"({1000 * self.step:.3g} ms){evaluation}: {duration(self.each)} each"
        )


@dataclass(frozen=True)
class TimeEstimate:
    """Times of a plan's unfinished runs.

    Attributes:
        rows: of each kind of run, and of the stores of soft labels.
        runs: how many runs there are to do.
        at_once: how many run at a time.
    """

    rows: Sequence[RunTime]
    runs: int
    at_once: int

    @property
    def of_runs(self) -> float:
        """Seconds of all runs, one after the other."""
        return sum(row.count * row.each for row in self.rows)

    @property
    def total(self) -> float:
        """Seconds until the page is there, with no place ever empty."""
        return self.of_runs / self.at_once + _AROUND_RUNS

    def shorter(self, epochs: int) -> "TimeEstimate":
        """Return the estimate for another number of epochs."""
        return replace(self, rows=[replace(row, epochs=epochs) for row in self.rows])

    def lines(self) -> list[str]:
        """Return it in lines, one for each kind of run and one for all."""
        together = f"{self.at_once} at a time" if self.at_once > 1 else "one after the other"
        found = [row.line() for row in self.rows]
        return [*found, f"in all {duration(self.total)}: {self.runs} runs, {together}, and the page"]


def estimate_time(plan: Plan, cores: int) -> TimeEstimate | None:
    """Time a few steps of each kind of a plan's unfinished runs, here; None where they need too much memory.

    Runs that differ in seed and smoothing take as long.

    Raises:
        LskdError: for what the trainer refuses, and for steps that fail.
    """
    plan = with_stores(plan)
    todo = plan.unfinished()
    devices = gpus.visible_gpus() if gpus.gpus_of_a_run(plan.resources) else []
    at_once = max(1, min(cores // plan.threads, len(todo), len(devices) or len(todo)))
    kinds: dict[tuple[str, str, str], list[Run]] = {}
    for run in todo:
        teacher = plan.run(run.teacher).model if run.teacher else ""
        kinds.setdefault((run.model, run.config, teacher), []).append(run)
    rows: list[RunTime] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="lskd-time-") as folder:
            for runs in kinds.values():
                rows += _times(plan, replace(plan, output=folder, stores=[]), runs)
    except torch.OutOfMemoryError:
        return None
    except LskdError:
        raise
    except Exception as error:  # whatever a framework raises in a step
        raise LskdError(
            f"the time cannot be measured ({type(error).__name__}: {one_line(error)}); "
            "run the study without an estimate, by its file"
        ) from error
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()
    return TimeEstimate(rows, len(todo), at_once)


def _times(plan: Plan, scratch: Plan, runs: Sequence[Run]) -> list[RunTime]:
    """Return the times of runs of one kind, after their stores'; ``scratch``: without any, elsewhere."""
    run = runs[0]
    with quiet():
        begun = time.perf_counter()
        session = open_session(scratch, run)
        assert session.loader_eval is not None
        _ = session.task, session.optimizer  # made when first asked for
        opening = time.perf_counter() - begun
        step = _seconds_of_a_batch(session.loader, SECONDS, partial(train_on, session))
        evaluation = _seconds_of_a_batch(session.loader_eval, SECONDS / 2, partial(evaluate_on, session))
    teacher = plan.run(run.teacher).model if run.teacher else ""
    found = RunTime(
        name=f"student {run.model} of {teacher}" if teacher else f"{run.role} {run.model}",
        count=len(runs),
        start=_PROCESS + opening,
        step=step,
        steps=len(session.loader),
        evaluation=len(session.loader_eval) * evaluation,
        epochs=session.args.epochs + session.args.cooldown_epochs,
    )
    store = plan.store_of(run)
    if store is None:
        return [found]
    loading = _seconds_of_a_batch(session.loader, SECONDS / 4, partial(deque[Any], maxlen=0))
    asking = _seconds_of_a_batch(session.loader, SECONDS / 2, partial(_ask_teacher, session))
    rows = [replace(found, step=max(loading, step - max(0.0, asking - loading)))]
    # A store serves students of several networks; it is counted with the one whose settings write it.
    own = [one for one in plan.stores if one.writer in {run.id for run in runs}]
    if count := sum(not Path(plan.root, one.folder, JOB).exists() for one in own):
        name = f"soft labels of {teacher}"
        rows.insert(0, RunTime(name, count, found.start, asking, found.steps, 0.0, store.epochs))
    return rows


def operations(plan: Plan) -> float:
    """Return the floating-point operations of all runs for each of their training images."""
    sizes: dict[str, int] = {}

    def flops(run: Run) -> int:
        if run.model not in sizes:
            sizes[run.model] = TIMM.size(plan, run).operations or 0
        return sizes[run.model]

    # A backward pass costs about two forward passes.
    each = {run: 3 * flops(run) + (flops(plan.run(run.teacher)) if run.teacher else 0) for run in plan.runs}
    return float(sum(plan.configs[run.config]["epochs"] * work for run, work in each.items()))


def open_session(plan: Plan, run: Run, *more: str) -> Session:
    """Return what a run trains with, taught by an untrained teacher; ``more``: arguments after the run's."""
    if not run.teacher:
        return Session.open(TIMM.arguments(plan, run, *more))
    teacher = plan.run(run.teacher)
    args = TIMM.arguments(plan, teacher, *more)
    folder = plan.folder(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": create_student(args).state_dict()}, folder / CHECKPOINT)
    (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)), encoding="utf-8")
    return Session.open(
        TIMM.arguments(plan, run, "--kd-preflight-samples", "0", *more)
    )  # it has learnt nothing


def train_on(session: Session, batches: Any) -> None:
    """Train on a loader's batches."""
    train_one_epoch(
        0,
        session.task,
        batches,
        session.optimizer,
        session.args,
        autocast=session.autocast,
        scaler=session.scaler,
    )


def evaluate_on(session: Session, batches: Any) -> None:
    """Validate on a loader's batches."""
    validate(session.task.get_eval_model(), batches, session.args, session.autocast)


def _ask_teacher(session: Session, batches: Any) -> None:
    with torch.inference_mode():
        for images, _ in batches:
            ask(session.task.teacher, images, "--kd-teacher-img-size", session.autocast)


def _seconds_of_a_batch(loader: Loader, limit: float, use: Callable[[Any], object]) -> float:
    """Return what a batch takes, its loading included, where ``use`` goes through the loader."""
    timed = _Timed(loader, limit)
    use(timed)
    first = 1 if len(timed.laps) > 2 else 0  # warms up
    return (timed.laps[-1] - timed.laps[first]) / (len(timed.laps) - 1 - first)


class _Timed:
    """Batches of a loader, again and again until the time is over; ``laps``: when each was asked for."""

    def __init__(self, loader: Loader, limit: float) -> None:
        self.device = loader.device
        self.laps: list[float] = []
        self._loader, self._limit = loader, limit

    def __len__(self) -> int:
        return 10**9  # of an epoch that is broken off

    def __iter__(self) -> Iterator[Any]:
        self._lap()
        while True:
            for batch in self._loader:
                yield batch
                self._lap()
                if self.laps[-1] - self.laps[0] >= self._limit:
                    return

    def _lap(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.laps.append(time.perf_counter())
