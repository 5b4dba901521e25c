"""What a training of images is told about its stored soft labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lskd.errors import SoftLabelsError
from lskd.soft_labels.format import MANIFEST, SoftLabelsLayout, read_manifest, shard_folder
from lskd.soft_labels.forms import check_reading
from lskd.terms import Rest

DEFAULT_SEED = 42
LARGEST_SEED = 2**63 - 1
DEFAULT_TOP_K = 10
OnError = Literal["stop", "continue"]


@dataclass(frozen=True)
class StoreSettings:
    """What a training of images does with stored soft labels, whichever trainer it is of.

    Attributes:
        path: folder of the store, or a URL of one that is only read.
        cache: where copies of what is at a URL are kept; None: in the user's cache folder.
        top_k: classes kept of each image; 0: all; None: as stored, 10 where nothing is stored yet.
        sampled: classes drawn of each image instead, so that they are right in expectation; None: as stored.
        views: of each image, which the epochs read in turn; 0: every epoch has its own.
        values: one of :data:`lskd.soft_labels.format.ValueDtype`; None: as stored, else float32 for all
            classes and float16 otherwise.
        seed: of the augmentation, which all students of the store share.
        rest: what becomes of the probability of classes that are not stored; see :class:`lskd.TopK`.
        verify: how many stored images the teacher is asked about again before training.
        on_error: when the disk fails: "stop", or "continue" with the teacher and store nothing.
    """

    path: str
    cache: str | None = None
    top_k: int | None = None
    sampled: int | None = None
    views: int = 0
    values: str | None = None
    seed: int = DEFAULT_SEED
    rest: Rest = "spread"
    verify: int = 0
    on_error: OnError = "stop"

    def layout(
        self,
        folder: Path,
        num_classes: int,
        samples: int,
        epochs: int,
        temperature: float = 1.0,
        shard: str = "",
    ) -> SoftLabelsLayout:
        """Return the layout of the store: what was not asked for is as in ``folder``, if one is there.

        Args:
            folder: ``path``, or the local copy of what is there.
            epochs: how many are wanted.
            temperature: of the loss that reads it.
            shard: "I/N": that shard of the store alone.

        Raises:
            SoftLabelsError: a top-K beyond the number of classes, a temperature that cannot be had from it,
                a store that has the other kind of classes or views instead of epochs, or a damaged one.
        """
        drawn, top_k, values = self.sampled is not None, self.top_k, self.values
        own = shard_folder(folder, shard)
        if (own / MANIFEST).exists():
            there = read_manifest(own).layout
            if there.views and not self.views:
                raise SoftLabelsError(
                    f"the soft labels in {folder} are {there.epochs} view(s) of each image, to be read in "
                    "turn, and this run reads one epoch after the other: ask for views "
                    f"({there.epochs}), or use another folder"
                )
            if there.sampled != drawn and (drawn or top_k is not None):
                raise SoftLabelsError(
                    f"the soft labels in {folder} are {there.kept} classes, and this run asks for "
                    f"{'drawn ones' if drawn else 'the largest'}: ask for what is there, or use another "
                    "folder"
                )
            drawn = there.sampled
            top_k = there.k if top_k is None else top_k
            values = there.values if values is None else values
        top_k = top_k if self.sampled is None else self.sampled
        k = min(DEFAULT_TOP_K, num_classes) if top_k is None else top_k or num_classes
        kept: Any = values or ("float32" if k == num_classes else "float16")
        epochs = min(epochs, self.views) if self.views else epochs
        layout = SoftLabelsLayout(
            num_classes,
            k,
            samples,
            epochs,
            rows_per_sample=1,
            values=kept,
            seeds=True,
            views=self.views > 0,
            sampled=drawn,
            shard=shard,
        )
        check_reading(folder, layout, temperature, self.rest)
        return layout
