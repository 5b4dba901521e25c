"""``lskd study``: check everything, hand the matrix to Snakemake, then write the page."""

import contextlib
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from lskd import LskdError
from lskd.base.files import lock, read_json
from lskd.base.trackers import check_tracker
from lskd_study.base.extras import require_ecosystem, require_extra
from lskd_study.base.progress import FILE, Follower, open_log
from lskd_study.base.stopping import StoppedError, until_stopped
from lskd_study.base.text import storable
from lskd_study.claims.outlook import LITTLE, before
from lskd_study.pages.verdicts import VERDICTS_FILE
from lskd_study.plan.folders import check_no_link, full_disk
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import BEGUN, JOB, PLAN, Plan, exact, expand, more_seeds
from lskd_study.plan.recipes import find_study_file
from lskd_study.plan.records import Begun, MadeRun, read_record
from lskd_study.plan.schema import Network, Study, load_study
from lskd_study.plan.teacher_list import is_teacher_list
from lskd_study.runs import clusters
from lskd_study.runs.data_checksum import check_unchanged
from lskd_study.runs.forkserver import forking
from lskd_study.runs.remaining import Remaining
from lskd_study.runs.scheduler import Schedule, make_schedule
from lskd_study.stores.decide import with_stores
from lskd_study.stores.state import release_stores, renew_stores
from lskd_study.stores.summary import describe_stores
from lskd_study.study.checks import (
    check_data_bin,
    check_data_folder,
    check_last_epochs,
    check_output,
    check_preparation,
    check_runs,
    try_out,
)
from lskd_study.study.planning import check_declared, looked_at, looks_of, next_look, outlooks_of
from lskd_study.trainers import trainer_of
from lskd_study.trainers.same import changes, tidy

LOCK = ".lskd.lock"
SNAKEMAKE_LOG = "snakemake.log"


def run_study(
    study_file: str,
    output: str | None,
    cores: int | None,
    dry_run: bool,
    options: Sequence[str],
    *,
    max_seeds: int | None = None,
    variance_from: str | None = None,
    told: bool = False,
) -> int:
    """Run (or go on with) a study and write its page; returns the exit status, 1 when a run failed.

    Args:
        study_file: or the folder of a study's results.
        output: folder of results instead of the study file's.
        cores: runs at a time.
        dry_run: show what there is to do.
        options: for Snakemake.
        max_seeds: seeds are added until it is decided, up to so many; None: those of the study file.
        variance_from: results of a study whose differences vary as much as this one's will.
        told: what the study can tell has been said.

    Raises:
        LskdError: before anything is written, for what the user can fix.
    """
    require_extra()
    if study_file.startswith("-"):
        raise LskdError(f"the study file comes before the options for Snakemake; {study_file} stands first")
    if Path(study_file).is_dir():
        study_file, output = study_of(study_file, output)
    make = partial(make_plan, study_file, output, max_seeds)
    return run_plans(make, cores, dry_run, options, variance_from, told=told)


def run_plans(
    make: Callable[[int | None], Plan],
    cores: int | None,
    dry_run: bool,
    options: Sequence[str],
    variance_from: str | None,
    write: Callable[[], None] | None = None,
    told: bool = False,
) -> int:
    """Run plans until there is no other number of seeds to go on to; returns the exit status.

    ``make``: returns the plan of so many seeds, at first of None; ``write``: writes the study's file, when
    nothing is refused any more. The others are those of ``run_study``.

    Raises:
        LskdError: as ``run_study``.
    """
    plan = make(None)
    while True:
        schedule = make_schedule(plan, cores, options)
        with _forking(plan, schedule, dry_run) as served:
            status = _run(plan, served, dry_run, options, variance_from, write, told)
        if dry_run or status or (number := next_look(plan)) is None:
            return status
        print(f"not decided with {len(plan.seeds)} seeds; going on to {number}", file=sys.stderr, flush=True)
        plan, told = make(number), False


@contextmanager
def _forking(plan: Plan, schedule: Schedule, dry_run: bool) -> Iterator[Schedule]:
    """Let a process import the trainer while everything is checked, for runs of this machine to be forked."""
    if schedule.executor != "local" or dry_run or not plan.unfinished():
        yield schedule
        return
    modules = trainer_of(plan.ecosystem, "student").modules
    threads = min(plan.threads, schedule.cores or 1)
    with forking(modules, threads, schedule.process_environment()) as (variables, inherited):
        yield replace(schedule, environment=schedule.environment | variables, inherited=inherited)


