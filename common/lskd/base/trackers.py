"""A run's epochs in TensorBoard, Weights & Biases or Trackio, by their own writers."""

import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lskd.base.hub import offline
from lskd.errors import LskdError, one_line

TrackerName = Literal["tensorboard", "wandb", "trackio"]
EVENTS = "events.out.tfevents.*"  # what TensorBoard's writer leaves in a run's folder
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # by which Trackio is told to send


def check_tracker(name: str) -> None:
    """Check that a tracker is installed.

    Raises:
        LskdError: it is not; says what to install.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as wandb leaves, is no package
        raise LskdError(f"the tracker {name} is not installed here; pip install {name}")


def project_name(name: str) -> str:
    """Return a name that all trackers take for a project.

    >>> project_name("runs: own/flowers?")
    'runs_own_flowers'
    """
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_")[:128] or "lskd"


class Tracker:
    """One run in a tracker, open until `close`; one that fails meanwhile is said once and ends no training.

    TensorBoard's files lie in the run's folder. Trackio stays on this machine unless one of its own variables
    says where to send; wandb goes by its own settings, such as WANDB_MODE.

    Args:
        project: what the tracker groups runs by; TensorBoard does so by folders. None: wandb's default.
        start: the first epoch that will be logged of a run that an earlier process began: the tracker's same
            run is gone on with, and what TensorBoard has from there on is hidden. None: a new run.
        resume_id: wandb's id of the run to go on with; empty: found in the folder.

    Raises:
        LskdError: it is not installed, or cannot be started.
    """

    def __init__(
        self,
        name: TrackerName,
        folder: Path,
        *,
        project: str | None,
        run: str,
        config: Mapping[str, Any],
        start: int | None = None,
        tags: Sequence[str] = (),
        resume_id: str = "",
    ) -> None:
        check_tracker(name)
        self._name = name
        self._run: Any = None  # with the methods `log` and `finish`
        settings: dict[str, Any] = {"name": run, "config": dict(config)}
        try:
            if name == "tensorboard":
                self._run = _Events(folder, settings["config"], start)
            elif name == "wandb":
                self._run = importlib.import_module(name).init(
                    **settings,
                    project=project,
                    tags=list(tags),
                    dir=str(folder),
                    id=resume_id or (None if start is None else _wandb_id(folder)),
                    resume="must" if resume_id else "allow",
                )
            else:
                settings |= {"project": project or project_name(folder.parent.name)}
                settings |= {"resume": "never" if start is None else "allow"}
                with offline(unless=_ELSEWHERE):
                    module = importlib.import_module(name)
                    self._run = module.init(**settings, auto_log_cpu=False, auto_log_gpu=False)
        except Exception as error:  # libraries of many kinds of errors
            advice = "; `wandb login`, or WANDB_MODE=offline to send nothing" if name == "wandb" else ""
            raise LskdError(f"{name} cannot be started ({one_line(error)}){advice}") from error

    def log(self, row: Mapping[str, float], epoch: int) -> None:
        """Log an epoch's numbers under their names."""
        self._unharmed("log", dict(row), step=epoch)

    def close(self) -> None:
        """Write what is left."""
        self._unharmed("finish")
        self._run = None

    def _unharmed(self, method: str, *given: Any, **options: Any) -> None:
        try:
            if self._run is not None:
                getattr(self._run, method)(*given, **options)
        except Exception as error:  # hours of training are worth more than their picture
            self._run = None
            line = f"lskd: warning: {self._name} failed ({one_line(error)}); the run goes on without it"
            print(line, file=sys.stderr, flush=True)


class _Events:
    """TensorBoard's writer, used as the others' runs are."""

    def __init__(self, folder: Path, config: dict[str, Any], purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads files by name, the second of their beginning first: of two of one second, the
        # later could be read before the one that it goes on from.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_text("config", f"```\n{yaml.safe_dump(config)}```")
        self._writer.flush()

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _wandb_id(folder: Path) -> str | None:
    """Return wandb's id of the run that was last begun in a folder, by what wandb left there."""
    left = (folder / "wandb").glob("*run-2*/run-*.wandb")  # [offline-]run-TIME-ID/run-ID.wandb
    last = max(left, key=lambda path: path.parent.name.partition("run-")[2], default=None)
    return None if last is None else last.stem.removeprefix("run-")
