"""Parallel text, split into subwords learned on the training text, and fairseq's data-bin of it."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import whole_folder
from lskd.base.images import passed_over
from lskd.base.install import how_to_install
from lskd_study.data.manifest import MANIFEST, OTHER_PLACE, Made, read_manifest, refuse_other

TEXT_SPLITS = ("train", "valid", "test")
LANGUAGES = ("de", "en")

Pair = tuple[str, str]


def write_parallel(
    output: Path,
    name: str,
    make: Callable[[], tuple[Mapping[str, Sequence[Pair]], dict[str, Any]]],
    bpe_tokens: int,
    source: str = "",
) -> Made:
    """Write German-English text unless it is there.

    ``train``, ``valid`` and ``test`` in ``.de`` and ``.en``, subwords joined by ``@@``, are what
    fairseq-preprocess takes; ``words/`` has the same before subwords, ``code`` is the subword model. The
    folder appears whole or not at all.

    Args:
        output: folder to write.
        name: of the data set, for the manifest.
        make: returns the pairs (German, English) by split, and what else belongs into the manifest.
        bpe_tokens: subwords to learn on the joint training text; 0 for none.
        source: fingerprint of the file that the text comes from, if there is one.

    Raises:
        LskdError: for an output that cannot be written or contains something else.
    """
    settings = {"name": name, "bpe_tokens": bpe_tokens} | ({"source_sha256": source} if source else {})
    finished = _finished(output, settings)
    if finished is not None:
        return Made(output, finished, False)
    refuse_other(output, "data set", OTHER_PLACE)
    splits, more = make()
    for split in TEXT_SPLITS:
        if not splits[split]:
            raise LskdError(f"the {split} split of {name} would be empty; the source has too few sentences")

    def fill(scratch: Path) -> dict[str, Any]:
        _write(scratch, splits, bpe_tokens)
        return settings | more | {"pairs": {split: len(splits[split]) for split in TEXT_SPLITS}}

    return _write_folder(output, fill)


def write_data_bin(
    output: Path, text: Path, manifest: Mapping[str, Any], options: Mapping[str, bool | int | str]
) -> Made:
    """Binarise German-English text by fairseq-preprocess unless it is done.

    The folder appears whole or not at all, with a manifest of its own.

    Args:
        output: folder to write.
        text: folder that :func:`write_parallel` wrote.
        manifest: its manifest.
        options: of the command that made the text, by name.

    Raises:
        LskdError: for an output that cannot be written or contains something else, or without fairseq.
    """
    made = read_manifest(output)
    source = manifest["listing_sha256"]
    if made.get("text_sha256") == source and made.get("listing_sha256") == text_checksum(output):
        return Made(output, made, False)
    refuse_other(output, "data-bin", "choose another one or remove it")
    if find_spec("fairseq_cli") is None:
        raise LskdError(f"this needs fairseq, not installed here; {how_to_install('fairseq')}")

    def fill(scratch: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "-s", "de", "-t", "en"]
        command += ["--destdir", str(scratch)]
        for split in TEXT_SPLITS:
            command += [f"--{split}pref", str(text / split)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise LskdError(f"fairseq-preprocess failed on {text}: {lines[-1] if lines else done.returncode}")
        (scratch / "preprocess.log").unlink(missing_ok=True)  # names the scratch folder
        kept = {"name": manifest["name"], "options": dict(options), "pairs": manifest["pairs"]}
        return kept | {"text_sha256": source}

    return _write_folder(output, fill)


def _write_folder(output: Path, fill: Callable[[Path], dict[str, Any]]) -> Made:
    """Write a folder whole or not at all; ``output`` is absent or empty, ``fill`` returns the manifest.

    Raises:
        LskdError: the disk cannot take it.
    """
    with whole_folder(output) as scratch:
        manifest = fill(scratch)
        manifest["listing_sha256"] = text_checksum(scratch)
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Made(output, manifest, True)


def clean_pairs(pairs: Iterable[Pair], ratio: float, shortest: int, longest: int) -> list[Pair]:
    """Keep pairs of ``shortest`` to ``longest`` words each, neither ``ratio`` times as long as the other.

    What Moses' clean-corpus-n does.
    """
    kept = []
    for source, target in pairs:
        a, b = len(source.split()), len(target.split())
        if shortest <= a <= longest and shortest <= b <= longest and a <= ratio * b and b <= ratio * a:
            kept.append((" ".join(source.split()), " ".join(target.split())))
    return kept


def tokenizer(language: str) -> Callable[[str], str]:
    """Return Moses' tokeniser of a language, followed by lower case."""
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer(lang=language)
    return lambda line: str(moses.tokenize(line, return_str=True)).lower()


def _write(folder: Path, splits: Mapping[str, Sequence[Pair]], bpe_tokens: int) -> None:
    apply = _subwords(folder, splits["train"], bpe_tokens) if bpe_tokens else None
    for split in TEXT_SPLITS:
        for column, language in enumerate(LANGUAGES):
            words = [pair[column] for pair in splits[split]]
            if apply is not None:
                _write_lines(folder / "words" / f"{split}.{language}", words)
                words = [apply(line) for line in words]
            _write_lines(folder / f"{split}.{language}", words)


def _subwords(folder: Path, train: Sequence[Pair], tokens: int) -> Callable[[str], str]:
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    text = io.StringIO("".join(f"{pair[column]}\n" for column in (0, 1) for pair in train))
    codes = io.StringIO()
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bar
        learn_bpe(text, codes, num_symbols=tokens)
    (folder / "code").write_text(codes.getvalue(), encoding="utf-8")
    bpe = BPE(codes)  # which keeps what it has made of each word
    return lambda line: str(bpe.segment(" ".join(line.split())))


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(f"{line}\n" for line in lines)


def text_checksum(folder: Path) -> str:
    """Return the sha256 of the names and contents of the texts."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file() and not passed_over(path.name))
    for file in sorted(path for path in files if path.name != MANIFEST):
        digest.update(f"{file.relative_to(folder).as_posix()} ".encode(errors="surrogateescape"))
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _finished(output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    manifest = read_manifest(output, {"name", "pairs"})
    if manifest.get("name") != settings["name"]:
        return None
    for key, value in settings.items():
        if manifest.get(key) != value:
            raise LskdError(f"{output} was made with {key} {manifest.get(key)}, not {value}; {OTHER_PLACE}")
    counted = manifest["pairs"].keys() >= set(TEXT_SPLITS)
    return manifest if counted and manifest.get("listing_sha256") == text_checksum(output) else None
