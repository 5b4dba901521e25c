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
from lskd.teachers.frozen import Normalisation
from lskd.teachers.replay import augmentation_seed, replayed
from timm_ls_kd.data import CheckedReader, DataConfig, unreadable

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
    def samples(self) -> int:
        """Samples of the whole data set."""
        return self.sampler.samples

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


def create_loader(
    dataset: Any,
    *,
    input_size: Sequence[int],
    batch_size: int,
    normalisation: Normalisation,
    device: torch.device,
    transform: dict[str, Any],
    training: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    prefetch: bool = True,
    mixing: dict[str, Any] | None = None,
    mixing_off_epoch: int = 0,
    erasing: dict[str, Any] | None = None,
    replayed_images: tuple[Dataset[Any], Any] | None = None,
) -> Loader:
    """Build a loader from timm's transform, collate and prefetch parts.

    Args:
        dataset: a map-style timm data set; its `transform` is set here.
        input_size: channels, height, width.
        batch_size: of this process.
        normalisation: mean and deviation of each channel.
        device: where batches go.
        transform: arguments for timm's `create_transform`.
        training: shuffle, and drop the last incomplete batch.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        workers: loading processes.
        pin_memory: pin memory for copies to the GPU.
        prefetch: normalise on the device.
        mixing: arguments for timm's `Mixup`, None: no mixing.
        mixing_off_epoch: first epoch without mixing, 0: none.
        erasing: `re_prob`, `re_mode`, `re_count` of random erasing.
        replayed_images: samples and what makes batches of them, where soft labels are stored; then `seed` is
            that of the order alone, and `mixing` does not count.

    Raises:
        LskdError: timm cannot make the transform.
    """
    mean, std = normalisation.mean, normalisation.std
    erasing = erasing or {}
    try:
        dataset.transform = create_transform(
            tuple(input_size),
            is_training=training,
            use_prefetcher=prefetch,
            mean=mean,
            std=std,
            **erasing,
            **transform,
        )
    except Exception as error:  # timm's parsers of policies raise whatever they like
        policy = transform.get("auto_augment")
        fix = f"check --aa {policy}" if policy else "check the arguments of cropping and augmentation"
        kind = "training" if training else "validation"
        raise LskdError(f"the {kind} transform cannot be made ({one_line(error)}); {fix}.") from None
    sampler = EpochSampler(len(dataset), seed, rank, world_size, shuffle=training)
    samples, collate = replayed_images or (
        SeededDataset(dataset, seed),
        _SeededCollate(prefetch, mixing, mixing_off_epoch),
    )
    loader: Any = DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        worker_init_fn=_end_quietly,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Starting workers draws a number: not from the generator of dropout, which must not depend on when.
        generator=torch.Generator(),
    )
    if prefetch:
        loader = PrefetchLoader(loader, mean=mean, std=std, channels=input_size[0], device=device, **erasing)
    return Loader(loader, sampler, device)


def eval_loader(
    dataset: Any, data: DataConfig, args: Namespace, device: torch.device, rank: int = 0, world_size: int = 1
) -> Loader:
    """Load a split in its order through the validation transform."""
    return create_loader(
        dataset,
        transform=_named(data, "interpolation", "crop_pct", "crop_mode"),
        batch_size=getattr(args, "validation_batch_size", None) or args.batch_size,
        rank=rank,
        world_size=world_size,
        **_of_run(data, args, device),
    )


def train_loader(
    dataset: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    smoothing: float,
    replayed_images: tuple[Dataset[Any], Any] | None = None,
) -> Loader:
    """Load the training split through timm's augmentation; mixup's labels are smoothed timm's way."""
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
    named = _named(args, "no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
    interpolation = data.interpolation if args.no_aug else (args.train_interpolation or data.interpolation)
    loader = create_loader(
        dataset,
        transform={**named, "auto_augment": args.aa, "interpolation": interpolation},
        batch_size=args.batch_size,
        training=True,
        mixing=mixing,
        mixing_off_epoch=args.mixup_off_epoch,
        erasing={
            "re_prob": 0.0 if args.no_aug else args.reprob,
            "re_mode": args.remode,
            "re_count": args.recount,
        },
        replayed_images=replayed_images,
        **_named(args, "seed", "rank", "world_size"),
        **_of_run(data, args, device),
    )
    if len(loader) == 0:
        raise LskdError(
            f"{loader.samples} training images do not fill one batch of {args.batch_size} "
            f"in each of {args.world_size} process(es); lower --batch-size."
        )
    return loader


def _of_run(data: DataConfig, args: Namespace, device: torch.device) -> dict[str, Any]:
    return {
        **_named(data, "input_size", "normalisation"),
        "device": device,
        "workers": args.workers,
        "pin_memory": args.pin_mem,
        "prefetch": not args.no_prefetcher,
    }


def _named(source: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}
