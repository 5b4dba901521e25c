"""Label smoothing and knowledge distillation: targets, losses, stability and teachers' weights.

Everything here is mathematics on tensors; what belongs to a trainer is in its plugin.
"""

from lskd._checkpoints import file_checksum, load_teacher_weights
from lskd._errors import CheckpointError, LskdError
from lskd._losses import DistillationLoss, DistillationTerms, LossComponents, Rest, TopK, distillation_terms
from lskd._stability import Definition, Stability, stability
from lskd._targets import (
    Convention,
    convert_alpha,
    smooth_targets,
    target_entropy,
    target_mass,
    target_values,
)

__all__ = [
    "CheckpointError",
    "Convention",
    "Definition",
    "DistillationLoss",
    "DistillationTerms",
    "LossComponents",
    "LskdError",
    "Rest",
    "Stability",
    "TopK",
    "convert_alpha",
    "distillation_terms",
    "file_checksum",
    "load_teacher_weights",
    "smooth_targets",
    "stability",
    "target_entropy",
    "target_mass",
    "target_values",
]
