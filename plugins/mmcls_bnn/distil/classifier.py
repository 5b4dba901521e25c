"""The student: an image classifier of mmcls that learns from a frozen teacher, and what is measured of it."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from torch import Tensor, nn

from lskd import (
    CheckpointError,
    DistillationLoss,
    FrozenTeacher,
    LskdError,
    TopK,
    distillation_terms,
    load_teacher_weights,
)
from lskd.base.tensors import SampleMeans
from lskd.checkpoints import load_strictly, read_checkpoint
from lskd.targets import smooth_probabilities
from lskd.teachers.fast import FastMode
from lskd.teachers.replay import replayed
from mmcls_bnn.binary.layers import image_channels
from mmcls_bnn.compat import METRICS, MODELS, ImageClassifier, labels_of
from mmcls_bnn.distil.store import SoftLabelSettings, StoredTeacher
from mmcls_bnn.distil.teacher import (
    FastTeacherSettings,
    TeacherSettings,
    describe_teacher,
    load_teacher,
    normalisation_of,
)
from mmcls_bnn.losses import SmoothedCrossEntropy

NOTE = "mmcls_bnn"
"""Key in a checkpoint's `meta` under which it says what was binarised."""

LOGGED = {
    "loss_ce": "cross_entropy",
    "loss_kl": "kl",
    "teacher_entropy": "teacher_entropy",
    "loss_hard": "hard_cross_entropy",
    "agreement": "agreement",
}
"""Name in the log, and in :class:`lskd.LossComponents`."""

# No "loss" in a name: mmengine would show such a number averaged over the last ten validations.
VALIDATED = ("cross_entropy", "kl", "teacher_entropy", "agreement")
"""What :class:`DistillationMetric` reports, in the order in which a prediction carries it."""

