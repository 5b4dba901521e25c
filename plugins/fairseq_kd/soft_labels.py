"""`python -m fairseq_kd.soft_labels DATA-BIN --path teacher.pt --output DIR`: ask the teacher once."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import fairseq
import numpy as np
import torch

from fairseq_kd import passes
from fairseq_kd.errors import run
from fairseq_kd.task import data_identity
from fairseq_kd.teacher import Teacher
from lskd import LskdError, SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout, ValueDtype, read_manifest, shard_folder
from lskd.soft_labels.forms import drawing_points
from lskd.terms import sampled_log_probabilities, top_k_log_probabilities

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
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--top-k", type=int, default=8, metavar="K", help="words kept of each token (default: 8)"
    )
    kept.add_argument(
        "--sampled",
        type=int,
        metavar="N",
        help="keep N words that are drawn, so that their weights are the teacher's probabilities in "
        "expectation; for students at temperature 1",
    )
    parser.add_argument(
        "--values",
        choices=get_args(ValueDtype),
        default="float16",
        help="how log-probabilities are stored; packed: in 8 bits, and words in as few as they need "
        "(default: float16)",
    )
    parser.add_argument(
        "--shard",
        default="",
        metavar="I/N",
        help="write the I-th of N shards, which as many jobs write at once; `lskd soft-labels merge DIR` "
        "then makes the soft labels of them",
    )
    args = parser.parse_args(argv)
    args.output = shard_folder(args.output, args.shard)
    teacher = passes.load_teacher(args)
    classes = len(teacher.task.target_dictionary)
    sampled = args.sampled is not None
    flag, k = ("--sampled", args.sampled) if sampled else ("--top-k", args.top_k)
    if not 1 <= k <= classes:
        raise LskdError(f"{flag} is {k}; it must be 1 to {classes}, the vocabulary's size")
    asked = passes.Pass(teacher, args.subset, args.max_tokens, cpu=args.cpu, fp16=args.fp16)
    layout = SoftLabelsLayout(
        classes, k, len(asked.pairs), values=args.values, sampled=sampled, shard=args.shard
    )
    with SoftLabelsWriter(args.output, layout, identity(teacher, args.subset, args.output)) as writer:
        if not writer.complete:
            _write(writer, asked)
    labels = SoftLabels(args.output, shard=args.shard)
    size, error = labels.info()["bytes"] / 2**20, labels.own_error
    print(
        f"{args.output}: {len(labels)} sentences, {labels.rows} target tokens, {layout.kept} words, "
        f"{size:.1f} MiB" + (f"; {error}" if error else "")
    )


def identity(teacher: Teacher, subset: str, output: Path) -> dict[str, Any]:
    """Return what the soft labels are made of; the versions are those they were begun with."""
    cfg = teacher.task.cfg
    versions = {"torch": torch.__version__, "fairseq": fairseq.__version__}
    with suppress(LskdError):  # none there yet, or the writer says what is wrong with them
        versions = read_manifest(output).identity.get("versions", versions)
    return {
        "teacher": {"checksum": teacher.checksum, "architecture": teacher.architecture},
        "teacher_bleu": teacher.bleu,
        "data": data_identity(cfg.data, subset, cfg.source_lang, cfg.target_lang),
        "augmentation": None,
        "versions": versions,
    }


def _write(writer: SoftLabelsWriter, asked: passes.Pass) -> None:
    k, first = writer.layout.k, writer.layout.first
    held = k * _HELD.itemsize
    for window in passes.windows(asked.pairs, first + writer.keys, held, stop=writer.layout.stop):
        fitting = [asked.fits(index) for index in window]
        lengths = np.where(fitting, asked.pairs.tgt_sizes[window.start : window.stop], 0)
        ends = np.cumsum(lengths)
        rows = np.empty((ends[-1], k), _HELD)
        for batch in asked.batches(window):
            logits = asked.teacher.logits(batch["net_input"])
            keys = np.asarray(batch["id"].tolist())
            kept = _kept(logits, writer.layout, keys)
            counts = batch["target"].ne(asked.teacher.task.target_dictionary.pad())
            writer.measure(keys, logits, *kept, counts)
            values, ids = (part.cpu().numpy() for part in kept)
            for row, index in enumerate(keys.tolist()):
                place = index - window.start
                own = rows[ends[place] - lengths[place] : ends[place]]
                own["values"], own["ids"] = values[row, : len(own)], ids[row, : len(own)]
        writer.append(rows["values"], rows["ids"], lengths)


def _kept(logits: torch.Tensor, layout: SoftLabelsLayout, keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and words ``(sentences, tokens, k)``; draws follow from key and token."""
    if not layout.sampled:
        return top_k_log_probabilities(logits, layout.k)
    points = drawing_points(keys[:, None], np.arange(logits.shape[1]))
    return sampled_log_probabilities(logits, layout.k, points.to(logits.device))


if __name__ == "__main__":
    run(main)
