"""Label smoothing and knowledge distillation: targets, losses, stability and teachers' weights.

Everything here is mathematics on tensors; what belongs to a trainer is in its plugin.
"""

from typing import TYPE_CHECKING, Any

from lskd._checkpoints import file_checksum, load_teacher_weights
from lskd._errors import CheckpointError, LskdError, SoftLabelsError
from lskd._fused import FusedTerms, fused_distillation
from lskd._losses import DistillationLoss, DistillationTerms, LossComponents, Rest, TopK, distillation_terms
from lskd._soft_labels import SoftLabelRows, SoftLabels, SoftLabelsWriter
from lskd._soft_labels_manifest import SoftLabelsLayout
from lskd._targets import (
    Convention,
    convert_alpha,
    smooth_targets,
    target_entropy,
    target_mass,
    target_values,
)
from lskd._teachers import AlphaSchedule, ensemble_logits, selective_weight, top_k_log_probabilities

if TYPE_CHECKING:
    from lskd._stability import Definition, Stability, stability

__all__ = [
    "AlphaSchedule",
    "CheckpointError",
    "Convention",
    "Definition",
    "DistillationLoss",
    "DistillationTerms",
    "FusedTerms",
    "LossComponents",
    "LskdError",
    "Rest",
    "SoftLabelRows",
    "SoftLabels",
    "SoftLabelsError",
    "SoftLabelsLayout",
    "SoftLabelsWriter",
    "Stability",
    "TopK",
    "convert_alpha",
    "distillation_terms",
    "ensemble_logits",
    "file_checksum",
    "fused_distillation",
    "load_teacher_weights",
    "selective_weight",
    "smooth_targets",
    "stability",
    "target_entropy",
    "target_mass",
    "target_values",
    "top_k_log_probabilities",
]


def __getattr__(name: str) -> Any:
    """Import torchmetrics when it is asked for: it takes longer than torch, and a loss does without it."""
    if name not in ("Definition", "Stability", "stability"):
        raise AttributeError(f"module 'lskd' has no attribute {name!r}")
    from lskd import _stability

    return getattr(_stability, name)