REMEMBERED_BYTES = 256 << 20  # ImageNet's 50,000 images and 1,000 classes take 200 million
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@MODELS.register_module()
class LsKdClassifier(ImageClassifier):
    """Image classifier with the paper's distillation loss: soft labels only, temperature 1, batch mean.

    The teacher is not part of the module tree. It is loaded when training starts (`init_weights`), so that
    testing a student needs no teacher.

    Args:
        head: as for mmcls' ImageClassifier; its own loss is not used.
        teacher: see :class:`mmcls_bnn.distil.teacher.TeacherSettings`.
        distillation: arguments of :class:`lskd.DistillationLoss`; beside them `soft_labels` and
            `teacher_fast`, see :class:`mmcls_bnn.distil.store.SoftLabelSettings` and
            :class:`mmcls_bnn.distil.teacher.FastTeacherSettings`.
        step1_checkpoint: start from this checkpoint of step 1 of two-step training.

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
        super().__init__(backbone, neck, head, **kwargs)
        if teacher is None:
            raise LskdError("LsKdClassifier needs a teacher; give model.teacher, or use ImageClassifier.")
        self.teacher_settings = TeacherSettings.of(teacher)
        self.step1_checkpoint = step1_checkpoint
        distillation = dict(distillation or {})
        soft_labels, fast = distillation.pop("soft_labels", None), distillation.pop("teacher_fast", None)
        self.soft_label_settings = None if soft_labels is None else SoftLabelSettings.of(soft_labels)
        self.fast_settings = FastTeacherSettings.of({"mode": "none"} if fast is None else fast)
        try:
            self.distillation = DistillationLoss(**distillation)
        except (TypeError, ValueError) as error:
            raise LskdError(f"model.distillation: {error}.") from None
        self.stored: StoredTeacher | None = None
        self.teacher: FrozenTeacher | None = None
        self._answers = RememberedAnswers()
        self._means = SampleMeans(LOGGED)

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

    def load_teacher(self) -> FrozenTeacher:
        """Return the teacher, loaded on the student's device.

        Raises:
            LskdError: for a teacher that cannot be had or does not fit.
        """
        if self.teacher is None:
            classes = int(self.head.num_classes)
            student = normalisation_of(self.data_preprocessor, image_channels(self.backbone))
            with replayed(0):  # a student starts from the same weights whether or not a teacher is built
                teacher = load_teacher(self.teacher_settings, classes, student)
            self.teacher = teacher.to(next(self.parameters()).device)
            MMLogger.get_current_instance().info(describe_teacher(self.teacher_settings, teacher, classes))
        return self.teacher

    @property
    def teacher_mode(self) -> FastMode:
        """The form in which the teacher is to answer: that of what is stored, else what was asked for."""
        return self.fast_settings.mode if self.stored is None else self.stored.teacher_mode

    def speaking_teacher(self) -> FrozenTeacher:
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
        """
        teacher: Tensor | TopK
        if self.soft_label_settings is None:
            teacher = self.speaking_teacher()(inputs)
        elif self.stored is None:
            raise LskdError(
                "soft labels need dict(type='SoftLabelsHook') in custom_hooks; add it to the recipe."
            )
        else:
            teacher = self.stored.answer(inputs, data_samples)
        labels = labels_of(data_samples)
        if labels.ndim == 2:  # the loss takes probabilities as they are
            labels = smooth_probabilities(labels, self.distillation.alpha, self.distillation.convention)
        logits = self.head(self.extract_feat(inputs))
        # Autocast off: the loss is computed in float32 whatever the networks ran in.
        with torch.autocast(logits.device.type, enabled=False):
            parts = self.distillation.components(logits, teacher, labels)
        named = {name: getattr(parts, field) for name, field in LOGGED.items()}
        self._means.add(named.values(), len(logits))
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
        predictions = list(self.head._get_predictions(logits, data_samples))
        if self.teacher is None and self.stored is None:
            return predictions
        if self.teacher is None:
            rows = logits.new_full((len(logits), len(VALIDATED)), math.nan)
        else:
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
        return self._means.read(next(self.parameters()).device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        result: nn.Module = super()._apply(fn, *args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(next(self.parameters()).device)
        return result


@MODELS.register_module()
class UntaughtClassifier(LsKdClassifier):
    """The student of a recipe without its teacher, which is neither loaded nor asked: a study's control.

    It learns from the labels, smoothed as `distillation` says by `alpha` and `convention`. Arguments are
    those of :class:`LsKdClassifier`; what they say of teacher, temperature and stored labels does nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.soft_label_settings = None
        self._means = SampleMeans(("loss_hard",))
        self._labels = SmoothedCrossEntropy(self.distillation.alpha, self.distillation.convention)

    def init_weights(self) -> None:
        """Initialise the student."""
        ImageClassifier.init_weights(self)

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the cross-entropy with the labels, mean over the batch `(B, C, H, W)`, in nats."""
        logits = self.head(self.extract_feat(inputs))
        with torch.autocast(logits.device.type, enabled=False):
            loss: Tensor = self._labels(logits, labels_of(data_samples))
        self._means.add([loss], len(logits))
        return {"loss": loss}

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None, **kwargs: Any) -> list[Any]:
        """Return predictions, for which there are no distillation terms: NaN."""
        predictions = super().predict(inputs, data_samples, **kwargs)
        for sample in predictions:
            sample.set_field(inputs.new_full((len(VALIDATED),), math.nan), "distillation", dtype=Tensor)
        return predictions


class RememberedAnswers:
    """Asks a teacher about a batch of validation images, unless all have been asked about before.

    They are the same images in every epoch. An image is known by all of its pixels: where validation is
    augmented, the teacher is asked again.

    Args:
        limit: bytes of logits that are kept; beyond them the teacher is asked.
    """

    def __init__(self, limit: int = REMEMBERED_BYTES) -> None:
        self._room = limit
        self._rows: dict[int, Tensor] = {}
        self._factors = torch.empty(0, dtype=torch.int64)

    def __call__(self, teacher: Any, inputs: Tensor) -> Tensor:
        """Return the teacher's logits `(B, K)` for a batch `(B, C, H, W)`."""
        keys = self._keys(inputs)
        if all(key in self._rows for key in keys):
            return torch.stack([self._rows[key] for key in keys]).to(inputs.device)
        logits: Tensor = teacher(inputs)
        size = logits.numel() * logits.element_size()
        if size <= self._room:
            self._room -= size
            self._rows.update(zip(keys, logits.cpu(), strict=True))
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "RememberedAnswers":
        """Return itself: a student's copy (an averaged model, say) has the same teacher."""
        return self

    def _keys(self, inputs: Tensor) -> list[int]:
        # Sums of the pixels, as bits, times fixed random numbers, modulo 2 ** 64: exact on any device.
        images = [image.flatten().view(_INTEGERS[image.element_size()]) for image in inputs.contiguous()]
        if len(self._factors) != len(images[0]) or self._factors.device != inputs.device:
            factors = torch.empty(len(images[0]), dtype=torch.int64)
            factors.random_(generator=torch.Generator().manual_seed(0))
            self._factors = (2 * factors + 1).to(inputs.device)
        keys: list[int] = torch.stack([(image * self._factors).sum() for image in images]).tolist()
        return keys


@METRICS.register_module()
class DistillationMetric(BaseMetric):
    """Means over the validation samples of cross-entropy, KL and teacher entropy (nats), and of agreement.

    This is Fig. 6's curve of the test loss. Reported as `distillation/cross_entropy` and so on, at the
    temperature of the training loss.
    """

    default_prefix = "distillation"

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the terms that `LsKdClassifier.predict` put into each sample.

        Raises:
            LskdError: where there are none: the model is no LsKdClassifier, or it is tested without training.
        """
        for sample in data_samples:
            if "distillation" not in sample:
                raise LskdError(
                    "DistillationMetric found no teacher: it works in val_evaluator of a run that trains an "
                    "LsKdClassifier; take it out of test_evaluator."
                )
            self.results.append(sample["distillation"].cpu())

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the means; nothing in a run whose teacher's answers are read from a store."""
        means = torch.stack(results).double().mean(0).tolist()
        return {} if all(map(math.isnan, means)) else dict(zip(VALIDATED, means, strict=True))


def binarized_in(model: nn.Module) -> list[str] | None:
    """Return what a classifier's backbone binarises; None where it is none of this package's."""
    binarize = getattr(getattr(model, "backbone", None), "binarize", None)
    return None if binarize is None else list(binarize)


def check_binarized(model: nn.Module, note: Mapping[str, Any], where: str) -> None:
    """Compare what a checkpoint's note says is binary with what the model binarises; weights look the same.

    Raises:
        CheckpointError: they differ.
    """
    said, own = note.get("binarize"), binarized_in(model)
    if isinstance(said, list) and own is not None and {*map(str, said)} != {*own}:
        words = [", ".join(sorted(map(str, names))) or "nothing" for names in (said, own)]
        raise CheckpointError(
            f"{where} was saved with {words[0]} binary, the model binarises {words[1]}; "
            "set model.backbone.binarize as it was"
        )


def read_note(path: str) -> dict[str, Any]:
    """Return what a checkpoint says about itself; {} where it says nothing.

    Raises:
        CheckpointError: for a file that is missing, damaged or unsafe.
    """
    return note_in(read_checkpoint(path))


def note_in(content: Any) -> dict[str, Any]:
    """Return the note of a checkpoint that was read; {} where there is none."""
    meta = content.get("meta") if isinstance(content, dict) else None
    note = meta.get(NOTE) if isinstance(meta, dict) else None
    return note if isinstance(note, dict) else {}


def load_step1(model: nn.Module, path: str) -> None:
    """Load a step-1 checkpoint into a step-2 model, every weight of it.

    Raises:
        CheckpointError: for a file that is missing or unsafe, that is not of step 1, or that does not fit.
    """
    weights = load_teacher_weights(path, use_ema=False)
    binarize = read_note(path).get("binarize")
    if binarize != ["activations"]:
        what = "does not say that it is" if binarize is None else f"has {binarize} binarised, so it is not"
        raise CheckpointError(
            f"step1_checkpoint {path} {what} step 1; give one that a step-1 recipe "
            "(binarize=('activations',)) has written."
        )
    fix = "give the same depth, width, stem and classes as in step 1"
    load_strictly(model, weights, "this step 2", f"step1_checkpoint {path}", fix)
