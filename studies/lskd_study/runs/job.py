"""One run of a study: what ``python -m lskd_study.runs PLAN RUN`` does for one.

Trains (or goes on from the last checkpoint), stores the validation logits (or the test set's translations)
and the curves and, last and in one piece, ``job.json``: where it exists, the run is finished.
"""

import contextlib
import csv
import errno
import io
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lskd import DivergedError, LskdError
from lskd.base.files import cannot_write, write_text
from lskd.base.finite import require_finite
from lskd.checkpoints import file_checksum
from lskd.teacher_terms import centred
from lskd_study.base import provenance
from lskd_study.base.gpus import chosen_gpus
from lskd_study.base.progress import open_log, say
from lskd_study.plan.folders import LOG, begin, disk_is_full, held
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import CURVES, JOB, LOGITS, TEACHER_FAILED, TRANSLATIONS, Plan, Run, Store
from lskd_study.plan.records import Made, read_record
from lskd_study.runs.data_checksum import check_same_data, data_checksum
from lskd_study.stores.commands import rerun_command
from lskd_study.stores.state import release_stores, stored_identity
from lskd_study.trainers import trainer_of
from lskd_study.trainers.same import changes

# Exit statuses of a trainer that was asked to stop; its own advice is not a study's.
_STOPPED = (130, 143, -2, -15)
_NO_ROOM = re.compile(r"No space left|os error 28|[Qq]uota exceeded|PytorchStreamWriter|unexpected pos")
_LOSSES = ("train_ce", "train_hard_ce", "val_loss")
_PREFIX = re.compile(r"[\w.-]+: error: ")  # of a trainer's own command


def run_job(plan: Plan, run: Run) -> None:
    """Train and measure one run, in its own folder.

    A run that diverged, and a student of a teacher that did, is recorded as failed and raises nothing.

    Raises:
        LskdError: when another process is at work on this run, when training fails for another reason, or
            when the data change meanwhile.
    """
    os.chdir(plan.cwd)
    folder = Path(plan.output, run.folder)
    with held(folder), chosen_gpus(plan.resources, lambda line: say(f"{run.id}  {line}")) as devices:
        started = time.monotonic()
        teacher = teacher_identity(plan, run)
        data = data_checksum(plan)
        trainer = trainer_of(plan.ecosystem, run.role)
        words = trainer.command(plan, run)
        stored, resumed, quality = None, 0, ""
        failed = untaught(plan, run)
        if not failed:
            stored = stored_identity(plan, run, data)
            identity: dict[str, Any] = {"settings": plan.settings(run), "teacher": teacher, "data": data}
            resumed, goes_on = begin(
                folder,
                identity,
                lambda before: (
                    before.get("teacher") == teacher
                    and before.get("data", data) == data  # an earlier version did not note it
                    and not changes(before.get("settings", {}), identity["settings"], Path(plan.cwd))
                ),
                lambda: trainer.resume(folder) is not None,
                trainer.files,
            )
            where = "".join(f"  {name}={value}" for name, value in devices.items())
            say(f"{'resumes' if goes_on else 'starts '}  {run.id}{where}")
            extra = (trainer.resume(folder) or []) if goes_on else []
            if devices:
                with contextlib.suppress(OSError), open_log(folder / LOG) as log:
                    log.write(f"lskd:{where}\n")
            try:
                with logged(run.id, folder / LOG):
                    trainer.train(words[1:] + extra)
                    _store_curves(plan, run, folder)
                    store = _store_translations if plan.kind is TRANSLATION else _store_logits
                    quality = store(plan, run, folder)
            except DivergedError as error:
                failed = str(error)
            check_same_data(plan, data, f"{run.id} was trained")
        wall = time.monotonic() - started
        record = _record(plan, run, folder, words, teacher, resumed, wall) | {"soft_labels": stored}
        record["data"] = {"path": plan.data, "sha256": data}
        record["environment"].update(devices)
        if failed:
            record["failed"] = failed
        write_text(folder / JOB, json.dumps(record, indent=2) + "\n")
        release_stores(plan)
        done = len(plan.runs) - len(plan.unfinished())
        how = f"failed   {run.id}  {failed}" if failed else f"finished {run.id}  {quality}"
        say(f"{how}  ({wall:.0f} s)  [{done} of {len(plan.runs)} done]")


def untaught(plan: Plan, student: Run | Store) -> str:
    """Return why a student (or a store) is not made, its teacher or its store having failed; else nothing."""
    teacher = plan.by_id[student.teacher] if student.teacher else None
    if teacher is not None and (reason := plan.failed(teacher)):
        return f"{TEACHER_FAILED} {teacher.id} failed: {reason}"
    store = plan.store_of(student) if isinstance(student, Run) else None
    if store is not None and (reason := plan.failed(store)):
        return f"{TEACHER_FAILED}'s soft labels {store.id} failed: {reason}"
    return ""


def teacher_identity(plan: Plan, run: Run) -> dict[str, str] | None:
    """Return who teaches a run, None for a teacher; one that failed may have no weights.

    Raises:
        LskdError: when the teacher's weights are gone.
    """
    if run.role == "teacher":
        return None
    teacher = plan.run(run.teacher)
    if plan.failed(teacher):
        checkpoint = read_record(plan.folder(teacher) / JOB, Made).get("checkpoint") or {}
        return {"run": teacher.id, "checkpoint_sha256": checkpoint.get("sha256", "")}
    path = plan.folder(teacher) / trainer_of(plan.ecosystem, "teacher").checkpoint
    if not path.exists():
        raise LskdError(f"the teacher's weights {path} are gone; remove {path.parent} to train it again")
    return {"run": teacher.id, "checkpoint_sha256": file_checksum(path)}


