"""Data loading for the bundled trainer: timm's data sets and transforms, in an order and with randomness that
depend on nothing but (seed, epoch, sample), so that a resumed or a distributed run sees the same images."""

import random
import re
import signal
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lskd import LskdError
from lskd.errors import one_line
from lskd.teachers.replay import augmentation_seed, replayed
from timm_ls_kd.data import CheckedReader, DataConfig, unreadable

# What timm's `create_transform` takes of a data configuration, or of a run's arguments, under the same names.
_VALIDATION = ("interpolation", "crop_pct", "crop_mode")
_TRAINING = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
_COLLATE = 1  # tells the seed of a batch's mixing from the seeds of its samples


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run a block on random generators seeded from `key`, and give the old state back."""
    with replayed(0):  # which gives it back
        seed_all(*key)
        yield


def seed_all(*key: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators from a tuple of whole numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))


class _ReadOnceReader(CheckedReader):
    """Lets one sample be read once: timm's data set would quietly take the next for an unreadable one."""

    def __init__(self, reader: Any) -> None:
        super().__init__(reader)
        self.open_for: int | None = None
        self.current = -1

    def allow(self, index: int) -> None:
        self.open_for = self.current = index

    def __getitem__(self, index: int) -> Any:
        if index != self.open_for:
            raise unreadable(self.filename(self.current, absolute=True))
        self.open_for = None
        return super().__getitem__(index)


class _Batch(list[Any]):
    """Samples of one batch, and the seed for mixing them."""

    key: tuple[int, ...] = ()


class SeededDataset(Dataset[Any]):
    """A timm data set whose augmentation depends on (seed, epoch, sample) alone.

    Indices come from `EpochSampler` as `epoch * len + sample`, so that workers that live on know the epoch.

    Args:
        dataset: timm's.
        seed: of the augmentation.
        once: its reader, where it has one, from now on skips no unreadable image; False: it stays as it is.
    """

    def __init__(self, dataset: Any, seed: int, once: bool = True) -> None:
        self.dataset, self.seed = dataset, seed
        reader = getattr(dataset, "reader", None)
        if once and reader is not None and not isinstance(reader, _ReadOnceReader):
            reader = dataset.reader = _ReadOnceReader(reader)
        self.reader = reader if isinstance(reader, _ReadOnceReader) else None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return the sample that an index of `EpochSampler` stands for."""
        epoch, sample = divmod(index, len(self.dataset))
        # As for stored soft labels, so that a run with them sees the images that it would see without.
        with replayed(augmentation_seed(self.seed, epoch, sample)):
            return self.read(sample)

    def read(self, sample: int) -> Any:
        """Return a sample through the transform, with whatever randomness there is.

        Raises:
            LskdError: the image cannot be read.
        """
        if self.reader is not None:
            self.reader.allow(sample)
        try:
            return self.dataset[sample]
        except (OSError, SyntaxError, zlib.error) as error:
            if self.reader is None:
                raise
            raise unreadable(self.reader.filename(sample, absolute=True), error) from None

    def __getitems__(self, indices: Sequence[int]) -> _Batch:
        """Return a batch, with its seed for mixing."""
        batch = _Batch(self[index] for index in indices)
        batch.key = (self.seed, *divmod(indices[0], len(self.dataset)), _COLLATE)
        return batch


class _SeededCollate:
    """Collate, and mix until `off_epoch` (0: always), drawing from the batch's own seed."""

    def __init__(self, prefetch: bool, mixing: dict[str, Any] | None, off_epoch: int) -> None:
        self.mixup = None if mixing is None else (FastCollateMixup if prefetch else Mixup)(**mixing)
        self.prefetch = prefetch
        self.off_epoch = off_epoch

    def __call__(self, batch: list[Any]) -> Any:
        assert isinstance(batch, _Batch)
        if self.mixup is None:
            return fast_collate(batch) if self.prefetch else default_collate(list(batch))
        # The epoch comes with the batch: workers that live on would not see a switch in this process.
        self.mixup.mixup_enabled = not self.off_epoch or batch.key[1] < self.off_epoch
        with seeded(*batch.key):
            return self.mixup(batch) if self.prefetch else self.mixup(*default_collate(list(batch)))


