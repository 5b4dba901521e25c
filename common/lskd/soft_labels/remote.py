"""Stored soft labels on object storage: copied once into a local folder, and read from there."""

import hashlib
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lskd.base.files import cannot_write, lock, no_link, to_disk
from lskd.base.install import how_to_install
from lskd.errors import SoftLabelsError, one_line
from lskd.soft_labels.blocks import DIGEST_BYTES
from lskd.soft_labels.format import COPY, MANIFEST, read_manifest
from lskd.soft_labels.store import SoftLabels

_MANIFEST_BYTES = 1 << 24
_AT_ONCE = 1 << 23  # bytes that are asked for at a time
_SECONDS = 60.0  # within which they must come


def local_folder(path: str | Path, cache: str | Path | None = None) -> Path:
    """Return the folder to read soft labels from: ``path``, or for a URL a local copy of what is there.

    Whatever fsspec reads (``s3://``, ``gs://``, ``https://``, ``file://``, ...) is read; nothing is sent.
    The copy is known by the checksum of its manifest, so it is made once, and again where the manifest has
    changed. A copy that was cut short goes on where it stopped; it takes its name when all its blocks are
    checked. Processes that ask for the same one wait for each other.

    Args:
        path: a folder, or the URL of one.
        cache: where copies are kept; None: ``lskd/soft_labels`` in the user's cache folder.

    Raises:
        SoftLabelsError: fsspec is not installed, the storage does not answer in a minute or has something
            else there, or the copy cannot be written.
    """
    url = str(path)
    if "://" not in url:
        return Path(path)
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lskd", "soft_labels")
    storage = _Storage(url)
    manifest = storage.read(MANIFEST, 0, _MANIFEST_BYTES)
    folder = Path(cache, hashlib.sha256(manifest).hexdigest()[:32])
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not folder.exists():
                part.mkdir(exist_ok=True)
                (part / COPY).touch()
                (part / MANIFEST).write_bytes(manifest)
                _copy(storage, part)
                to_disk(part)
                part.replace(folder)
    except OSError as error:
        raise SoftLabelsError(str(cannot_write(part, error))) from None
    return folder


def written_folder(path: str | Path) -> Path:
    """Return a folder to write in.

    Raises:
        SoftLabelsError: it is a URL.
    """
    if "://" in str(path):
        raise SoftLabelsError(
            f"{without_secrets(str(path))} is a URL, where nothing is written; name a local folder, and copy "
            "it there when it is complete"
        )
    return Path(path)


def _copy(storage: "_Storage", part: Path) -> None:
    """Copy what is missing in ``part``, and check all of it."""
    try:
        manifest = read_manifest(part)
    except SoftLabelsError:
        raise SoftLabelsError(f"{storage.name}/{MANIFEST} is not one of soft labels; check the URL") from None
    if not manifest.complete:
        raise SoftLabelsError(
            f"the soft labels in {storage.name} are unfinished ({manifest.keys} of {manifest.layout.keys} "
            "keys), and nothing is written there; copy them to a local folder and go on there"
        )
    for name, committed in manifest.files.items():
        sums = committed.bytes // manifest.block_bytes * DIGEST_BYTES
        for file, size in ((f"{name}.bin.sums", sums), (f"{name}.bin", committed.bytes)):
            with open(part / file, "ab", opener=no_link) as target:
                while (at := target.tell()) < size:
                    target.write(storage.read(file, at, min(at + _AT_ONCE, size), whole=True))
    try:
        SoftLabels(part).verify()
    except SoftLabelsError as error:
        for bad in part.glob("*.bin*"):  # what came does not belong to the manifest: from the beginning then
            bad.unlink()
        raise SoftLabelsError(
            f"what {storage.name} gave is damaged ({error}); it is read anew the next time"
        ) from None


class _Storage:
    """What is below a URL, read in pieces.

    Attributes:
        name: the URL without a user's name and password.

    Raises:
        SoftLabelsError: there is no fsspec, or none for such URLs.
    """

    def __init__(self, url: str) -> None:
        self.name = without_secrets(url.rstrip("/"))
        try:
            import fsspec
        except ImportError:
            raise SoftLabelsError(
                f"{self.name} is read by fsspec, which is not installed; {how_to_install('remote')}"
            ) from None
        self._system, self._root = self._asked(lambda: fsspec.core.url_to_fs(url.rstrip("/")))

    def read(self, file: str, start: int, stop: int, whole: bool = False) -> bytes:
        """Return bytes ``start`` to ``stop`` of a file, or with ``whole`` no fewer.

        Raises:
            SoftLabelsError: they do not come.
        """
        data = bytes(self._asked(lambda: self._system.cat_file(f"{self._root}/{file}", start, stop)))
        if len(data) > stop - start or (whole and len(data) < stop - start):
            raise SoftLabelsError(
                f"{self.name}/{file} gave {len(data)} bytes from {start} on where {stop - start} were "
                "asked for: it is cut short or not what its manifest says, or cannot be read in parts; what "
                "came before is kept"
            )
        return data

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Ask in a thread that nobody waits for at the end: not every kind of storage gives up by itself."""
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((ask(), None))
            except Exception as error:  # each kind of storage has its own
                answers.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            answer, error = answers.get(timeout=_SECONDS)
        except queue.Empty:
            answer, error = None, TimeoutError(f"no answer in {_SECONDS:g} seconds")
        if error is not None:
            what = without_secrets(one_line(error, 200))
            raise SoftLabelsError(
                f"{self.name} cannot be read ({type(error).__name__}: {what}); what came before is kept, "
                "and the same command goes on from it"
            ) from None
        return answer


def without_secrets(text: str) -> str:
    """Return a text as messages may show it: without the user, password and query of the URLs in it."""
    return re.sub(r"(://[^\s?]*\?)[^\s]+", r"\1...", re.sub(r"//[^/@\s]*@", "//", text))
