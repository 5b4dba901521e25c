"""Stored soft labels of a timm run: images that can be made again, what a store belongs to, what is read and
what is stored."""

import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lskd import Convention, FrozenTeacher, LskdError, SoftLabels, SoftLabelsError
from lskd.checkpoints import file_checksum, settings_beside
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import TOLERANCE
from lskd.soft_labels.remote import local_folder
from lskd.soft_labels.run import StoredRun, read_rows
from lskd.teachers.outputs import answers_to
from lskd.teachers.replay import (
    MixingPolicy,
    augmentation_seed,
    generator_seeds,
    mixed_image,
    mixed_targets,
    replayed,
)
from timm_ls_kd.arguments import KdConfig, SoftLabelsConfig, scheduled_epochs
from timm_ls_kd.loader import SeededDataset, collated
from timm_ls_kd.teacher import StudentRun, make_teacher

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
# How a teacher is made faster: the form that came of it is in the store, see lskd.teachers.fast.TeacherForm.
_FAST = ("teacher_fast", "teacher_fast_bound", "teacher_compile")
# What a teacher's normalisation and input size are made of.
_TEACHER_SETTINGS = ("img_size", "in_chans", "input_size", "mean", "std", "gp", "model_kwargs")


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
        mixing_off_epoch: first epoch without, 0: none.
        views: how many an image has, that the epochs show in turn; 0: every epoch has its own.
    """

    def __init__(
        self, dataset: Any, seed: int, mixing: MixingPolicy, mixing_off_epoch: int, views: int = 0
    ) -> None:
        super().__init__(dataset, seed)
        self.views = views
        self.mixing, self.mixing_off_epoch = mixing, mixing_off_epoch

    @property
    def transform(self) -> Any:
        """The transform of the wrapped data set, which timm's `create_loader` sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitems__(self, indices: Sequence[int]) -> list[ReplayedSample]:
        """Return the images of keys, `epoch * samples + sample`."""
        self._last = (-1, None, None)
        epochs, samples = np.divmod(indices, len(self.dataset))
        if self.views:
            epochs %= self.views
            indices = (epochs * len(self.dataset) + samples).tolist()
        seeds = augmentation_seed(self.seed, epochs, samples)
        with self.replaying():
            return list(map(self._replayed, indices, seeds.tolist(), generator_seeds(seeds)))

    def _replayed(self, key: int, seed: int, seeds: Sequence[int]) -> ReplayedSample:
        epoch, sample = divmod(key, len(self.dataset))
        image, label = self.read(sample, seeds)
        mixing = None
        if not self.mixing_off_epoch or epoch < self.mixing_off_epoch:
            mixing = self.mixing.draw(seed, sample, len(self.dataset))
        if mixing is None:
            return ReplayedSample(image, int(label), int(label), 1.0, key)
        partner_seed = augmentation_seed(self.seed, epoch, np.array([mixing.partner]))
        last = self._last
        partner, partner_label = self.read(mixing.partner, *generator_seeds(partner_seed))
        self._last = last  # of which the next view may be made
        image, weight = mixed_image(image, partner, mixing)
        return ReplayedSample(image, int(label), int(partner_label), weight, key)


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
        mixing: whether the run mixes.

    Attributes:
        labels: the store, set before the first batch; None: there is none yet.
        stored: the keys below this one are read.
    """

    def __init__(self, prefetch: bool, seed: int, mixing: bool) -> None:
        self.prefetch, self.seed, self.mixing = prefetch, seed, mixing
        self.labels: SoftLabels | None = None
        self.stored = 0

    def __call__(self, batch: Sequence[ReplayedSample]) -> tuple[Tensor, ReplayedTargets]:
        """Return images and targets.

        Raises:
            SoftLabelsError: damaged rows, or rows of other augmentation.
        """
        pairs = [(sample.image, sample.label) for sample in batch]
        images, labels = collated(pairs)
        targets = ReplayedTargets(labels, torch.tensor([sample.key for sample in batch]))
        if self.mixing:
            targets = replace(
                targets,
                partner_labels=torch.tensor([sample.partner_label for sample in batch]),
                weights=torch.tensor([sample.weight for sample in batch], dtype=torch.float32),
            )
        if self.labels is not None and int(targets.keys.max()) < self.stored:
            values, ids = read_rows(self.labels, targets.keys.numpy(), self.seed)
            targets = replace(targets, values=values, ids=ids)
        return images, targets


class KeySampler(Sampler[int]):
    """Turns the sample numbers that a sampler gives into keys of the current epoch.

    Attributes:
        epoch: set before each epoch.
    """

    def __init__(self, sampler: Any, samples: int) -> None:
        self.sampler, self.samples, self.epoch = sampler, samples, 0

    def __len__(self) -> int:
        """Return the length of the wrapped sampler."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield keys."""
        first = self.epoch * self.samples
        for sample in self.sampler:
            yield first + int(sample)


