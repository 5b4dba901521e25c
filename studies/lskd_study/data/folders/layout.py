"""One image folder, written whole or not at all: ``train/<class>/``, ``val/<class>/`` and a manifest.

While it is made, the folder lies beside its place under a hidden name. A command that was killed finds it
there and goes on; a command that fails removes it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import cannot_write, is_scratch, lock, write_text
from lskd.base.images import passed_over
from lskd_study.base.files import check_writable, read_object
from lskd_study.base.text import gigabytes
from lskd_study.data.folders.archives import check_md5
from lskd_study.data.folders.rows import SPLITS, Image, Rows
from lskd_study.data.manifest import MANIFEST, OTHER_PLACE, Made, read_manifest, refuse_other

_SETTINGS = ".settings.json"
_CHECKED = ".checked.json"
_LOCK = ".lock"
_INCOMING = ".incoming"
_OF_SOURCES = ("source_files", "source_listing_sha256")
# What file systems answer where a kind of link is not possible: other disk, not the owner, no such feature.
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
)


class Tree:
    """The folder while it is made.

    Attributes:
        counts: images put there so far, by split and class.
        links: files by how they came: ``hard``, ``symbolic``, ``copied``, ``written``.
    """

    def __init__(self, folder: Path, copy: bool) -> None:
        self._folder = folder
        self._copies = copy
        self._ways: tuple[str, ...] = ("copied",) if copy else ("hard", "symbolic", "copied")
        self._made: set[Path] = set()
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.links: Counter[str] = Counter()

    def fill(self, rows: Rows) -> None:
        """Check the archives and the space, then put everything there.

        Raises:
            LskdError: for an archive that is not its publisher's, a disk without room, and what reading
                raises.
        """
        from tqdm import tqdm

        copied = [image.source for image in rows.linked if isinstance(image.source, Path) and self._copies]
        self._require_space(rows.size + sum(path.stat().st_size for path in copied))
        self._check_archives(rows.archives)
        for image in tqdm(rows.linked, desc="images", unit=" images", leave=False, disable=None):
            self.add(image)
        for image in rows.unpacked():
            self.add(image)
        for name, content in rows.files.items():
            self.write(name, content)

    def add(self, image: Image) -> None:
        """Put an image there unless an earlier run left it whole: a file is linked to, or copied."""
        name, source = f"{image.split}/{image.label}/{image.name}", image.source
        if isinstance(source, Path):
            way = self._link(self._place(name), Path(os.path.realpath(source)))
        else:
            way, size = "written", len(source) if isinstance(source, bytes) else source.size
            if not _has_size(self._folder / name, size):
                self.write(name, source if isinstance(source, bytes) else source.read())
        self.counts[image.split][image.label] += 1
        self.links[way] += 1

    def write(self, name: str, content: bytes) -> None:
        """Write a file in one piece."""
        target, incoming = self._place(name), self._folder / _INCOMING
        incoming.write_bytes(content)
        os.replace(incoming, target)

    def _require_space(self, size: int) -> None:
        """Check that ``size`` bytes fit in all, those of an earlier run included."""
        usage = shutil.disk_usage(self._folder)
        if size > usage.free:
            there = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            if size - there > usage.free:
                raise LskdError(
                    f"the disk of {self._folder.parent} has {gigabytes(usage.free)} free, this needs "
                    f"{gigabytes(size - there)}; free some, or choose another --output"
                )

    def _check_archives(self, archives: Mapping[Path, str]) -> None:
        """Compare MD5s, but of archives that a run which was killed had compared."""
        passed = read_object(self._folder / _CHECKED)
        for archive, md5 in archives.items():
            about = archive.stat()
            key = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns} {md5}"
            if key not in passed:
                check_md5(archive, md5)
                passed[key] = True
                self.write(_CHECKED, json.dumps(passed).encode())

    def _link(self, target: Path, source: Path) -> str:
        """Make a hard link, a symbolic link or a copy, the first that is possible; return which."""
        while True:
            way = self._ways[0]
            try:
                self._put(way, source, target)
            except OSError as error:
                if error.errno not in _NO_LINK or len(self._ways) == 1:
                    raise
                if error.errno == errno.EMLINK:  # of this one file
                    self._put("copied", source, target)
                    return "copied"
                self._ways = self._ways[1:]
            else:
                return way

    def _put(self, way: str, source: Path, target: Path) -> None:
        try:
            if way == "hard":
                os.link(source, target)
            elif way == "symbolic":
                os.symlink(source, target)
            elif not _has_size(target, source.stat().st_size):
                incoming = self._folder / _INCOMING
                shutil.copyfile(source, incoming)
                os.replace(incoming, target)
        except FileExistsError:
            if not (target.exists() and target.samefile(source)):
                target.unlink()
                self._put(way, source, target)

    def _place(self, name: str) -> Path:
        target = self._folder / name
        if target.parent not in self._made:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(target.parent)
        return target


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def build(
    output: Path,
    name: str,
    settings: Mapping[str, Any],
    plan: Callable[[], Rows],
    copy: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Made:
    """Make an image folder unless it is there.

    Args:
        output: folder to write.
        name: of the data set, for the manifest.
        settings: what decides what is in the folder, e.g. a seed; kept in the manifest and compared with it.
        plan: checks the source, as far as can be told without writing, and returns what is to be written.
        copy: copy files where links would do.
        sources: fingerprints of the files that the images or their labels come from.

    Raises:
        LskdError: for an output that cannot be written or contains something else, and what ``plan`` raises.
    """
    asked = {"name": name, **settings, **({"source_files": sources} if sources else {}), "copies": copy}
    finished = _finished(output, asked)
    if finished is not None:
        with suppress(OSError):
            _tidy(output)
        return Made(output, finished, False)
    refuse_other(output, "data set", OTHER_PLACE)
    check_writable(output, folder=True)
    rows = plan()
    try:
        with _partial(output, asked) as folder:
            tree = Tree(folder, copy)
            tree.fill(rows)
            manifest = asked | dict(rows.more) | _contents(folder, tree)
            tree.write(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            if output.is_dir():
                output.rmdir()
            os.replace(folder, output)
            _tidy(output)
    except OSError as error:
        raise cannot_write(output, error) from error
    return Made(output, manifest, True)


def _tidy(output: Path) -> None:
    """Remove what served while it was made, without which the hidden folder would be nobody's."""
    for name in (_SETTINGS, _CHECKED, _LOCK):
        (output / name).unlink(missing_ok=True)


