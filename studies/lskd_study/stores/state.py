"""Stores on the disk: whether they contain what a plan needs, when they go, and how a run is made without."""

import contextlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lskd import LskdError, SoftLabels, SoftLabelsError
from lskd.base.files import write_text
from lskd_study.base.gpus import VISIBLE
from lskd_study.plan.folders import LABEL_FILES, remove_files
from lskd_study.plan.plan import JOB, Plan, Run, Store
from lskd_study.plan.records import MadeRun, MadeStore, read_record
from lskd_study.trainers import trainer_of

# Where a command that is copied from the page writes: the trainer refuses a folder that contains a run.
_RERUN = "rerun"
_SETTINGS = ("OMP_NUM_THREADS", VISIBLE)


def record_of(plan: Plan, store: Store) -> dict[str, Any]:
    """Return the record of a finished store; empty where there is none.

    Raises:
        LskdError: it is damaged.
    """
    return read_record(plan.root / store.folder / JOB, MadeStore)


def contains(plan: Plan, store: Store) -> bool:
    """Whether a store has all that the plan needs, of the teacher that now lies in the output folder."""
    made = read_record(plan.folder(plan.run(store.teacher)) / JOB, MadeRun)
    record = record_of(plan, store)
    if not record or record["teacher"]["checkpoint_sha256"] != (made.get("checkpoint") or {}).get("sha256"):
        return False
    try:
        labels = SoftLabels(Path(plan.cwd, plan.labels(store)))
    except SoftLabelsError:
        return False
    layout = labels.layout
    kept = (0 if layout.k == layout.num_classes else layout.k, layout.values, layout.sampled)
    wanted = (store.top_k, store.values, store.sampled)
    return labels.complete and layout.epochs >= store.epochs and kept == wanted


def stored_identity(plan: Plan, run: Run, data: str) -> dict[str, Any] | None:
    """Return what a student is about to read, None where it asks its teacher.

    ``data``: the checksum of the data that the student sees.

    Raises:
        LskdError: the store does not contain it, or was written when the data were others.
    """
    store = plan.store_of(run)
    if store is None:
        return None
    if not contains(plan, store):
        raise LskdError(
            f"{plan.output}/{store.folder} does not contain what {run.id} reads; run `lskd study` again, it "
            "writes that first"
        )
    record = record_of(plan, store)
    if record.get("data", {}).get("sha256", data) != data:
        raise LskdError(
            f"the data in {plan.data} changed since {plan.output}/{store.folder} was written; put them back, "
            "or remove that folder and give the same command again"
        )
    found: dict[str, Any] = record["soft_labels"]
    return {"store": store.id, "seed": store.seed, **found}


def renew_stores(plan: Plan) -> None:
    """Have stores written (further) that students still need and that do not contain what these need."""
    for store in plan.stores:
        if any(not plan.done(plan.run(student)) for student in store.students) and not contains(plan, store):
            (plan.root / store.folder / JOB).unlink(missing_ok=True)


def release_stores(plan: Plan) -> None:
    """Remove the soft labels of stores whose students are all finished, unless they are to be kept."""
    if plan.soft_labels.get("keep"):
        return
    for store in plan.stores:
        labels = Path(plan.cwd, plan.labels(store))
        if labels.exists() and all(plan.done(plan.run(student)) for student in store.students):
            if record := record_of(plan, store):
                write_text(labels.parent / JOB, json.dumps({**record, "removed": True}, indent=2) + "\n")
            with contextlib.suppress(OSError):
                remove_files(labels.parent, LABEL_FILES)
                labels.rmdir()  # where nothing else lies in it


def rerun_command(plan: Plan, run: Run, environment: Mapping[str, str] = os.environ) -> str:
    """Return the shell command that makes a run again in a folder apart from the study's own runs.

    It reads nothing of the study's stores: timm and mmcls ask the teacher and store what it says while they
    train, for the next rerun too; in translation a command before it does.
    """
    trainer = trainer_of(plan.ecosystem, run.role)
    command = shlex.join(trainer.command(plan, run, _RERUN))
    store = plan.store_of(run)
    if store is None or trainer.stores_while_training:
        return command
    # What stands before the whole line on the page counts for its first command alone.
    settings = [f"{name}={shlex.quote(environment[name])} " for name in _SETTINGS if environment.get(name)]
    return f"{shlex.join(trainer.store_command(plan, store, _RERUN))} && {''.join(settings)}{command}"