def _run(
    plan: Plan,
    schedule: Schedule,
    dry_run: bool,
    options: Sequence[str],
    variance_from: str | None,
    write: Callable[[], None] | None,
    was_told: bool,
) -> int:
    check_preparation(plan)
    if not plan.prepare or plan.data_dir.exists():
        _check_data(plan)
    check_runs(plan)
    check_last_epochs(plan)
    plan = with_stores(plan)
    _check_no_other_study(plan)
    for folder in [run.folder for run in plan.unfinished()] + [store.folder for store in plan.stores]:
        check_no_link(plan.root / folder)
    if changed := _changed_settings(plan):
        run, what = next(iter(changed.items()))
        listed = "; ".join(what[:3]) + (f" (and {len(what) - 3} more)" if len(what) > 3 else "")
        raise LskdError(
            f"{plan.output} contains {len(changed)} runs of other settings, e.g. {run}: {listed}; "
            "set that back, or choose another --output"
        )
    todo = plan.unfinished()
    if todo:
        if plan.tracker:
            check_tracker(plan.tracker)
        check_unchanged(plan)
        try_out(plan)
    told = [] if was_told else before(plan, outlooks_of(plan, variance_from))
    if dry_run:
        print(describe(plan, told))
        names = {run.id for run in todo}
        print("\n".join(f"    {'to do   ' if name in names else 'finished'}  {name}" for name in plan.by_id))
        return 0
    check_output(plan.root, plan.output)
    if plan.prepare and not plan.data_dir.exists():
        check_output(plan.data_dir.parent, str(Path(plan.data).parent))
    with _only_study(plan) as held:
        _forget_orphaned_students(plan)
        renew_stores(plan)
        plan = looked_at(plan)
        if write is not None:
            write()
        plan.write()
        if plan.unfinished() or options:
            print(describe(plan, told), file=sys.stderr, flush=True)
            _snakemake(plan, schedule, held)
        return _write_page(plan)


def make_plan(
    study_file: str, output: str | None, max_seeds: int | None = None, number: int | None = None
) -> Plan:
    """Read a study file and spell out its matrix.

    ``max_seeds``: seeds are added up to so many, by a rule; ``number``: so many there are now.

    Raises:
        LskdError: for anything in the study file, or the files it names, that is not as it should be.
    """
    study, path = find_study(study_file)
    return plan_of(study, path, study_file, output, max_seeds, number)


def find_study(study_file: str) -> tuple[Study, Path]:
    """Read a study file, or the recipe of that name; return where it lies too.

    Raises:
        LskdError: for a file that is not there, is a list of teachers, or is no study as it should be.
    """
    path = find_study_file(study_file)
    if is_teacher_list(path):
        raise LskdError(
            f"{study_file} is a list of teachers; measure them with `lskd stability --list {study_file}`"
        )
    return load_study(path), path


def plan_of(
    study: Study,
    path: Path,
    study_file: str,
    output: str | None,
    max_seeds: int | None = None,
    number: int | None = None,
) -> Plan:
    """Spell out the matrix of what a study file says; ``path``: the file, which need not be there yet.

    Raises:
        LskdError: as ``make_plan``.
    """
    require_ecosystem(study.ecosystem, path)

    def networks(entries: list[Network]) -> list[tuple[str, str]]:
        return [(entry.model, str(path.parent / entry.config)) for entry in entries]

    teachers, students = networks(study.teachers), networks(study.students)
    looks, seeds = looks_of(Path(output or study.output), study.seeds, max_seeds)
    if number is not None:
        seeds += more_seeds(seeds, number - len(seeds))
    settings = study.temperatures, study.hard_weights, study.controls, study.student_seeds
    runs = expand(study.smoothing.values, seeds, teachers, students, *settings)
    twice = [name for name, times in Counter(run.id for run in runs).items() if times > 1]
    if twice:
        raise LskdError(f"{path}: the same run is asked for twice ({twice[0]}); list each network once")
    for place in (str(Path.cwd()), output or study.output, study.data.path, study_file):
        if not storable(place):
            raise LskdError(f"the path {place!r} is no UTF-8 text in one line; rename it")
    # The students' trainer reads the teachers' files too: one file may be both.
    read_config = trainer_of(study.ecosystem, "student").read_config
    configs = {config: read_config(Path(config)) for _, config in [*teachers, *students]}
    for run in {(run.config, run.role, run.model): run for run in runs}.values():
        trainer = trainer_of(study.ecosystem, run.role)
        trainer.check_config(configs[run.config], run.config, run.role, run.model)
    plan = Plan(
        title=study.title,
        study_file=tidy(study_file),
        ecosystem=study.ecosystem,
        cwd=str(Path.cwd()),
        output=tidy(output or study.output),
        data=tidy(study.data.path),
        prepare=study.data.prepare or "",
        num_classes=study.data.num_classes or 0,
        convention=study.smoothing.convention,
        smoothing=sorted(study.smoothing.values),
        seeds=seeds,
        student_seeds=study.student_seeds,
        last_epochs=study.last_epochs,
        pool_seed_variance=study.pool_seed_variance,
        looks=looks,
        threads=study.resources.threads,
        resources=study.resources.extra,
        configs=configs,
        runs=runs,
        soft_labels=study.soft_labels.model_dump(),
        prepare_options=study.data.options,
        temperature_squared=study.temperature_squared,
        margin=study.margin,
        note=study.note,
        tracker=study.tracker or "",
        paper=study.papers_tables,
        published=study.published.model_dump() if study.published else {},
    )
    check_declared(plan)
    return plan


