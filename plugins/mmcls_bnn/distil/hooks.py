"""What a run does when mmengine asks: checkpoints, seeds, learning rate, the teacher, stored soft labels."""

import json
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import LinearLR
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from torch import Tensor, nn

from lskd import LskdError
from lskd.base.files import write_text
from lskd.checkpoints import is_whole
from lskd.soft_labels.forms import TOLERANCE
from mmcls_bnn.binary.layers import binary_layers
from mmcls_bnn.binary.packed import deployable
from mmcls_bnn.compat import HOOKS
from mmcls_bnn.distil.classifier import NOTE, UntaughtClassifier, binarized_in, check_binarized, note_in
from mmcls_bnn.distil.store import StoredTeacher
from mmcls_bnn.distil.teacher import speed_up, try_teacher
from mmcls_bnn.recipe import check_count, check_variables


def unwrapped(model: nn.Module) -> Any:
    """Return the classifier itself, without DistributedDataParallel around it."""
    return model.module if is_model_wrapper(model) else model


def is_training(runner: Any) -> bool:
    """Return whether a run trains, before it begins: testing leaves the training loop unbuilt."""
    return isinstance(runner._train_loop, BaseLoop)


def mixed_precision(runner: Any) -> torch.dtype | bool:
    """Return a run's mixed precision, see :func:`mmcls_bnn.distil.teacher.autocast_of`."""
    wrapper = runner.optim_wrapper
    return type(wrapper).__name__ == "AmpOptimWrapper" and (wrapper.cast_dtype or True)


@HOOKS.register_module()
class SafeCheckpointHook(Hook):
    """Keep mmengine's log out of checkpoints, note in them which student they contain, and find the last one.

    The log is the history of every logged number, as objects that torch's safe loading refuses wherever this
    package is not imported. Its files keep it.

    Raises:
        LskdError: before the run, for a variable of the recipe that changes nothing, or a run to resume that
            has no whole checkpoint.
    """

    def before_run(self, runner: Any) -> None:
        """Check what the recipe says, and what a killed run left for `--resume`."""
        if is_training(runner):
            check_variables(runner.cfg)
            if runner._resume and runner._load_from is None:
                if is_main_process():
                    _find_last_checkpoint(runner)
                barrier()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Reduce 'message_hub' to plain values, and add the note to 'meta'."""
        hub = checkpoint.get("message_hub") or {}
        info: dict[str, Any] = {}
        for key, value in hub.get("runtime_info", {}).items():
            with suppress(TypeError, ValueError, RecursionError):  # no plain value, such as an array
                info[key] = json.loads(json.dumps(value, default=np.generic.item))
        resumed = {key: bool(hub.get("resumed_keys", {}).get(key, True)) for key in info}
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": info, "resumed_keys": resumed}
        if (binarize := binarized_in(unwrapped(runner.model))) is None:
            return
        note: dict[str, Any] = {"binarize": binarize}
        if isinstance(runner.cfg.get("model"), ConfigDict):  # and not built in Python
            student = deployable(runner.cfg)
            student["backbone"]["binarize"] = binarize  # TwoStepHook's step 1 is not yet what the config says
            # As text: a config may contain what safe loading refuses.
            note["model"] = json.dumps(student)
        checkpoint["meta"][NOTE] = note

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check before a test that the model binarises what the checkpoint's did."""
        if not is_training(runner):
            check_binarized(unwrapped(runner.model), note_in(checkpoint), str(runner._load_from))


def _find_last_checkpoint(runner: Any) -> None:
    """Have `last_checkpoint` name a whole one: mmengine writes in place, and a kill leaves half a file."""
    note = Path(runner.work_dir, "last_checkpoint")
    named = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
    if not note.is_file() or "://" in named or is_whole(named):  # what is elsewhere mmengine reads itself
        return
    places = {note.parent, *([Path(named).parent] if named.endswith(".pth") else [])}
    found = [path for place in places for path in place.glob("*.pth")]
    found = [path for path in found if re.fullmatch(r"(?:epoch|iter)_\d+", path.stem)]
    found.sort(key=lambda path: int(path.stem.partition("_")[2]), reverse=True)
    whole = next((path for path in found if is_whole(path)), None)
    if whole is None:
        raise LskdError(
            f"--resume: {note} names no whole checkpoint, and none lies beside it; remove it to start anew"
        )
    runner.logger.warning(f"{note} names no whole checkpoint; going on from {whole}")
    write_text(note, str(whole))


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed Python's, numpy's and torch's generators from the run's seed, the epoch and the process.

    A run that was killed and resumed then sees the same augmentation as an unbroken one. Loading processes
    follow with `worker_init_fn=dict(type='seed_worker')` and `persistent_workers=False`.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Any) -> None:
        """Seed."""
        seeds = np.random.SeedSequence([runner.seed, runner.epoch, runner.rank]).generate_state(2)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        torch.manual_seed(int(seeds[0]))


