"""A teacher's pass over a data-bin, in the order of its sentences and in bounded memory."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import utils
from torch import Tensor
from tqdm import tqdm

from fairseq_kd.teacher import Teacher, split_paths
from lskd import LskdError
from lskd.errors import ShownParser
from lskd.soft_labels.remote import written_folder

WINDOW = 2048  # sentences in memory at a time, and sorted by length to fill batches
WINDOW_BYTES = 256 << 20  # of what is kept of them; one sentence may have more


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with the arguments that every pass needs."""
    parser = ShownParser(prog=f"python -m fairseq_kd.{command}", description=description)
    parser.add_argument("data", metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    parser.add_argument(
        "--path", required=True, metavar="FILE", help="the teacher: a checkpoint, a folder (its best), or A:B"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=written_folder, help="folder to write")
    parser.add_argument("-s", "--source-lang", default=None, help="default: the teacher's")
    parser.add_argument("-t", "--target-lang", default=None, help="default: the teacher's")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens in a batch (default: 4096)")
    parser.add_argument("--cpu", action="store_true", help="not on the GPU even where there is one")
    parser.add_argument("--fp16", action="store_true", help="the teacher in half precision")
    return parser


def load_teacher(args: argparse.Namespace) -> Teacher:
    """Load the teacher of a command.

    Raises:
        LskdError: for arguments or files that cannot be used.
    """
    if args.max_tokens < 1:
        raise LskdError(f"--max-tokens is {args.max_tokens}; it must be 1 or more")
    if not Path(args.data).is_dir():
        raise LskdError(f"data-bin {args.data} is not a folder; give what fairseq-preprocess wrote")
    return Teacher(split_paths(args.path), args.data, args.source_lang, args.target_lang)


class Pass:
    """A teacher on its device, and the sentence pairs of a subset.

    Args:
        teacher: it is moved to the GPU where there is one.
        max_tokens: of a batch with its padding; a longer sentence is a batch of its own.
        fp16: the teacher in half precision.
        teaches: whether the teacher must make sense of the sentences.

    Raises:
        LskdError: the subset is not there, has no targets, or makes no sense to the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        subset: str,
        max_tokens: int,
        *,
        cpu: bool = False,
        fp16: bool = False,
        teaches: bool = True,
    ) -> None:
        task = teacher.task
        task.cfg.left_pad_target = False
        try:
            task.load_dataset(subset, combine=False, task_cfg=task.cfg)
        except OSError as error:
            raise LskdError(
                f"subset '{subset}' is not in {task.cfg.data} ({error}); check --subset"
            ) from None
        self.teacher, self.max_tokens = teacher, max_tokens
        self.pairs: Any = task.dataset(subset)
        if self.pairs.tgt is None:
            raise LskdError(f"subset '{subset}' of {task.cfg.data} has no target sentences")
        if teaches:
            teacher.check_sense(self.pairs)
        models: list[Any] = teacher.models
        limits = [model.max_positions() for model in models]
        self._longest = utils.resolve_max_positions(task.max_positions(), *limits)
        self._device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        for model in models:
            model.to(self._device)
            if fp16:
                model.half()

    def fits(self, index: int) -> bool:
        """Return whether all models can read a sentence and its target."""
        source, target = self._longest
        return bool(self.pairs.src_sizes[index] <= source and self.pairs.tgt_sizes[index] <= target)

    def batches(self, window: range) -> Iterator[dict[str, Any]]:
        """Yield collated batches of a window's sentences, alike in length; without those that do not fit."""
        pairs = self.pairs
        sizes = {index: (int(pairs.src_sizes[index]), int(pairs.tgt_sizes[index])) for index in window}
        fitting = [index for index in window if self.fits(index)]
        batch: list[int] = []
        width = 0
        for index in sorted(fitting, key=lambda index: (*sizes[index][::-1], index)):
            width_with = max(width, *sizes[index])
            if batch and width_with * (len(batch) + 1) > self.max_tokens:
                yield self._collated(batch)
                batch, width_with = [], max(sizes[index])
            batch.append(index)
            width = width_with
        if batch:
            yield self._collated(batch)

    def translated(self, window: range, generator: Any) -> dict[int, Tensor]:
        """Return the best translation of each sentence that fits, tokens ``(length,)``, by its number."""
        said = {}
        for batch in self.batches(window):
            with torch.inference_mode():
                hypotheses = self.teacher.task.inference_step(generator, self.teacher.models, batch)
            for index, best in zip(batch["id"].tolist(), hypotheses, strict=True):
                said[index] = best[0]["tokens"].cpu()
        return said

    def _collated(self, indices: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = self.pairs.collater([self.pairs[index] for index in indices])
        return utils.move_to_cuda(batch, self._device) if self._device.type == "cuda" else batch


def windows(
    pairs: Any, start: int = 0, token_bytes: int = 0, bar: bool = True, stop: int | None = None
) -> Iterator[range]:
    """Yield the numbers of the sentences from ``start`` to ``stop``, some at a time, with a progress bar.

    Args:
        token_bytes: what is kept of each target token, for `WINDOW_BYTES` in all.
        stop: the sentence after the last one; None: all.
    """
    total = len(pairs) if stop is None else stop
    with tqdm(total=total, initial=start, unit=" sentences", mininterval=1, disable=not bar) as shown:
        while start < total:
            sizes = np.asarray(pairs.tgt_sizes[start : min(start + WINDOW, total)], np.int64)
            kept = np.searchsorted(np.cumsum(sizes) * token_bytes, WINDOW_BYTES, side="right")
            window = range(start, start + max(1, int(kept)))
            yield window
            shown.update(len(window))
            start = window.stop
