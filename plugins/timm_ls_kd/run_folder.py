"""The folder of a run: checkpoints and summary.csv that survive a kill at any moment."""

import csv
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.utils import CheckpointSaver, update_summary

from lskd import LskdError


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver without its moments in which `last.pth.tar` does not exist."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = dst + ".tmp"
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:  # no hard links on this file system
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)
        # POSIX renames nothing, and leaves the source, where both names are links to one file already.
        Path(temporary).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuse, before anything heavy, a folder that cannot be made or written.

    Raises:
        LskdError: something that is no folder is in the way, or it cannot be written.
    """
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise LskdError(
                f"output folder {folder} cannot be made, {existing} is no folder; choose another --output."
            )
        # Permissions alone do not tell: a full disk, a quota, /proc, a name that is too long.
        with tempfile.TemporaryDirectory(dir=existing) as trial:
            for part in folder.relative_to(existing).parts:
                (Path(trial) / part).mkdir(exist_ok=True)
    except OSError as error:
        where = f"{existing}: " if existing != folder else ""
        raise LskdError(
            f"output folder {folder} cannot be written ({where}{error.strerror}); "
            "choose another --output or --experiment."
        ) from None


def check_folder(folder: Path, resume: str) -> None:
    """Refuse a run folder that cannot be written, or that holds another run's results.

    Raises:
        LskdError: as `check_writable`, or a run that is there already and not resumed.
    """
    check_writable(folder)
    last = folder / "last.pth.tar"
    if last.exists() and not resume:
        raise LskdError(
            f"{folder} holds a run already; go on with it by --resume {last}, or choose another --experiment."
        )


class RunFolder:
    """Writes a run's files; on the primary process only.

    Args:
        folder: the run's folder; it is made.
        args: the arguments, kept in checkpoints.
        args_text: what args.yaml gets.
        start_epoch: rows of summary.csv from this epoch on are of a broken-off epoch and dropped.
        distils: whether summary.csv gets the columns of distillation.
        eval_metric: what the best checkpoint is best at: 'top1', 'top5' or 'loss'.
        saver: keyword arguments for timm's `CheckpointSaver`.

    Raises:
        LskdError: the folder cannot be written, or the run in it is of another kind.
    """

    def __init__(
        self,
        folder: Path,
        args: Namespace,
        args_text: str,
        start_epoch: int,
        distils: bool,
        eval_metric: str,
        **saver: Any,
    ) -> None:
        """Make or take over the folder."""
        self.folder = folder
        self.summary = folder / "summary.csv"
        self._column = "eval_" + eval_metric if args.val_split else "train_loss"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rows = self._trim(start_epoch, distils)
            write_text(folder / "args.yaml", args_text)
        except OSError as error:
            raise LskdError(
                f"output folder {folder} cannot be written ({error.strerror}); choose another --output."
            ) from None
        self.saver = AtomicCheckpointSaver(
            args=args,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=eval_metric == "loss",
            max_history=args.checkpoint_hist,
            **saver,
        )
        if rows:
            self._restore(rows, start_epoch)

    def save(
        self, epoch: int, train: Mapping[str, float], evaluated: Mapping[str, float] | None, lr: float
    ) -> tuple[float | None, int | None]:
        """Write the epoch's row, then its checkpoint; return the best metric and its epoch.

        In this order a kill in between leaves a row too many, which resuming drops, and never one too few.
        """
        header = not self.summary.exists() or self.summary.stat().st_size == 0
        update_summary(epoch, train, evaluated, filename=str(self.summary), lr=lr, write_header=header)
        metrics = {f"train_{name}": value for name, value in train.items()}
        metrics |= {f"eval_{name}": value for name, value in (evaluated or {}).items()}
        best: tuple[float | None, int | None] = self.saver.save_checkpoint(
            epoch, metric=metrics[self._column]
        )
        return best

    def has_checkpoint(self) -> bool:
        """Tell whether the run can be resumed."""
        return (self.folder / "last.pth.tar").exists()

    def _trim(self, start_epoch: int, distils: bool) -> dict[int, float]:
        """Drop rows of epochs that are run again; return the tracked metric of those kept."""
        if not self.summary.exists():
            return {}
        with self.summary.open(newline="") as file:
            table = list(csv.reader(file))
        header = table[0] if table else []
        kept = [
            row
            for row in table[1:]
            if len(row) == len(header) and row[0].isdigit() and int(row[0]) < start_epoch
        ]
        if not kept:
            self.summary.unlink()
            return {}
        if ("train_kl" in header) != distils:
            raise LskdError(
                f"the run in {self.folder} was {'not ' * distils}distilled, its summary.csv has other "
                "columns; resume it as it was, or into another --experiment."
            )
        write_text(self.summary, "".join(",".join(row) + "\r\n" for row in [header, *kept]))
        if self._column not in header:
            return {}
        column = header.index(self._column)
        return {int(row[0]): float(row[column]) for row in kept}

    def _restore(self, metrics: Mapping[int, float], start_epoch: int) -> None:
        """Give the saver back its ranking, and write again what a kill may have left unwritten."""
        files = [
            (str(path), metrics[epoch])
            for epoch in metrics
            if epoch < start_epoch - 1 and (path := self.folder / f"checkpoint-{epoch}.pth.tar").exists()
        ]
        saver = self.saver
        saver.checkpoint_files = sorted(files, key=lambda item: item[1], reverse=not saver.decreasing)
        earlier = [epoch for epoch in metrics if epoch < start_epoch - 1]
        if earlier:
            best = (min if saver.decreasing else max)(earlier, key=lambda epoch: metrics[epoch])
            saver.best_epoch, saver.best_metric = best, metrics[best]
            if (path := self.folder / f"checkpoint-{best}.pth.tar").exists():
                saver._duplicate(str(path), str(self.folder / "model_best.pth.tar"))
        if start_epoch - 1 in metrics:
            saver.save_checkpoint(start_epoch - 1, metric=metrics[start_epoch - 1])


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
