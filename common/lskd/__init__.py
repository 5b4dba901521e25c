"""Label smoothing and knowledge distillation: targets, losses, stability and teachers' weights.

Everything here is mathematics on tensors; what belongs to a trainer is in its plugin. What more there is has
a module of its own in ``lskd.teachers``, ``lskd.soft_labels`` and ``lskd.analysis``.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from lskd.analysis.calibration import fit_temperature as fit_temperature
    from lskd.analysis.measures import TeacherMeasures as TeacherMeasures
    from lskd.analysis.measures import measure_teacher as measure_teacher
    from lskd.checkpoints import load_teacher_weights as load_teacher_weights
    from lskd.errors import CheckpointError as CheckpointError
    from lskd.errors import DivergedError as DivergedError
    from lskd.errors import LskdError as LskdError
    from lskd.errors import SoftLabelsError as SoftLabelsError
    from lskd.kernel.fused import LossComponents as LossComponents
    from lskd.kernel.fused import fused_distillation as fused_distillation
    from lskd.loss import DistillationLoss as DistillationLoss
    from lskd.soft_labels.store import SoftLabels as SoftLabels
    from lskd.soft_labels.store import SoftLabelsWriter as SoftLabelsWriter
    from lskd.stability import Stability as Stability
    from lskd.targets import Convention as Convention
    from lskd.targets import convert_alpha as convert_alpha
    from lskd.targets import smooth_targets as smooth_targets
    from lskd.targets import target_entropy as target_entropy
    from lskd.targets import target_mass as target_mass
    from lskd.targets import target_values as target_values
    from lskd.teachers.frozen import FrozenTeacher as FrozenTeacher
    from lskd.teachers.outputs import AlphaSchedule as AlphaSchedule
    from lskd.teachers.outputs import ensemble_logits as ensemble_logits
    from lskd.terms import TopK as TopK
    from lskd.terms import distillation_terms as distillation_terms

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
    "lskd.teachers.outputs": "AlphaSchedule ensemble_logits",
    "lskd.terms": "TopK distillation_terms",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)  # imported above for those who check types


def __getattr__(name: str) -> typing.Any:
    """Import a name's module when it is asked for: an error's class does without torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lskd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
