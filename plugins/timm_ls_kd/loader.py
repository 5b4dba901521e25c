"""Data loading for the bundled trainer: timm's data sets and transforms, in an order and with randomness that
depend on nothing but (seed, epoch, sample), so that a resumed or a distributed run sees the same images."""

import signal
import sys
import weakref
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_transform
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lskd import LskdError
from lskd.errors import loading_error, one_line
from lskd.teachers.replay import augmentation_seed, generator_seeds, replayed, seed_generators
from timm_ls_kd.data import CheckedReader, DataConfig, unreadable

# What timm's `create_transform` takes of a data configuration, or of a run's arguments, under the same names.
_VALIDATION = ("interpolation", "crop_pct", "crop_mode")
_TRAINING = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
# timm's and torchvision's transforms that draw from Python's and torch's generators alone, or from none.
_CROPS = ("RandomResizedCropAndInterpolation", "Resize", "CenterCrop")
_COLOURS = ("ColorJitter", "MaybePILToTensor", "MaybeToTensor", "Normalize")
_NO_NUMPY = frozenset((*_CROPS, "RandomHorizontalFlip", "RandomVerticalFlip", *_COLOURS))
_COLLATE = 1  # tells the seed of a batch's mixing from the seeds of its samples


def seed_all(*key: int) -> None:
    """Seed the global generators from a tuple of whole numbers."""
    seed_generators(np.random.SeedSequence(key).generate_state(3).tolist())


class _Batch(list[Any]):
    """Samples of one batch, and the seed for mixing them."""

    key: tuple[int, ...] = ()


class SeededDataset(Dataset[Any]):
    """A timm data set whose augmentation depends on (seed, epoch, sample) alone.

    Indices come from `EpochSampler` as `epoch * len + sample`, so that workers that live on know the epoch.

    Args:
        once: an image that cannot be read is an error; False: timm takes the next one for it.
    """

    def __init__(self, dataset: Any, seed: int, once: bool = True) -> None:
        self.dataset, self.seed, self.reader = dataset, seed, None
        self._numpy = True
        self._last: tuple[int, Any, Any] = (-1, None, None)  # decoded: several views come one after another
        if once and isinstance(dataset, ImageDataset):
            self.reader = CheckedReader(dataset.reader)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return the sample that an index of `EpochSampler` stands for."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a batch, with its seed for mixing."""
        self._last = (-1, None, None)  # a file may change between batches
        epochs, samples = np.divmod(indices, len(self.dataset))
        # As for stored soft labels, so that a run with them sees the images that it would see without.
        seeds = generator_seeds(augmentation_seed(self.seed, epochs, samples))
        with self.replaying():
            batch = _Batch(map(self.read, samples.tolist(), seeds))
        batch.key = (self.seed, int(epochs[0]), int(samples[0]), _COLLATE)
        return batch

    def replaying(self) -> AbstractContextManager[None]:
        """Return what gives the generators back after all images of a batch.

        NumPy's, which is slow to seed and to give back, is left alone where nothing draws from it.
        """
        steps = getattr(self.dataset.transform, "transforms", (self.dataset.transform,))
        known = self.reader is not None and self.dataset.target_transform is None
        self._numpy = not known or not all(type(step).__name__ in _NO_NUMPY for step in steps)
        return replayed(0, numpy=self._numpy)

    def read(self, sample: int, seeds: Sequence[int]) -> tuple[Any, Any]:
        """Return a sample and its label through the transform, the global generators seeded.

        Args:
            sample: its place in the data.
            seeds: of its augmentation, of :func:`lskd.teachers.replay.generator_seeds`.

        Raises:
            LskdError: the image cannot be read.
        """
        if self.reader is None:
            seed_generators(seeds)
            image, label, *_ = self.dataset[sample]
            return image, label
        if self._last[0] != sample:
            self._last = (sample, *self._decoded(self.reader, sample))
        _, image, label = self._last
        seed_generators(seeds, self._numpy)
        return image if self.dataset.transform is None else self.dataset.transform(image), label

    def _decoded(self, reader: CheckedReader, sample: int) -> tuple[Any, Any]:
        try:
            with reader.opened(sample) as (image, label):
                # Pillow would copy an image that has the mode already.
                mode = self.dataset.input_img_mode or image.mode
                image = image if image.mode == mode else image.convert(mode)
                image.load()
        except (OSError, SyntaxError, zlib.error) as error:
            raise unreadable(reader.filename(sample, absolute=True), error) from None
        label = -1 if label is None else label
        if self.dataset.target_transform is not None:
            label = self.dataset.target_transform(label)
        return image, label


def collated(samples: Sequence[tuple[Any, Any]]) -> Any:
    """Return a batch of images and labels as torch's `default_collate` does.

    Bytes, which transforms give as views `(C, H, W)` of `(H, W, C)`, NumPy puts in order in half of the time.
    """
    images, labels = map(list, zip(*samples, strict=True))
    if getattr(images[0], "dtype", None) != torch.uint8:
        return default_collate(list(samples))
    batch = np.empty((len(images), *images[0].shape), np.uint8)
    np.stack([image.numpy() for image in images], out=batch)
    return torch.from_numpy(batch), default_collate(labels)


