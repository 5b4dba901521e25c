"""The folder of a run: checkpoints and summary.csv that survive a kill at any moment."""

import csv
import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from timm.utils import CheckpointSaver, update_summary

from lskd import CheckpointError, LskdError
from lskd.base.files import whole_file, write_text
from lskd.checkpoints import is_whole

LAST = "last.pth.tar"
_CHECKPOINT = r"(?:last|model_best|(?:checkpoint|milestone)-\d+)\.pth\.tar"
_HALF = "tmp.pth.tar"  # what timm's saver leaves of a process that is killed while it writes


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver, whose files are whole and on the disk before they take their names."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with whole_file(save_path) as scratch, scratch.open("wb") as file:
            super()._save(file, epoch, metric)

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with whole_file(dst) as scratch:
            scratch.unlink()
            try:
                os.link(src, scratch)
            except OSError:  # no hard links on this file system
                shutil.copyfile(src, scratch)


def whole_checkpoint(path: Path) -> Path | None:
    """Return a checkpoint, or where it is damaged the newest whole one of its run, else None."""
    beside = [file for file in path.parent.glob("checkpoint-*.pth.tar") if _epoch(file) is not None]
    beside.sort(key=lambda file: _epoch(file) or 0, reverse=True)
    return next((file for file in [path, *beside] if is_whole(file)), None)


def _epoch(path: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)\.pth\.tar", path.name)
    return None if found is None else int(found[1])


def automatic_resume(args: Namespace) -> str:
    """Return what `--resume` names; for `auto` the run's last checkpoint, '' where the run is to start.

    Raises:
        LskdError: `auto` without the run's name.
    """
    if args.resume != "auto":
        return str(args.resume)
    if not args.experiment:
        raise LskdError("--resume auto goes on with the run that --experiment NAME names; add it.")
    last = Path(args.output or "output/train") / args.experiment / LAST
    return str(last) if last.exists() else ""


def resumed_checkpoint(path: str) -> tuple[str, str]:
    """Return the checkpoint that `--resume` goes on from, and a line about it where it is not the one named.

    Raises:
        CheckpointError: it is damaged, and so is every other of its run.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    if start not in (b"", b"PK"):  # another format than torch's own: what reads it will judge it
        return path, ""
    found = whole_checkpoint(Path(path))
    if found is None:
        raise CheckpointError(
            f"--resume {path} is cut off or damaged, and no whole checkpoint lies beside it; "
            "move it away and start again"
        )
    if found == Path(path):
        return path, ""
    return str(found), f"--resume {path} is cut off or damaged; going on from {found} instead"


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
    """Refuse a run folder that cannot be written, or that contains another run's results."""
    check_writable(folder)
    if folder.is_symlink():
        raise LskdError(f"{folder} is a link; name the folder that it leads to, or another --experiment.")
    goes_on = bool(resume) and Path(resume).resolve().parent == folder.resolve()
    if folder.is_dir() and not goes_on:
        for path in folder.iterdir():
            if re.fullmatch(_CHECKPOINT, path.name):
                raise LskdError(
                    f"{folder} contains a run already ({path.name}); go on with it by --resume "
                    f"{folder / LAST}, or choose another --experiment."
                )


class RunFolder:
    """Writes a run's files; on the primary process only.

    A file of another run that is in the way is moved aside; only files that a run writes are ever removed.

    Args:
        folder: the run's folder; it is made.
        start_epoch: rows of summary.csv from this epoch on are of a broken-off epoch and dropped.
        distils: whether summary.csv gets the columns of distillation.

    Attributes:
        row: the last epoch's numbers, by their names in summary.csv.

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
        **saver: Any,
    ) -> None:
        self.folder = folder
        self.summary = folder / "summary.csv"
        self.row: dict[str, float] = {}
        self._milestones = args.save_epochs or []
        self._column = "eval_" + args.eval_metric if args.val_split else "train_loss"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            half = folder / _HALF
            if half.is_file() or half.is_symlink():
                half.unlink()
            rows = self._trim(start_epoch, distils, args_text if args.epochs > 1 else "")
            if start_epoch == 0:
                _set_aside(folder / "args.yaml", args_text)
            write_text(folder / "args.yaml", args_text)
        except OSError as error:
            raise LskdError(
                f"output folder {folder} cannot be written ({error.strerror}); choose another --output."
            ) from None
        self.saver = AtomicCheckpointSaver(
            args=args,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=args.eval_metric == "loss",
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
        before = self.summary.read_bytes() if self.summary.exists() else b""
        with whole_file(self.summary) as scratch:
            scratch.write_bytes(before)
            update_summary(epoch, train, evaluated, filename=str(scratch), lr=lr, write_header=not before)
        self.row = {"epoch": epoch, **{f"train_{name}": value for name, value in train.items()}}
        self.row |= {f"eval_{name}": value for name, value in (evaluated or {}).items()} | {"lr": lr}
        best: tuple[float | None, int | None] = self.saver.save_checkpoint(
            epoch, metric=self.row[self._column]
        )
        if epoch + 1 in self._milestones:
            self.saver._duplicate(
                str(self.folder / LAST), str(self.folder / f"milestone-{epoch + 1}.pth.tar")
            )
        return best

    def _trim(self, start_epoch: int, distils: bool, args_text: str) -> dict[int, float]:
        """Drop rows of epochs that are run again; return the tracked metric of those kept."""
        if not self.summary.exists():
            return {}
        try:
            with self.summary.open(newline="", encoding="utf-8", errors="replace") as file:
                table = list(csv.reader(file))
        except csv.Error as error:
            raise self._damaged(error) from None
        header = table[0] if table else []
        kept = [
            row
            for row in table[1:]
            if len(row) == len(header)
            and re.fullmatch(r"\d{1,9}", "".join(row[:1]))
            and int(row[0]) < start_epoch
        ]
        if not kept:
            # One row without a checkpoint is left by a kill between the two, and is written again as it is;
            # of a run of one epoch it may be all that was kept.
            settings = self.folder / "args.yaml"
            own = len(table) <= 2 and settings.is_file() and settings.read_bytes() == args_text.encode()
            if not own:
                _set_aside(self.summary)
            elif not self.summary.is_symlink():
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
        try:
            return {int(row[0]): float(row[column]) for row in kept}
        except ValueError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> LskdError:
        return LskdError(f"{self.summary} is damaged ({error}); move it away to go on without its epochs.")

    def _restore(self, metrics: Mapping[int, float], start_epoch: int) -> None:
        """Restore the saver's ranking, and write again what a kill may have left unwritten."""
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


def _set_aside(path: Path, text: str = "") -> None:
    """Rename a file, unless it is empty or says what will be written there."""
    if not os.path.lexists(path) or (not path.is_symlink() and path.read_bytes() in (b"", text.encode())):
        return
    names = (path.with_name(f"{path.name}.aside-{number}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    print(f"{path} is not of this run; it was moved to {aside}", flush=True)
