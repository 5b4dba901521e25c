"""A timm run's use of stored soft labels: how its images are made, and which epoch comes."""

import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from lskd import Convention, LskdError, SoftLabels, SoftLabelsError
from lskd.checkpoints import file_checksum
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.run import StoredRun
from lskd.teachers.fast import FAST_BOUND, FastMode
from lskd.teachers.replay import MixingPolicy, augmentation_seed, mixed_image, mixed_targets, replayed
from timm_ls_kd.arguments import KdConfig, SoftLabelsConfig
from timm_ls_kd.data import Normalisation
from timm_ls_kd.loader import SeededDataset
from timm_ls_kd.run_settings import settings_beside


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
    dataset: Any, config: SoftLabelsConfig | None, prefetch: bool
) -> tuple[ReplayedDataset, ReplayCollate] | None:
    """Wrap timm's data set, and make the collate function that goes with it; None: nothing is stored."""
    if config is None:
        return None
    policy = config.mixing
    mixing = policy.mixup_alpha > 0 or policy.cutmix_alpha > 0
    return (
        ReplayedDataset(dataset, config.seed, policy, config.mixing_off_epoch),
        ReplayCollate(prefetch, config.seed, mixing),
    )


# How far two answers to the same image may be apart, in nats per nat: other kernels, half precision.
TOLERANCE = {"float32": 0.01, "half": 0.1}


class SoftLabelsRun(StoredRun):
    """Stored soft labels as one process of a run sees them; see :class:`lskd.StoredRun`.

    Args:
        config: what was asked for.
        layout: of the store.
        identity: what it must belong to.
        source: makes the training images.
        rank: number of this process; the first one writes.
        world_size: number of processes.
        say: prints a line, on the first process.
        teacher: the form in which the teacher is asked for.
        bound: of its error.

    Raises:
        SoftLabelsError: the folder holds something else, or is damaged.
    """

    LOCK_SECONDS = 15.0  # the loading processes of a killed run may hold its lock for a few seconds
    STOP_ADVICE = (
        "; make room and go on by --resume, or train on without storing by --kd-soft-labels-on-error continue"
    )

    def __init__(
        self,
        config: SoftLabelsConfig,
        layout: SoftLabelsLayout,
        identity: dict[str, Any],
        source: ImageSource,
        rank: int,
        world_size: int,
        say: Callable[[str], None],
        teacher: FastMode = "none",
        bound: float = FAST_BOUND,
    ) -> None:
        """Look at what is there, and let the loader read it."""
        self.config, self.source = config, source
        self._epoch = 0
        super().__init__(
            config.path,
            layout,
            identity,
            seed=config.seed,
            on_error=config.on_error,
            rank=rank,
            processes=world_size,
            say=say,
            teacher=teacher,
            bound=bound,
        )
        if self.labels is not None:
            source.collate.labels = self.labels
            source.collate.stored = self.epochs * layout.samples

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is trained next.

        Raises:
            SoftLabelsError: it is not stored, nor is one before it.
        """
        self._epoch = epoch
        if epoch < self.epochs or self.failed:
            return
        if epoch > self.epochs:
            raise SoftLabelsError(
                f"{self.path} has {self.epochs} epoch(s) and training is at epoch {epoch}; epochs are "
                "stored in order: store those before it by timm soft-labels with the same arguments"
            )
        self.open_writer()

    def end_epoch(self, teacher: Callable[[Tensor], Tensor]) -> None:
        """Ask about images that the epoch left out (its last, incomplete batch), and commit it.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self._collector is not None and self._epoch >= self.epochs:
            self.complete_by(teacher, (self._epoch + 1) * self.layout.samples)

    def complete_by(
        self, teacher: Callable[[Tensor], Tensor], stop: int, progress: Callable[[int], Any] = lambda n: None
    ) -> None:
        """Store all keys before `stop`; see :meth:`lskd.StoredRun.complete`."""
        self.complete(stop, partial(self.source.answers, teacher), progress)

    def verify_by(self, teacher: Callable[[Tensor], Tensor], half: bool) -> str:
        """Ask the teacher, which computes in half precision or not, about stored images again.

        Raises:
            SoftLabelsError: an answer is further from the stored one than arithmetic explains.
        """
        tolerance = TOLERANCE["half" if half else "float32"]
        return self.verify(partial(self.source.answers, teacher), self.config.verify, tolerance)


# Arguments of the transform; those of the upstream script alone are None elsewhere.
_TRANSFORM = (
    "train_crop_mode",
    "scale",
    "ratio",
    "hflip",
    "vflip",
    "color_jitter",
    "color_jitter_prob",
    "grayscale_prob",
    "gaussian_blur_prob",
    "aa",
)
_ERASING = ("reprob", "remode", "recount")
_MIXED = ("mixup", "cutmix")
_MIXING = ("mixup_prob", "mixup_switch_prob", "mixup_off_epoch")
# How a teacher is made faster: the form that came of it is in the store, see lskd.TeacherForm.
_FAST = ("teacher_fast", "teacher_fast_bound", "teacher_compile")
# What a teacher's normalisation and input size are made of.
_TEACHER_SETTINGS = ("img_size", "in_chans", "input_size", "mean", "std", "gp", "model_kwargs")