def listing_checksum(folder: Path) -> str:
    """Return the sha256 of the sorted relative names and sizes of the files under ``train`` and ``val``."""
    digest = hashlib.sha256()
    for path in sorted(_files(folder)):
        digest.update(
            f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of both splits, without those that file managers and notebooks leave there."""
    for split in SPLITS:
        for path in (folder / split).rglob("*"):
            if path.is_file() and not any(map(passed_over, path.relative_to(folder).parts)):
                yield path


def _contents(folder: Path, tree: Tree) -> dict[str, Any]:
    classes = sorted(set(tree.counts["train"]) | set(tree.counts["val"]))
    counted = sum(tree.counts[split].total() for split in SPLITS)
    found = sum(1 for _ in _files(folder))
    if counted != found:
        raise LskdError(
            f"{counted:,} images became {found:,} files; the source changed, or has images of the same name"
        )
    return {
        "num_classes": len(classes),
        "classes": classes,
        "images": {split: tree.counts[split].total() for split in SPLITS},
        "images_per_class": {split: [tree.counts[split][label] for label in classes] for split in SPLITS},
        "files": dict(tree.links),
        "listing_sha256": listing_checksum(folder),
    }


def _finished(output: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    manifest = read_manifest(output, {"num_classes", "classes", "images", "images_per_class"})
    if manifest.get("name") != asked["name"]:
        return None
    for key, value in asked.items():
        if key != "copies" and manifest.get(key) != value:
            other = f"contains {asked['name']} with {key} {manifest.get(key)}, not {value}"
            other = "was made when the source was another" if key in _OF_SOURCES else other
            raise LskdError(f"{output} {other}; {OTHER_PLACE}")
    counts = [manifest["images_per_class"].get(split, []) for split in SPLITS]
    if (
        manifest.get("listing_sha256") != listing_checksum(output)
        or manifest["images"] != dict(zip(SPLITS, map(sum, counts), strict=True))
        or {manifest["num_classes"], *map(len, counts)} != {len(manifest["classes"])}
    ):
        return None
    if asked["copies"] and set(manifest.get("files", {})) & {"hard", "symbolic"}:
        raise LskdError(f"{output} contains links; for copies {OTHER_PLACE}")
    return manifest


@contextmanager
def _partial(output: Path, asked: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the hidden folder, that of a killed run of the same settings if there is one.

    Only what such a run has left is removed: a folder without its settings is somebody else's.
    """
    folder = output.parent / f".{output.name}.partial"
    settings = json.loads(json.dumps(asked))
    begun = folder.is_dir() and all(path.name == _LOCK or is_scratch(path) for path in folder.iterdir())
    ours = not folder.is_symlink() and (begun or bool(read_object(folder / _SETTINGS)))
    if os.path.lexists(folder) and not ours:
        raise LskdError(f"{folder} was not made by this command; move it away or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / _LOCK) as held:
        if held is None:
            raise LskdError(f"another command is writing {output}; wait for it or end it")
        try:
            if read_object(folder / _SETTINGS) != settings:
                for entry in folder.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name not in (_LOCK, _SETTINGS):
                        entry.unlink()
                write_text(folder / _SETTINGS, json.dumps(settings))
            yield folder
        except Exception:  # not KeyboardInterrupt: the same command goes on from there
            shutil.rmtree(folder, ignore_errors=True)
            raise
