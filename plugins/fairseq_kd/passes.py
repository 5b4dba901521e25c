"""A teacher's pass over a data-bin, in the order of its sentences and in bounded memory."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import utils

from fairseq_kd.teacher import Teacher, split_paths
from lskd import LskdError

WINDOW = 2048  # sentences that are held at a time, and sorted by length to fill batches
WINDOW_BYTES = 256 << 20  # of what is held of them; one sentence may have more


def add_pass_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every pass needs."""
    parser.add_argument("data", metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    parser.add_argument(
        "--path", required=True, metavar="FILE", help="the teacher: a checkpoint, a folder (its best), or A:B"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("-s", "--source-lang", default=None, help="default: the teacher's")
    parser.add_argument("-t", "--target-lang", default=None, help="default: the teacher's")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens in a batch (default: 4096)")
    parser.add_argument("--cpu", action="store_true", help="not on the GPU even where there is one")
    parser.add_argument("--fp16", action="store_true", help="the teacher in half precision")


def load_teacher(args: argparse.Namespace) -> Teacher:
    """Load the teacher.

    Raises:
        LskdError: for arguments or files that cannot be used.
    """
    if args.max_tokens < 1:
        raise LskdError(f"--max-tokens is {args.max_tokens}; it must be 1 or more")
    if not Path(args.data).is_dir():
        raise LskdError(f"data-bin {args.data} is not a folder; give what fairseq-preprocess wrote")
    return Teacher(split_paths(args.path), args.data, args.source_lang, args.target_lang)


def load_pairs(teacher: Teacher, subset: str, args: argparse.Namespace, teaches: bool = True) -> Any:
    """Return the sentence pairs of a subset, and bring the teacher to its device.

    One that ``teaches`` must make sense of them.

    Raises:
        LskdError: it is not there, or it has no targets.
    """
    task = teacher.task
    task.cfg.left_pad_target = False
    try:
        task.load_dataset(subset, combine=False, task_cfg=task.cfg)
    except (FileNotFoundError, OSError) as error:
        raise LskdError(f"subset '{subset}' is not in {task.cfg.data} ({error}); check --subset") from None
    pairs = task.dataset(subset)
    if pairs.tgt is None:
        raise LskdError(f"subset '{subset}' of {task.cfg.data} has no target sentences")
    if teaches:
        teacher.check_sense(pairs)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    for model in teacher.models:
        model.to(device)
        if args.fp16:
            model.half()
    return pairs


def windows(pairs: Any, start: int, token_bytes: int = 0, size: int | None = None) -> Iterator[range]:
    """Yield the numbers of the sentences from ``start`` on, some at a time.

    Args:
        pairs: the sentence pairs.
        start: the first sentence.
        token_bytes: what is held of each target token, for `WINDOW_BYTES` in all.
        size: most sentences; `WINDOW` if it is not given.
    """
    while start < len(pairs):
        end = min(start + (size or WINDOW), len(pairs))
        held = np.cumsum(np.asarray(pairs.tgt_sizes[start:end], np.int64)) * token_bytes
        end = start + max(1, int(np.searchsorted(held, WINDOW_BYTES, side="right")))
        yield range(start, end)
        start = end


def batches(pairs: Any, window: range, max_tokens: int, longest: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield collated batches of a window's sentences, alike in length; without those beyond ``longest``.

    Args:
        pairs: the sentence pairs.
        window: their numbers.
        max_tokens: of a batch with its padding; a longer sentence is a batch of its own.
        longest: most tokens of source and target that the teacher can read.
    """
    sizes = {index: (int(pairs.src_sizes[index]), int(pairs.tgt_sizes[index])) for index in window}
    fitting = [index for index in window if fits(pairs, index, longest)]
    batch: list[int] = []
    width = 0
    for index in sorted(fitting, key=lambda index: (*sizes[index][::-1], index)):
        width_with = max(width, *sizes[index])
        if batch and width_with * (len(batch) + 1) > max_tokens:
            yield pairs.collater([pairs[i] for i in batch])
            batch, width_with = [], max(sizes[index])
        batch.append(index)
        width = width_with
    if batch:
        yield pairs.collater([pairs[i] for i in batch])


def fits(pairs: Any, index: int, longest: Sequence[int]) -> bool:
    """Return whether the teacher can read a sentence and its target."""
    return bool(pairs.src_sizes[index] <= longest[0] and pairs.tgt_sizes[index] <= longest[1])


def longest_of(teacher: Teacher) -> tuple[int, int]:
    """Return how many tokens of source and target all models and the task can read."""
    models: list[Any] = teacher.models
    limits = [model.max_positions() for model in models]
    source, target = utils.resolve_max_positions(teacher.task.max_positions(), *limits)
    return int(source), int(target)


def to_device(teacher: Teacher, batch: dict[str, Any]) -> dict[str, Any]:
    """Move a batch to where the teacher is."""
    device = next(teacher.models[0].parameters()).device
    moved: dict[str, Any] = utils.move_to_cuda(batch, device) if device.type == "cuda" else batch
    return moved
