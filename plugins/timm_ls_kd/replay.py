"""Training images that can be made again: augmentation and mixing follow from each one's seed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from lskd import Convention, SoftLabels, SoftLabelsError
from lskd.teachers.replay import MixingPolicy, augmentation_seed, mixed_image, mixed_targets, replayed
from timm_ls_kd.data import SeededDataset
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.soft_label_arguments import SoftLabelsConfig


class ReplayedSample(NamedTuple):
    """An image as the network gets it, what is in it, and its key in the store."""

    image: Any
    label: int
    partner_label: int
    weight: float
    key: int


class ReplayedDataset(SeededDataset):
    """A timm data set whose images depend on (base seed, epoch, sample) alone, mixed ones too.

    Args:
        dataset: timm's; its transform may be set through this one.
        seed: base seed.
        mixing: mixup and CutMix.
        mixing_off_epoch: first epoch without, 0: none.
    """

    def __init__(self, dataset: Any, seed: int, mixing: MixingPolicy, mixing_off_epoch: int) -> None:
        """Wrap `dataset`; its reader from now on skips no unreadable image."""
        super().__init__(dataset, seed)
        self.mixing, self.mixing_off_epoch = mixing, mixing_off_epoch

    @property
    def transform(self) -> Any:
        """The transform of the wrapped data set, which timm's `create_loader` sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int) -> ReplayedSample:
        """Return the image of a key, `epoch * samples + sample`."""
        epoch, sample = divmod(index, len(self.dataset))
        seed = augmentation_seed(self.seed, epoch, sample)
        image, label = self._augmented(sample, seed)
        mixing = None
        if not self.mixing_off_epoch or epoch < self.mixing_off_epoch:
            mixing = self.mixing.draw(seed, sample, len(self.dataset))
        if mixing is None:
            return ReplayedSample(image, label, label, 1.0, index)
        partner_seed = augmentation_seed(self.seed, epoch, mixing.partner)
        partner, partner_label = self._augmented(mixing.partner, partner_seed)
        image, weight = mixed_image(image, partner, mixing)
        return ReplayedSample(image, label, partner_label, weight, index)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the images of a batch."""
        return [self[index] for index in indices]

    def _augmented(self, sample: int, seed: int) -> tuple[Any, int]:
        with replayed(seed):
            image, label = self.read(sample)[:2]
        return image, int(label)


@dataclass(frozen=True)
class ReplayedTargets:
    """What is known of a batch, in place of timm's targets: labels, and what the store has.

    Attributes:
        labels: class ids `(B,)`.
        keys: of the images in the store `(B,)`, always on the CPU.
        partner_labels: those of mixed-in images `(B,)`; None: nothing is mixed in this run.
        weights: shares of the images themselves `(B,)`.
        values: `(B, k)` as stored; None: the teacher has to be asked.
        ids: `(B, k)`.
    """

    labels: Tensor
    keys: Tensor
    partner_labels: Tensor | None = None
    weights: Tensor | None = None
    values: Tensor | None = None
    ids: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> "ReplayedTargets":
        """Move everything but the keys, as `Tensor.to` does."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> "ReplayedTargets":
        """Pin everything but the keys, for torch's loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def hard(self, num_classes: int, alpha: float, convention: Convention) -> Tensor:
        """Return class ids `(B,)`, or where the run mixes smoothed probabilities `(B, num_classes)`."""
        if self.partner_labels is None or self.weights is None:
            return self.labels
        return mixed_targets(self.labels, self.partner_labels, self.weights, num_classes, alpha, convention)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "ReplayedTargets":
        moved = {
            field.name: change(value)
            for field in fields(self)
            if field.name != "keys" and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)


class ReplayCollate:
    """Collates images as timm does, with `ReplayedTargets`; worker processes read the store here.

    Args:
        prefetch: whether the images are bytes, for timm's prefetcher.
        seed: base seed.
        mixing: whether the run mixes.

    Attributes:
        labels: the store, set before the first batch; None: there is none yet.
        stored: the keys below this one are read.
    """

    def __init__(self, prefetch: bool, seed: int, mixing: bool) -> None:
        """Collate without a store."""
        self.prefetch, self.seed, self.mixing = prefetch, seed, mixing
        self.labels: SoftLabels | None = None
        self.stored = 0

    def __call__(self, batch: Sequence[ReplayedSample]) -> tuple[Tensor, ReplayedTargets]:
        """Return images and targets.

        Raises:
            SoftLabelsError: damaged rows, or rows of other augmentation.
        """
        pairs = [(sample.image, sample.label) for sample in batch]
        images, labels = fast_collate(pairs) if self.prefetch else default_collate(pairs)
        targets = ReplayedTargets(labels, torch.tensor([sample.key for sample in batch]))
        if self.mixing:
            targets = replace(
                targets,
                partner_labels=torch.tensor([sample.partner_label for sample in batch]),
                weights=torch.tensor([sample.weight for sample in batch], dtype=torch.float32),
            )
        if self.labels is not None and int(targets.keys.max()) < self.stored:
            values, ids = self._read(self.labels, targets.keys.numpy())
            targets = replace(targets, values=values, ids=ids)
        return images, targets

    def _read(self, labels: SoftLabels, keys: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rows = labels.take(keys)
        epochs, samples = np.divmod(keys, labels.layout.samples)
        expected = augmentation_seed(self.seed, epochs, samples)
        if rows.seeds is None or (rows.seeds != expected).any():
            raise SoftLabelsError(
                f"the soft labels in {labels.path} are of images augmented otherwise; write them again"
            )
        values = torch.from_numpy(np.ascontiguousarray(rows.values))
        return values, torch.from_numpy(rows.ids.astype(np.int32))


class KeySampler(Sampler[int]):
    """Turns the sample numbers that a sampler gives into keys of the current epoch.

    Attributes:
        epoch: set before each epoch.
    """

    def __init__(self, sampler: Any, samples: int) -> None:
        """Wrap `sampler` of a data set of `samples` samples."""
        self.sampler, self.samples, self.epoch = sampler, samples, 0

    def __len__(self) -> int:
        """Return the length of the wrapped sampler."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield keys."""
        first = self.epoch * self.samples
        for sample in self.sampler:
            yield first + int(sample)


