"""Augmentation that can be repeated: seeds of samples, generators that start from them, and mixing."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lskd.targets import Convention, smooth_targets

Image = TypeVar("Image", Tensor, NDArray[Any])

_64_BITS = 2**64 - 1
_MIXING = 1  # tells the draws of mixing from those of the transform, which start from the same seed


@overload
def augmentation_seed(base_seed: int, epoch: int, sample: int) -> int: ...
@overload
def augmentation_seed(
    base_seed: int, epoch: int | NDArray[Any], sample: NDArray[Any]
) -> NDArray[np.uint32]: ...
def augmentation_seed(
    base_seed: int, epoch: int | NDArray[Any], sample: int | NDArray[Any]
) -> int | NDArray[np.uint32]:
    """Return the 32-bit seed of a sample's augmentation in an epoch.

    The upper half of ``f(f(f(base_seed) ^ epoch) ^ sample)``, where ``f`` is a step of SplitMix64 (Steele et
    al., OOPSLA 2014): it adds 0x9E3779B97F4A7C15 and mixes, modulo 2^64. Nothing else counts: no order of
    samples, the batch, the number of processes, or a library's version.

    Args:
        base_seed: seed of the whole store, 0 or more.
        epoch: 0 or more, or an array as ``sample``.
        sample: place of the sample in the data, 0 or more; an array gives an array.

    >>> augmentation_seed(0, 0, 0), augmentation_seed(42, 3, 17)
    (595752380, 2657077105)
    >>> augmentation_seed(42, 3, np.array([17, 18])).tolist()
    [2657077105, 1658616417]
    """
    if isinstance(sample, np.ndarray):
        epochs = np.asarray(epoch, np.uint64) if isinstance(epoch, np.ndarray) else int(epoch)
        state = _mix(_mix(_mix(int(base_seed)) ^ epochs) ^ sample.astype(np.uint64))
        seeds: NDArray[np.uint32] = (state >> 32).astype(np.uint32)
        return seeds
    # In Python's whole numbers, which are many times as fast for a single one.
    return int(_mix(_mix(_mix(int(base_seed)) ^ int(epoch)) ^ int(sample))) >> 32


def _mix(value: Any) -> Any:
    z = (value + 0x9E3779B97F4A7C15) & _64_BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return z ^ (z >> 31)


def generator_seeds(seeds: NDArray[np.uint32]) -> list[list[int]]:
    """Return what :func:`seed_generators` takes for each of the seeds ``(n,)``, three words each.

    >>> generator_seeds(np.array([7], np.uint32))
    [[2083679832, 3939563265, 4185785210]]
    """
    return [np.random.SeedSequence(seed).generate_state(3).tolist() for seed in seeds.tolist()]


def seed_generators(words: Sequence[int], numpy: bool = True) -> None:
    """Seed the global generators of Python, NumPy and torch's CPU, one 32-bit word for each.

    Args:
        numpy: False leaves NumPy's out, for what does not draw from it.
    """
    random.seed(words[0])
    if numpy:
        np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])


@contextmanager
def replayed(*key: int, numpy: bool = True) -> Iterator[None]:
    """Run a block on the global generators of Python, NumPy and torch's CPU, seeded; then give them back.

    A transform that draws from these - timm's, torchvision's, mmcv's - does the same to the same image each
    time it runs under the same seed. Giving them back takes a third of loading a small image: for several
    images do this once, and call :func:`seed_generators` before each.

    Args:
        key: one seed, 0 to 2^32 - 1, of :func:`augmentation_seed`, or several whole numbers.
        numpy: False leaves NumPy's generator alone, whose state costs the most to give back.

    >>> with replayed(3):
    ...     first = random.random(), np.random.rand(), torch.rand(1).item()
    >>> with replayed(3):
    ...     first == (random.random(), np.random.rand(), torch.rand(1).item())
    True
    """
    before = random.getstate(), np.random.get_state() if numpy else None, torch.get_rng_state()
    seed_generators(np.random.SeedSequence(key).generate_state(3).tolist(), numpy)
    try:
        yield
    finally:
        random.setstate(before[0])
        if before[1] is not None:
            np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Mixing(NamedTuple):
    """What one image is mixed with.

    Attributes:
        partner: the other sample; its own augmentation is that of its own seed in the same epoch.
        kind: pixel by pixel, or a box of the partner's.
        weight: share of the image itself, 0 to 1, as drawn. A box that the border cuts off leaves it more.
        centre: of the box, as shares of height and width.
    """

    partner: int
    kind: Literal["mixup", "cutmix"]
    weight: float
    centre: tuple[float, float]

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, bottom, left and right of the box in pixels (Yun et al., 2019)."""
        ratio = (1 - self.weight) ** 0.5
        bounds: list[int] = []
        for size, share in ((height, self.centre[0]), (width, self.centre[1])):
            cut, middle = int(size * ratio), int(share * size)
            bounds += [max(middle - cut // 2, 0), min(middle + (cut + 1) // 2, size)]
        return bounds[0], bounds[1], bounds[2], bounds[3]


@dataclass(frozen=True)
class MixingPolicy:
    """How images are mixed, each by itself: partner, kind, weight and box follow from the sample's seed.

    timm and mmcls draw one weight and one kind for a batch and mix it with its own reverse. Here every image
    draws its own, by the same laws (``Beta(alpha, alpha)``, the same probabilities), and its partner is any
    other sample of the data: so a teacher's answer to the mixed image is right for a student with another
    order of samples, batch size or number of processes. The partner has to be loaded, too: twice the loading.

    Attributes:
        mixup_alpha: alpha of mixup (Zhang et al., 2018), 0: none.
        cutmix_alpha: alpha of CutMix (Yun et al., 2019), 0: none.
        probability: how many of the images are mixed at all.
        switch_probability: how many of these by CutMix, where both are on.

    Raises:
        ValueError: for numbers out of range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.mixup_alpha, self.cutmix_alpha) < 0:
            raise ValueError("mixup_alpha and cutmix_alpha must not be negative")
        if not (0 <= self.probability <= 1 and 0 <= self.switch_probability <= 1):
            raise ValueError("probability and switch_probability must lie in [0, 1]")

    def draw(self, seed: int, sample: int, samples: int) -> Mixing | None:
        """Return what a sample is mixed with; None: it stays as it is."""
        if samples < 2 or not (self.mixup_alpha or self.cutmix_alpha):
            return None
        # RandomState, whose streams NumPy has promised not to change.
        generator = np.random.RandomState(augmentation_seed(seed, _MIXING, 0))
        mixed, switch, partner, top, left = generator.random_sample(5).tolist()
        if mixed >= self.probability:
            return None
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or switch < self.switch_probability)
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        other = min(int(partner * (samples - 1)), samples - 2)
        return Mixing(
            partner=other + (other >= sample),
            kind="cutmix" if cutmix else "mixup",
            weight=float(generator.beta(alpha, alpha)),
            centre=(top, left),
        )


def mixed_image(image: Image, partner: Image, mixing: Mixing) -> tuple[Image, float]:
    """Mix two images of the same size.

    Args:
        image: ``(..., height, width)``, an array or a tensor; whole numbers are rounded to after mixing.

    Returns:
        The mixed image, a new one of the same type, and the share in it, 0 to 1, of the first.
    """
    first, second = torch.as_tensor(image), torch.as_tensor(partner)
    if mixing.kind == "cutmix":
        height, width = first.shape[-2:]
        top, bottom, left, right = mixing.box(height, width)
        mixed, weight = first.clone(), 1 - (bottom - top) * (right - left) / (height * width)
        mixed[..., top:bottom, left:right] = second[..., top:bottom, left:right]
    else:
        weight = mixing.weight
        mixed = first.float() * weight + second.float() * (1 - weight)
        mixed = (mixed if first.is_floating_point() else mixed.round()).to(first.dtype)
    result: Any = mixed if isinstance(image, Tensor) else mixed.numpy()
    return result, weight


def mixed_targets(
    labels: Tensor,
    partner_labels: Tensor,
    weights: Tensor,
    num_classes: int,
    alpha: float = 0.0,
    convention: Convention = "uniform",
) -> Tensor:
    """Return the labels of mixed images as probabilities, ``(B, num_classes)`` in float32.

    Args:
        labels: class ids ``(B,)``.
        partner_labels: those of the partners ``(B,)``.
        weights: share ``(B,)`` of the image itself, 0 to 1.
        alpha: smoothing of both labels before mixing.

    >>> mixed_targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.75]), 3).tolist()
    [[0.75, 0.25, 0.0]]
    """
    share = weights.float().unsqueeze(-1)
    own = smooth_targets(labels, num_classes, alpha, convention)
    other = smooth_targets(partner_labels, num_classes, alpha, convention)
    return own * share + other * (1 - share)