class _WidenedLoader(DataLoader[Any]):
    """Gives float32 for bytes, on the CPU, in memory that is used again when nothing holds its last batch.

    New memory costs more than what is done in it: a batch of 32 images of 224 px has 4,700 pages.
    """

    _rooms: tuple[tuple[NDArray[np.float32], Callable[[], object]], ...] = ()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is one
        """Yield batches."""
        try:
            for images, targets in super().__iter__():
                yield self._room(images.numel()).view(images.shape).copy_(images), targets
        finally:
            self._rooms = ()  # whoever still holds a batch holds its memory

    def _room(self, count: int) -> Tensor:
        free = [memory for memory, user in self._rooms if user() is None and len(memory) == count]
        if not free:
            memory = np.empty(count + 15, np.float32)
            start = -memory.ctypes.data % 64 // 4  # as torch aligns memory
            free = [memory[start : start + count]]
        user = free[0][:]  # lives as long as any tensor in this memory, autograd's too
        taken = [room for room in self._rooms if room[1]() is not None]
        self._rooms = (*taken, (free[0], weakref.ref(user)))
        return torch.from_numpy(user)


class _MixingCollate:
    """Collate, and mix until `off_epoch` (0: always), drawing from the batch's own seed."""

    def __init__(self, prefetch: bool, mixing: dict[str, Any], off_epoch: int) -> None:
        self.mixup = (FastCollateMixup if prefetch else Mixup)(**mixing)
        self.prefetch = prefetch
        self.off_epoch = off_epoch

    def __call__(self, batch: list[Any]) -> Any:
        assert isinstance(batch, _Batch)
        # The epoch comes with the batch: workers that live on would not see a switch in this process.
        self.mixup.mixup_enabled = not self.off_epoch or batch.key[1] < self.off_epoch
        with replayed(*batch.key):
            return self.mixup(batch) if self.prefetch else self.mixup(*collated(batch))


def _end_quietly(worker: int) -> None:
    """Leave Ctrl-C to the training process, which ends its workers: they would end with a traceback each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # multiprocessing's thread that hands tensors over reports its own end in this way, and nothing else does:
    # errors of loading travel to the training process.
    sys.excepthook = lambda *error: None


class EpochSampler(Sampler[int]):
    """Share of one process of an epoch's training samples.

    The order is a permutation drawn from (seed, epoch), of which process r of w takes every w-th sample from
    the r-th on: the processes' n-th batches together are the n-th batch of one process with the whole batch
    size.

    With `views` V above 1 what V epochs would show comes in another order: V views of an image, one of each
    epoch, one after another, so that they are made of one decoding (Shen and Xing, ECCV 2022).
    """

    def __init__(self, samples: int, seed: int, rank: int, world_size: int, views: int = 1) -> None:
        self.samples, self.seed, self.epoch, self.views = samples, seed, 0, views
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the length of this process's share."""
        return self.samples // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices."""
        turn, part = divmod(self.epoch, self.views)
        words = np.random.SeedSequence((self.seed, turn)).generate_state(1)
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(int(words[0]))).tolist()
        share, length = order[self.rank :: self.world_size], len(self)
        for place in range(part * length, (part + 1) * length):
            index, view = divmod(place, self.views)
            yield (turn * self.views + view) * self.samples + share[index]


class Loader:
    """Batches `(images, targets)` on the device, normalised; errors of loading processes are one line."""

    def __init__(self, loader: Any, sampler: Any, device: torch.device) -> None:
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
    """Load a split in its order through the validation transform; each sample is of exactly one process."""
    share = range(rank, len(dataset), world_size)
    images = SeededDataset(dataset, 0), collated
    return _load(dataset, data, args, device, share, images, _named(data, *_VALIDATION), {})


def train_loader(
    dataset: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    smoothing: float,
    replayed_images: tuple[Dataset[Any], Any] | None = None,
    views: int = 1,
) -> Loader:
    """Load the training split through timm's augmentation.

    Args:
        dataset: a map-style timm data set; its `transform` is set here.
        smoothing: of mixup's labels, timm's way.
        replayed_images: samples and what makes batches of them, where soft labels are stored; then the run's
            seed is that of the order alone, and images come mixed.
        views: of an image that come together, see `EpochSampler`.

    Raises:
        LskdError: timm cannot make the transform, or the images do not fill a batch.
    """
    collate: Callable[[Any], Any] = collated
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
        collate = _MixingCollate(not args.no_prefetcher, mixing, args.mixup_off_epoch)
    images = replayed_images or (SeededDataset(dataset, args.seed), collate)
    sampler = EpochSampler(len(dataset), args.seed, args.rank, args.world_size, views)
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
    sampler: EpochSampler | range,
    images: tuple[Dataset[Any], Any],
    transform: dict[str, Any],
    erasing: dict[str, Any],
) -> Loader:
    training, prefetch = isinstance(sampler, EpochSampler), not args.no_prefetcher
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
    widened = prefetch and device.type == "cpu"
    loader: Any = (_WidenedLoader if widened else DataLoader)(
        samples,
        batch_size=args.batch_size if training else args.validation_batch_size or args.batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=args.workers,
        worker_init_fn=_end_quietly,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        persistent_workers=args.workers > 0 and args.persistent_workers,
        # Starting workers draws a number: not from the generator of dropout, which must not depend on when.
        generator=torch.Generator(),
    )
    if prefetch:
        channels = data.input_size[0]
        loader = PrefetchLoader(loader, mean=mean, std=std, channels=channels, device=device, **erasing)
    return Loader(loader, sampler, device)


def _named(source: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}
