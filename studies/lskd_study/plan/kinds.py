"""What a study's models do, classify images or translate, and what follows from that everywhere."""

from dataclasses import dataclass
from typing import Literal

Ecosystem = Literal["timm", "mmcls", "fairseq"]
Control = Literal["hard", "smoothed", "real"]


@dataclass(frozen=True)
class Kind:
    """What the models of a study do.

    Attributes:
        name: in ``verdicts.json``, and of the page's template.
        samples: on which models are measured.
        short: the samples in one word.
        score: the quantity of the headline.
        measure: the same in a word.
        splits: folders of the data that runs read, all of them where there is "".
    """

    name: Literal["images", "translation"]
    samples: str
    short: str
    score: str
    measure: str
    splits: tuple[str, ...]


IMAGES = Kind("images", "validation images", "images", "top-1 accuracy", "accuracy", ("train", "val"))
TRANSLATION = Kind("translation", "test sentences", "sentences", "BLEU", "BLEU", ("",))


def kind_of(ecosystem: str) -> Kind:
    """Return what the models of an ecosystem's studies do."""
    return TRANSLATION if ecosystem == "fairseq" else IMAGES
