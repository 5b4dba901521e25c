"""The trainers that a study drives, one class a framework behind one protocol."""

from lskd_study.trainers.fairseq import Fairseq
from lskd_study.trainers.mmcls import Mmcls
from lskd_study.trainers.timm import Timm
from lskd_study.trainers.trainer import Trainer

TIMM = Timm()
TRAINERS: dict[str, Trainer] = {"timm": TIMM, "mmcls": Mmcls(), "fairseq": Fairseq()}


def trainer_of(ecosystem: str, role: str) -> Trainer:
    """Return what trains a run.

    The teachers of an mmcls study are timm's: the same file then teaches timm's students and mmcls'. fairseq
    trains both.
    """
    return TRAINERS["timm" if role == "teacher" and ecosystem == "mmcls" else ecosystem]
