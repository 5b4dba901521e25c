"""`python -m fairseq_kd.soft_labels DATA-BIN --path teacher.pt --output DIR`: ask the teacher once."""

from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_kd import passes
from fairseq_kd.errors import run
from fairseq_kd.task import data_identity
from fairseq_kd.teacher import Teacher
from lskd import LskdError, SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.terms import top_k_log_probabilities

_HELD = np.dtype([("values", np.float32), ("ids", np.int32)])  # of one word of one token


def main(argv: Sequence[str] | None = None) -> None:
    """Write the soft labels, or go on writing them.

    Raises:
        LskdError: for what the user can fix.
    """
    parser = passes.parser_of(
        "soft_labels", "Store a teacher's top-K of each target token. The same command goes on after an end."
    )
    parser.add_argument("--subset", default="train", help="which sentences (default: train)")
    parser.add_argument(
        "--top-k", type=int, default=8, metavar="K", help="words kept of each token (default: 8)"
    )
    parser.add_argument(
        "--values", choices=("float16", "float32"), default="float16", help="default: float16"
    )
    args = parser.parse_args(argv)
    teacher = passes.load_teacher(args)
    classes = len(teacher.task.target_dictionary)
    if not 1 <= args.top_k <= classes:
        raise LskdError(f"--top-k is {args.top_k}; it must be 1 to {classes}, the vocabulary's size")
    asked = passes.Pass(teacher, args.subset, args.max_tokens, cpu=args.cpu, fp16=args.fp16)
    layout = SoftLabelsLayout(classes, args.top_k, len(asked.pairs), values=args.values)
    with SoftLabelsWriter(args.output, layout, identity(teacher, args.subset, args.output)) as writer:
        if not writer.complete:
            _write(writer, asked)
    labels = SoftLabels(args.output)
    size = labels.info()["bytes"] / 2**20
    print(
        f"{args.output}: {len(labels)} sentences, {labels.rows} target tokens, top {args.top_k}, "
        f"{size:.1f} MiB"
    )


def identity(teacher: Teacher, subset: str, output: Path) -> dict[str, Any]:
    """Return what the soft labels are made of; the versions are those they were begun with."""
    cfg = teacher.task.cfg
    versions = {"torch": torch.__version__, "fairseq": _fairseq_version()}
    with suppress(LskdError):  # none there yet, or the writer says what is wrong with them
        versions = SoftLabels(output).identity.get("versions", versions)
    return {
        "teacher": {"checksum": teacher.checksum, "architecture": teacher.architecture},
        "teacher_bleu": teacher.bleu,
        "data": data_identity(cfg.data, subset, cfg.source_lang, cfg.target_lang),
        "augmentation": None,
        "versions": versions,
    }


def _write(writer: SoftLabelsWriter, asked: passes.Pass) -> None:
    k = writer.layout.k
    for window in passes.windows(asked.pairs, writer.keys, k * _HELD.itemsize):
        fitting = [asked.fits(index) for index in window]
        lengths = np.where(fitting, asked.pairs.tgt_sizes[window.start : window.stop], 0)
        ends = np.cumsum(lengths)
        rows = np.empty((ends[-1], k), _HELD)
        for batch in asked.batches(window):
            logits = asked.teacher.logits(batch["net_input"])
            values, ids = (part.cpu().numpy() for part in top_k_log_probabilities(logits, k))
            for row, index in enumerate(batch["id"].tolist()):
                place = index - window.start
                own = rows[ends[place] - lengths[place] : ends[place]]
                own["values"], own["ids"] = values[row, : len(own)], ids[row, : len(own)]
        writer.append(rows["values"], rows["ids"], lengths)


def _fairseq_version() -> str:
    for name in ("ve-fairseq", "fairseq-fixed", "fairseq"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


if __name__ == "__main__":
    run(main)