def replayed_images(
    dataset: Any, config: SoftLabelsConfig, prefetch: bool
) -> tuple[ReplayedDataset, ReplayCollate]:
    """Wrap timm's data set, and make the collate function that goes with it."""
    policy = config.mixing
    mixing = policy.mixup_alpha > 0 or policy.cutmix_alpha > 0
    return (
        ReplayedDataset(dataset, config.seed, policy, config.mixing_off_epoch, config.views),
        ReplayCollate(prefetch, config.seed, mixing),
    )


def identity_of(run: StudentRun, layout: SoftLabelsLayout) -> dict[str, Any]:
    """Return what a store with this layout must agree in with a run, number for number.

    Raises:
        LskdError: images of a data set that has no list of them.
    """
    libraries = ("torchvision", "pillow", "numpy")
    return {
        "stored": {"classes": layout.num_classes, "top_k": layout.k, "values": layout.values},
        "teacher": _teacher(run.kd, bool(run.args.amp), str(run.args.amp_dtype)),
        "data": {"images": layout.samples, "listing": listing_checksum(run.stored[1].dataset)},
        "augmentation": augmentation_of(run),
        "versions": {"timm": timm.__version__} | {name: version(name) for name in libraries},
    }


def _teacher(kd: KdConfig, amp: bool, amp_dtype: str) -> dict[str, Any]:
    if kd.checkpoint is not None:
        weights = file_checksum(kd.checkpoint)
        beside = settings_beside(kd.checkpoint, kd.teacher)
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


def augmentation_of(run: StudentRun) -> dict[str, Any]:
    """Return what a run's stored training images follow from, beside the images on disk."""
    args, (config, images, _) = run.args, run.stored
    augmented = not args.no_aug
    mixed = args.mixup > 0 or args.cutmix > 0
    erased = augmented and args.reprob > 0
    # Values as text, and none left out: what only one side names would not be compared.
    named: dict[str, Any] = {"seed": config.seed, "no_aug": bool(args.no_aug)}
    named |= {name: _text(getattr(args, name, None)) if augmented else "off" for name in _TRANSFORM}
    named |= {name: _text(getattr(args, name)) if erased else "off" for name in _ERASING}
    named |= {name: _text(getattr(args, name)) for name in _MIXED}
    named |= {name: _text(getattr(args, name)) if mixed else "off" for name in _MIXING}
    named |= {"mean": _text(run.normalisation.mean), "std": _text(run.normalisation.std)}
    named["prefetcher"] = run.prefetch
    transform = re.sub(r" at 0x[0-9a-f]+", "", repr(images.transform))
    # What the names above do not say: image size, interpolation, and the library's own constants.
    return named | {"transform": hashlib.sha256(transform.encode()).hexdigest()}


def listing_checksum(dataset: Any) -> str:
    """Return a checksum of a timm data set's relative file names and class ids.

    Raises:
        LskdError: a data set that lists neither its files nor its arrays.
    """
    digest = hashlib.sha256()
    reader = getattr(dataset, "reader", None)
    reader = getattr(reader, "reader", reader)  # the one inside that which reads each sample once
    samples = getattr(reader, "samples", None)
    if reader is not None and samples is not None:
        targets = getattr(reader, "targets", None)
        labels = [sample[1] for sample in samples] if targets is None else targets
        for name, label in zip(reader.filenames(absolute=False), labels, strict=True):
            digest.update(f"{name}\t{int(label)}\n".encode())
    elif getattr(dataset, "samples", None) is not None and hasattr(dataset, "root"):  # torchvision's folders
        for path, label in dataset.samples:
            name = Path(path).relative_to(dataset.root)
            digest.update(f"{name}\t{int(label)}\n".encode(errors="surrogateescape"))
    elif hasattr(dataset, "data") and hasattr(dataset, "targets"):  # torchvision's arrays
        digest.update(np.ascontiguousarray(dataset.data).tobytes())
        digest.update(np.asarray(dataset.targets, np.int64).tobytes())
    else:
        raise LskdError(
            f"data set {type(dataset).__name__} has no list of its images, by which --kd-soft-labels could "
            "know them again; use a folder of images or a tar file."
        )
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 0 on the command line and 0.0 in a file are one number
    return str(value)


