"""What a run does with stored soft labels, at the moments that mmengine gives."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from lskd import LskdError
from mmcls_bnn.compat import HOOKS
from mmcls_bnn.distil.hooks import is_training, mixed_precision, unwrapped
from mmcls_bnn.distil.mixing import mix_by_image
from mmcls_bnn.distil.replay import seed_pipeline
from mmcls_bnn.distil.store import identity_of
from mmcls_bnn.distil.stored_teacher import StoredTeacher


@HOOKS.register_module()
class SoftLabelsHook(Hook):
    """Train from `model.distillation.soft_labels`: read what is stored there, store what is not.

    Images are then augmented by seeds of the store. An epoch counts before its checkpoint is saved. Without
    such settings the hook does nothing.
    """

    priority = "BELOW_NORMAL"  # after TeacherHook, before checkpoints are saved

    def before_run(self, runner: Any) -> None:
        """Look at the store; the runner loads the teacher after this where it is needed.

        Raises:
            LskdError: what the run does cannot be repeated, or the store belongs to another run.
        """
        model = unwrapped(runner.model)
        if getattr(model, "soft_label_settings", None) is None or not is_training(runner):
            return
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise LskdError("soft labels are stored by epoch; train with train_cfg.by_epoch=True.")
        model.stored = stored_teacher(
            model, runner.cfg, runner.train_dataloader, int(runner.max_epochs), mixed_precision(runner)
        )
        runner.logger.info(model.stored.describe())

    def before_train(self, runner: Any) -> None:
        """Verify where that is asked for, and become the one who writes where something is missing.

        Raises:
            LskdError: the teacher says something else than is stored, or the store cannot be written.
        """
        stored = _stored(runner)
        if stored is None:
            return
        if not stored.needs_no_teacher:
            stored.speaks(unwrapped(runner.model).speaking_teacher().form)
        if stored.settings.verify:
            runner.logger.info(stored.verify_stored())
        if not stored.covers(int(runner.max_epochs)):
            stored.open_writer()

    def before_train_epoch(self, runner: Any) -> None:
        """Say which epoch comes."""
        if (stored := _stored(runner)) is not None:
            stored.begin_epoch(int(runner.epoch))

    def after_train_epoch(self, runner: Any) -> None:
        """Commit the epoch."""
        if (stored := _stored(runner)) is not None:
            stored.end_epoch()

    def after_run(self, runner: Any) -> None:
        """Let others write."""
        if (stored := _stored(runner)) is not None:
            stored.close()


def stored_teacher(model: Any, cfg: Any, loader: Any, epochs: int, amp: bool) -> StoredTeacher:
    """Return a run's view of the store that its recipe names, with the training images seeded.

    Args:
        model: an LsKdClassifier with settings of soft labels.
        cfg: the whole recipe.
        loader: of the training images.
        epochs: that the run wants.
        amp: whether it runs in mixed precision.

    Raises:
        LskdError: what the run does cannot be repeated, or the store belongs to another run.
    """
    settings, dataset = model.soft_label_settings, loader.dataset
    mixing = mix_by_image(model)
    seed_pipeline(loader, settings.seed, mixing)
    layout = settings.layout(int(model.head.num_classes), len(dataset), epochs)
    steps = cfg.train_dataloader.dataset.get("pipeline") or dataset.pipeline.transforms
    identity = identity_of(
        settings, layout, model.teacher_settings, model.data_preprocessor, dataset, list(steps), amp, mixing
    )
    return StoredTeacher(settings, layout, identity, model, dataset, amp)


def _stored(runner: Any) -> StoredTeacher | None:
    stored: StoredTeacher | None = getattr(unwrapped(runner.model), "stored", None)
    return stored
