"""The checksum of a study's data: whether all of its runs saw the same."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lskd import LskdError, file_checksum
from lskd.files import read_json, write_text
from lskd_study.data._layout import SPLITS
from lskd_study.data.manifest import MANIFEST
from lskd_study.plan import JOB, Plan, Run, Store
from lskd_study.progress import say
from lskd_study.schema import TRANSLATION

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
    try:
        files = list(_files(plan))
        listing = hashlib.sha256()
        size = 0
        for name, path in files:
            about = path.stat()
            size += about.st_size
            listing.update(f"{name}\0{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\n".encode())
        known = _known(plan)
        if known.get("listing") == listing.hexdigest():
            return str(known["sha256"])
        if size > _LARGE:
            say(f"reads {len(files):,} files of {plan.data} ({size / 1e9:.1f} GB) once, for their checksum")
        contents = hashlib.sha256()
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(files), _BLOCK):
                block = files[start : start + _BLOCK]
                sums = pool.map(file_checksum, (path for _, path in block))
                for (name, _), of_file in zip(block, sums, strict=True):
                    contents.update(f"{name}\0{of_file}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise LskdError(f"cannot read {error.filename} ({error.strerror}); mend the data") from error
    found = contents.hexdigest()
    if remember:
        write_text(plan.root / FILE, f'{{"listing": "{listing.hexdigest()}", "sha256": "{found}"}}\n')
    return found


def check_unchanged(plan: Plan) -> None:
    """Check before more is trained that the data are those of the runs, and soft labels, that are there.

    Raises:
        LskdError: they are not.
    """
    made: list[Run | Store] = [*plan.runs, *plan.stores]
    seen = {one.folder: sha256 for one in made if (sha256 := _recorded(plan, one))}
    if not seen or not plan.data_dir.exists():
        return
    now = data_checksum(plan, remember=False)
    older = [folder for folder, sha256 in seen.items() if sha256 != now]
    if older:
        raise LskdError(
            f"the data in {plan.data} changed since {len(older)} runs of {plan.output} were made, e.g. "
            f"{older[0]}; put the data back, remove the folders of those runs, or choose another --output"
        )


def _recorded(plan: Plan, made: Run | Store) -> str:
    try:
        return str(read_json(plan.root / made.folder / JOB)["data"]["sha256"])
    except (LskdError, KeyError, TypeError):
        return ""


def _files(plan: Plan) -> Iterator[tuple[str, Path]]:
    """Yield relative name and path of each file, sorted; links are followed, as the trainers do."""
    root = plan.data_dir
    for top in [root] if plan.ecosystem == TRANSLATION else [root / split for split in SPLITS]:
        for folder, folders, names in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if not name.startswith(".") and path != root / MANIFEST:
                    yield path.relative_to(root).as_posix(), path


def _known(plan: Plan) -> dict[str, str]:
    try:
        found = read_json(plan.root / FILE)
    except LskdError:
        return {}
    return found if isinstance(found, dict) and {"listing", "sha256"} <= found.keys() else {}
