"""Training images whose augmentation follows from a seed, so that a teacher's words about them stay true."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from torch import Tensor
from torch.utils.data import Dataset

from lskd import LskdError
from lskd.teachers.replay import augmentation_seed, replayed
from mmcls_bnn.compat import BaseDataset
from mmcls_bnn.distil.mixing import ImageMixing

KEY = "soft_label_key"
_TRIED = 4  # images on which repeating is tried


class SeededPipeline(Compose):
    """A data set's pipeline that starts each image from the seed of its sample and epoch.

    Each data sample says which key of the store it has. Loading processes share the number of the epoch.

    Args:
        dataset: whose pipeline it takes the place of.
        base_seed: of the store.
        mixing: of images with one another; None: none.
    """

    def __init__(self, dataset: Any, base_seed: int, mixing: ImageMixing | None = None) -> None:
        """Take the pipeline's transforms."""
        super().__init__(dataset.pipeline.transforms)
        self.samples, self.base_seed = len(dataset), base_seed
        self._dataset, self._mixing = dataset, mixing
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._override: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say, to all loading processes, which epoch comes next."""
        self._epoch[0] = epoch

    def at(self, epoch: int | None) -> None:
        """Let this process alone see another epoch; None: the common one again."""
        self._override = epoch

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Run the transforms, and mix the image.

        Raises:
            LskdError: images that cannot be mixed.
        """
        sample = int(data["sample_idx"])
        epoch = int(self._epoch) if self._override is None else self._override
        result = self._augmented(data, epoch)
        if result is not None and self._mixing is not None:
            seed = augmentation_seed(self.base_seed, epoch, sample)
            mixing = self._mixing.policy.draw(seed, sample, self.samples)
            partner = None
            if mixing is not None:
                partner = self._augmented(self._dataset.get_data_info(mixing.partner), epoch)
                if partner is None:
                    raise _unreadable(self._dataset, mixing.partner)
            self._mixing.apply(result, partner, mixing)
        if result is not None:
            result["data_samples"].set_metainfo({KEY: epoch * self.samples + sample})
        return result

    def _augmented(self, data: dict[str, Any], epoch: int) -> dict[str, Any] | None:
        with replayed(augmentation_seed(self.base_seed, epoch, int(data["sample_idx"]))):
            result: dict[str, Any] | None = super().__call__(data)
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
            raise _unreadable(self.dataset, sample)
        return item


def seed_pipeline(loader: Any, base_seed: int, mixing: ImageMixing | None = None) -> SeededPipeline:
    """Make a training loader's images follow from seeds; where they do already, leave it so.

    Raises:
        LskdError: data, an order or transforms that cannot be repeated, by name; images of different sizes
            that are to be mixed.
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
        dataset.pipeline = SeededPipeline(dataset, base_seed, mixing)
        _check_replay(dataset, base_seed)
        if mixing is not None:
            for sample in range(min(_TRIED, len(dataset))):
                dataset.pipeline(dataset.get_data_info(sample))
    return dataset.pipeline


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


def _unreadable(dataset: Any, sample: int) -> LskdError:
    name = dataset.get_data_info(sample).get("img_path", sample)
    return LskdError(
        f"training image {name} cannot be read, so nothing can be stored about it; repair or remove it."
    )


def keys_of(data_samples: list[Any]) -> Tensor:
    """Return the keys `(B,)` of a batch.

    Raises:
        LskdError: the pipeline was not seeded.
    """
    keys = [sample.get(KEY) for sample in data_samples]
    if None in keys:
        raise LskdError("soft labels need dict(type='SoftLabelsHook') in custom_hooks; add it to the recipe.")
    return torch.tensor(keys, dtype=torch.int64)