def _check_data(plan: Plan) -> None:
    fix = f"make it with `lskd {shlex.join(plan.prepare_arguments)}`" if plan.prepare else ""
    if plan.kind is TRANSLATION:
        check_data_bin(plan.data_dir, plan.data, plan.prepare_options, fix)
    else:
        check_data_folder(plan.data_dir, plan.data, plan.num_classes, fix)


def describe(plan: Plan, told: Sequence[str] = ()) -> str:
    """Return the matrix in words: what there is to do, what is done, and (``told``) what it can tell."""
    warning = [f"warning: {told[0]}"] if told and told[0].startswith(LITTLE) else []
    lines = [*warning, plan.title, f"  data     {plan.data}", f"  output   {plan.output}"]
    for role in ("teacher", "student", *["control"] * bool(plan.controls)):
        runs = [run for run in plan.runs if run.role == role]
        models = ", ".join(dict.fromkeys(run.model for run in runs))
        lines.append(f"  {role}s {len(runs):3d}  {models}")
    smoothing = ", ".join(map(exact, plan.smoothing))
    seeds = ", ".join(map(str, plan.seeds))
    lines.append(f"  teachers' smoothing {smoothing} ({plan.convention}); seeds {seeds}")
    if plan.student_seeds > 1:
        lines.append(f"  {plan.student_seeds} students of each kind for one seed of their teacher")
    if plan.last_epochs > 1:
        lines.append(
            f"  accuracy is the mean of the last {plan.last_epochs} epochs; where the rate falls in all of "
            "them (cosine) the first are of a model that is not yet the last one"
        )
    if plan.pool_seed_variance:
        lines.append("  the variance between seeds is pooled over the settings of a claim (moderated t)")
    if plan.looks:
        lines.append(f"  seeds are added until it is decided: looks after {', '.join(map(str, plan.looks))}")
    lines += [f"  power    {line}" for line in told[len(warning) :]]
    lines += describe_stores(plan)
    todo = plan.unfinished()
    lines.append(f"  {len(plan.runs)} runs: {len(plan.runs) - len(todo)} finished, {len(todo)} to do")
    return "\n".join(lines)


def _snakemake(plan: Plan, schedule: Schedule, held: int) -> None:
    """Run what is to do; what runs say is shown, what Snakemake says is in its log."""
    if schedule.executor == "slurm" and (orphans := clusters.cancel_orphans(plan.root)):
        print(f"lskd: cancelled {orphans} jobs that a killed study had left in the queue", file=sys.stderr)
    schedule.prepare(plan)
    shown: list[str] = []

    def show(line: str) -> None:
        shown.append(line)
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)

    remaining = Remaining(plan, show)
    follower = Follower(plan.root / FILE, remaining.hear, remaining.look)
    with open_log(plan.root / SNAKEMAKE_LOG) as log:
        process = subprocess.Popen(
            schedule.command(plan),
            pass_fds=(held, *schedule.inherited),
            env=schedule.process_environment(),
            stderr=None if schedule.speaks else log,
        )
        with until_stopped(process, schedule.executor == "local") as asked:
            status = process.wait()
    follower.stop(silently=bool(asked))
    if asked:
        done = len(plan.runs) - len(plan.unfinished())
        raise StoppedError(
            f"stopped; {done} of {len(plan.runs)} runs are finished and kept; "
            "the same command goes on from there",
            asked[0],
        )
    if status and (full := full_disk(plan.root)):
        raise full
    # Where a run has said why it failed, no more is to be said.
    if status and not any(line.startswith("lskd: error: ") for line in shown):
        print(
            f"lskd: snakemake ended with {status}; its log is {plan.output}/{SNAKEMAKE_LOG}",
            file=sys.stderr,
        )