@HOOKS.register_module()
class FlipRatioHook(Hook):
    """Log the share of binary weights whose sign an epoch has changed, as `flip_ratio`.

    It falls as a run converges; near 0 from the start, the latent weights are too large for the learning
    rate to move them across 0.
    """

    priority = "HIGH"  # before the curves are written

    def __init__(self) -> None:
        self._signs: list[Tensor] = []

    def before_train_epoch(self, runner: Any) -> None:
        """Take down the signs that the epoch starts from."""
        layers = binary_layers(unwrapped(runner.model)).values()
        self._signs = [layer.weight.detach() >= 0 for layer in layers]

    def after_train_epoch(self, runner: Any) -> None:
        """Compare with the signs of an epoch ago."""
        before = self._signs
        self.before_train_epoch(runner)
        flipped = sum(int((old != new).sum()) for old, new in zip(before, self._signs, strict=True))
        if before:
            ratio = flipped / sum(signs.numel() for signs in before)
            # Not under "train/", whose line for this epoch is written: it would come an epoch late.
            runner.message_hub.update_scalar("flip_ratio", ratio)
            runner.visualizer.add_scalar("flip_ratio", ratio, step=runner.epoch + 1)
            runner.logger.info(f"flip ratio of epoch {runner.epoch + 1}: {ratio:.5f}")


@HOOKS.register_module()
class TwoStepHook(Hook):
    """Train both steps of two-step training in one run, so that step 2 starts from a step 1 of its own.

    The weights stay real for the first `epochs` epochs. Then they become binary, if the backbone is to
    binarise them at all, and the optimiser starts anew: no state, the first learning rate, no weight decay. A
    run with `model.step1_checkpoint` does the same, but for its epochs, which are counted and seeded from 0.

    Args:
        epochs: of step 1.

    Raises:
        LskdError: before the run, for a step 1 that is no part of it, a schedule of the rate that is not of
            one step or that begins step 2 at another rate than the first, or a model that is no ReActNet.
    """

    priority = "VERY_HIGH"  # before signs are taken down, and before what a resumed run makes up for

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def before_run(self, runner: Any) -> None:
        """Check what the recipe says, and take down what is binary in the end."""
        if not is_training(runner):
            return
        self._binarize = binarized_in(model := unwrapped(runner.model))
        if self._binarize is None or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise LskdError("TwoStepHook is for a ReActNet that is trained by epochs; take it out.")
        if getattr(model, "step1_checkpoint", None) is not None:
            raise LskdError("TwoStepHook trains step 1 itself; take out model.step1_checkpoint, or the hook.")
        check_count("TwoStepHook.epochs", self.epochs, largest=int(runner.max_epochs) - 1)
        for schedule in runner.param_schedulers or []:
            across = schedule.begin < self.epochs < schedule.end
            warm_up = schedule.begin == self.epochs and getattr(schedule, "start_factor", 1) != 1
            if not schedule.by_epoch or across or warm_up:
                name = type(schedule).__name__
                raise LskdError(
                    f"{name} of param_scheduler does not fit two steps; give each step its own, "
                    f"by epochs, with end={self.epochs} and begin={self.epochs}, from the first rate."
                )
        self._layers = list(binary_layers(model).values())

    def before_train(self, runner: Any) -> None:
        """Be in the step whose checkpoint it is: step 1's last epoch is validated before step 2 begins."""
        self._enter(runner, second=runner.epoch > self.epochs)

    def before_train_epoch(self, runner: Any) -> None:
        """Begin step 2."""
        if runner.epoch != self.epochs:
            return
        self._enter(runner, second=True)
        runner.optim_wrapper.optimizer.state.clear()
        runner.optim_wrapper.zero_grad()  # of batches that were accumulated for an update that never came
        for group in runner.optim_wrapper.param_groups:  # and that of the rate that is logged as base_lr
            group["lr"], group["weight_decay"] = group.get("initial_lr", group["lr"]), 0
        runner.logger.info(f"step 2: {self._binarize or 'nothing'} binary, and the optimiser starts anew")

    def _enter(self, runner: Any, *, second: bool) -> None:
        kept = [part for part in self._binarize or () if second or part != "weights"]
        unwrapped(runner.model).backbone.binarize = kept
        for layer in self._layers:
            layer.binarize = second


