"""Training images whose augmentation and mixing follow from a seed, so that a teacher's answers stay true."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from torch import Tensor
from torch.utils.data import Dataset

from lskd import LskdError
from lskd.teachers.replay import Mixing, MixingPolicy, augmentation_seed, mixed_image, mixed_targets, replayed
from mmcls_bnn.compat import BaseDataset

KEY = "soft_label_key"
_TRIED = 4  # images on which repeating is tried


@dataclass(frozen=True)
class ImageMixing:
    """How training images are mixed, each by itself, and their labels, which the loss smooths.

    Called as a preprocessor's `batch_augments`, it changes nothing: the images are mixed before.
    """

    policy: MixingPolicy
    num_classes: int

    def __call__(self, inputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return inputs, scores

    def apply(self, item: dict[str, Any], partner: dict[str, Any] | None, mixing: Mixing | None) -> None:
        """Mix an image of a pipeline with its partner's, in place; None: keep it as it is.

        Raises:
            LskdError: images of two sizes.
        """
        sample, weight = item["data_samples"], 1.0
        label = other = _label_of(sample)
        if partner is not None and mixing is not None:
            sizes = [tuple(each["inputs"].shape) for each in (item, partner)]
            if sizes[0] != sizes[1]:
                raise LskdError(
                    f"images of {sizes[0]} and {sizes[1]} cannot be mixed; let the pipeline crop or resize "
                    "all to one size."
                )
            item["inputs"], weight = mixed_image(item["inputs"], partner["inputs"], mixing)
            other = _label_of(partner["data_samples"])
        weights = torch.tensor([weight], dtype=torch.float32)
        sample.set_gt_score(mixed_targets(label, other, weights, self.num_classes)[0])


class SeededPipeline(Compose):
    """A data set's pipeline that starts each image from the seed of its sample and epoch.

    Each data sample says which key of the store it has. Loading processes share the number of the epoch.

    Args:
        dataset: whose pipeline it takes the place of.
        mixing: of images with one another; None: none.

    Attributes:
        override: another epoch, which this process alone is shown; None: the common one.
    """

    def __init__(self, dataset: Any, base_seed: int, mixing: ImageMixing | None = None) -> None:
        super().__init__(dataset.pipeline.transforms)
        self.samples, self.base_seed = len(dataset), base_seed
        self._dataset, self._mixing = dataset, mixing
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.override: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set, for all loading processes, which epoch comes next."""
        self._epoch[0] = epoch

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Run the transforms, and mix the image.

        Raises:
            LskdError: images that cannot be mixed.
        """
        sample = int(data["sample_idx"])
        epoch = int(self._epoch) if self.override is None else self.override
        result = self._augmented(data, epoch)
        if result is None:
            return None
        if self._mixing is not None:
            seed = augmentation_seed(self.base_seed, epoch, sample)
            mixing, partner = self._mixing.policy.draw(seed, sample, self.samples), None
            if mixing is not None:
                partner = self._augmented(self._dataset.get_data_info(mixing.partner), epoch)
                if partner is None:
                    raise _unreadable(self._dataset, mixing.partner)
            self._mixing.apply(result, partner, mixing)
        result["data_samples"].set_metainfo({KEY: epoch * self.samples + sample})
        return result

    def _augmented(self, data: dict[str, Any], epoch: int) -> dict[str, Any] | None:
        with replayed(augmentation_seed(self.base_seed, epoch, int(data["sample_idx"]))):
            result: dict[str, Any] | None = super().__call__(data)
        return result


class KeyedImages(Dataset[Any]):
    """The training images by the keys of a store."""

    def __init__(self, dataset: Any, keys: Any) -> None:
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
        pipeline.override, sample = divmod(key, pipeline.samples)
        try:
            item: dict[str, Any] = self.dataset[sample]
        finally:
            pipeline.override = None
        if item["data_samples"].get(KEY) != key:  # the data set took another image in its place
            raise _unreadable(self.dataset, sample)
        return item


def seed_pipeline(loader: Any, base_seed: int, mixing: ImageMixing | None = None) -> SeededPipeline:
    """Make a training loader's images follow from seeds, unless they do already.

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
    """Run a few images twice through the first transform, the first two, and so on."""
    transforms = dataset.pipeline.transforms
    for sample in range(min(_TRIED, len(dataset))):
        for count in range(1, len(transforms) + 1):
            results = []
            for _ in range(2):
                with replayed(augmentation_seed(base_seed + sample, 0, 0)):
                    results.append(Compose(transforms[:count])(dataset.get_data_info(sample)))
            if not _same(*results):
                name = type(transforms[count - 1]).__name__
                raise LskdError(
                    f"soft labels cannot be stored with {name}: it draws from "
                    "a generator of its own, which no seed of Python, NumPy or torch repeats; take it out."
                )


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


def _label_of(sample: Any) -> Tensor:
    label: Tensor = getattr(sample.gt_label, "label", sample.gt_label)  # mmcls; mmpretrain
    return label


def keys_of(data_samples: list[Any]) -> Tensor:
    """Return the keys `(B,)` of a batch of a :class:`SeededPipeline`."""
    return torch.tensor([sample.get(KEY) for sample in data_samples], dtype=torch.int64)


def mix_by_image(model: Any) -> ImageMixing | None:
    """Take over what the model's preprocessor would mix by batch; None: it mixes nothing.

    mmcls draws one kind and one weight for a batch and mixes it with a permutation of itself. Here each image
    draws its own by the same laws, see :class:`lskd.teachers.replay.MixingPolicy`.

    Args:
        model: an LsKdClassifier; its preprocessor mixes no more.

    Raises:
        LskdError: a way of mixing that no seed repeats here, by name.
    """
    preprocessor = model.data_preprocessor
    augments = getattr(preprocessor, "batch_augments", None)
    if augments is None:
        return None
    if isinstance(augments, ImageMixing):
        return augments
    alphas, shares = ({"Mixup": 0.0, "CutMix": 0.0} for _ in range(2))
    probabilities = augments.probs or [1 / len(augments.augments)] * len(augments.augments)
    for augment, probability in zip(augments.augments, probabilities, strict=True):
        if augment is None or probability == 0:
            continue
        name = type(augment).__name__
        other_box = getattr(augment, "cutmix_minmax", None) or not getattr(augment, "correct_lam", True)
        if name not in alphas or other_box or alphas[name]:
            raise LskdError(
                f"soft labels cannot be stored with {name} of data_preprocessor.batch_augments as it is set "
                "up there: images are mixed one by one by one Mixup(alpha) and one CutMix(alpha) at most; "
                "take it out, or train without soft_labels."
            )
        alphas[name], shares[name] = float(augment.alpha), float(probability)
    mixed = sum(shares.values())
    policy = MixingPolicy(
        alphas["Mixup"], alphas["CutMix"], min(mixed, 1.0), shares["CutMix"] / mixed if mixed else 0.0
    )
    mixing = ImageMixing(policy, int(model.head.num_classes))
    preprocessor.batch_augments = mixing
    return mixing
