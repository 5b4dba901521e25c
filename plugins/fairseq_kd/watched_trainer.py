"""fairseq's own Trainer, watched: a run that diverges ends, and checkpoints are whole and know their words.

This holds for every run that loads the plugin, whatever its task and criterion.
"""

import atexit
import contextlib
import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from fairseq.sequence_generator import EnsembleModel
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer

from fairseq_kd.safe_loading import wrap
from lskd import LskdError
from lskd.base.files import whole_file
from lskd.base.tensors import require_finite, require_finite_weights

STATE = "fairseq_kd"  # in a checkpoint's extra_state
# fairseq's words for gradients that are not finite, in one process, in several, and under --fp16.
_DIVERGED = re.compile(r"\b(nan|inf)\b|exploding", re.IGNORECASE)


def install() -> None:
    """Watch the trainer, and write checkpoints beside their name and to the disk before they take it."""
    wrap(Trainer, "__init__", _init)
    wrap(Trainer, "begin_epoch", _begin_epoch)
    wrap(Trainer, "begin_valid_epoch", _begin_valid_epoch)
    wrap(Trainer, "train_step", _train_step)
    wrap(Trainer, "valid_step", _valid_step)
    wrap(Trainer, "lr_step", _lr_step)
    wrap(Trainer, "state_dict", _state_dict)
    wrap(checkpoint_utils, "save_checkpoint", _save_checkpoint)
    wrap(checkpoint_utils, "torch_persistent_save", _write)
    wrap(PathManager, "copy", _copy)
    wrap(EnsembleModel, "set_decoder_beam_size", _leave_as_it_is)


def dictionary_checksums(task: Any) -> dict[str, str]:
    """Return the SHA-256 of the words of a task's dictionaries, in their order, by side; none it has not."""
    checksums = {}
    for side in ("source", "target"):
        with contextlib.suppress(NotImplementedError, AttributeError):  # of a task that is not about words
            words = "\n".join(getattr(task, f"{side}_dictionary").symbols)
            checksums[side] = hashlib.sha256(words.encode()).hexdigest()
    return checksums


def _leave_as_it_is(set_size: Callable[..., Any], models: Any, beam_size: int) -> None:
    """Stand for what makes BART's attention decode faster, and is never undone.

    Whoever reads a given target with the model afterwards - training, validation, a teacher - would be told
    of the words of other sentences. Without it the same is decoded.
    """


@dataclass
class _Watch:
    """What is noted of a run: entries to guess among, its epoch, and its last validation in nats."""

    words: int = 0  # 0: of no translation, or another process says it
    epoch: int = 1
    nll: float = 0.0
    tokens: int = 0

    def mean(self) -> float | None:
        return self.nll / self.tokens if self.tokens else None

    def warn_if_guessing(self) -> None:
        """Print, at the end of a run, that it learnt nothing."""
        nll, chance = self.mean(), math.log(self.words or 1)
        if nll is not None and self.words and nll >= chance:
            print(
                "fairseq_kd: warning: the run is no better than guessing: its last validation has "
                f"{nll:.2f} nats a token, guessing has {chance:.2f}; it can teach nothing",
                flush=True,
            )


def _init(
    begin: Callable[..., None], self: Any, cfg: Any, task: Any, model: Any, criterion: Any, *rest: Any
) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if processes > 1 and "RANK" in os.environ and cfg.distributed_training.distributed_world_size == 1:
        raise LskdError(
            f"{processes} processes were started (WORLD_SIZE), and each would train alone into one folder; "
            f"add --distributed-world-size {processes}"
        )
    if hasattr(criterion, "check_student"):
        limits = task.max_positions(), model.max_positions(), cfg.dataset.max_tokens
        criterion.check_student(model, utils.resolve_max_positions(*limits))  # as get_train_iterator does
    elif flag := _asks_a_teacher(task):
        raise LskdError(
            f"--{flag} is for --criterion ls_kd, and the criterion is {type(criterion).__name__}, which asks "
            f"no teacher; give --criterion ls_kd, or leave out --{flag}"
        )
    begin(self, cfg, task, model, criterion, *rest)
    says = isinstance(task, TranslationTask) and self.data_parallel_rank == 0
    self.kd_watch = _Watch(len(task.target_dictionary) if says else 0)
    if Path(sys.argv[0]).name.startswith("fairseq-"):  # a command, whose end is the run's
        atexit.register(self.kd_watch.warn_if_guessing)


def _asks_a_teacher(task: Any) -> str | None:
    """Return the flag of a task's that only the criterion ls_kd heeds; None where none is given."""
    for flags in (getattr(task, "cfg", None), getattr(task, "args", None)):
        for name in ("kd_soft_labels", "kd_pair_weights"):
            if getattr(flags, name, None):
                return name.replace("_", "-")
    return None


def _begin_epoch(begin: Callable[..., None], self: Any, epoch: int) -> None:
    self.kd_watch.epoch = epoch
    begin(self, epoch)


def _begin_valid_epoch(begin: Callable[..., None], self: Any, epoch: int) -> None:
    self.kd_watch.nll, self.kd_watch.tokens = 0.0, 0
    begin(self, epoch)


def _train_step(step: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    epoch = self.kd_watch.epoch
    try:
        log = step(self, *args, **kwargs)
    except Exception as error:
        # fairseq looks for the module at fault, and its search may fail itself.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, FloatingPointError) and _DIVERGED.search(str(cause)):
                require_finite("the gradient", math.nan, epoch)
            cause = cause.__context__
        raise
    if log and "loss" in log:
        require_finite("the training loss", log["loss"], epoch)
    return log


def _valid_step(step: Callable[..., Any], self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
    watch = self.kd_watch
    log = step(self, sample, *args, **kwargs)
    if log and "loss" in log:
        require_finite("the validation loss", log["loss"], watch.epoch)
        tokens = int((sample or {}).get("ntokens", 0))
        watch.nll += float(log.get("nll_loss", log["loss"])) * math.log(2) * tokens
        watch.tokens += tokens
    return log


def _lr_step(step: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """At the end of each epoch, whether it is saved or not."""
    require_finite_weights(self.get_model().named_parameters(), self.kd_watch.epoch)
    return step(self, *args, **kwargs)


def _save_checkpoint(save: Callable[..., Any], cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    require_finite_weights(trainer.get_model().named_parameters(), trainer.kd_watch.epoch)
    return save(cfg, trainer, *args, **kwargs)


def _state_dict(state_of: Callable[..., Any], self: Any) -> Any:
    state = state_of(self)
    state["extra_state"][STATE] = {
        "dictionaries": dictionary_checksums(self.task),
        "valid_nll": self.kd_watch.mean(),
    }
    return state


def _write(save: Callable[..., None], content: Any, filename: Any, async_write: bool = False) -> None:
    """Stand for `torch_persistent_save`."""
    if async_write or not isinstance(filename, str) or not PathManager.supports_rename(filename):
        save(content, filename, async_write)
        return
    with whole_file(filename) as scratch, open(scratch, "wb") as file:
        torch.save(content, file)


def _copy(copy: Callable[..., Any], source: str, target: str, *args: Any, **kwargs: Any) -> Any:
    """Stand for `PathManager.copy`, which fairseq makes the last checkpoint of the best with."""
    if not (PathManager.supports_rename(source) and PathManager.supports_rename(target)):
        return copy(source, target, *args, **kwargs)
    with whole_file(target) as scratch:
        shutil.copyfile(source, scratch)
    return target