def _write_page(plan: Plan) -> int:
    from lskd_study.pages.study import write_report
    from lskd_study.pages.teachers import write_teachers_report
    from lskd_study.pages.verdicts import read_record as read_verdicts

    release_stores(plan)
    missing = plan.unfinished()
    if len(missing) == len(plan.runs):
        raise LskdError(f"no run has finished; the logs are {plan.output}/*/*/train.log")
    if plan.teachers_alone:
        write_teachers_report(plan)
    else:
        print(write_report(plan))
        print(f"{plan.output}/index.html")
    print(read_verdicts(plan.root).recommendation)
    if missing:
        names = ", ".join(run.id for run in missing[:3]) + " ..." * (len(missing) > 3)
        print(f"lskd: error: {len(missing)} of {len(plan.runs)} runs are missing: {names}", file=sys.stderr)
    failed = any(plan.failed(run) for run in plan.runs)  # named before the answer
    return 1 if missing or failed else 0


def study_of(folder: str, output: str | None) -> tuple[str, str]:
    """Return the study file and the output of the study whose results a folder contains."""
    if output is not None and Path(output).resolve() != Path(folder).resolve():
        raise LskdError(f"{folder} is a folder of results; to write into {output} name the study file")
    if not Path(folder, PLAN).is_file():
        own = f"; for images of your own: --own {folder}" if Path(folder, "train").is_dir() else ""
        raise LskdError(f"{folder} is a folder and no study has written into it; name a study file{own}")
    file, cwd, place = _begun_by(folder)
    here = Path(folder, Path(file).name)  # `--own` keeps it with its results, which may have been moved
    if not file or (here.is_file() and not Path(file).exists()):
        return str(here), folder
    started = Path(cwd, place)
    if cwd and Path.cwd() != Path(cwd) and started.is_dir() and started.samefile(folder):
        raise LskdError(f"the study in {folder} was started in {cwd}; give the command there")
    try:
        find_study_file(file)
    except LskdError:
        raise LskdError(
            f"{file}, the study file of {folder}, is not there; name it where it is, with {folder} as output"
        ) from None
    return file, folder


def _begun_by(folder: str | Path) -> tuple[str, str, str]:
    """Return which study file wrote into a folder, where it was started, and what it called the folder.

    Empty where unknown.
    """
    content = read_json(Path(folder, PLAN), "a plan")
    found = content if isinstance(content, dict) else {}
    parts = (found.get(name) for name in ("study_file", "cwd", "output"))
    file, cwd, output = (part if isinstance(part, str) else "" for part in parts)
    return file, cwd, output


def _check_no_other_study(plan: Plan) -> None:
    """Refuse an output folder that contains the results of another study file."""
    if not (plan.root / PLAN).is_file():
        if (plan.root / VERDICTS_FILE).is_file():
            raise LskdError(
                f"{plan.output} contains the results of a list of teachers; choose another --output"
            )
        return
    name, cwd, _ = _begun_by(plan.root)
    before = Path(cwd, name)
    now = find_study_file(plan.study_file)
    same = not name or name == plan.study_file or not before.is_file() or before.samefile(now)
    if not same and before.read_bytes() != now.read_bytes():
        raise LskdError(
            f"{plan.output} contains the results of {name}; choose another --output for {plan.study_file}"
        )


def _changed_settings(plan: Plan) -> dict[str, list[str]]:
    """Return the runs begun or finished with settings other than the plan's, and which those are."""
    changed = {}
    for run in plan.runs:
        begun = read_record(plan.folder(run) / BEGUN, Begun)
        if begun and not plan.failed(run):
            changed[run.id] = changes(begun.get("settings", {}), plan.settings(run), Path(plan.cwd))
    return {name: what for name, what in changed.items() if what}


def _forget_orphaned_students(plan: Plan) -> None:
    """Have students of a teacher that was trained anew made again: their mark of being finished goes.

    So does that of runs that failed with other settings, and with it that of their students.
    """
    for run in plan.runs:
        if not plan.done(run):
            continue
        made = read_record(plan.folder(run) / JOB, MadeRun)
        settings = made.get("settings", {})
        again = bool(plan.failed(run) and changes(settings, plan.settings(run), Path(plan.cwd)))
        if run.role == "student" and not again:
            teacher = read_record(plan.folder(plan.run(run.teacher)) / JOB, MadeRun).get("checkpoint") or {}
            taught_by = (made.get("teacher") or {}).get("checkpoint_sha256")
            again = not teacher or teacher.get("sha256") != taught_by
        if again:
            (plan.folder(run) / JOB).unlink()


@contextmanager
def _only_study(plan: Plan) -> Iterator[int]:
    with lock(plan.root / LOCK) as taken:
        if taken is None:
            raise LskdError(f"another study is running in {plan.output}; wait for it or end it")
        yield taken
