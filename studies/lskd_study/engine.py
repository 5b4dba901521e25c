"""``lskd study``: check everything, hand the matrix to Snakemake, then write the page."""

import fcntl
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lskd import LskdError
from lskd_study import slurm
from lskd_study.checks import (
    check_class_order,
    check_data_bin,
    check_data_folder,
    check_models,
    check_output,
    try_out,
)
from lskd_study.class_counts import check_class_counts
from lskd_study.data_options import check_preparation
from lskd_study.ecosystems import timm, trainer_of
from lskd_study.extras import require_ecosystem, require_study_extra
from lskd_study.plan import BEGUN, JOB, Plan, Run, expand
from lskd_study.recipes import find_study_file
from lskd_study.scheduler import Schedule, make_schedule
from lskd_study.schema import TRANSLATION, Network, load_study, read_trainer_config
from lskd_study.stores.decide import with_stores
from lskd_study.stores.state import release_stores, renew_stores
from lskd_study.stores.words import describe_stores
from lskd_study.teachers.schema import is_teacher_list
from lskd_study.teachers.study import run_teachers_file

LOCK = ".lskd.lock"


def run_study(
    study_file: str, output: str | None, cores: int | None, dry_run: bool, options: Sequence[str]
) -> int:
    """Run (or go on with) a study and write its page; returns the exit status, 1 when a run failed.

    A study that only lists teachers trains nothing: they are measured.

    ``options`` go to Snakemake. Raises LskdError, before anything is written, for what the user
    can mend.
    """
    require_study_extra()
    if study_file.startswith("-"):
        raise LskdError(f"the study file comes before the options for Snakemake; {study_file} stands first")
    if is_teacher_list(find_study_file(study_file)):
        return run_teachers_file(study_file, output, dry_run, options)
    plan = make_plan(study_file, output)
    schedule = make_schedule(plan, cores, options)
    check_preparation(plan)
    if not plan.prepare or plan.data_dir.exists():
        _check_data(plan)
    check_class_counts(plan)
    plan = with_stores(plan)
    changed = _changed_settings(plan)
    if changed:
        raise LskdError(
            f"{plan.output} holds {len(changed)} runs of other settings, e.g. {changed[0]}; "
            "choose another --output or remove those folders"
        )
    todo = plan.unfinished()
    if todo:
        check_models(run.model for run in plan.runs if trainer_of(plan.ecosystem, run.role) is timm)
        try_out(plan)
    if dry_run:
        print(describe(plan))
        print("\n".join(f"    {'to do   ' if run in todo else 'finished'}  {run.id}" for run in plan.runs))
        return 0
    check_output(plan.root, plan.output)
    if plan.prepare and not plan.data_dir.exists():
        check_output(plan.data_dir.parent, str(Path(plan.data).parent))
    with _only_study(plan) as lock:
        _forget_orphaned_students(plan)
        renew_stores(plan)
        plan.write()
        if plan.unfinished() or options:
            print(describe(plan), file=sys.stderr, flush=True)
            _snakemake(plan, schedule, lock)
        return _write_page(plan)


def make_plan(study_file: str, output: str | None) -> Plan:
    """Read a study file and spell out its matrix.

    Raises:
        LskdError: for anything in the study file, or the files it names, that is not as it should be.
    """
    path = find_study_file(study_file)
    study = load_study(path)
    require_ecosystem(study.ecosystem, path)

    def networks(entries: list[Network]) -> list[tuple[str, str]]:
        return [(entry.model, str(path.parent / entry.config)) for entry in entries]

    teachers, students = networks(study.teachers), networks(study.students)
    runs = expand(
        study.smoothing.values, study.seeds, teachers, students, study.temperatures, study.hard_weights
    )
    twice = [name for name, times in Counter(run.id for run in runs).items() if times > 1]
    if twice:
        raise LskdError(f"{path}: the same run is asked for twice ({twice[0]}); list each network once")
    configs = {config: _read_config(study.ecosystem, Path(config)) for _, config in [*teachers, *students]}
    for run in {(run.config, run.role): run for run in runs}.values():
        trainer_of(study.ecosystem, run.role).check_config(configs[run.config], run.config, run.role)
    if study.ecosystem == TRANSLATION:
        for model, config in {*teachers, *students}:
            trainer_of(study.ecosystem, "student").check_model(configs[config], config, model)
    return Plan(
        title=study.title,
        study_file=study_file,
        ecosystem=study.ecosystem,
        cwd=str(Path.cwd()),
        output=output or study.output,
        data=study.data.path,
        prepare=study.data.prepare or "",
        num_classes=study.data.num_classes or 0,
        convention=study.smoothing.convention,
        smoothing=sorted(study.smoothing.values),
        seeds=study.seeds,
        threads=study.resources.threads,
        resources=study.resources.extra,
        configs=configs,
        runs=runs,
        soft_labels=study.soft_labels.model_dump(),
        prepare_options=study.data.options,
        temperature_squared=study.temperature_squared,
        margin=study.margin,
        paper=study.papers_tables,
        published=study.published.model_dump() if study.published else {},
    )