def identity_of(
    args: Namespace,
    kd: KdConfig,
    layout: SoftLabelsLayout,
    dataset: ReplayedDataset,
    normalisation: Normalisation,
    prefetch: bool,
) -> dict[str, Any]:
    """Return what the store must agree in with a run, number for number.

    Args:
        args: the run's arguments, of the bundled trainer or timm's script.
        kd: what the run distils.
        layout: of the store.
        dataset: the training images, with their transform.
        normalisation: of the batches.
        prefetch: whether it is applied on the device.

    Raises:
        LskdError: images of a data set that has no list of them.
    """
    assert kd.soft_labels is not None
    return {
        "stored": {"classes": layout.num_classes, "top_k": layout.k, "values": layout.values},
        "teacher": _teacher(kd, bool(args.amp), str(args.amp_dtype)),
        "data": {"images": layout.samples, "listing": listing_checksum(dataset.dataset)},
        "augmentation": augmentation_of(args, kd.soft_labels, dataset, normalisation, prefetch),
        "versions": {"timm": timm.__version__}
        | {name: version(name) for name in ("torchvision", "pillow", "numpy")},
    }


def _teacher(kd: KdConfig, amp: bool, amp_dtype: str) -> dict[str, Any]:
    if kd.checkpoint is not None:
        weights = file_checksum(kd.checkpoint)
        beside = settings_beside(Path(kd.checkpoint), kd.teacher)
    else:
        known = timm.models.get_pretrained_cfg(kd.teacher) if ":" not in kd.teacher else None
        source = known and (known.hf_hub_id or known.url or known.file)
        weights, beside = f"pretrained, {known.tag if known else kd.teacher} {source}", {}
    # Whatever else the arguments say about the teacher changes what it says.
    asked = {
        field.name: _plain(getattr(kd, field.name))
        for field in fields(kd)
        if field.name.startswith("teacher_") and field.name not in _FAST
    }
    return {
        "architecture": kd.teacher,
        "weights": weights,
        "precision": kd.teacher_dtype or (f"autocast {amp_dtype}" if amp else "float32"),
        "arguments": _text(asked),
        "run_beside_it": _text({name: _plain(beside.get(name)) for name in _TEACHER_SETTINGS}),
    }


def augmentation_of(
    args: Namespace,
    config: SoftLabelsConfig,
    dataset: ReplayedDataset,
    normalisation: Normalisation,
    prefetch: bool,
) -> dict[str, Any]:
    """Return what a run's training images follow from, beside the images on disk; as `identity_of`."""
    augmented = not args.no_aug
    mixed = args.mixup > 0 or args.cutmix > 0
    erased = augmented and args.reprob > 0
    # Values as text, and none left out: what only one side names would not be compared.
    named: dict[str, Any] = {"seed": config.seed, "no_aug": bool(args.no_aug)}
    named |= {name: _text(getattr(args, name, None)) if augmented else "off" for name in _TRANSFORM}
    named |= {name: _text(getattr(args, name)) if erased else "off" for name in _ERASING}
    named |= {name: _text(getattr(args, name)) for name in _MIXED}
    named |= {name: _text(getattr(args, name)) if mixed else "off" for name in _MIXING}
    named |= {"mean": _text(normalisation.mean), "std": _text(normalisation.std), "prefetcher": prefetch}
    transform = re.sub(r" at 0x[0-9a-f]+", "", repr(dataset.transform))
    # What the names above do not say: image size, interpolation, and the library's own constants.
    return named | {"transform": hashlib.sha256(transform.encode()).hexdigest()}


def listing_checksum(dataset: Any) -> str:
    """Return a checksum of a timm data set's relative file names and class ids.

    Raises:
        LskdError: a data set that lists neither its files nor its arrays.
    """
    digest = hashlib.sha256()
    for line in _lines(dataset):
        digest.update(line)
    return digest.hexdigest()


def _lines(dataset: Any) -> Iterable[bytes]:
    reader = getattr(dataset, "reader", None)
    reader = getattr(reader, "reader", reader)  # the one inside that which reads each sample once
    samples = getattr(reader, "samples", None)
    if reader is not None and samples is not None:
        targets = getattr(reader, "targets", None)
        labels = [sample[1] for sample in samples] if targets is None else targets
        for name, label in zip(reader.filenames(absolute=False), labels, strict=True):
            yield f"{name}\t{int(label)}\n".encode()
    elif getattr(dataset, "samples", None) is not None and hasattr(dataset, "root"):  # torchvision's folders
        for path, label in dataset.samples:
            name = Path(path).relative_to(dataset.root)
            yield f"{name}\t{int(label)}\n".encode(errors="surrogateescape")
    elif hasattr(dataset, "data") and hasattr(dataset, "targets"):  # torchvision's arrays
        yield np.ascontiguousarray(dataset.data).tobytes()
        yield np.asarray(dataset.targets, np.int64).tobytes()
    else:
        raise LskdError(
            f"data set {type(dataset).__name__} has no list of its images, by which --kd-soft-labels could "
            "know them again; use a folder of images or a tar file."
        )


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 0 on the command line and 0.0 in a file are one number
    return str(value)
