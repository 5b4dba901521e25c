"""One store of a study: a teacher asked about all that its students will see."""

import json
import os
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lskd import DivergedError, LskdError, SoftLabels
from lskd.base.files import write_text
from lskd_study.base import provenance
from lskd_study.base.gpus import chosen_gpus
from lskd_study.base.progress import say
from lskd_study.plan.folders import LABELS, LOG, begin, held
from lskd_study.plan.plan import JOB, Plan, Store
from lskd_study.runs import job
from lskd_study.runs.data_checksum import check_same_data, data_checksum
from lskd_study.stores.decide import gigabytes
from lskd_study.trainers import trainer_of


def write_store(plan: Plan, store: Store) -> None:
    """Write one store, or go on with it, in its own folder.

    Raises:
        LskdError: when another process is at work on it, when the trainer's command fails, or when the data
            change meanwhile. What diverged, or has a teacher that did, is recorded as failed instead.
    """
    os.chdir(plan.cwd)
    folder = Path(plan.output, store.folder)
    name = f"soft labels of {store.teacher}"
    with held(folder), chosen_gpus(plan.resources, lambda line: say(f"{name}  {line}")) as devices:
        started = time.monotonic()
        teacher = job.teacher_identity(plan, plan.run(store.students[0]))
        data = data_checksum(plan)
        trainer = trainer_of(plan.ecosystem, "student")
        words = trainer.store_command(plan, store)
        resumed, said = 0, ""
        outcome: dict[str, Any] = {}
        failed = job.untaught(plan, store)
        if not failed:
            identity = {
                "teacher": teacher,
                "data": data,
                "seed": store.seed,
                "top_k": store.top_k,
                "values": store.values,
            }
            resumed, _ = begin(
                folder,
                identity,
                # The words of a teacher that has since been trained anew are of no use. Data: an earlier
                # version did not note them.
                lambda before: {key: ({"data": data} | before).get(key) for key in identity} == identity,
                plan.labels(store).exists,
                LABELS,
            )
            where = "".join(f"  {variable}={value}" for variable, value in devices.items())
            say(f"{'resumes' if resumed else 'starts '}  {name}{where}")
            try:
                with job.logged(f"soft labels {store.id}", folder / LOG):
                    trainer.store(words)
                outcome, said = _written(plan, store, folder)
            except DivergedError as error:
                failed = str(error)
            check_same_data(plan, data, f"{name} were written")
        wall = time.monotonic() - started
        record = {
            "store": store.id,
            "students": store.students,
            "command": shlex.join(words),
            "cwd": plan.cwd,
            "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""), **devices},
            "teacher": teacher,
            "data": {"path": plan.data, "sha256": data},
            **({"failed": failed} if failed else {"soft_labels": outcome}),
            "versions": provenance.versions(),
            "git": provenance.git_state(Path(__file__).parent),
            "hardware": provenance.hardware(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(wall, 1),
            "resumed": resumed,
        }
        write_text(folder / JOB, json.dumps(record, indent=2) + "\n")
        say(f"failed   {name}  {failed}" if failed else f"finished {name}  {said}  ({wall:.0f} s)")


def _written(plan: Plan, store: Store, folder: Path) -> tuple[dict[str, Any], str]:
    """Return what was stored, for the record and in words.

    Raises:
        LskdError: it is not complete.
    """
    labels = SoftLabels(plan.labels(store))
    if not labels.complete:
        raise LskdError(f"{plan.labels(store)} is not complete; the log is {folder / LOG}")
    info = labels.info()
    return {
        "checksum": info["checksum"],
        "bytes": info["bytes"],
        "samples": labels.layout.samples,
        "epochs": labels.layout.epochs,
        "rows": labels.rows,
        "top_k": store.top_k or "all",
        "values": store.values,
    }, gigabytes(info["bytes"])