@HOOKS.register_module()
class TeacherHook(Hook):
    """Try the teacher, and make it fast, before training.

    Args:
        samples: validation images on which the teacher must beat chance; 0: it is not tried.

    Raises:
        LskdError: before the run, for a model without a teacher, or a variable of the recipe that changes
            nothing; before training, for a teacher at chance level, one that cannot process the images, or a
            fast one that is too far from it.
    """

    priority = "ABOVE_NORMAL"  # before what a resumed run makes up for is validated

    def __init__(self, samples: int = 512) -> None:
        self.samples = samples

    def before_run(self, runner: Any) -> None:
        """Check what the recipe says; the runner loads the teacher after this, if it trains."""
        if not is_training(runner):
            return
        check_variables(runner.cfg)
        if not hasattr(unwrapped(runner.model), "teacher_settings"):
            raise LskdError("TeacherHook is for a model of type LsKdClassifier; take it out of custom_hooks.")

    def before_train(self, runner: Any) -> None:
        """Try the teacher on validation images, and where asked for make it fast on training images."""
        model = unwrapped(runner.model)
        if isinstance(model, UntaughtClassifier):
            runner.logger.info("no teacher: the labels alone")
            return
        if model.stored is not None and model.stored.needs_no_teacher:
            runner.logger.info(
                "the teacher is not asked: all that it says is stored, about training images alone; "
                "distillation/* of the validation, val_ce to val_agreement in epochs.csv, stay empty"
            )
            return
        if runner.val_loop is None or self.samples <= 0:
            runner.logger.info("the teacher's accuracy is not checked: no validation images")
        else:
            runner.logger.info(try_teacher(model, runner.val_dataloader.dataset, self.samples))
        if model.teacher_mode != "none":
            runner.logger.info(speed_up(model, runner.train_dataloader.dataset, mixed_precision(runner)))


@HOOKS.register_module()
class SoftLabelsHook(Hook):
    """Train from `model.distillation.soft_labels`: read what is stored there, store what is not.

    Images are then augmented by seeds of the store. An epoch counts before its checkpoint is saved. Without
    such settings the hook does nothing.

    Raises:
        LskdError: what the run does cannot be repeated, the store belongs to another run, the teacher says
            something else than is stored, or the store cannot be written.
    """

    priority = "BELOW_NORMAL"  # after TeacherHook, before checkpoints are saved

    def before_run(self, runner: Any) -> None:
        """Look at the store; the runner loads the teacher after this where it is needed."""
        model = unwrapped(runner.model)
        if getattr(model, "soft_label_settings", None) is None or not is_training(runner):
            return
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise LskdError("soft labels are stored by epoch; train with train_cfg.by_epoch=True.")
        epochs, amp = int(runner.max_epochs), mixed_precision(runner)
        model.stored = StoredTeacher(model, runner.cfg, runner.train_dataloader, epochs, amp)
        runner.logger.info(model.stored.describe())

    def before_train(self, runner: Any) -> None:
        """Verify where that is asked for, and become the one who writes where something is missing."""
        if (stored := _stored(runner)) is None:
            return
        if not stored.needs_no_teacher:
            stored.speaks(unwrapped(runner.model).speaking_teacher().form)
        if stored.settings.verify:
            tolerance = TOLERANCE["autocast" if mixed_precision(runner) else stored.layout.values]
            runner.logger.info(stored.verify(stored.answers, stored.settings.verify, tolerance))
        if not stored.all_there:
            stored.open_writer()

    def before_train_epoch(self, runner: Any) -> None:
        """Begin the epoch in the store."""
        if (stored := _stored(runner)) is not None:
            stored.begin_epoch(int(runner.epoch))

    def after_train_epoch(self, runner: Any) -> None:
        """Commit the epoch."""
        if (stored := _stored(runner)) is not None:
            stored.end_epoch()

    def after_run(self, runner: Any) -> None:
        """Close the store, so that others may write."""
        if (stored := _stored(runner)) is not None:
            stored.close()


def _stored(runner: Any) -> StoredTeacher | None:
    stored: StoredTeacher | None = getattr(unwrapped(runner.model), "stored", None)
    return stored


@PARAM_SCHEDULERS.register_module()
class LinearDecay(LinearLR):
    """Epoch e of E, counted from 0, runs at lr (1 - e / E): the first at lr, the last at lr / E.

    mmengine's LinearLR from 1 to 0 would leave the last epoch with a learning rate of 0.

    Args:
        end: E; mmengine's Runner gives `train_cfg.max_epochs`, or `max_iters` with `by_epoch=False`.
        begin: the epoch that counts as 0.
    """

    def __init__(self, optimizer: Any, *, end: int, begin: int = 0, **kwargs: Any) -> None:
        last = 1 / (end - begin)
        super().__init__(optimizer, start_factor=1.0, end_factor=last, begin=begin, end=end, **kwargs)
