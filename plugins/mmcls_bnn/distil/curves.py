"""One row for each epoch, in `epochs.csv` of the work folder: exact means, not the log's moving ones."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from lskd.base.files import read_csv, whole_file
from lskd.base.tensors import SampleMeans, require_finite, require_finite_weights
from lskd.teachers.preflight import at_chance
from mmcls_bnn.compat import HOOKS, scores_of
from mmcls_bnn.distil.hooks import unwrapped

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
COLUMNS = ("epoch", "lr", *_TRAIN, "flip_ratio", *_VALIDATION)
FILE = "epochs.csv"


@HOOKS.register_module()
class CurvesHook(Hook):
    """Write `epochs.csv`, and end a run that has diverged, before it is saved; after a kill go on as if none.

    The checkpoint of an epoch is saved before its validation. Where a kill came between the two, the
    validation that is missing is made up for when the run is resumed. The loss of a model that is not
    distilled is its cross-entropy with the (smoothed) labels and goes into `train_hard_ce`. Training by
    iterations has a row for each validation, and `iteration` in place of `epoch`.

    Raises:
        DivergedError: losses, weights or validation outputs that are not finite, from where they are seen.
    """

    def __init__(self) -> None:
        self._loss = SampleMeans(("loss_hard",))
        self._rows: dict[int, dict[str, str]] = {}
        self._unit = ""  # "epoch" or "iteration", once the run trains
        self._trained = False  # since the last row
        self._top1: float | None = None

    def before_train(self, runner: Any) -> None:
        """Drop the rows that will be repeated, and validate where that is missing."""
        loop = runner.train_loop
        self._unit = "iteration" if isinstance(loop, IterBasedTrainLoop) else "epoch"
        done, path = self._done(runner), Path(runner.work_dir, FILE)
        rows = _read(path) if done and path.is_file() else {}
        self._rows = {number: row for number, row in rows.items() if number <= done}
        if is_main_process():
            _write(path, self._rows, self._unit)
        end = loop.max_iters if self._unit == "iteration" else loop.max_epochs
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)
        last = self._rows.get(done)
        if last is not None and not last.get("val_top1") and runner.val_loop is not None and due:
            runner.val_loop.run()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Add up the loss where the model does not do so itself."""
        self._trained = True
        if outputs and "loss" in outputs and not hasattr(unwrapped(runner.model), "epoch_means"):
            self._loss.add([outputs["loss"]], len(data_batch["inputs"]))

    def after_train_epoch(self, runner: Any) -> None:
        """Write what training has shown."""
        if self._trained:  # by iterations, the last validation may have written it
            self._write_training(runner, self._done(runner) + (self._unit == "epoch"))

    def before_val_epoch(self, runner: Any) -> None:
        """Write what training by iterations has shown since the last validation."""
        if self._trained and self._unit == "iteration":
            self._write_training(runner, self._done(runner))

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Check that the student's answers are finite."""
        if self._unit and outputs:
            self._check("validation outputs", scores_of(outputs), self._done(runner))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add what validation has shown."""
        if metrics and self._unit:
            row = {column: metrics[name] for column, name in _VALIDATION.items() if name in metrics}
            for column, value in row.items():
                self._check(column, value, self._done(runner))
            self._top1 = metrics.get("accuracy/top1")
            self._update(runner, self._done(runner), row)

    def after_train(self, runner: Any) -> None:
        """Log a warning where the last validation is no better than guessing."""
        if self._top1 is None:
            return
        dataset = runner.val_dataloader.dataset
        if not hasattr(dataset, "get_gt_labels"):  # a data set of data sets
            return
        labels = np.asarray(dataset.get_gt_labels())
        counts = np.bincount(labels, minlength=len(dataset.metainfo.get("classes") or ())).tolist()
        if found := at_chance(round(self._top1 / 100 * len(labels)), counts):
            runner.logger.warning(
                f"no better than chance: right on {found}; whatever is compared with this run says nothing"
            )

    def _done(self, runner: Any) -> int:
        return int(runner.iter if self._unit == "iteration" else runner.epoch)

    def _write_training(self, runner: Any, number: int) -> None:
        self._trained = False
        model = unwrapped(runner.model)
        means = {}
        if hasattr(model, "epoch_means"):
            means = model.epoch_means()
        elif self._loss:
            means = self._loss.read(next(model.parameters()).device)
        for name in ("loss_ce", "loss_hard"):  # the others are NaN of drawn classes
            if name in means:
                self._check(f"training {name}", means[name], number)
        require_finite_weights(model.state_dict().items(), number if self._unit == "epoch" else None)
        row: dict[str, Any] = {column: means.get(name, "") for column, name in _TRAIN.items()}
        row["lr"] = runner.optim_wrapper.get_lr()["lr"][0]
        scalars = runner.message_hub.log_scalars
        if "flip_ratio" in scalars:
            row["flip_ratio"] = scalars["flip_ratio"].current()
        self._update(runner, number, row)

    def _check(self, name: str, value: Any, number: int) -> None:
        if self._unit == "epoch":
            require_finite(f"the {name}", value, number)
        else:
            require_finite(f"iteration {number}: the {name}", value)

    def _update(self, runner: Any, number: int, values: dict[str, Any]) -> None:
        row = self._rows.setdefault(number, dict.fromkeys(COLUMNS[1:], ""))
        row.update({name: value if value == "" else f"{value:.9g}" for name, value in values.items()})
        if is_main_process():
            _write(Path(runner.work_dir, FILE), self._rows, self._unit)


def _read(path: Path) -> dict[int, dict[str, str]]:
    numbered = ((row.pop(next(iter(row))), row) for row in read_csv(path))
    return {int(number): row for number, row in numbered if number.isdecimal()}


def _write(path: Path, rows: dict[int, dict[str, str]], unit: str) -> None:
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, (unit, *COLUMNS[1:]))
        writer.writeheader()
        writer.writerows({unit: str(number), **rows[number]} for number in sorted(rows))
