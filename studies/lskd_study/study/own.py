"""``lskd study --own``: look at the images, choose, measure the time, ask, write the files, run the study."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.base.extras import require_extra
from lskd_study.base.provenance import usable_cores
from lskd_study.base.text import duration
from lskd_study.claims.outlook import LITTLE, Outlook, before
from lskd_study.data.folders.image_folder import read_classes
from lskd_study.data.folders.split import converts
from lskd_study.pages.verdicts import VERDICTS_FILE
from lskd_study.plan.plan import PLAN, Plan, exact
from lskd_study.runs.scheduler import make_schedule
from lskd_study.study.checks import check_names, check_output
from lskd_study.study.engine import make_plan, run_study
from lskd_study.study.own_choice import (
    FEWEST_EPOCHS,
    USUAL,
    Asked,
    Choice,
    candidates,
    shorter,
    with_what_was_cut,
)
from lskd_study.study.own_files import STUDY, data_path, study_files
from lskd_study.study.own_images import PNG, OwnImages, look_at
from lskd_study.study.own_time import TimeEstimate, estimate_time, operations
from lskd_study.study.planning import outlooks_of
from lskd_study.trainers.same import tidy

HOURS_ON_CPU, HOURS_ON_GPU = 1.0, 12.0
# Many small operations keep a CPU or GPU less busy than few large ones do, by no more than this.
_BETTER_USED = 5.0


def run_own(
    folder: str,
    output: str | None,
    cores: int,
    dry_run: bool,
    yes: bool,
    hours: float | None,
    options: Sequence[str],
    *,
    asked: Asked = USUAL,
    max_seeds: int | None = None,
    variance_from: str | None = None,
) -> int:
    """Make a study of a folder of images and run it, or go on with it; returns the exit status.

    Args:
        folder: of the images.
        output: folder of results and of the study's files; None: ``runs/own-`` and the folder's name.
        cores: runs at a time.
        dry_run: show what would be done.
        yes: do not ask.
        hours: the longest that the study may take; None: 1 on a CPU, 12 with a GPU.
        options: for Snakemake.
        asked: what the user decides of the study.
        max_seeds: seeds are added until it is decided, up to so many; None: those of the study.
        variance_from: results of a study whose differences vary as much as this one's will.

    Raises:
        LskdError: for what the user can fix, before anything is written.
    """
    require_extra()
    if not yes and not dry_run and not sys.stdin.isatty():
        raise LskdError(
            "there is no terminal to ask at; --dry-run shows the estimate, --yes goes on without asking"
        )
    folder = tidy(folder)
    images = look_at(folder)
    check_names(read_classes(images.splits["val"]), str(images.splits["val"]))
    output = tidy(output or str(Path("runs", f"own-{Path(folder).resolve().name}")))
    file = Path(output, STUDY)
    check = partial(_check_options, cores, options, variance_from)
    if file.exists():
        plan = make_plan(str(file), output, max_seeds)
        _check_is_this(plan, file, images, asked)
        outlooks = check(plan)
    elif any(Path(output, name).exists() for name in (PLAN, VERDICTS_FILE)):
        raise LskdError(f"{output} contains results and no {STUDY} of --own; choose another --output")
    else:
        # Whichever settings are chosen, it is a plan of as many seeds and runs that says as much.
        with _plan_of(images, _candidates(images, asked)[-1], max_seeds) as plan:
            outlooks = check(plan)
    say = partial(print, flush=True) if dry_run else _to_stderr
    say(images.describe())
    for line in _warnings(images):
        _warn(line)
    files: dict[str, str] = {}
    if file.exists():
        say(f"{file} is there; this goes on with it as it is")
        if plan.note:
            say(plan.note)
        expected = _in_memory(estimate_time(plan, cores))
        if hours and expected.total > 3600 * hours:
            _warn(f"this takes longer than --hours {exact(hours)}; fewer seeds or epochs in {file} take less")
    else:
        choice, expected = _choose(images, cores, hours, asked)
        for line in choice.describe():
            say(line)
        about = f"Expected on the machine where it was written: {expected.lines()[-1]}."
        files = study_files(images, choice, output, about)
    say("\n".join(expected.lines()) if expected.rows else "all runs are finished")
    whole = expected.runs == len(plan.runs)
    a_seed = expected.of_runs / len(plan.seeds) if whole else math.nan
    if plan.looks:
        most = f" in at most {duration(expected.total * plan.looks[-1] / len(plan.seeds))}" * whole
        say(f"until it is decided more seeds follow, up to {plan.looks[-1]}{most}")
    told = before(plan, [replace(x, seconds=a_seed) if math.isnan(x.seconds) else x for x in outlooks])
    for line in told:
        if not line.startswith(LITTLE):  # the warning stands first
            say(f"power: {line}")
    if dry_run:
        if files:
            say(f"would write {', '.join(str(Path(output, name)) for name in files)}")
        return 0
    if expected.rows and not yes and not typer.confirm("Go on?", default=True, err=True):
        _to_stderr("nothing was written")
        return 0
    check_output(Path(output), output)
    if not images.usual_names:
        _link(images, Path(data_path(images, output)))
    for name, text in reversed(files.items()):  # the study last: where it is, it is gone on with
        write_text(Path(output, name), text)
    return run_study(
        str(file), output, cores, False, options, max_seeds=max_seeds, variance_from=variance_from, told=True
    )


def _check_is_this(plan: Plan, file: Path, images: OwnImages, asked: Asked) -> None:
    """Check that the study which is there is one of these images, and does what is asked for."""
    if plan.data != data_path(images, plan.output):
        raise LskdError(f"{file} is a study of {plan.data}; choose another --output or remove it")
    if other := asked.differs(plan):
        raise LskdError(
            f"{file} is there and says otherwise than {other}; change it, or choose another --output"
        )


def _check_options(
    cores: int, options: Sequence[str], variance_from: str | None, plan: Plan
) -> list[Outlook]:
    executor = make_schedule(plan, cores, options).executor
    outlooks = outlooks_of(plan, variance_from)
    if (first := before(plan, outlooks)[0]).startswith(LITTLE):
        _warn(first)
    if executor != "local":
        _to_stderr(f"the times below are those of this machine, not of --executor {executor}")
    return outlooks


def _warnings(images: OwnImages) -> list[str]:
    found = []
    if images.strangers:
        count = len(images.strangers)
        found.append(
            f"{count} file{'s are no images and are' if count > 1 else ' is no image and is'} passed over, "
            f"e.g. {images.strangers[0]}" + f"; {PNG}" * any(converts(path.name) for path in images.strangers)
        )
    if images.smallest_class < 10:
        found.append(f"the smallest class has {images.smallest_class} training images")
    return found


def _choose(
    images: OwnImages, cores: int, hours: float | None, asked: Asked = USUAL
) -> tuple[Choice, TimeEstimate]:
    """Return the most wanted settings that fit the time, as measured, or the cheapest with fewer epochs.

    Raises:
        LskdError: not even those fit.
    """
    wanted = _candidates(images, asked)
    hours = hours or (HOURS_ON_GPU if wanted[0].gpu else HOURS_ON_CPU)
    limit = 3600 * hours
    cheapest = wanted[-1]
    _to_stderr(f"measuring a few steps, for a study of at most {duration(limit)} (--hours)")
    least = _in_memory(_try(images, cheapest, cores))
    unit = least.total / _work(images, cheapest)
    for choice in wanted[:-1]:
        if unit * _work(images, choice) / _BETTER_USED > limit:
            continue
        found = _try(images, choice, cores)
        if found is not None and found.total <= limit:
            return with_what_was_cut(choice, wanted[0], hours), found
    while least.total > limit and cheapest.epochs > FEWEST_EPOCHS:
        cheapest = shorter(cheapest, limit / least.total)
        least = least.shorter(cheapest.epochs)
    if least.total > limit:
        enough = math.ceil(1.1 * least.total / 36) / 100  # a second measurement gives another time
        raise LskdError(
            f"--hours {exact(hours)} cannot be met: {cheapest.epochs} epochs of {cheapest.teacher} on "
            f"{len(cheapest.seeds)} seeds need at least {duration(least.total)}; give --hours {exact(enough)}"
        )
    return with_what_was_cut(cheapest, wanted[0], hours), least


def _candidates(images: OwnImages, asked: Asked) -> list[Choice]:
    import torch

    gpu, count = torch.cuda.is_available(), torch.cuda.device_count()
    return candidates(images, gpu, usable_cores() // max(1, count), asked)


def _try(images: OwnImages, choice: Choice, cores: int) -> TimeEstimate | None:
    with _plan_of(images, choice) as plan:
        return estimate_time(plan, cores)


def _in_memory(expected: TimeEstimate | None) -> TimeEstimate:
    if expected is None:
        raise LskdError("even the smallest settings need more memory than the GPU has; free some, or hide it")
    return expected


@contextmanager
def _plan_of(images: OwnImages, choice: Choice, max_seeds: int | None = None) -> Iterator[Plan]:
    """Yield the plan of a choice, whose files lie in a scratch folder."""
    with tempfile.TemporaryDirectory(prefix="lskd-own-") as folder:
        if not images.usual_names:
            _link(images, Path(data_path(images, folder)))
        for name, text in study_files(images, choice, folder, "").items():
            write_text(Path(folder, name), text)
        yield make_plan(str(Path(folder, STUDY)), None, max_seeds)


def _work(images: OwnImages, choice: Choice) -> float:
    with _plan_of(images, choice) as plan:
        return operations(plan)


def _link(images: OwnImages, folder: Path) -> None:
    """Link the splits under their usual names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, path in images.splits.items():
            target = folder / split
            if target.is_symlink() and not target.samefile(path):
                raise LskdError(f"{target} is a link to other images; choose another --output or remove it")
            if not target.exists():
                os.symlink(path.resolve(), target, target_is_directory=True)
    except OSError as error:
        raise LskdError(
            f"cannot make links in {folder} ({error.strerror}); rename the folders to train and val"
        ) from None


def _warn(line: str) -> None:
    print(f"lskd: warning: {line}", file=sys.stderr)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
