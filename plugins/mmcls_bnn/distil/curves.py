"""One row for each epoch, in `epochs.csv` of the work folder: exact means, not the log's moving ones."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from lskd.base.files import read_csv, whole_file
from lskd.base.tensors import accumulator_dtype, require_finite, require_finite_weights
from lskd.teachers.preflight import compare_with_chance
from mmcls_bnn.compat import HOOKS, scores_of
from mmcls_bnn.distil.hooks import unwrapped

COLUMNS = (
    "epoch",
    "lr",
    "train_ce",
    "train_kl",
    "train_teacher_entropy",
    "train_hard_ce",
    "train_agreement",
    "flip_ratio",
    "val_ce",
    "val_kl",
    "val_teacher_entropy",
    "val_agreement",
    "val_top1",
    "val_top5",
)
_TRAIN = {
    "train_ce": "loss_ce",
    "train_kl": "loss_kl",
    "train_teacher_entropy": "teacher_entropy",
    "train_hard_ce": "loss_hard",
    "train_agreement": "agreement",
}
_VALIDATION = {
    "val_ce": "distillation/cross_entropy",
    "val_kl": "distillation/kl",
    "val_teacher_entropy": "distillation/teacher_entropy",
    "val_agreement": "distillation/agreement",
    "val_top1": "accuracy/top1",
    "val_top5": "accuracy/top5",
}
FILE = "epochs.csv"


@HOOKS.register_module()
class CurvesHook(Hook):
    """Write `epochs.csv`, and end a run that has diverged, before it is saved; after a kill go on as if none.

    The checkpoint of an epoch is saved before its validation. Where a kill came between the two, the
    validation that is missing is made up for when the run is resumed. The loss of a model that is not
    distilled is its cross-entropy with the (smoothed) labels and goes into `train_hard_ce`. Training by
    iterations has a row for each validation, and `iteration` in place of `epoch`.
    """

    def __init__(self) -> None:
        """Start without sums."""
        self._loss = torch.zeros(2, dtype=torch.float64)
        self._training = False
        self._trained = False  # since the last row
        self._top1: float | None = None

    def before_train(self, runner: Any) -> None:
        """Drop the rows that will be repeated, and validate where that is missing."""
        self._training = True
        done = _done(runner)
        rows = _read(_path(runner)) if done else {}
        rows = {number: row for number, row in rows.items() if number <= done}
        if is_main_process():
            _write(_path(runner), rows, _unit(runner))
        last = rows.get(done)
        if last is not None and not last.get("val_top1") and _validates(runner, done):
            runner.val_loop.run()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Add up the loss where the model does not do so itself."""
        self._trained = True
        if not outputs or "loss" not in outputs or hasattr(unwrapped(runner.model), "epoch_means"):
            return
        samples, loss = len(data_batch["inputs"]), outputs["loss"].detach()
        # On the device: reading a number at every step would wait for the device at every step.
        loss = loss.to(accumulator_dtype(loss.device))
        self._loss = self._loss.to(loss) + torch.stack([loss * samples, loss.new_tensor(samples)])

    def after_train_epoch(self, runner: Any) -> None:
        """Write what training has shown.

        Raises:
            DivergedError: losses or weights that are not finite.
        """
        if self._trained:  # by iterations, the last validation may have written it
            self._write_training(runner, _done(runner) + (_unit(runner) == "epoch"))

    def before_val_epoch(self, runner: Any) -> None:
        """Write what training by iterations has shown since the last validation.

        Raises:
            DivergedError: losses or weights that are not finite.
        """
        if self._trained and _unit(runner) == "iteration":
            self._write_training(runner, _done(runner))

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at the student's answers.

        Raises:
            DivergedError: they are not finite.
        """
        if self._training and outputs:
            self._check(runner, "validation outputs", scores_of(outputs), _done(runner))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add what validation has shown.

        Raises:
            DivergedError: a loss that is not finite.
        """
        if metrics and self._training:
            row = {column: metrics[name] for column, name in _VALIDATION.items() if name in metrics}
            for column, value in row.items():
                self._check(runner, column, value, _done(runner))
            self._top1 = metrics.get("accuracy/top1")
            self._update(runner, _done(runner), row)

    def after_train(self, runner: Any) -> None:
        """Say so where the last validation is no better than guessing."""
        if self._top1 is not None and (line := at_chance(runner.val_dataloader.dataset, self._top1)):
            runner.logger.warning(line)

    def _write_training(self, runner: Any, number: int) -> None:
        self._trained = False
        model = unwrapped(runner.model)
        means = model.epoch_means() if hasattr(model, "epoch_means") else self._mean_loss()
        for name, mean in means.items():
            self._check(runner, f"training {name}", mean, number)
        epoch = number if _unit(runner) == "epoch" else None
        require_finite_weights(model.state_dict().items(), epoch)
        row: dict[str, Any] = {column: means.get(name, "") for column, name in _TRAIN.items()}
        row["lr"] = runner.optim_wrapper.get_lr()["lr"][0]
        scalars = runner.message_hub.log_scalars
        if "flip_ratio" in scalars:
            row["flip_ratio"] = scalars["flip_ratio"].current()
        self._update(runner, number, row)

    @staticmethod
    def _check(runner: Any, name: str, value: Any, number: int) -> None:
        epoch = number if _unit(runner) == "epoch" else None
        require_finite(f"the {name}" if epoch else f"iteration {number}: the {name}", value, epoch)

    def _mean_loss(self) -> dict[str, float]:
        sums, self._loss = self._loss, torch.zeros(2, dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, samples = sums.tolist()
        return {"loss_hard": total / samples} if samples else {}

    @staticmethod
    def _update(runner: Any, number: int, values: dict[str, Any]) -> None:
        if not is_main_process():
            return
        rows = _read(_path(runner))
        row = rows.setdefault(number, dict.fromkeys(COLUMNS[1:], ""))
        row.update({name: value if value == "" else f"{value:.9g}" for name, value in values.items()})
        _write(_path(runner), rows, _unit(runner))


def at_chance(dataset: Any, top1: float) -> str:
    """Return a line about an accuracy on a data set that is no better than guessing, "" where it is better.

    Args:
        dataset: of mmcls, with a label for each image.
        top1: in percent.
    """
    if not hasattr(dataset, "get_gt_labels"):  # a data set of data sets
        return ""
    labels = np.asarray(dataset.get_gt_labels())
    classes = max(len(dataset.metainfo.get("classes") or ()), 1 + int(labels.max()))
    chance = max(1 / classes, float(np.bincount(labels).max()) / len(labels))
    if compare_with_chance(round(top1 / 100 * len(labels)), len(labels), chance) != "at":
        return ""
    return (
        f"no better than chance: {top1:.2f} % of {len(labels)} validation images are right, and guessing "
        f"gives {100 * chance:.2f} %; whatever is compared with this run says nothing"
    )


def _unit(runner: Any) -> str:
    return "iteration" if isinstance(runner.train_loop, IterBasedTrainLoop) else "epoch"


def _done(runner: Any) -> int:
    return int(runner.iter if _unit(runner) == "iteration" else runner.epoch)


def _validates(runner: Any, number: int) -> bool:
    loop = runner.train_loop
    last = loop.max_iters if _unit(runner) == "iteration" else loop.max_epochs
    due = number % loop.val_interval == 0 or number == last
    return runner.val_loop is not None and number >= loop.val_begin and due


def _path(runner: Any) -> Path:
    return Path(runner.work_dir, FILE)


def _read(path: Path) -> dict[int, dict[str, str]]:
    if not path.is_file():
        return {}
    rows = {}
    for row in read_csv(path):
        number = row.pop(next(iter(row)))
        if number.isdecimal():
            rows[int(number)] = row
    return rows


def _write(path: Path, rows: dict[int, dict[str, str]], unit: str) -> None:
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, (unit, *COLUMNS[1:]))
        writer.writeheader()
        writer.writerows({unit: str(number), **rows[number]} for number in sorted(rows))
