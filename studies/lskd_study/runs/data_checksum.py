"""The checksum of a study's data: whether all of its runs saw the same."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from lskd import LskdError
from lskd.base.files import write_text
from lskd.checkpoints import file_checksum
from lskd_study.base.files import read_object
from lskd_study.base.progress import say
from lskd_study.data.manifest import MANIFEST
from lskd_study.plan.plan import JOB, Plan, Run, Store

FILE = "data_checksum.json"
_BLOCK = 4096  # files that are handed to the threads at once
_READERS = 8
_LARGE = 1_000_000_000  # bytes from which reading them is worth a line


def data_checksum(plan: Plan, remember: bool = True) -> str:
    """Return the sha256 of the names and contents of a study's data.

    Of images all files below ``train`` and ``val``, of translation all of the data-bin; hidden ones count
    nowhere. Contents are read once for a study: as long as no file has another size or time of change than
    when they were read, which the output folder remembers, what was found then stands. A copy of the data
    is read anew and has the same checksum. ``remember``: write it down for the next time.

    Raises:
        LskdError: for data that cannot be read.
    """
    root = str(plan.data_dir)
    try:
        names = list(_names(plan))
        listing, contents, size = hashlib.sha256(), hashlib.sha256(), 0
        for name in names:
            about = os.stat(os.path.join(root, name))
            size += about.st_size
            times = f"{about.st_mtime_ns} {about.st_ctime_ns}"
            listing.update(os.fsencode(f"{name}\0{about.st_size} {times}\n"))
    except OSError as error:
        raise LskdError(f"cannot read {error.filename} ({error.strerror}); fix the data") from error
    known = read_object(plan.root / FILE)
    if known.get("listing") == listing.hexdigest() and "sha256" in known:
        return str(known["sha256"])
    if size > _LARGE:
        say(f"reads {len(names):,} files of {plan.data} ({size / 1e9:.1f} GB) once, for their checksum")
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(names), _BLOCK):
            block = names[start : start + _BLOCK]
            sums = pool.map(file_checksum, (os.path.join(root, name) for name in block))
            for name, of_file in zip(block, sums, strict=True):
                contents.update(os.fsencode(f"{name}\0{of_file}\n"))
    found = contents.hexdigest()
    if remember:
        write_text(plan.root / FILE, f'{{"listing": "{listing.hexdigest()}", "sha256": "{found}"}}\n')
    return found


def check_same_data(plan: Plan, before: str, meanwhile: str) -> None:
    """Check at the end of a run, or of soft labels, that the data are those of its start.

    Raises:
        LskdError: they are not.
    """
    if data_checksum(plan) != before:
        raise LskdError(
            f"the data in {plan.data} changed while {meanwhile}, so nothing is recorded of it; leave them "
            "alone and give the same command again, it starts anew"
        )


def check_unchanged(plan: Plan) -> None:
    """Check before more is trained that the data are those of the runs, and soft labels, that are there.

    Raises:
        LskdError: they are not.
    """
    made: list[Run | Store] = [*plan.runs, *plan.stores]
    data = {one.folder: read_object(plan.root / one.folder / JOB).get("data") for one in made}
    seen = {folder: was.get("sha256") for folder, was in data.items() if isinstance(was, dict)}
    if not seen or not plan.data_dir.exists():
        return
    now = data_checksum(plan, remember=False)
    older = [folder for folder, sha256 in seen.items() if sha256 != now]
    if older:
        raise LskdError(
            f"the data in {plan.data} changed since {len(older)} runs of {plan.output} were made, e.g. "
            f"{older[0]}; put the data back, remove the folders of those runs, or choose another --output"
        )


def _names(plan: Plan) -> Iterator[str]:
    """Yield the path of each file below the data folder, sorted; links are followed, as the trainers do."""
    root = str(plan.data_dir)
    for top in plan.kind.splits:
        for folder, folders, names in os.walk(os.path.join(root, top), followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = os.path.relpath(folder, root)
            for name in sorted(names):
                if not name.startswith(".") and (below, name) != (".", MANIFEST):
                    yield os.path.normpath(os.path.join(below, name))
