"""One store of a study: a teacher asked about all that its students will see."""

import json
import os
import shlex
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lskd import LskdError, SoftLabels
from lskd_study import job, provenance
from lskd_study.data._layout import read_manifest
from lskd_study.gpus import chosen_gpus
from lskd_study.plan import BEGUN, JOB, Plan, Store, write_text
from lskd_study.progress import say
from lskd_study.stores import storing
from lskd_study.stores.decide import gigabytes


def write_store(plan: Plan, store: Store) -> None:
    """Write one store, or go on with it, in its own folder.

    Raises:
        LskdError: when another process is at work on it, or when the trainer's command fails.
    """
    os.chdir(plan.cwd)
    folder = Path(plan.output, store.folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"soft labels of {store.teacher}"
    with job.only_one(folder), chosen_gpus(plan.resources, lambda line: say(f"{name}  {line}")) as devices:
        started = time.monotonic()
        teacher = job.teacher_identity(plan, plan.run(store.students[0]))
        resumed = _begin(plan, store, folder, teacher)
        where = "".join(f"  {variable}={value}" for variable, value in devices.items())
        say(f"{'resumes' if resumed else 'starts '}  {name}{where}")
        module = storing(plan.ecosystem)
        words = module.command(plan, store)
        with job.logged(f"soft labels {store.id}", folder / job.LOG):
            module.write(words)
        labels = SoftLabels(plan.labels(store))
        if not labels.complete:
            raise LskdError(f"{plan.labels(store)} is not complete; the log is {folder / job.LOG}")
        info = labels.info()
        wall = time.monotonic() - started
        record = {
            "store": store.id,
            "students": store.students,
            "command": shlex.join(words),
            "cwd": plan.cwd,
            "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""), **devices},
            "teacher": teacher,
            "soft_labels": {
                "checksum": info["checksum"],
                "bytes": info["bytes"],
                "samples": labels.layout.samples,
                "epochs": labels.layout.epochs,
                "rows": labels.rows,
                "top_k": store.top_k or "all",
                "values": store.values,
            },
            "versions": provenance.versions(),
            "git": provenance.git_state(Path(__file__).parent),
            "hardware": provenance.hardware(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(wall, 1),
            "resumed": resumed,
        }
        write_text(folder / JOB, json.dumps(record, indent=2) + "\n")
        say(f"finished {name}  {gigabytes(info['bytes'])}  ({wall:.0f} s)")


def _begin(plan: Plan, store: Store, folder: Path, teacher: dict[str, str] | None) -> int:
    """Note what this store is; return how often it was resumed."""
    identity: dict[str, Any] = {
        "teacher": teacher,
        "seed": store.seed,
        "top_k": store.top_k,
        "values": store.values,
    }
    path = folder / BEGUN
    before = read_manifest(folder, BEGUN)
    same = all(before.get(key) == value for key, value in identity.items())
    if not same:
        # The words of a teacher that has since been trained anew are of no use; what else lies there stays.
        labels = Path(plan.labels(store))
        if labels.is_symlink() or (labels.exists() and not before):
            raise LskdError(f"{labels} was not written by this study; move it away")
        shutil.rmtree(labels, ignore_errors=True)
        for name in (JOB, job.LOG):
            (folder / name).unlink(missing_ok=True)
    resumed = int(before.get("resumed", -1)) + 1 if same and Path(plan.labels(store)).exists() else 0
    write_text(path, json.dumps({**identity, "resumed": resumed}, indent=1) + "\n")
    return resumed
