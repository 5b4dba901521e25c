"""A teacher asked once for all of its students: which stores a study needs, and how they are written.

One module per ecosystem, named like it: `views` says what a student's training images follow from, `command`
is the trainer's own command that stores, `write` runs it.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

MIXED = "mixup and CutMix mix the images of a batch, stored they are mixed one by one"


class CannotStoreError(Exception):
    """Why a student cannot read what is stored, in words that follow "because"."""


@dataclass(frozen=True)
class Views:
    """What a student's training images follow from, beside the teacher, the data and the seed.

    Attributes:
        key: equal ones mean equal images, and one store.
        epochs: how many of them the student trains; 0 where its file does not say.
        stored: how many epochs a store of them has; 1 where every epoch has the same.
        caution: why a store would change more than the teacher's work; empty: nothing.
    """

    key: str
    epochs: int
    stored: int
    caution: str = ""


def storing(ecosystem: str) -> ModuleType:
    """Return the module of an ecosystem."""
    return import_module(f"lskd_study.trainers.{ecosystem}_store")
