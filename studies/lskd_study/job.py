"""One run of a study: ``python -m lskd_study.job PLAN RUN``; what a rule of the workflow executes.

Trains (or goes on from the last checkpoint), stores the validation logits (or the test set's translations)
and the curves and, last and in one piece, ``job.json``: where it exists, the run is finished.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lskd import DivergedError, LskdError, file_checksum, require_finite
from lskd.files import read_json
from lskd_study import provenance
from lskd_study.data_checksum import data_checksum
from lskd_study.ecosystems import trainer_of
from lskd_study.gpus import chosen_gpus
from lskd_study.plan import (
    BEGUN,
    CURVES,
    JOB,
    LOGITS,
    TEACHER_FAILED,
    TRANSLATIONS,
    Plan,
    Run,
    Store,
    write_text,
)
from lskd_study.progress import say
from lskd_study.schema import TRANSLATION
from lskd_study.stores.commands import rerun_command
from lskd_study.stores.state import release_stores, stored_identity

LOG = "train.log"
# Where a command that is copied from the page writes: the trainer refuses a folder that holds a run.
RERUN = "rerun"
_LOSSES = ("train_ce", "train_hard_ce", "val_loss")
_PREFIX = re.compile(r"[\w.-]+: error: ")  # of a trainer's own command


def main(arguments: list[str] | None = None) -> int:
    """Do one run; returns the exit status. What went wrong is one line on stderr, the rest is in the log."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m lskd_study.job PLAN RUN", file=sys.stderr)
        return 2
    try:
        plan = Plan.read(Path(arguments[0]))
        if store := plan.store_by_id.get(arguments[1]):
            from lskd_study.stores.job import write_store

            write_store(plan, store)
        else:
            run_job(plan, plan.run(arguments[1]))
    except LskdError as error:
        say(f"lskd: error: {error}", timed=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_job(plan: Plan, run: Run) -> None:
    """Train and measure one run, in its own folder.

    A run that diverged, and a student of a teacher that did, is recorded as failed and raises nothing.

    Raises:
        LskdError: when another process is at work on this run, when training fails for another reason, or
            when the data change meanwhile.
    """
    os.chdir(plan.cwd)
    folder = Path(plan.output, run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder), chosen_gpus(plan.resources, lambda line: say(f"{run.id}  {line}")) as devices:
        started = time.monotonic()
        teacher = teacher_identity(plan, run)
        data = data_checksum(plan)
        trainer = trainer_of(plan.ecosystem, run.role)
        words = trainer.command(plan, run)
        stored, resumed, quality = None, 0, ""
        failed = untaught(plan, run)
        if not failed:
            stored = stored_identity(plan, run, data)
            resumed, goes_on = _begin(plan, run, folder, teacher, data)
            where = "".join(f"  {name}={value}" for name, value in devices.items())
            say(f"{'resumes' if goes_on else 'starts '}  {run.id}{where}")
            extra = (trainer.resume(folder) or []) if goes_on else []
            if devices:
                with (folder / LOG).open("a", encoding="utf-8") as log:
                    log.write(f"lskd:{where}\n")
            try:
                with logged(run.id, folder / LOG):
                    trainer.train(words[1:] + extra)
                    _store_curves(plan, run, folder)
                    store = _store_translations if plan.ecosystem == TRANSLATION else _store_logits
                    quality = store(plan, run, folder)
            except DivergedError as error:
                failed = str(error)
            if data_checksum(plan) != data:
                raise LskdError(
                    f"the data in {plan.data} changed while {run.id} was trained, so nothing is recorded "
                    "of it; leave them alone and give the same command again, it starts this run anew"
                )
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


def _begin(plan: Plan, run: Run, folder: Path, teacher: dict[str, str] | None, data: str) -> tuple[int, bool]:
    """Note what this run is; return how often it was resumed, and whether it goes on from a checkpoint."""
    identity: dict[str, Any] = {"settings": plan.settings(run), "teacher": teacher, "data": data}
    path = folder / BEGUN
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    before = {"data": data} | before  # what a version left that did not note them
    same = all(before.get(key) == value for key, value in identity.items())
    goes_on = same and trainer_of(plan.ecosystem, run.role).resume(folder) is not None
    if not goes_on:
        # Half a run of other settings, or of a teacher that has since been trained anew, is of no use.
        for item in folder.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    resumed = int(before.get("resumed", 0)) + 1 if goes_on else 0
    write_text(path, json.dumps({**identity, "resumed": resumed}, indent=1) + "\n")
    return resumed, goes_on


def teacher_identity(plan: Plan, run: Run) -> dict[str, str] | None:
    """Return who teaches a run, None for a teacher; one that failed may have no weights.

    Raises:
        LskdError: when the teacher's weights are gone.
    """
    if run.role == "teacher":
        return None
    teacher = plan.run(run.teacher)
    if plan.failed(teacher):
        checkpoint = read_json(plan.folder(teacher) / JOB)["checkpoint"]
        return {"run": teacher.id, "checkpoint_sha256": checkpoint["sha256"]}
    path = plan.folder(teacher) / trainer_of(plan.ecosystem, "teacher").CHECKPOINT
    if not path.exists():
        raise LskdError(f"the teacher's weights {path} are gone; remove {path.parent} to train it again")
    return {"run": teacher.id, "checkpoint_sha256": file_checksum(path)}


@contextlib.contextmanager
def logged(name: str, log: Path) -> Iterator[None]:
    """Send all output to the log; whatever stops the trainer becomes one line that names the log.

    Raises:
        DivergedError: the trainer says so, by this error or by its exit status; its own line.
        LskdError: for whatever else stops it.
    """
    try:
        with _output_to(log):
            try:
                yield
            except (LskdError, SystemExit):
                raise
            except Exception as error:
                with log.open("a", encoding="utf-8") as file:
                    traceback.print_exc(file=file)
                raise LskdError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    except DivergedError as error:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{error}\n")
        raise
    except LskdError as error:
        raise LskdError(f"{name} failed: {str(error).rstrip('.')}; the whole log is {log}") from error
    except SystemExit as stop:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"the trainer exited with {stop.code}"
        reason = _PREFIX.sub("", reason, count=1) if _PREFIX.match(reason) else reason
        if stop.code == DivergedError.STATUS:
            raise DivergedError(reason) from stop
        raise LskdError(f"{name} failed: {reason.rstrip('.')}; the whole log is {log}") from stop


def _store_logits(plan: Plan, run: Run, folder: Path) -> str:
    """Write ``val_logits.safetensors``; return how good the run is."""
    import torch
    from safetensors.torch import save_file

    trainer = trainer_of(plan.ecosystem, run.role)
    result = trainer.collect_logits(folder, trainer.CHECKPOINT, Path(plan.data))
    epoch = int(trainer.read_curves(folder, run.role)[-1]["epoch"])
    require_finite("the logits of the validation images", result.logits, epoch)
    limit = torch.finfo(torch.float16).max
    names = torch.from_numpy(np.frombuffer("\n".join(result.keys).encode(), dtype=np.uint8).copy())
    tensors = {
        "logits": result.logits.clamp(-limit, limit).to(torch.float16).contiguous(),
        "labels": result.labels.to(torch.int64).contiguous(),
        "keys": names,
    }
    scratch = folder / f".{LOGITS}"
    save_file(tensors, scratch)
    os.replace(scratch, folder / LOGITS)
    return f"val top-1 {100 * float((result.logits.argmax(-1) == result.labels).float().mean()):.2f} %"


def _store_translations(plan: Plan, run: Run, folder: Path) -> str:
    """Write ``translations.jsonl``, the test set by the best epoch; return how good the run is."""
    trainer = trainer_of(plan.ecosystem, run.role)
    found = trainer.collect_translations(folder, trainer.CHECKPOINT, Path(plan.data))
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
    columns = trainer_of(plan.ecosystem, "student").CURVE_COLUMNS
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
    checkpoint = trainer_of(plan.ecosystem, run.role).CHECKPOINT
    weights = folder / checkpoint  # of a failed run perhaps not there
    return {
        "run": run.id,
        "role": run.role,
        "command": shlex.join(words),
        "rerun_command": rerun_command(plan, run, RERUN),
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
def only_one(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the kernel lets go when the process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LskdError(f"another process is at work in {folder}; wait for it or end it") from error
        yield


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and its children print to a file, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


if __name__ == "__main__":
    raise SystemExit(main())
