"""Label smoothing and knowledge distillation: targets, losses, stability and teachers' weights.

Everything here is mathematics on tensors; what belongs to a trainer is in its plugin. What more there is has
a module of its own in ``lskd.teachers``, ``lskd.soft_labels`` and ``lskd.analysis``.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from lskd.analysis.calibration import fit_temperature
    from lskd.analysis.measures import TeacherMeasures, measure_teacher
    from lskd.checkpoints import load_teacher_weights
    from lskd.errors import CheckpointError, DivergedError, LskdError, SoftLabelsError
    from lskd.kernel.fused import LossComponents, fused_distillation
    from lskd.loss import DistillationLoss
    from lskd.soft_labels.store import SoftLabels, SoftLabelsWriter
    from lskd.stability import Stability
    from lskd.targets import (
        Convention,
        convert_alpha,
        smooth_targets,
        target_entropy,
        target_mass,
        target_values,
    )
    from lskd.teachers.frozen import FrozenTeacher
    from lskd.terms import AlphaSchedule, TopK, distillation_terms, ensemble_logits

__all__ = [
    "AlphaSchedule",
    "CheckpointError",
    "Convention",
    "DistillationLoss",
    "DivergedError",
    "FrozenTeacher",
    "LossComponents",
    "LskdError",
    "SoftLabels",
    "SoftLabelsError",
    "SoftLabelsWriter",
    "Stability",
    "TeacherMeasures",
    "TopK",
    "convert_alpha",
    "distillation_terms",
    "ensemble_logits",
    "fit_temperature",
    "fused_distillation",
    "load_teacher_weights",
    "measure_teacher",
    "smooth_targets",
    "target_entropy",
    "target_mass",
    "target_values",
]

_HOMES = {
    "lskd.analysis.calibration": "fit_temperature",
    "lskd.analysis.measures": "TeacherMeasures measure_teacher",
    "lskd.checkpoints": "load_teacher_weights",
    "lskd.errors": "CheckpointError DivergedError LskdError SoftLabelsError",
    "lskd.kernel.fused": "LossComponents fused_distillation",
    "lskd.loss": "DistillationLoss",
    "lskd.soft_labels.store": "SoftLabels SoftLabelsWriter",
    "lskd.stability": "Stability",
    "lskd.targets": "Convention convert_alpha smooth_targets target_entropy target_mass target_values",
    "lskd.teachers.frozen": "FrozenTeacher",
    "lskd.terms": "AlphaSchedule TopK distillation_terms ensemble_logits",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> typing.Any:
    """Import a name's module when it is asked for: an error's class does without torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lskd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