def _end_quietly(worker: int) -> None:
    """Leave Ctrl-C to the training process, which ends its workers: they would end with a traceback each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # multiprocessing's thread that hands tensors over reports its own end in this way, and nothing else does:
    # errors of loading travel to the training process.
    sys.excepthook = lambda *error: None


def loading_error(error: LskdError) -> LskdError:
    """Return the one line of an error that comes from a worker process wrapped in its traceback."""
    last = str(error).strip().splitlines()[-1]
    return LskdError(re.sub(r"^(\w+\.)*\w*Error: ", "", last))


class EpochSampler(Sampler[int]):
    """Share of one process of an epoch's samples.

    In training the order is a permutation drawn from (seed, epoch), of which process r of w takes every w-th
    sample from the r-th on: the processes' n-th batches together are the n-th batch of one process with the
    whole batch size. In validation the order is the data set's, each sample belongs to exactly one process.
    """

    def __init__(self, samples: int, seed: int, rank: int, world_size: int, shuffle: bool) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the length of this process's share."""
        shared = self.samples // self.world_size
        return shared if self.shuffle else len(range(self.rank, self.samples, self.world_size))

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices."""
        if not self.shuffle:
            yield from range(self.rank, self.samples, self.world_size)
            return
        words = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(int(words[0]))).tolist()
        for index in order[self.rank :: self.world_size][: len(self)]:
            yield self.epoch * self.samples + index


class Loader:
    """Batches `(images, targets)` on the device, normalised; errors of loading processes are one line."""

    def __init__(self, loader: Any, sampler: EpochSampler, device: torch.device) -> None:
        self._loader, self.sampler, self.device = loader, sampler, device

    @property
    def dataset(self) -> Any:
        """The wrapped data set."""
        return self._loader.dataset

    @property
    def collate(self) -> Any:
        """What makes batches of samples."""
        return getattr(self._loader, "loader", self._loader).collate_fn

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the epoch's batches."""
        try:
            for images, targets in self._loader:
                yield images.to(self.device), targets.to(self.device)
        except LskdError as error:
            raise loading_error(error) from None


def eval_loader(
    dataset: Any, data: DataConfig, args: Namespace, device: torch.device, rank: int = 0, world_size: int = 1
) -> Loader:
    """Load a split in its order through the validation transform."""
    sampler = EpochSampler(len(dataset), 0, rank, world_size, shuffle=False)
    images = SeededDataset(dataset, 0), _SeededCollate(not args.no_prefetcher, None, 0)
    return _load(dataset, data, args, device, sampler, images, _named(data, *_VALIDATION), {})


def train_loader(
    dataset: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    smoothing: float,
    replayed_images: tuple[Dataset[Any], Any] | None = None,
) -> Loader:
    """Load the training split through timm's augmentation.

    Args:
        dataset: a map-style timm data set; its `transform` is set here.
        data: how images become the model's input.
        args: of the run.
        device: where batches go.
        smoothing: of mixup's labels, timm's way.
        replayed_images: samples and what makes batches of them, where soft labels are stored; then the run's
            seed is that of the order alone, and images come mixed.

    Raises:
        LskdError: timm cannot make the transform, or the images do not fill a batch.
    """
    mixing = None
    if args.mixup > 0 or args.cutmix > 0:
        mixing = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "prob": args.mixup_prob,
            "switch_prob": args.mixup_switch_prob,
            "mode": args.mixup_mode,
            "label_smoothing": smoothing,
            "num_classes": args.num_classes,
        }
    images = replayed_images or (
        SeededDataset(dataset, args.seed),
        _SeededCollate(not args.no_prefetcher, mixing, args.mixup_off_epoch),
    )
    sampler = EpochSampler(len(dataset), args.seed, args.rank, args.world_size, shuffle=True)
    interpolation = data.interpolation if args.no_aug else (args.train_interpolation or data.interpolation)
    transform = {**_named(args, *_TRAINING), "auto_augment": args.aa, "interpolation": interpolation}
    erasing = {
        "re_prob": 0.0 if args.no_aug else args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    loader = _load(dataset, data, args, device, sampler, images, transform, erasing)
    if len(loader) == 0:
        raise LskdError(
            f"{len(dataset)} training images do not fill one batch of {args.batch_size} "
            f"in each of {args.world_size} process(es); lower --batch-size."
        )
    return loader


def _load(
    dataset: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    sampler: EpochSampler,
    images: tuple[Dataset[Any], Any],
    transform: dict[str, Any],
    erasing: dict[str, Any],
) -> Loader:
    training, prefetch = sampler.shuffle, not args.no_prefetcher
    mean, std = data.normalisation.mean, data.normalisation.std
    options = {"is_training": training, "use_prefetcher": prefetch, "mean": mean, "std": std}
    try:
        dataset.transform = create_transform(data.input_size, **options, **erasing, **transform)
    except Exception as error:  # timm's parsers of policies raise whatever they like
        policy = transform.get("auto_augment")
        fix = f"check --aa {policy}" if policy else "check the arguments of cropping and augmentation"
        kind = "training" if training else "validation"
        raise LskdError(f"the {kind} transform cannot be made ({one_line(error)}); {fix}.") from None
    samples, collate = images
    loader: Any = DataLoader(
        samples,
        batch_size=args.batch_size if training else args.validation_batch_size or args.batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=args.workers,
        worker_init_fn=_end_quietly,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        persistent_workers=args.workers > 0,
        # Starting workers draws a number: not from the generator of dropout, which must not depend on when.
        generator=torch.Generator(),
    )
    if prefetch:
        channels = data.input_size[0]
        loader = PrefetchLoader(loader, mean=mean, std=std, channels=channels, device=device, **erasing)
    return Loader(loader, sampler, device)


def _named(source: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}
