"""One job of a study: what ``python -m lskd_study.runs PLAN NAME`` does for one run or store.

It trains, or stores soft labels, or goes on with that, and writes, last and in one piece, ``job.json``:
where it exists, the job is finished.
"""

import contextlib
import errno
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from lskd import DivergedError, LskdError
from lskd.base.files import cannot_write, write_text
from lskd.checkpoints import file_checksum
from lskd_study.base import provenance
from lskd_study.base.gpus import chosen_gpus
from lskd_study.base.progress import open_log, say
from lskd_study.plan.folders import LOG, begin, locked
from lskd_study.plan.plan import JOB, TEACHER_FAILED, Plan, Run, Store
from lskd_study.plan.records import MadeRun, read_record
from lskd_study.runs.data_checksum import check_same_data, data_checksum
from lskd_study.runs.work import Storing, Training
from lskd_study.stores.state import release_stores
from lskd_study.trainers import trainer_of
from lskd_study.trainers.same import changes


def do_job(arguments: Sequence[str]) -> int:
    """Do what a job's command says; return its exit status.

    What went wrong is one line on stderr, the rest is in the log.
    """
    try:
        plan = _plan(Path(arguments[0]).absolute())
        run_job(plan, plan.store_by_id.get(arguments[1]) or plan.run(arguments[1]))
    except LskdError as error:
        say(f"lskd: error: {error}", timed=False)
        return 1
    except OSError as error:
        where = error.filename or arguments[0]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = cannot_write(where, error) if full else f"{where}: {error.strerror}"
        say(f"lskd: error: {reason}", timed=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def know_plan(cwd: str, arguments: Sequence[str]) -> None:
    """Read the plan of a job's command where it is about to be forked: once for all jobs, not once for each.

    One that cannot be read the job complains of.
    """
    with contextlib.suppress(LskdError, OSError, IndexError):
        _plan(Path(cwd, arguments[0]))


@lru_cache(maxsize=1)
def _plan(path: Path) -> Plan:
    return Plan.read(path)  # a study writes it before its first job, and another study has another process


def run_job(plan: Plan, made: Run | Store) -> None:
    """Make one run or store, or go on with it, in its own folder.

    What diverged, and what has a teacher that did, is recorded as failed and raises nothing.

    Raises:
        LskdError: when another process is at work on it, when the trainer fails for another reason, or when
            the data change meanwhile.
    """
    os.chdir(plan.cwd)
    folder = Path(plan.output, made.folder)
    work = Training(plan, made) if isinstance(made, Run) else Storing(plan, made)
    with locked(folder), chosen_gpus(plan.resources, lambda line: say(f"{work.name}  {line}")) as devices:
        started = time.monotonic()
        teacher, data = teacher_identity(plan, made), data_checksum(plan)
        resumed, said = 0, ""
        failed = untaught(plan, made)
        if not failed:
            identity = {**work.identity(data), "teacher": teacher, "data": data}
            resumed, goes_on = begin(
                folder, identity, lambda before: _is_same(plan, before, identity), work.can_go_on, work.files
            )
            where = "".join(f"  {name}={value}" for name, value in devices.items())
            say(f"{'resumes' if goes_on else 'starts '}  {work.name}{where}")
            if devices:
                with contextlib.suppress(OSError), open_log(folder / LOG) as log:
                    log.write(f"lskd:{where}\n")
            try:
                said = work.do(goes_on)
            except DivergedError as error:
                failed = str(error)
            check_same_data(plan, data, work.done)
        wall = time.monotonic() - started
        record = {
            **work.record(),
            "command": shlex.join(work.command),
            "cwd": plan.cwd,
            "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""), **devices},
            "teacher": teacher,
            "data": {"path": plan.data, "sha256": data},
            **({"failed": failed} if failed else {}),
            "versions": provenance.versions(),
            "git": provenance.git_state(Path(__file__).parent),
            "hardware": provenance.hardware(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_time_s": round(wall, 1),
            "resumed": resumed,
        }
        write_text(folder / JOB, json.dumps(record, indent=2) + "\n")
        how = f"failed   {work.name}  {failed}" if failed else f"finished {work.name}  {said}"
        done = ""
        if isinstance(made, Run):
            release_stores(plan)
            done = f"  [{len(plan.runs) - len(plan.unfinished())} of {len(plan.runs)} done]"
        say(f"{how}  ({wall:.0f} s){done}")


def _is_same(plan: Plan, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether what an earlier process noted is what is begun now."""
    if any(before.get(key) != now[key] for key in now.keys() - {"settings"}):
        return False
    return "settings" not in now or not changes(before.get("settings", {}), now["settings"], Path(plan.cwd))


def untaught(plan: Plan, made: Run | Store) -> str:
    """Return why a student (or a store) is not made, its teacher or its store having failed; else nothing."""
    teacher = plan.by_id[made.teacher] if made.teacher else None
    if teacher is not None and (reason := plan.failed(teacher)):
        return f"{TEACHER_FAILED} {teacher.id} failed: {reason}"
    store = plan.store_of(made) if isinstance(made, Run) else None
    if store is not None and (reason := plan.failed(store)):
        return f"{TEACHER_FAILED}'s soft labels {store.id} failed: {reason}"
    return ""


def teacher_identity(plan: Plan, made: Run | Store) -> dict[str, str] | None:
    """Return who teaches, None where nobody does; a teacher that failed may have no weights.

    Raises:
        LskdError: when the teacher's weights are gone.
    """
    if not made.teacher:
        return None
    teacher = plan.run(made.teacher)
    if plan.failed(teacher):
        checkpoint = read_record(plan.folder(teacher) / JOB, MadeRun).get("checkpoint") or {}
        return {"run": teacher.id, "checkpoint_sha256": checkpoint.get("sha256", "")}
    path = plan.folder(teacher) / trainer_of(plan.ecosystem, "teacher").checkpoint
    if not path.exists():
        raise LskdError(f"the teacher's weights {path} are gone; remove {path.parent} to train it again")
    return {"run": teacher.id, "checkpoint_sha256": file_checksum(path)}
