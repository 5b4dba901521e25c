"""The student: an image classifier of mmcls that learns from a frozen teacher."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from lskd import DistillationLoss, LskdError, distillation_terms
from lskd.base.tensors import accumulator_dtype
from lskd.teachers.fast import FastMode
from lskd.teachers.replay import replayed
from mmcls_bnn.compat import MODELS, ImageClassifier, labels_of, predictions_of
from mmcls_bnn.distil.fast_teacher import FastTeacherSettings
from mmcls_bnn.distil.remembered import RememberedAnswers
from mmcls_bnn.distil.step1 import load_step1
from mmcls_bnn.distil.store import SoftLabelSettings
from mmcls_bnn.distil.stored_teacher import StoredTeacher
from mmcls_bnn.distil.teacher import InputFormat, Teacher, TeacherSettings, describe_teacher
from mmcls_bnn.distil.teacher_models import load_teacher

LOGGED = {
    "loss_ce": "cross_entropy",
    "loss_kl": "kl",
    "teacher_entropy": "teacher_entropy",
    "loss_hard": "hard_cross_entropy",
    "agreement": "agreement",
}
"""Name in the log, and in :class:`lskd.LossComponents`."""


@MODELS.register_module()
class LsKdClassifier(ImageClassifier):
    """Image classifier with the paper's distillation loss: soft labels only, temperature 1, batch mean.

    The teacher is not part of the module tree. It is loaded when training starts (`init_weights`), so that
    testing a student needs no teacher.

    Args:
        backbone: as for mmcls' ImageClassifier.
        neck: as for mmcls' ImageClassifier.
        head: as for mmcls' ImageClassifier; its own loss is not used.
        teacher: see :class:`mmcls_bnn.distil.teacher.TeacherSettings`.
        distillation: arguments of :class:`lskd.DistillationLoss`; beside them `soft_labels` and
            `teacher_fast`, see :class:`mmcls_bnn.distil.store.SoftLabelSettings` and
            :class:`mmcls_bnn.distil.fast_teacher.FastTeacherSettings`.
        step1_checkpoint: start from this checkpoint of step 1 of two-step training.
        kwargs: further arguments of mmcls' ImageClassifier.

    Raises:
        LskdError: for settings that are unknown or out of range.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        teacher: Mapping[str, Any] | None = None,
        distillation: Mapping[str, Any] | None = None,
        step1_checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the student."""
        super().__init__(backbone, neck, head, **kwargs)
        if teacher is None:
            raise LskdError("LsKdClassifier needs a teacher; give model.teacher, or use ImageClassifier.")
        self.teacher_settings = TeacherSettings.of(teacher)
        self.step1_checkpoint = step1_checkpoint
        distillation = dict(distillation or {})
        soft_labels = distillation.pop("soft_labels", None)
        self.soft_label_settings = None if soft_labels is None else SoftLabelSettings.of(soft_labels)
        teacher_fast = distillation.pop("teacher_fast", None)
        self.fast_settings = FastTeacherSettings.of(
            {"mode": "none"} if teacher_fast is None else teacher_fast
        )
        self.stored: StoredTeacher | None = None
        try:
            self.distillation = DistillationLoss(**distillation)
        except (TypeError, ValueError) as error:
            raise LskdError(f"model.distillation: {error}.") from None
        self.teacher: Teacher | None = None
        self._answers = RememberedAnswers()
        self._sums: Tensor | None = None

    def init_weights(self) -> None:
        """Initialise the student, or start it from step 1, and load the teacher unless all it says is stored.

        Raises:
            LskdError: for a teacher or a start that cannot be had or does not fit.
        """
        if self.stored is None or not self.stored.needs_no_teacher:
            self.load_teacher()
        super().init_weights()
        if self.step1_checkpoint is not None:
            load_step1(self, self.step1_checkpoint)

    def load_teacher(self) -> Teacher:
        """Return the teacher, loaded on the student's device.

        Raises:
            LskdError: for a teacher that cannot be had or does not fit.
        """
        if self.teacher is None:
            classes = int(self.head.num_classes)
            channels = getattr(self.backbone, "in_channels", 3)
            student = InputFormat.of_preprocessor(self.data_preprocessor, channels)
            with replayed(0):  # a student starts from the same weights whether or not a teacher is built
                teacher = load_teacher(self.teacher_settings, classes, student)
            self.teacher = teacher.to(next(self.parameters()).device)
            MMLogger.get_current_instance().info(describe_teacher(self.teacher_settings, teacher, classes))
        return self.teacher

    @property
    def teacher_mode(self) -> FastMode:
        """The form in which the teacher is to answer: that of what is stored, else what was asked for."""
        return self.fast_settings.mode if self.stored is None else self.stored.teacher_mode

    def speaking_teacher(self) -> Teacher:
        """Return the teacher in the form in which it is to answer.

        Raises:
            LskdError: for one that cannot be had, or that nothing has made fast.
        """
        teacher = self.load_teacher()
        if self.teacher_mode != "none" and teacher.form.mode == "none":
            raise LskdError(
                "model.distillation.teacher_fast needs dict(type='TeacherHook') in custom_hooks; "
                "add it to the recipe."
            )
        return teacher

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the loss and its parts under the names in `LOGGED`; only `loss` carries a graph.

        Args:
            inputs: images `(B, C, H, W)`, normalised.
            data_samples: B samples with their labels.
        """
        if self.soft_label_settings is not None:
            teacher = self._stored().answer(inputs, data_samples)
        else:
            teacher = self.speaking_teacher()(inputs)
        logits = self.head(self.extract_feat(inputs))
        # Autocast off: the loss is computed in float32 whatever the networks ran in.
        with torch.autocast(logits.device.type, enabled=False):
            parts = self.distillation.components(logits, teacher, labels_of(data_samples))
        named = {name: getattr(parts, field) for name, field in LOGGED.items()}
        self._accumulate(torch.stack(list(named.values())), logits.shape[0])
        return {"loss": parts.loss, **named}

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, OrderedDict[str, Tensor]]:
        """Return what is minimised, and what is logged.

        mmengine would add up every entry whose name contains "loss", and so count the parts twice.
        """
        return losses["loss"], OrderedDict(losses)

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None, **kwargs: Any) -> list[Any]:
        """Return predictions; in a training run they carry the distillation terms of each sample.

        Where all that the teacher says is read from a store, there is none to ask, and the terms are NaN.

        Args:
            inputs: images `(B, C, H, W)`, normalised.
            data_samples: B samples, which are filled in; None: new ones are made.
            kwargs: none are known to the head of this classifier.
        """
        logits = self.head(self.extract_feat(inputs))
        predictions = predictions_of(self.head, logits, data_samples)
        if self.teacher is None and self.stored is not None:
            for sample in predictions:
                sample.set_field(logits.new_full((4,), math.nan), "distillation", dtype=Tensor)
        if self.teacher is not None:
            teacher_logits = self._answers(self.teacher, inputs)
            terms = distillation_terms(logits, teacher_logits, self.distillation.temperature)
            agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).to(terms.kl.dtype)
            rows = torch.stack([*terms, agreement], dim=-1)
            for sample, row in zip(predictions, rows, strict=True):
                sample.set_field(row, "distillation", dtype=Tensor)
        return predictions

    def epoch_means(self) -> dict[str, float]:
        """Return the sample means of `LOGGED` since the last call, over all processes, and start anew.

        Every process of a distributed run must call it.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            device = next(self.parameters()).device
            sums = torch.zeros(len(LOGGED) + 1, dtype=accumulator_dtype(device), device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, samples = sums.tolist()
        return {
            name: total / samples if samples else math.nan for name, total in zip(LOGGED, totals, strict=True)
        }

    def _stored(self) -> StoredTeacher:
        if self.stored is None:
            raise LskdError(
                "soft labels need dict(type='SoftLabelsHook') in custom_hooks; add it to the recipe."
            )
        return self.stored

    def _accumulate(self, means: Tensor, samples: int) -> None:
        # Kept on the device: reading a number at every step would wait for the device at every step.
        means = means.to(accumulator_dtype(means.device))
        row = torch.cat([means * samples, means.new_full((1,), samples)])
        self._sums = row if self._sums is None else self._sums + row

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        result: nn.Module = super()._apply(fn, *args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(next(self.parameters()).device)
        return result
