"""A run while it trains: its epochs are said, for the time left, and logged by the study's tracker."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lskd import LskdError
from lskd.base.trackers import Tracker, project_name
from lskd_study.base.progress import say_epoch
from lskd_study.plan.plan import Plan, Run
from lskd_study.trainers import trainer_of

_SECONDS = 2.0
_SHARE = 50  # fairseq's log has many megabytes: so many times as long as a look took is waited


@contextlib.contextmanager
def watched(plan: Plan, run: Run, goes_on: bool) -> Iterator[None]:
    """Look at a run's table of epochs while it trains, in a thread, the same for all trainers.

    So trackers get one vocabulary of columns, and no trainer's command sends anything: it can be repeated by
    whoever reads the page.

    Raises:
        LskdError: the study's tracker cannot be started.
    """
    watch, end = _Watch(plan, run, goes_on), threading.Event()

    def follow() -> None:
        pause = _SECONDS
        while not end.wait(pause):
            begun = time.perf_counter()
            watch.tell(watch.rows(ended=False))
            pause = max(_SECONDS, _SHARE * (time.perf_counter() - begun))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    ended = False
    try:
        yield
        ended = True
    finally:
        end.set()
        thread.join()
        watch.tell(watch.rows(ended))
        if watch.tracker is not None:
            watch.tracker.close()


class _Watch:
    def __init__(self, plan: Plan, run: Run, goes_on: bool) -> None:
        self._run, self._trainer = run, trainer_of(plan.ecosystem, run.role)
        self._folder = Path(plan.cwd, plan.output, run.folder)
        self._epochs = self._trainer.epochs(plan, run)
        before = self.rows(ended=False) if goes_on else {}
        self._said = max(before, default=-1)  # the last epoch that was
        # TensorBoard hides what it is told again; the others would have it twice.
        self._logged = -1 if plan.tracker == "tensorboard" else self._said
        self.tracker: Tracker | None = None
        if plan.tracker:
            self.tracker = Tracker(
                plan.tracker,
                self._folder,
                project=project_name(plan.root.name),
                run=run.id,
                config={"study": plan.title, **plan.settings(run)},
                start=0 if goes_on else None,
            )
        say_epoch(run.id, self._said + 1, self._epochs)
        self.tell(before)

    def rows(self, ended: bool) -> dict[int, dict[str, float]]:
        """Return the epochs that are whole: trained and validated, or followed by another."""
        with contextlib.suppress(LskdError, OSError, ValueError, KeyError):  # not there yet, or half written
            rows = {
                int(row["epoch"]): {name: float(value) for name, value in row.items() if value}
                for row in self._trainer.read_curves(self._folder, self._run.role)
            }
            if rows and not ended:
                last = max(rows)
                if not {"train", "val"} <= {name.partition("_")[0] for name in rows[last]}:
                    del rows[last]
            return rows
        return {}

    def tell(self, rows: dict[int, dict[str, float]]) -> None:
        for epoch, row in rows.items():
            if self.tracker is not None and epoch > self._logged:
                numbers = {name: value for name, value in row.items() if math.isfinite(value)}
                self.tracker.log(numbers, epoch)
                self._logged = epoch
        if rows and max(rows) > self._said:
            self._said = max(rows)
            say_epoch(self._run.id, self._said + 1, self._epochs)
