"""One row for each epoch, in `epochs.csv` of the work folder: exact means, not the log's moving ones."""

import csv
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from lskd.files import read_csv, whole_file
from mmcls_bnn.compat import HOOKS
from mmcls_bnn.hooks import unwrapped

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
    """Write `epochs.csv`; after a kill it goes on as if there had been none.

    The checkpoint of an epoch is saved before its validation. Where a kill came between the two, the
    validation that is missing is made up for when the run is resumed. The loss of a model that is not
    distilled is its cross-entropy with the (smoothed) labels and goes into `train_hard_ce`.
    """

    def __init__(self) -> None:
        """Start without sums."""
        self._loss = torch.zeros(2, dtype=torch.float64)

    def before_train(self, runner: Any) -> None:
        """Drop the rows of epochs that will be repeated, and validate where that is missing."""
        done = int(runner.epoch)
        rows = _read(_path(runner)) if done else {}
        rows = {epoch: row for epoch, row in rows.items() if epoch <= done}
        if is_main_process():
            _write(_path(runner), rows)
        last = rows.get(done)
        if last is not None and not last.get("val_top1") and _validates(runner, done):
            runner.val_loop.run()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Add up the loss where the model does not do so itself."""
        if not outputs or "loss" not in outputs or hasattr(unwrapped(runner.model), "epoch_means"):
            return
        samples, loss = len(data_batch["inputs"]), outputs["loss"].detach().double()
        # On the device: reading a number at every step would wait for the device at every step.
        self._loss = self._loss.to(loss.device) + torch.stack([loss * samples, loss.new_tensor(samples)])

    def after_train_epoch(self, runner: Any) -> None:
        """Write what training has shown."""
        model = unwrapped(runner.model)
        means = model.epoch_means() if hasattr(model, "epoch_means") else self._mean_loss()
        row: dict[str, Any] = {column: means.get(name, "") for column, name in _TRAIN.items()}
        row["lr"] = runner.optim_wrapper.get_lr()["lr"][0]
        scalars = runner.message_hub.log_scalars
        if "flip_ratio" in scalars:
            row["flip_ratio"] = scalars["flip_ratio"].current()
        self._update(runner, int(runner.epoch) + 1, row)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add what validation has shown."""
        if metrics and runner.train_loop is not None:
            row = {column: metrics[name] for column, name in _VALIDATION.items() if name in metrics}
            self._update(runner, int(runner.epoch), row)

    def _mean_loss(self) -> dict[str, float]:
        sums, self._loss = self._loss, torch.zeros(2, dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, samples = sums.tolist()
        return {"loss_hard": total / samples} if samples else {}

    @staticmethod
    def _update(runner: Any, epoch: int, values: dict[str, Any]) -> None:
        if not is_main_process():
            return
        rows = _read(_path(runner))
        row = rows.setdefault(epoch, dict.fromkeys(COLUMNS, ""))
        row.update({name: value if value == "" else f"{value:.9g}" for name, value in values.items()})
        row["epoch"] = str(epoch)
        _write(_path(runner), rows)


def _validates(runner: Any, epoch: int) -> bool:
    loop = runner.train_loop
    return runner.val_loop is not None and epoch >= loop.val_begin and epoch % loop.val_interval == 0


def _path(runner: Any) -> Path:
    return Path(runner.work_dir, FILE)


def _read(path: Path) -> dict[int, dict[str, str]]:
    if not path.is_file():
        return {}
    return {int(row["epoch"]): row for row in read_csv(path, ("epoch",)) if row["epoch"].isdecimal()}


def _write(path: Path, rows: dict[int, dict[str, str]]) -> None:
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[epoch] for epoch in sorted(rows))