class SoftLabelsRun(StoredRun):
    """Stored soft labels as one process of a run sees them; see :class:`lskd.soft_labels.run.StoredRun`.

    Raises:
        SoftLabelsError: the folder contains something else, or is damaged.
    """

    LOCK_SECONDS = 15.0  # the loading processes of a killed run may keep its lock for a few seconds
    STOP_ADVICE = (
        "; make room and go on by --resume, or train on without storing by --kd-soft-labels-on-error continue"
    )

    def __init__(self, run: StudentRun) -> None:
        args, (config, images, collate) = run.args, run.stored
        self.run, self.config = run, config
        path = local_folder(config.path, config.cache)
        epochs, temperature = planned_epochs(args), run.kd.temperature
        layout = config.layout(path, args.num_classes, len(images), epochs, temperature, config.shard)
        self.wanted, self._unit = layout.epochs, "view" if layout.views else "epoch"
        self._epoch = 0
        super().__init__(
            path,
            layout,
            identity_of(run, layout),
            seed=config.seed,
            on_error=config.on_error,
            rank=args.rank,
            processes=args.world_size,
            say=run.say,
            teacher=run.kd.teacher_fast,
            bound=run.kd.teacher_fast_bound,
        )
        if self.labels is not None and not layout.shard:
            collate.labels, collate.stored = self.labels, self.epochs * layout.samples
        run.say(self.describe())

    def prepare(self, teacher: "OnDemandTeacher") -> None:
        """Do before the first step what can be done then: try the teacher, lock the store, verify; say so.

        Raises:
            LskdError: the teacher says something else, another run writes, or the teacher cannot be used.
        """
        together = self.config.together
        trained = planned_epochs(self.run.args)
        if together > 1 and (self.epochs < self.wanted or trained % together):
            raise LskdError(
                f"--kd-soft-labels-together {together} shows views of {together} epochs at a time: all "
                f"{self.wanted} must be stored before (there are {self.epochs}), and {together} divide the "
                f"{trained} of training; write them by timm soft-labels, or drop the flag."
            )
        missing = self.keys < self.layout.stop
        if self.config.verify or missing:
            teacher.load()  # first: a new store says in which form the teacher answers
        if missing:
            self.open_writer()
        if self.config.verify:
            kd, amp = self.run.kd, bool(self.run.args.amp)
            half = kd.teacher_dtype == "bfloat16" or (kd.teacher_dtype is None and amp)
            tolerance = TOLERANCE["autocast" if half else self.layout.values]
            self.run.say(self.verify(partial(self.answers, teacher), self.config.verify, tolerance))
        if self.layout.shard:
            return
        if missing:
            self.run.say(f"soft labels: {self._unit}s {self.epochs} to {self.wanted - 1} are to be stored")
        else:
            self.run.say(f"soft labels: all {self.wanted} {self._unit}s are read, the teacher is not asked")

    def begin_epoch(self, epoch: int) -> None:
        """Note which epoch is trained next; every process must.

        Raises:
            SoftLabelsError: it is not stored, nor is one before it.
        """
        self._epoch = self.layout.stored_epoch(epoch)
        if self._epoch < self.epochs or self.failed:
            return
        if self._epoch > self.epochs:
            raise SoftLabelsError(
                f"{self.path} has {self.epochs} {self._unit}(s) and training is at epoch {epoch}; "
                f"{self._unit}s are stored in order: store those before it by timm soft-labels with the same "
                "arguments"
            )
        self.open_writer()

    def end_epoch(self, teacher: Callable[[Tensor], Tensor]) -> None:
        """Ask about images that the epoch left out (its last, incomplete batch), and commit it; likewise.

        Raises:
            SoftLabelsError: the disk cannot take it, and the run is to stop then.
        """
        if self.writing and self._epoch >= self.epochs:
            self.complete((self._epoch + 1) * self.layout.samples, partial(self.answers, teacher))

    def answers(
        self, teacher: Callable[[Tensor], Tensor], keys: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the images of keys as training does, and yield keys `(n,)` and logits `(n, K)` by batch."""
        args, (_, images, collate) = self.run.args, self.run.stored
        batches = self.run.batches(
            images,
            batch_size=args.batch_size,
            sampler=[int(key) for key in keys],
            collate_fn=collate,
            num_workers=args.workers if len(keys) > args.batch_size else 0,
            generator=torch.Generator(),  # a draw from torch's own would change the training that goes on
        )
        asked = ((targets.keys, pixels) for pixels, targets in batches)
        return answers_to(asked, teacher, args.batch_size, self.run.autocast)


class OnDemandTeacher(FrozenTeacher):
    """The teacher of a store, which is made when it is first asked something."""

    def __init__(self, store: SoftLabelsRun) -> None:
        self._store = store
        self._made: FrozenTeacher | None = None
        self._device: torch.device | None = None
        self._compile: dict[str, Any] | None = None

    def load(self) -> FrozenTeacher:
        """Return the teacher, made now if it was not.

        Raises:
            LskdError: as :func:`timm_ls_kd.teacher.make_teacher`.
        """
        if self._made is None:
            # The run's own generators must not notice: a student that needs no teacher has the same ones.
            with replayed(0):
                self._made = make_teacher(self._store.run, self._store.teacher_mode).to(self._device)
            self._store.speaks(self._made.form)
            if self._compile is not None:
                self._made.compile(**self._compile)
        return self._made

    def to(self, device: torch.device | None) -> "OnDemandTeacher":
        """Move the teacher, now or when it is made."""
        self._device = device
        if self._made is not None:
            self._made.to(device)
        return self

    def compile(self, **kwargs: Any) -> None:
        """Compile the teacher, now or when it is made."""
        self._compile = kwargs
        if self._made is not None:
            self._made.compile(**kwargs)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits, as the teacher itself."""
        return self.load()(batch)


def planned_epochs(args: Namespace) -> int:
    """Return how many epochs a run will train, as far as its arguments tell; the schedule may say more."""
    epochs = scheduled_epochs(args)
    return min(epochs, getattr(args, "stop_epoch", None) or epochs)
