"""A training run's use of stored soft labels: epochs that are there are read, the others are stored."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lskd.base.files import no_link
from lskd.errors import SoftLabelsError
from lskd.soft_labels.format import MANIFEST, SoftLabelsLayout, check_own, shard_folder
from lskd.soft_labels.forms import TEACHER_FORM, check_form, form_of_store, stored_difference, stored_form
from lskd.soft_labels.store import SoftLabels, SoftLabelsWriter
from lskd.teachers.fast import FAST_BOUND, FastMode, TeacherForm
from lskd.teachers.replay import augmentation_seed

SCRATCH = "scratch"
_CHUNK = 1 << 14  # keys that are put into order at a time

Answers = Callable[[NDArray[np.int64]], Iterable[tuple[Any, Tensor]]]
"""Asks a teacher about keys: yields some of them ``(n,)`` and its logits ``(n, num_classes)``."""


def read_rows(labels: SoftLabels, keys: ArrayLike, seed: int) -> tuple[Tensor, Tensor]:
    """Return what is stored about images, for their trainer.

    Args:
        keys: ``(n,)``.
        seed: of this run's augmentation.

    Returns:
        values ``(n, k)`` as stored and int32 ids ``(n, k)``.

    Raises:
        SoftLabelsError: damaged rows, or rows of other augmentation.
    """
    rows = labels.take(keys)
    epochs, samples = np.divmod(np.asarray(keys), labels.layout.samples)
    if rows.seeds is None or (rows.seeds != augmentation_seed(seed, epochs, samples)).any():
        raise SoftLabelsError(
            f"the soft labels in {labels.path} are of images augmented otherwise; write them again"
        )
    return torch.from_numpy(np.ascontiguousarray(rows.values)), torch.from_numpy(rows.ids.astype(np.int32))


class StoredRun:
    """Stored soft labels of images as one process of a training run sees them.

    Every process makes one and calls the same methods in the same order; they wait for each other by
    torch.distributed. The order: ``open_writer`` where something is to be stored; for each epoch ``record``
    by batch, then ``complete``; ``close``. A trainer's plugin adds how it makes its images.

    Rows come in the order of training and go to the store in that of their keys, a whole epoch at a time.
    Until then every process writes its own to a file below the store's folder. It is written, not mapped: a
    full disk is an error of writing then, where a map would end the process. What an ended process left there
    counts for nothing.

    Args:
        path: the store's folder, one that all processes see.
        layout: of the store, or of a shard of it; a shard is in a folder of its own below ``path``, and is
            written and verified, not trained from.
        identity: what it must belong to.
        seed: of the augmentation.
        on_error: when the disk fails in training: ``"stop"``, or ``"continue"`` and store nothing more.
        rank: number of this process; the first one writes.
        teacher: the form in which the teacher is asked for: "none" for the exact one, a mode of
            :func:`lskd.teachers.fast.choose_fast`, or "auto".
        bound: of its error.

    Attributes:
        labels: what was stored when the run began, None: nothing; of views also what it has stored itself.
        keys: the key after the last one that is stored by now.
        failed: the disk failed, and the run goes on without storing.
        writing: this run stores what is not there, from ``open_writer`` on.
        form: of the teacher who says what is stored; None: a fast teacher is yet to be made.

    Raises:
        SoftLabelsError: the folder contains something else, or is damaged.
        ValueError: a layout of several rows for each sample.
    """

    LOCK_SECONDS: ClassVar[float] = 0.0
    """How long another writer is waited for."""
    PATIENCE: ClassVar[float] = 120.0
    """Seconds that what one process wrote may take until the others see it: between computers it does."""
    STOP_ADVICE: ClassVar[str] = ""
    """What follows the error when a failing disk ends the run."""

    def __init__(
        self,
        path: str | Path,
        layout: SoftLabelsLayout,
        identity: dict[str, Any],
        *,
        seed: int,
        on_error: str = "stop",
        rank: int = 0,
        processes: int = 1,
        say: Callable[[str], Any] = print,
        teacher: FastMode = "none",
        bound: float = FAST_BOUND,
    ) -> None:
        self.path, self.layout, self.identity = shard_folder(path, layout.shard), layout, identity
        self.seed, self.rank, self.processes = seed, rank, processes
        self._stops, self._say = on_error == "stop", say
        if layout.rows_per_sample != 1:
            raise ValueError("rows are stored by sample; the layout must have one row for each")
        self.keys, self.failed, self.writing = layout.first, False, False
        self.labels: SoftLabels | None = None
        self._asked = teacher
        self.form = TeacherForm() if teacher == "none" else None
        self._writer: SoftLabelsWriter | None = None
        self._record = np.dtype([("key", "<u8"), ("row", layout.decoded_row)])
        self._scratch = self.path / SCRATCH
        self._file: Any = None
        if error := self._wait(self._look, -1):  # and nobody writes before all have looked
            raise SoftLabelsError(error)
        if self.labels is not None:
            self.form = form_of_store(self.path, self.labels.identity)
            check_form(self.path, self.form, teacher, bound)
        if self.keys < layout.stop:  # said now, and not when the first of them is to be written
            check_own(self.path)
        elif rank == 0 and self.labels is not None and self._scratch.exists():
            # The writer ended after its last commit. Where another writes, or nobody may, it stays.
            with suppress(SoftLabelsError):
                self._writer = SoftLabelsWriter(self.path, layout, self.labels.identity)
                self.close()

    @property
    def epochs(self) -> int:
        """How many epochs are stored, whole ones."""
        return self.keys // max(self.layout.samples, 1)

    def describe(self) -> str:
        """Return one line about what is there."""
        layout = self.layout
        unit = "view" if layout.views else "epoch"
        there = f"{self.epochs} {unit}(s) of {layout.samples} images are" if self.epochs else f"no {unit} is"
        if layout.shard:
            there = f"of shard {layout.shard} {self.keys - layout.first} of {layout.keys} images are"
        line = (
            f"soft labels {self.path}: {layout.kept} classes, {layout.values}; {there} "
            f"stored; augmentation from seed {self.seed}"
        )
        if self.labels is not None and (error := self.labels.own_error):
            line += f"; {error}"
        if layout.views:
            line += f"; {layout.epochs} view(s) an image, read in turn"
        if self.form is not None and not (self._asked == self.form.mode == "none"):
            line += f"; {self.form}"
            if self._asked not in ("auto", self.form.mode):
                line += f", taken instead of {self._asked}"
        return line

    @property
    def teacher_mode(self) -> FastMode:
        """The form in which a teacher must answer here: that of what is stored, else what was asked for."""
        return self._asked if self.form is None else self.form.mode

    def speaks(self, form: TeacherForm) -> None:
        """Note the form in which the teacher answers, for a new store; for the exact one it is known.

        Raises:
            SoftLabelsError: what is stored is of another form, which this machine does not have.
        """
        error = None
        if self.form is None:
            self.form = form
        elif form.mode != self.form.mode:
            error = (
                f"the soft labels in {self.path} are {self.form}; here the teacher is {form.name}, since "
                f"{self.form.name} cannot be had: go on where it can, or use another folder"
            )
        if error := self._agree(error):
            raise SoftLabelsError(error)

    def seeds(self, keys: ArrayLike) -> NDArray[np.uint32]:
        """Return the seeds of the augmentation of keys ``(n,)``."""
        epochs, samples = np.divmod(np.asarray(keys), self.layout.samples)
        return augmentation_seed(self.seed, epochs, samples)

    def open_writer(self) -> None:
        """Become the one who writes, or fail; a fast teacher of a new store :meth:`speaks` before.

        Raises:
            SoftLabelsError: another run writes, or the folder cannot be written.
        """
        if self.writing:
            return
        error = None
        if self.rank == 0:
            try:
                self._writer = self._locked_writer()
                self._clear()
                if self.layout.first + self._writer.keys != self.keys:
                    error = f"{self.path} was written by another run meanwhile; start again"
            except SoftLabelsError as caught:
                error = str(caught)
        if error := self._agree(error):
            self.close()
            raise SoftLabelsError(error)
        self.writing = True

    def stored(self, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what :attr:`labels` has about a batch, see :func:`read_rows`; None unless it has all.

        Raises:
            SoftLabelsError: damaged rows, or rows of other augmentation.
        """
        if self.labels is None or int(keys.max()) >= len(self.labels):
            return None
        return read_rows(self.labels, keys.numpy(), self.seed)

    def record(self, keys: ArrayLike, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Store what the teacher said about a batch; return it in the form in which it is stored.

        Args:
            keys: ``(n,)``.
            logits: ``(n, num_classes)``.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        values, ids = stored_form(logits, self.layout, keys)
        if self.writing and not self.failed:
            try:
                self._add(keys, values, ids, logits)
            except SoftLabelsError as error:
                self._fail(str(error))
        return values, ids

    def complete(self, stop: int, answers: Answers, progress: Callable[[int], Any] = lambda n: None) -> None:
        """Store all keys before ``stop``: what was recorded, and what the teacher now says about the rest.

        Args:
            progress: is told how many keys were asked about.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if not self.writing:
            raise RuntimeError("open_writer comes before complete")
        if self._any_failed():
            return
        error = self._wait_for_rows()
        unsaid = self._places(self._added(), self.keys, stop)[:, 0] < 0
        missing = (np.flatnonzero(unsaid) + self.keys)[self.rank :: self.processes]
        if error := self._agree(error):  # and nobody adds what is missing before all have looked
            self._fail(error)
            return
        try:
            for keys, logits in answers(missing) if len(missing) else ():
                self._add(keys, *stored_form(logits, self.layout, keys), logits)
                progress(len(keys))
        except SoftLabelsError as caught:
            self._fail(str(caught))
        if self._any_failed():
            return
        error = self._wait_for_rows()
        if self._writer is not None and not error:
            try:
                self._append_in_order(self._writer, stop)
            except SoftLabelsError as caught:
                error = str(caught)
        if error := self._agree(error):
            self._fail(error)
            return
        self._close_file()
        self._own_file.unlink(missing_ok=True)
        if self.layout.views and (error := self._wait(self._look, stop)):  # it reads them again itself
            raise SoftLabelsError(error)
        self.keys = stop

    def write_ahead(
        self, stop: int, answers: Answers, progress: Callable[[int], Any] = lambda n: None
    ) -> None:
        """Store all keys before ``stop`` in their order, without training; in a single process.

        Args:
            answers: asks the teacher, and yields the keys in the order in which they were asked for.
            progress: is told how many keys were asked about.

        Raises:
            SoftLabelsError: the disk cannot take it; what was committed stays.
        """
        self.open_writer()
        writer = self._writer
        assert writer is not None
        for keys, logits in answers(np.arange(self.keys, stop)):
            values, ids = stored_form(logits, self.layout, keys)
            writer.measure(keys, logits, values, ids)
            writer.append(values.cpu().numpy(), ids.cpu().numpy(), seeds=self.seeds(keys))
            progress(len(keys))
        writer.commit()
        self.keys = self.layout.first + writer.keys

    def verify(self, answers: Answers, count: int, tolerance: float) -> str:
        """Ask the teacher again about some stored images; return a line about it.

        Args:
            count: how many images, drawn at random.
            tolerance: of the exact teacher, see :func:`stored_difference`; a fast one has its own.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        labels = self.labels
        if labels is None or not len(labels):
            return "soft labels: nothing is stored yet, nothing to verify"
        allowed = f"{tolerance} is allowed"
        if self.form is not None and self.form.tolerance is not None:
            tolerance = self.form.tolerance
            allowed = f"{tolerance} is allowed of a teacher in {self.form.name}"
        count = min(count, len(labels))
        first = labels.layout.first
        drawn = first + np.random.default_rng().choice(len(labels), count, replace=False)
        chosen = drawn[self.rank :: self.processes]
        worst, error = 0.0, None
        for keys, logits in answers(chosen) if len(chosen) else ():
            rows = labels.take(np.asarray(keys) - first)
            apart = stored_difference(rows.values, rows.ids, logits, labels.layout.sampled)
            worst = max(worst, float(apart.max()))
            if worst > tolerance:
                epoch, sample = divmod(int(keys[int(apart.argmax())]), self.layout.samples)
                error = (
                    f"the soft labels in {self.path} are not what the teacher says: of image {sample} "
                    f"in epoch {epoch} they are {worst:.3g} apart, {allowed}; write them again"
                )
                break
        if error := self._agree(error):
            raise SoftLabelsError(error)
        return f"soft labels: {count} images verified, at most {worst:.2g} apart ({allowed})"

    def close(self) -> None:
        """Unlock the store; what is not committed does not count."""
        self._close_file()
        if self._writer is not None:
            with suppress(SoftLabelsError):  # what is left there counts for nothing
                self._clear()
            self._writer.close()
        self._writer, self.writing = None, False

    def _locked_writer(self) -> SoftLabelsWriter:
        if self.form is None:
            raise RuntimeError("a fast teacher speaks before its new store is opened")
        form: Any = self.form.as_json()
        if self.labels is not None:  # what was measured then; stores of before there were forms have none
            form = self.labels.identity.get(TEACHER_FORM)
        identity = self.identity | ({} if form is None else {TEACHER_FORM: form})
        deadline = time.monotonic() + self.LOCK_SECONDS
        while True:
            try:
                return SoftLabelsWriter(self.path, self.layout, identity)
            except SoftLabelsError as error:
                if "being written" not in str(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(0.5)

    @property
    def _own_file(self) -> Path:
        return self._scratch / f"rows-{self.rank}.bin"

    def _clear(self) -> None:
        """Remove what ended processes left; by one process, before any other adds."""
        self._close_file()
        try:
            for file in self._scratch.glob("rows-*.bin"):
                file.unlink(missing_ok=True)
            if self._scratch.exists():
                self._scratch.rmdir()
        except OSError as error:
            raise self._unwritable(error) from None

    def _add(self, keys: ArrayLike, values: Tensor, ids: Tensor, logits: Tensor) -> None:
        """Keep rows in any order; where a key comes twice, one of its rows counts."""
        if not bool(torch.isfinite(values).all()):
            raise SoftLabelsError(
                "the teacher gave NaN or infinity, which cannot be stored; check its weights"
            )
        if self._writer is not None:
            self._writer.measure(keys, logits, values, ids)
        records = np.zeros(len(values), self._record)
        records["key"] = keys
        records["row"]["values"], records["row"]["ids"] = values.cpu().numpy(), ids.cpu().numpy()
        if self.layout.seeds:
            records["row"]["seed"] = self.seeds(keys)
        try:
            if self._file is None:
                self._scratch.mkdir(exist_ok=True)
                self._file = open(self._own_file, "wb", opener=no_link)  # noqa: SIM115 - see _close_file
            self._file.write(records.tobytes())
            self._file.flush()  # for the others to see, and so that no forked worker process writes it again
        except OSError as error:
            self._close_file()
            raise self._unwritable(error) from None

    def _added(self) -> list[NDArray[Any]]:
        """Return the records that each process has added."""
        files = sorted(self._scratch.glob("rows-*.bin"))
        whole = [(file, file.stat().st_size // self._record.itemsize) for file in files]
        return [np.memmap(file, self._record, mode="r", shape=(count,)) for file, count in whole if count]

    def _places(self, files: list[NDArray[Any]], start: int, stop: int) -> NDArray[np.int64]:
        """Return of each key from ``start`` to ``stop`` its file and its place in there, -1 for none."""
        places = np.full((stop - start, 2), -1, np.int64)
        for number, records in enumerate(files):
            keys = records["key"].astype(np.int64)
            inside = np.flatnonzero((keys >= start) & (keys < stop))
            places[keys[inside] - start] = np.stack([np.full(len(inside), number), inside], 1)
        return places

    def _append_in_order(self, writer: SoftLabelsWriter, stop: int) -> None:
        """Append all keys before ``stop`` that ``writer`` does not have yet, and commit."""
        files = self._added()
        start = self.layout.first + writer.keys
        places = self._places(files, start, stop)
        if (places < 0).any():
            raise ValueError(f"{(places[:, 0] < 0).sum()} keys of {start} to {stop - 1} are missing")
        for first in range(0, len(places), _CHUNK):
            part = places[first : first + _CHUNK]
            rows = np.empty(len(part), self.layout.decoded_row)
            for number, records in enumerate(files):
                mine = part[:, 0] == number
                rows[mine] = records[part[mine, 1]]["row"]
            writer.append(rows["values"], rows["ids"], seeds=rows["seed"] if self.layout.seeds else None)
        writer.commit()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what is still buffered finds no room: it counts for nothing
                file.close()

    def _unwritable(self, error: OSError) -> SoftLabelsError:
        return SoftLabelsError(f"{self._scratch} cannot be written ({error.strerror})")

    def _fail(self, error: str) -> None:
        """Stop, or note that nothing is stored from now on; the epochs that were committed stay."""
        if self._stops:
            raise SoftLabelsError(f"{error}{self.STOP_ADVICE}")
        if not self.failed:
            self._say(f"soft labels: {error}; training goes on with the teacher and stores nothing more")
        self.failed = True

    def _any_failed(self) -> bool:
        if self._agree("failed" if self.failed else None):
            self.failed = True
        return self.failed

    def _agree(self, error: str | None) -> str | None:
        """Return the first error of any process, None where none has one; all wait for each other."""
        return next((found for found in self._gather(error) if found), None)

    def _gather(self, own: Any) -> list[Any]:
        """Return what each process has; all wait for each other."""
        found = [own] * self.processes
        if self.processes > 1:
            torch.distributed.all_gather_object(found, own)
        return found

    def _look(self) -> int:
        """Open what is stored by now, and return the key after it; -1 where none can be."""
        try:
            open(self.path / MANIFEST, "rb").close()  # or a network's file system might not be asked again
        except OSError:
            return -1
        self.labels = SoftLabels(self.path, expected=self.identity, shard=self.layout.shard)
        self.keys = self.layout.first + len(self.labels)
        return self.keys

    def _wait_for_rows(self) -> str | None:
        """Wait until this process sees all that any has added; return an error where it never does."""
        if self.processes == 1:
            return None
        size, error = 0, None
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())  # or a network's file system tells the others nothing yet
                size = self._file.tell()
        except OSError as failed:
            error = str(self._unwritable(failed))
        sizes, errors = zip(*self._gather((size, error)), strict=True)
        if found := next(filter(None, errors), None):
            return str(found)
        return self._wait(lambda: all(map(self._has, range(self.processes), sizes)), True)

    def _has(self, rank: int, size: int) -> bool:
        """Whether so much of a process's rows is here; opened, or a network might not be asked again."""
        try:
            with open(self._scratch / f"rows-{rank}.bin", "rb") as file:
                return os.fstat(file.fileno()).st_size >= size
        except FileNotFoundError:
            return not size

    def _wait(self, look: Callable[[], int], least: int) -> str | None:
        """Look until all processes see one and the same, and no less; return an error where they never do.

        They look in step, and all return the same. An error that only some see is waited for too: a new
        manifest may lie beside what was there before it.
        """
        deadline = time.monotonic() + self.PATIENCE
        while True:
            seen, error = -1, None
            try:
                seen = look()
            except SoftLabelsError as caught:
                error = str(caught)
            late = time.monotonic() >= deadline
            all_seen, errors, lates = zip(*self._gather((seen, error, late)), strict=True)
            found = [str(each) for each in errors if each]
            if len(found) == self.processes:
                return found[0]
            if not found and min(all_seen) == max(all_seen) >= least:
                return None
            if any(lates):
                seen_by_one = f" (one sees: {found[0].partition('; ')[0]})" if found else ""  # no advice
                return (
                    f"what another process wrote to {self.path} has not appeared for {self.PATIENCE:.0f} "
                    f"seconds; all of a run must see one folder{seen_by_one}"
                )
            time.sleep(0.1)