@contextlib.contextmanager
def logged(name: str, log: Path) -> Iterator[None]:
    """Send all output to the log; whatever stops the trainer becomes one line that names the log.

    Raises:
        DivergedError: the trainer says so, by this error or by its exit status; its own line.
        LskdError: for whatever else stops it.
        KeyboardInterrupt: the trainer was asked to stop.
    """
    try:
        with _output_to(log):
            try:
                yield
            except (LskdError, SystemExit):
                raise
            except Exception as error:
                with contextlib.suppress(OSError), open_log(log) as file:
                    traceback.print_exc(file=file)
                raise LskdError(_reason(error)) from error
    except DivergedError as error:
        with contextlib.suppress(OSError), open_log(log) as file:
            file.write(f"{error}\n")
        raise
    except (LskdError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in _STOPPED:
            raise KeyboardInterrupt from error
        if disk_is_full(log.parent):
            why = cannot_write(log.parent, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            raise LskdError(f"{name} failed: {why}") from error
        reason = str(error) if isinstance(error, LskdError) else _last_line(log, error)
        if isinstance(error, SystemExit) and error.code == DivergedError.STATUS:
            raise DivergedError(reason) from error
        raise LskdError(f"{name} failed: {reason.rstrip('.')}; the whole log is {log}") from error


def _reason(error: Exception) -> str:
    """Return what went wrong in one line; a disk that is full comes in the words of many libraries."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    if _NO_ROOM.search(str(error)):
        return (
            f"a file could not be written, the disk is full ({line}); what is finished is kept, make room "
            "and give the same command again"
        )
    return line


def _last_line(log: Path, stop: SystemExit) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"the trainer exited with {stop.code}"
    return _PREFIX.sub("", reason, count=1) if _PREFIX.match(reason) else reason


def _store_logits(plan: Plan, run: Run, folder: Path) -> str:
    """Write ``val_logits.safetensors``; return how good the run is."""
    import torch

    from lskd_study.teachers.safetensors_file import write_safetensors

    trainer = trainer_of(plan.ecosystem, run.role)
    result = trainer.collect(folder, Path(plan.data))
    epoch = int(trainer.read_curves(folder, run.role)[-1]["epoch"])
    require_finite("the logits of the validation images", result.logits, epoch)
    tensors = {
        # Less each image's largest, beside which float16 has its finest steps: no tie is made at the top.
        "logits": centred(result.logits).clamp(min=torch.finfo(torch.float16).min).to(torch.float16),
        "labels": result.labels.to(torch.int64),
    }
    write_safetensors(folder / LOGITS, tensors, {"keys": result.keys})
    return f"val top-1 {100 * float((result.logits.argmax(-1) == result.labels).float().mean()):.2f} %"


def _store_translations(plan: Plan, run: Run, folder: Path) -> str:
    """Write ``translations.jsonl``, the test set by the best epoch; return how good the run is."""
    trainer = trainer_of(plan.ecosystem, run.role)
    found = trainer.collect(folder, Path(plan.data))
    write_text(folder / TRANSLATIONS, "".join(json.dumps(line) + "\n" for line in found))
    best = max(float(row["val_bleu"] or "nan") for row in trainer.read_curves(folder, run.role))
    return f"best val BLEU {best:.2f}"


def _store_curves(plan: Plan, run: Run, folder: Path) -> None:
    text = io.StringIO()
    trainer = trainer_of(plan.ecosystem, run.role)
    rows = trainer.read_curves(folder, run.role)
    for row in rows:
        for name in _LOSSES:
            if value := row.get(name):
                require_finite(name, float(value), int(row["epoch"]))
    # One set of columns for a whole study, though its teachers and students may come from two trainers.
    columns = trainer_of(plan.ecosystem, "student").curve_columns
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / CURVES, text.getvalue())


def _record(
    plan: Plan,
    run: Run,
    folder: Path,
    words: list[str],
    teacher: dict[str, str] | None,
    resumed: int,
    wall: float,
) -> dict[str, Any]:
    checkpoint = trainer_of(plan.ecosystem, run.role).checkpoint
    weights = folder / checkpoint  # of a failed run perhaps not there
    return {
        "run": run.id,
        "role": run.role,
        "command": shlex.join(words),
        "rerun_command": rerun_command(plan, run),
        "cwd": plan.cwd,
        "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")},
        "settings": plan.settings(run),
        "seed": run.seed,
        "teacher": teacher,
        "checkpoint": {"file": checkpoint, "sha256": file_checksum(weights) if weights.exists() else ""},
        "versions": provenance.versions(),
        "git": provenance.git_state(Path(__file__).parent),
        "hardware": provenance.hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_time_s": round(wall, 1),
        "resumed": resumed,
    }


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and its children print to a file, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open_log(log) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for stream, number, old in zip((sys.stdout, sys.stderr), (1, 2), saved, strict=True):
            try:
                stream.flush()
            except OSError:  # what a full disk did not take must not come out elsewhere later
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), number)
                stream.flush()
            os.dup2(old, number)
            os.close(old)
