"""Parallel text as fairseq reads it: a data-bin, made by fairseq-preprocess."""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.data.manifest import MANIFEST, read_manifest
from lskd_study.data.text.parallel import SPLITS, listing_checksum, whole_folder


def write_data_bin(
    output: Path, text: Path, manifest: Mapping[str, Any], options: Mapping[str, bool | int | str]
) -> bool:
    """Binarise German-English text unless it is done; return whether it was.

    The folder appears whole or not at all, with a manifest of its own.

    Args:
        output: folder to write.
        text: folder that :func:`~lskd_study.data.text.parallel.write_parallel` wrote.
        manifest: what that function returned.
        options: of the command that made the text, by name.

    Raises:
        LskdError: for an output that cannot be written or holds something else, or without fairseq.
    """
    origin = {
        "name": manifest["name"],
        "options": dict(options),
        "pairs": manifest["pairs"],
        "text_sha256": manifest["listing_sha256"],
    }
    if _finished(output, origin["text_sha256"]):
        return False
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LskdError(f"{output} exists and is not this data-bin; choose another one or remove it")
    if find_spec("fairseq_cli") is None:
        raise LskdError(f"this needs fairseq, not installed here; {how_to_install('fairseq')}")
    with whole_folder(output) as scratch:
        _preprocess(text, scratch)
        content = {**origin, "listing_sha256": listing_checksum(scratch)}
        (scratch / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return True


def _preprocess(text: Path, folder: Path) -> None:
    words = [sys.executable, "-m", "fairseq_cli.preprocess", "-s", "de", "-t", "en", "--destdir", str(folder)]
    for split in SPLITS:
        words += [f"--{split}pref", str(text / split)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise LskdError(f"fairseq-preprocess failed on {text}: {lines[-1] if lines else done.returncode}")
    (folder / "preprocess.log").unlink(missing_ok=True)  # names the scratch folder


def _finished(folder: Path, text_sha256: str) -> bool:
    manifest = read_manifest(folder)
    if manifest.get("text_sha256") != text_sha256:
        return False
    return bool(manifest.get("listing_sha256") == listing_checksum(folder))
