"""Training images whose augmentation follows from a seed, so that a teacher's words about them stay true."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from torch import Tensor
from torch.utils.data import Dataset

from lskd import LskdError, augmentation_seed, replayed
from mmcls_bnn.compat import BaseDataset

KEY = "soft_label_key"
_TRIED = 4  # images on which repeating is tried


class SeededPipeline(Compose):
    """A data set's pipeline that starts each image from the seed of its sample and epoch.

    Each data sample says which key of the store it has. Loading processes share the number of the epoch.

    Args:
        pipeline: the data set's own.
        samples: images in the data.
        base_seed: of the store.
    """

    def __init__(self, pipeline: Any, samples: int, base_seed: int) -> None:
        """Take the pipeline's transforms."""
        super().__init__(pipeline.transforms)
        self.samples, self.base_seed = samples, base_seed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._override: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say, to all loading processes, which epoch comes next."""
        self._epoch[0] = epoch

    def at(self, epoch: int | None) -> None:
        """Let this process alone see another epoch; None: the common one again."""
        self._override = epoch

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Run the transforms."""
        sample = int(data["sample_idx"])
        epoch = int(self._epoch) if self._override is None else self._override
        with replayed(augmentation_seed(self.base_seed, epoch, sample)):
            result: dict[str, Any] | None = super().__call__(data)
        if result is not None:
            result["data_samples"].set_metainfo({KEY: epoch * self.samples + sample})
        return result


class KeyedImages(Dataset[Any]):
    """The training images by the keys of a store.

    Args:
        dataset: the training data, with a :class:`SeededPipeline`.
        keys: those that are wanted.
    """

    def __init__(self, dataset: Any, keys: Any) -> None:
        """Keep both."""
        self.dataset, self.keys = dataset, keys

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self.keys)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return an image as training sees it.

        Raises:
            LskdError: an image that the pipeline gives up.
        """
        key = int(self.keys[place])
        pipeline = self.dataset.pipeline
        epoch, sample = divmod(key, pipeline.samples)
        pipeline.at(epoch)
        try:
            item: dict[str, Any] = self.dataset[sample]
        finally:
            pipeline.at(None)
        if item["data_samples"].get(KEY) != key:  # the data set took another image in its place
            name = self.dataset.get_data_info(sample).get("img_path", sample)
            raise LskdError(
                f"training image {name} cannot be read, "
                "so nothing can be stored about it; repair or remove it."
            )
        return item


def seed_pipeline(loader: Any, base_seed: int) -> SeededPipeline:
    """Make a training loader's images follow from seeds; where they do already, leave it so.

    Raises:
        LskdError: data, an order or transforms that cannot be repeated, by name.
    """
    dataset, sampler = loader.dataset, type(loader.sampler).__name__
    if not isinstance(dataset, BaseDataset):
        raise LskdError(
            f"soft labels cannot be stored for data of type {type(dataset).__name__}, which puts others "
            "together or repeats them; give train_dataloader.dataset one list of images."
        )
    if sampler not in ("DefaultSampler", "SequentialSampler"):
        raise LskdError(
            f"soft labels cannot be stored with {sampler}: each image must come once in an epoch; "
            "use DefaultSampler."
        )
    if not isinstance(dataset.pipeline, SeededPipeline):
        dataset.pipeline = SeededPipeline(dataset.pipeline, len(dataset), base_seed)
        _check_replay(dataset, base_seed)
    return dataset.pipeline


def refuse_batch_augments(preprocessor: Any) -> None:
    """Check that images are not mixed by batch.

    Raises:
        LskdError: they are, by name.
    """
    augments = getattr(preprocessor, "batch_augments", None)
    if augments is not None:
        names = ", ".join(type(augment).__name__ for augment in augments.augments if augment is not None)
        raise LskdError(
            f"soft labels cannot be stored with data_preprocessor.batch_augments ({names}): which images are "
            "mixed would depend on the order of the batches; take it out, or train without soft_labels."
        )


def _check_replay(dataset: Any, base_seed: int) -> None:
    """Run a few images twice."""
    transforms = dataset.pipeline.transforms
    for sample in range(min(_TRIED, len(dataset))):
        for count in range(1, len(transforms) + 1):
            steps = Compose(transforms[:count])
            once, again = (_run(steps, dataset.get_data_info(sample), base_seed + sample) for _ in range(2))
            if not _same(once, again):
                name = type(transforms[count - 1]).__name__
                raise LskdError(
                    f"soft labels cannot be stored with {name}: it draws from "
                    "a generator of its own, which no seed of Python, NumPy or torch repeats; take it out."
                )


def _run(steps: Compose, data: dict[str, Any], seed: int) -> Any:
    with replayed(augmentation_seed(seed, 0, 0)):
        return steps(data)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one is None and other is None
    for name in ("img", "inputs"):
        if name in one:
            return np.array_equal(np.asarray(one[name]), np.asarray(other[name]))
    return True


def keys_of(data_samples: list[Any]) -> Tensor:
    """Return the keys `(B,)` of a batch.

    Raises:
        LskdError: the pipeline was not seeded.
    """
    keys = [sample.get(KEY) for sample in data_samples]
    if None in keys:
        raise LskdError("soft labels need dict(type='SoftLabelsHook') in custom_hooks; add it to the recipe.")
    return torch.tensor(keys, dtype=torch.int64)
