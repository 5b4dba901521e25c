"""Label smoothing and knowledge distillation: targets, losses, stability and teachers' weights.

Everything here is mathematics on tensors; what belongs to a trainer is in its plugin.
"""

from typing import TYPE_CHECKING, Any

from lskd.analysis.calibration import TemperatureFit, fit_temperature
from lskd.analysis.classes import (
    class_confusion,
    class_mean_probabilities,
    minor_probabilities,
    propose_classes,
)
from lskd.analysis.logistic import smoothed_logistic_loss, smoothed_logistic_minimum
from lskd.analysis.projection import ClusterDistances, ProjectionPlane, cluster_distances, projection_plane
from lskd.analysis.separation import ClassSeparation, class_separation, nearest_classes
from lskd.base.devices import accumulator_dtype
from lskd.base.finite import require_finite, require_finite_weights
from lskd.checkpoints import file_checksum, is_safetensors, load_teacher_weights
from lskd.errors import CheckpointError, DivergedError, LskdError, SoftLabelsError, one_line
from lskd.kernel.fused import FusedTerms, fused_distillation
from lskd.kernel.native import has_compiled_loss
from lskd.loss import DistillationLoss, LossComponents
from lskd.soft_labels.collector import RowCollector
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import stored_difference, stored_form, teacher_form
from lskd.soft_labels.run import DEFAULT_TOP_K, StoredRun, image_layout
from lskd.soft_labels.store import SoftLabelRows, SoftLabels, SoftLabelsWriter
from lskd.soft_labels.teacher_form import TeacherForm
from lskd.targets import (
    Convention,
    chance_like_mass,
    convert_alpha,
    smooth_targets,
    target_entropy,
    target_mass,
    target_values,
)
from lskd.teacher_terms import (
    AlphaSchedule,
    centred,
    ensemble_logits,
    selective_weight,
    top_k_log_probabilities,
)
from lskd.teachers.fast import FAST_BOUND, FAST_MODES, Deviation, FastMode, FastTeacher, choose_fast
from lskd.teachers.folding import fold_batch_norm
from lskd.teachers.outputs import logits_of
from lskd.teachers.preflight import binomial_tail, compare_with_chance
from lskd.teachers.replay import Mixing, MixingPolicy, augmentation_seed, mixed_image, mixed_targets, replayed
from lskd.terms import DistillationTerms, Rest, TopK, distillation_terms

if TYPE_CHECKING:
    from lskd.analysis.measures import (
        TeacherMeasures,
        equivalent_smoothing,
        measure_teacher,
        target_probability,
    )
    from lskd.stability import Definition, Stability, small_class_factor

__all__ = [
    "DEFAULT_TOP_K",
    "FAST_BOUND",
    "FAST_MODES",
    "AlphaSchedule",
    "CheckpointError",
    "ClassSeparation",
    "ClusterDistances",
    "Convention",
    "Definition",
    "Deviation",
    "DistillationLoss",
    "DistillationTerms",
    "DivergedError",
    "FastMode",
    "FastTeacher",
    "FusedTerms",
    "LossComponents",
    "LskdError",
    "Mixing",
    "MixingPolicy",
    "ProjectionPlane",
    "Rest",
    "RowCollector",
    "SoftLabelRows",
    "SoftLabels",
    "SoftLabelsError",
    "SoftLabelsLayout",
    "SoftLabelsWriter",
    "Stability",
    "StoredRun",
    "TeacherForm",
    "TeacherMeasures",
    "TemperatureFit",
    "TopK",
    "accumulator_dtype",
    "augmentation_seed",
    "binomial_tail",
    "centred",
    "chance_like_mass",
    "choose_fast",
    "class_confusion",
    "class_mean_probabilities",
    "class_separation",
    "cluster_distances",
    "compare_with_chance",
    "convert_alpha",
    "distillation_terms",
    "ensemble_logits",
    "equivalent_smoothing",
    "file_checksum",
    "fit_temperature",
    "fold_batch_norm",
    "fused_distillation",
    "has_compiled_loss",
    "image_layout",
    "is_safetensors",
    "load_teacher_weights",
    "logits_of",
    "measure_teacher",
    "minor_probabilities",
    "mixed_image",
    "mixed_targets",
    "nearest_classes",
    "one_line",
    "projection_plane",
    "propose_classes",
    "replayed",
    "require_finite",
    "require_finite_weights",
    "selective_weight",
    "small_class_factor",
    "smooth_targets",
    "smoothed_logistic_loss",
    "smoothed_logistic_minimum",
    "stored_difference",
    "stored_form",
    "target_entropy",
    "target_mass",
    "target_probability",
    "target_values",
    "teacher_form",
    "top_k_log_probabilities",
]

_WITH_TORCHMETRICS = {
    **dict.fromkeys(("Definition", "Stability", "small_class_factor"), "lskd.stability"),
    **dict.fromkeys(
        ("TeacherMeasures", "equivalent_smoothing", "measure_teacher", "target_probability"),
        "lskd.analysis.measures",
    ),
}


def __getattr__(name: str) -> Any:
    """Import torchmetrics when it is asked for: it takes longer than torch, and a loss does without it."""
    from importlib import import_module

    module = _WITH_TORCHMETRICS.get(name)
    if module is None:
        raise AttributeError(f"module 'lskd' has no attribute {name!r}")
    return getattr(import_module(module), name)
