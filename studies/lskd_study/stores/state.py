"""Stores on the disk: whether they hold what a plan needs, and when they go."""

import contextlib
import json
from pathlib import Path
from typing import Any

from lskd import LskdError, SoftLabels, SoftLabelsError
from lskd.base.files import write_text
from lskd_study.plan.folders import LABELS, remove_files
from lskd_study.plan.plan import JOB, Plan, Run, Store
from lskd_study.plan.records import Made, MadeStore, read_record


def record_of(plan: Plan, store: Store) -> dict[str, Any]:
    """Return the record of a finished store; empty where there is none.

    Raises:
        LskdError: it is damaged.
    """
    return read_record(plan.root / store.folder / JOB, MadeStore)


def holds(plan: Plan, store: Store) -> bool:
    """Whether a store has all that the plan needs, of the teacher that now lies in the output folder."""
    made = read_record(plan.folder(plan.run(store.teacher)) / JOB, Made)
    record = record_of(plan, store)
    if not record or record["teacher"]["checkpoint_sha256"] != (made.get("checkpoint") or {}).get("sha256"):
        return False
    try:
        labels = SoftLabels(Path(plan.cwd, plan.labels(store)))
    except SoftLabelsError:
        return False
    layout = labels.layout
    kept = (0 if layout.k == layout.num_classes else layout.k, layout.values)
    return labels.complete and layout.epochs >= store.epochs and kept == (store.top_k, store.values)


def stored_identity(plan: Plan, run: Run, data: str) -> dict[str, Any] | None:
    """Return what a student is about to read, None where it asks its teacher.

    ``data``: the checksum of the data that the student sees.

    Raises:
        LskdError: the store does not hold it, or was written when the data were others.
    """
    store = plan.store_of(run)
    if store is None:
        return None
    if not holds(plan, store):
        raise LskdError(
            f"{plan.output}/{store.folder} does not hold what {run.id} reads; run `lskd study` again, it "
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
    """Let stores that students still need and that do not hold what these need be written (further)."""
    for store in plan.stores:
        if any(not plan.done(plan.run(student)) for student in store.students) and not holds(plan, store):
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
                remove_files(labels.parent, LABELS)
                labels.rmdir()  # where nothing else lies in it