@dataclass(frozen=True)
class ImageSource:
    """Makes the images of any keys, as training does, and asks a teacher about them.

    Attributes:
        dataset: the training images.
        collate: how training collates them.
        normalisation: of the batches.
        device: where they go.
        autocast: context of the forward pass in training.
        batch_size: images at a time.
        channels_last: memory layout of batches in training.
        workers: loading processes.
    """

    dataset: ReplayedDataset
    collate: ReplayCollate
    normalisation: Normalisation
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    batch_size: int
    channels_last: bool = False
    workers: int = 0

    def answers(
        self, teacher: Callable[[Tensor], Tensor], keys: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys `(n,)` and the teacher's logits `(n, K)`, batch by batch."""
        loader: Any = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=[int(key) for key in keys],
            collate_fn=self.collate,
            num_workers=self.workers if len(keys) > self.batch_size else 0,
            generator=torch.Generator(),  # a draw from torch's own would change the training that goes on
        )
        if self.collate.prefetch:
            mean, std = self.normalisation.mean, self.normalisation.std
            loader = PrefetchLoader(loader, mean=mean, std=std, channels=len(mean), device=self.device)
        for images, targets in loader:
            # Always a whole batch, as in training: a smaller one would be rounded otherwise.
            count, images = len(images), images.to(self.device)
            if count < self.batch_size:
                images = images[torch.arange(self.batch_size, device=self.device) % count]
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), self.autocast():
                yield targets.keys, teacher(images)[:count]


def replayed_parts(
    dataset: Any, config: SoftLabelsConfig, prefetch: bool
) -> tuple[ReplayedDataset, ReplayCollate]:
    """Wrap timm's data set, and make the collate function that goes with it."""
    policy = config.mixing
    mixing = policy.mixup_alpha > 0 or policy.cutmix_alpha > 0
    return (
        ReplayedDataset(dataset, config.seed, policy, config.mixing_off_epoch),
        ReplayCollate(prefetch, config.seed, mixing),
    )
