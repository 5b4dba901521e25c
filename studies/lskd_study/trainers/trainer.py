"""What a study asks of a trainer: one class a framework, which imports it when it is asked."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lskd import LskdError
from lskd.base.files import read_csv
from lskd_study.plan.plan import Plan, Role, Run, Store
from lskd_study.plan.records import Size

if TYPE_CHECKING:  # torch takes a while
    from torch import Tensor, nn

    from lskd.teachers.outputs import Answers
    from lskd.terms import Rest

TryOut = Callable[[Run], None]

MIXED = "mixup and CutMix mix the images of a batch, stored they are mixed one by one"


class CannotStoreError(Exception):
    """Why a student cannot read what is stored, in words that follow "because"."""


@dataclass(frozen=True)
class Views:
    """What a student's training images follow from, beside the teacher, the data and the seed.

    Attributes:
        key: equal ones mean equal images, and one store.
        epochs: how many of them the student trains; 0 where its file does not say.
        stored: how many epochs a store of them has; 1 where every epoch has the same.
        caution: why a store would change more than the teacher's work; empty: nothing.
        rest: what becomes of the entries that are not stored, by the student's file or the trainer's default.
    """

    key: str
    epochs: int
    stored: int
    caution: str = ""
    rest: "Rest" = "spread"


@dataclass(frozen=True)
class Exported:
    """A run's network as it was written into a folder of its own, read back from there.

    Attributes:
        model: from images `(B, C, H, W)`, normalised, to logits `(B, K)`; in evaluation mode, on the CPU.
        images: noise `(4, C, H, W)` on which its logits are the checkpoint's to the bit.
        answers: what it says of the validation images, while they are taken; None: not to be had.
        library: what loads it, as the Hugging Face hub names it.
        usage: Python that loads the folder ``FOLDER``.
        any_size: whether it takes images of any height and width.
    """

    model: "nn.Module"
    images: "Tensor"
    answers: "Answers | None"
    library: str
    usage: str
    any_size: bool = False


class Trainer(Protocol):
    """How runs of a framework are checked, started, gone on with and read, in a vocabulary that all share.

    What the user can fix is an LskdError of one line, which names the file that it is in.

    Attributes:
        checkpoint: name of the file with a run's weights.
        curve_columns: names of the common columns.
        files: what a run writes into its folder, as patterns: what goes before half a run is begun anew.
        without_effect: settings, as patterns, that change how fast a run is, and what it keeps or says.
            Loading processes draw the augmentation, so another number of them is another draw of the same
            experiment.
        modules: what a run imports.
        stores_while_training: whether a student whose store is not there writes one while it trains.
    """

    checkpoint: str
    curve_columns: tuple[str, ...]
    files: tuple[str, ...]
    without_effect: tuple[str, ...]
    modules: tuple[str, ...]
    stores_while_training: bool

    def read_config(self, path: Path) -> dict[str, Any]:
        """Return the content of a trainer's file."""

    def check_config(self, config: dict[str, Any], path: str, role: Role, model: str) -> None:
        """Check a trainer's file before any run, in the framework's own terms."""

    def check_run(self, plan: Plan, run: Run) -> None:
        """Check a run to do: its model's name, and what its file says of classes."""

    def rehearsal(self, plan: Plan) -> TryOut:
        """Return what builds a run: its model, loaders, optimiser and schedule, and loads its first sample.

        Several runs share what they read.
        """

    def epochs(self, plan: Plan, run: Run) -> int:
        """Return how many epochs a run trains, by its file; 0 where that does not say."""

    def decays(self, plan: Plan, run: Run) -> list[int]:
        """Return after how many epochs the rate steps down; nothing where it falls all the time, or never."""

    def command(self, plan: Plan, run: Run, output: str | None = None) -> list[str]:
        """Return the shell command of a run from scratch, paths relative to ``plan.cwd``.

        ``output``: folder to make the run's folder in, instead of the study's own.
        """

    def train(self, arguments: list[str]) -> None:
        """Run that command in this process, without its first word.

        In this process, because importing a framework takes longer than a small training, and because a job
        that is killed must not leave a training behind.

        Raises:
            SystemExit: as the command would exit.
            DivergedError: a run that is not finite any more.
        """

    def resume(self, folder: Path) -> list[str] | None:
        """Return the arguments that let a run go on; None where it has no whole checkpoint yet."""

    def read_curves(self, folder: Path, role: Role) -> list[dict[str, str]]:
        """Return a run's epochs in the common columns, counted from 0; what was not logged is empty."""

    def collect(self, folder: Path, data_dir: Path) -> Any:
        """Return an `Evaluation` of all samples (`lskd.teachers.outputs`), or a list of translations."""

    def export(
        self, folder: Path, output: Path, class_names: list[str] | None, data_dir: Path | None
    ) -> Exported:
        """Write a run's network into a folder that is there: ``model.safetensors`` and ``config.json``.

        ``class_names``: of its K classes, where they are known; ``data_dir``: None where the data are gone.
        """

    def size(self, plan: Plan, run: Run) -> Size:
        """Return how large a finished run's model is; no weights are loaded for it.

        Raises:
            LskdError: it cannot be told.
        """

    def views(self, plan: Plan, run: Run) -> Views:
        """Return what a student's training samples follow from.

        Raises:
            CannotStoreError: its file stores by itself, or asks for what no seed repeats.
        """

    def store_command(self, plan: Plan, store: Store, output: str | None = None) -> list[str]:
        """Return the shell command that stores soft labels, paths as in `command`."""

    def store(self, command: list[str]) -> None:
        """Run such a command in this process; raises as `train`."""


def check_classes(plan: Plan, run: Run, what: str, found: object) -> None:
    """Compare a number of classes with the study's.

    Raises:
        LskdError: it is another one.
    """
    if found != plan.num_classes:
        raise LskdError(
            f"{run.config}: {what} is {found}, the study's num_classes {plan.num_classes}; fix one of them"
        )


def read_epochs(path: Path) -> list[dict[str, str]]:
    """Return the rows of a trainer's table of epochs.

    Raises:
        LskdError: it is missing, has no epochs, or is no such table.
    """
    if not path.is_file():
        raise LskdError(f"the trainer left no {path}; see {path.parent / 'train.log'}")
    rows = [row for row in read_csv(path, ("epoch",)) if row["epoch"].isdecimal()]
    if not rows:
        raise no_epochs(path)
    return rows


def no_epochs(path: Path) -> LskdError:
    """Return the one line for a log without epochs."""
    return LskdError(f"{path} has no epochs; see {path.parent / 'train.log'}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what frameworks say while they are imported and built, and the process as it was before them.

    Logging, the working folder and the arguments are given back as they were.
    """
    said, root, cwd, arguments = io.StringIO(), logging.getLogger(), Path.cwd(), list(sys.argv)
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        logging.disable(disabled)
        sys.argv[:] = arguments
        os.chdir(cwd)
