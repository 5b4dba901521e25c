"""Which GPUs a run may use, where nobody but the study decides: one machine, several runs at a time.

On a cluster the scheduler gives each job its devices. On one machine Snakemake only counts, and every run
would land on the first device; so each run takes as many free ones as it asks for and keeps a lock on each,
which the kernel lets go when the run's last process ends, however it ends.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lskd import LskdError
from lskd.base.files import lock

# The devices to choose from, set by `lskd study` where it is the one who chooses.
CANDIDATES = "LSKD_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_COUNT = "import torch; print(torch.cuda.device_count())"


def visible_gpus() -> list[str]:
    """Return the names of the devices that a process started here sees: as in CUDA_VISIBLE_DEVICES, if set.

    They are counted in a process of its own: CUDA reads the variable once, and it is still to be set here.
    """
    given = os.environ.get(VISIBLE)
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        # CUDA itself stops at the first name that is none.
        stop = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:stop]
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    printed = done.stdout.split()
    return [str(index) for index in range(int(printed[-1]))] if printed and printed[-1].isdigit() else []


def gpus_of_a_run(resources: Mapping[str, int | str]) -> int:
    """Return how many GPUs a study's ``resources.extra`` asks for each run.

    Raises:
        LskdError: for something other than a number.
    """
    asked = resources.get("gpu", 0)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 0:
        raise LskdError(f"resources.extra.gpu is {asked!r}; it is the number of GPUs that a run needs")
    return asked


def gpus_for_all(resources: Mapping[str, int | str], limit: int | None) -> tuple[int, list[str]]:
    """Return how many GPUs all runs together may use here, and the names of those they choose from.

    Args:
        resources: a study's ``resources.extra``.
        limit: what `--resources gpu=N` says; None for all that are visible.

    Raises:
        LskdError: when fewer are visible than one run, or the limit, asks for.
    """
    asked = gpus_of_a_run(resources)
    if asked == 0:
        return 0, []
    names = visible_gpus()
    seen = f"{len(names)} {'is' if len(names) == 1 else 'are'} visible"
    if VISIBLE in os.environ:
        seen += f" ({VISIBLE}={os.environ[VISIBLE]})"
    if asked > len(names):
        fix = "take gpu out of the study's resources.extra to run it here"
        raise LskdError(f"each run asks for {_gpus(asked)} but {seen}; {fix}")
    if limit is not None and limit > len(names):
        raise LskdError(f"--resources gpu={limit} but {seen}; give {len(names)} or leave it out")
    if limit is not None and asked > limit:
        raise LskdError(
            f"each run asks for {_gpus(asked)} but --resources gives {limit}; give {asked} or more"
        )
    return len(names) if limit is None else limit, names


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


@contextlib.contextmanager
def chosen_gpus(
    resources: Mapping[str, int | str], say: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, str]]:
    """Lock as many free GPUs as a run asks for, alone visible to this process and to what it starts.

    Nothing is changed where `lskd study` does not choose, as on a cluster. Gives the variables that were set.
    ``say`` is told when there is none free yet: another study of the same user has them.
    """
    count = gpus_of_a_run(resources)
    names = [name for name in os.environ.get(CANDIDATES, "").split(",") if name]
    if not count or not names:
        yield {}
        return
    if count > len(names):
        raise LskdError(f"the run asks for {_gpus(count)} but may choose among {len(names)}")
    with contextlib.ExitStack() as locks:
        chosen = _take(count, names, locks)
        if not chosen:
            say(f"waits for {_gpus(count)}: too few of {', '.join(names)} are free")
        while not chosen:
            time.sleep(0.5)
            chosen = _take(count, names, locks)
        before = {VISIBLE: os.environ[VISIBLE]} if VISIBLE in os.environ else {}
        locks.callback(os.environ.update, before)
        locks.callback(os.environ.pop, VISIBLE, None)
        os.environ[VISIBLE] = ",".join(chosen)
        yield {VISIBLE: os.environ[VISIBLE]}


def _take(count: int, names: list[str], locks: contextlib.ExitStack) -> list[str]:
    """Lock that many free devices, or none."""
    folder = _lock_folder()
    # One chooser at a time, so that two runs of two GPUs each do not end up with one each.
    with lock(folder / "choosing", wait=True), contextlib.ExitStack() as taken:
        chosen: list[str] = []
        for name in names:
            place = folder / f"gpu-{name.replace('/', '_')}"
            if len(chosen) < count and taken.enter_context(lock(place)) is not None:
                chosen.append(name)
        if len(chosen) < count:
            return []
        locks.push(taken.pop_all())
        return chosen


def _lock_folder() -> Path:
    """Return a folder of this machine and user and, as SLURM may number devices anew, of the allocation."""
    allocation = os.environ.get("SLURM_JOB_ID", "")
    folder = Path(tempfile.gettempdir(), f"lskd-gpus-{os.getuid()}{allocation and f'-{allocation}'}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise LskdError(f"{folder} belongs to somebody else; set TMPDIR to a folder of yours")
    return folder