def _check_data(plan: Plan) -> None:
    mend = f"make it with `lskd {shlex.join(plan.prepare_words)}`" if plan.prepare else ""
    if plan.ecosystem == TRANSLATION:
        check_data_bin(plan.data_dir, plan.data, plan.prepare_options, mend)
    else:
        check_data_folder(plan.data_dir, plan.data, plan.num_classes, mend)
        if plan.ecosystem == "mmcls":
            check_class_order(plan.data_dir, plan.data)


def _read_config(ecosystem: str, path: Path) -> dict[str, Any]:
    if ecosystem == "mmcls" and path.suffix == ".py":
        from lskd_study.ecosystems.mmcls import read_config

        return read_config(path)
    if ecosystem == TRANSLATION:  # whose files work without a study too, so a study overrides what they say
        return read_trainer_config(path, reserved=frozenset())
    return read_trainer_config(path)


def describe(plan: Plan) -> str:
    """Return the matrix in words: what there is to do and what is done."""
    lines = [plan.title, f"  data     {plan.data}", f"  output   {plan.output}"]
    for role in ("teacher", "student"):
        runs = [run for run in plan.runs if run.role == role]
        models = ", ".join(dict.fromkeys(run.model for run in runs))
        lines.append(f"  {role}s {len(runs):3d}  {models}")
    smoothing = ", ".join(f"{value:g}" for value in plan.smoothing)
    lines.append(f"  teachers' smoothing {smoothing} ({plan.convention}); seeds {_join(plan.seeds)}")
    lines += describe_stores(plan)
    todo = plan.unfinished()
    lines.append(f"  {len(plan.runs)} runs: {len(plan.runs) - len(todo)} finished, {len(todo)} to do")
    return "\n".join(lines)


def _join(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _snakemake(plan: Plan, schedule: Schedule, lock: IO[str]) -> None:
    if schedule.executor == "slurm" and (orphans := slurm.cancel_orphans(plan.root)):
        print(f"lskd: cancelled {orphans} jobs that a killed study had left in the queue", file=sys.stderr)
    schedule.prepare(plan)
    environment = schedule.process_environment()
    process = subprocess.Popen(schedule.command(plan), pass_fds=(lock.fileno(),), env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal sent it to Snakemake too, which stops its jobs; their checkpoints stay.
        process.wait()
        raise
    if status:
        print(
            f"lskd: snakemake ended with {status}; its log is in {plan.output}/.snakemake/log",
            file=sys.stderr,
        )


def _write_page(plan: Plan) -> int:
    from lskd_study.report import write_report
    from lskd_study.teachers_alone import write_teachers_report

    release_stores(plan)
    missing = plan.unfinished()
    if len(missing) == len(plan.runs):
        raise LskdError(f"no run has finished; the logs are {plan.output}/*/*/train.log")
    if plan.teachers_alone:
        write_teachers_report(plan)
    else:
        print(write_report(plan))
        print(f"{plan.output}/index.html")
    if missing:
        names = _join([run.id for run in missing[:3]]) + (" ..." if len(missing) > 3 else "")
        print(f"lskd: error: {len(missing)} of {len(plan.runs)} runs are missing: {names}", file=sys.stderr)
    return 1 if missing else 0


def _changed_settings(plan: Plan) -> list[str]:
    """Return the runs begun or finished with settings other than the plan's."""
    changed = []
    for run in plan.runs:
        begun = _read(plan.folder(run) / BEGUN)
        if begun and begun.get("settings") != json.loads(json.dumps(plan.settings(run))):
            changed.append(run.id)
    return changed


def _forget_orphaned_students(plan: Plan) -> None:
    """Let students of a teacher that was trained anew be made again: their mark of being finished goes."""
    for run in plan.runs:
        if run.role == "student" and plan.done(run) and not belongs_to_teacher(plan, run):
            (plan.folder(run) / JOB).unlink()


def belongs_to_teacher(plan: Plan, run: Run) -> bool:
    """Whether a finished student was distilled from the teacher that now lies in the output folder."""
    teacher = _read(plan.folder(plan.run(run.teacher)) / JOB).get("checkpoint", {})
    student = _read(plan.folder(run) / JOB).get("teacher") or {}
    return bool(teacher) and teacher.get("sha256") == student.get("checkpoint_sha256")


def _read(path: Path) -> dict[str, dict[str, object]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _only_study(plan: Plan) -> Iterator[IO[str]]:
    with (plan.root / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LskdError(f"another study is running in {plan.output}; wait for it or end it") from error
        yield lock
