"""One module per trainer: how its command line is built and its logs are read.

Each has `CHECKPOINT`, `CURVE_COLUMNS`, `check_config`, `command`, `train`, `resume`, `read_curves` and
`collect_logits`, or `collect_translations` where there are no images; and `Rehearsal(plan)`, whose
`try_out(run)` builds what the run is made of, so that mistakes come out before anything trains.
"""

from importlib import import_module
from types import ModuleType


def trainer_of(ecosystem: str, role: str) -> ModuleType:
    """Return the module that trains a run.

    The teachers of an mmcls study are timm's: the same file then teaches timm's students and mmcls'. fairseq
    trains both.
    """
    name = "timm" if role == "teacher" and ecosystem == "mmcls" else ecosystem
    return import_module(f"lskd_study.trainers.{name}")
