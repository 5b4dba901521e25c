"""The teacher's trial before the first training step: does it do better than guessing?"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lskd.base.tensors import accumulator_dtype, summed_over_processes
from lskd.errors import LskdError, one_line
from lskd.teachers.frozen import FrozenTeacher
from lskd.teachers.outputs import Autocast

SIGNIFICANCE = 0.01
"""Level of the test against chance."""


def binomial_tail(right: int, total: int, chance: float) -> float:
    """Return the probability of ``right`` or more successes in ``total`` draws of probability ``chance``.

    >>> binomial_tail(2, 2, 0.5)
    0.25
    """
    if right <= 0 or chance >= 1:
        return 1.0
    counts = torch.arange(right, total + 1, dtype=torch.float64)
    draws: Any = torch.distributions.Binomial(total, counts.new_tensor(chance), validate_args=False)
    return float(draws.log_prob(counts).logsumexp(0).exp())


@cache  # of a study's runs it is asked several times
def compare_with_chance(right: int, total: int, chance: float) -> Literal["above", "at", "too few"]:
    """Return whether ``right`` of ``total`` answers are more than chance gives: a one-sided binomial test.

    Args:
        chance: probability of a right answer by guessing.

    Returns:
        ``"too few"`` where not even ``total`` right answers would tell.

    >>> compare_with_chance(60, 100, 0.1), compare_with_chance(10, 100, 0.1), compare_with_chance(1, 1, 0.1)
    ('above', 'at', 'too few')
    """
    if total == 0 or binomial_tail(total, total, chance) > SIGNIFICANCE:
        return "too few"
    return "at" if binomial_tail(right, total, chance) > SIGNIFICANCE else "above"


def spread_indices(total: int, count: int) -> list[int]:
    """Return ``count`` of ``total`` indices at even distances: a folder is sorted by class.

    >>> spread_indices(10, 3), spread_indices(2, 3)
    ([1, 5, 8], [0, 1])
    """
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def accuracy_text(right: int, total: int, chance: float) -> str:
    """Return on how many images a model is right, and on how many a guess would be.

    >>> accuracy_text(3, 4, 0.5)
    '75.0 % of 4 validation images (chance 50.0 %)'
    """
    return f"{100 * right / total:.1f} % of {total} validation images (chance {100 * chance:.1f} %)"


def at_chance(right: int, counts: Sequence[int]) -> str:
    """Return :func:`accuracy_text` of a classifier that is no better than guessing, "" where it is better.

    Who always names the most frequent class only guesses, too.

    Args:
        right: how many images it is right on.
        counts: images of each class.

    >>> at_chance(3, [2, 2]), at_chance(50, [90, 10]), at_chance(100, [90, 10])
    ('', '50.0 % of 100 validation images (chance 90.0 %)', '')
    """
    total = sum(counts)
    chance = max(1 / len(counts), max(counts) / total)
    return accuracy_text(right, total, chance) if compare_with_chance(right, total, chance) == "at" else ""


def ask(teacher: FrozenTeacher, images: Tensor, size_option: str, autocast: Autocast = nullcontext) -> Tensor:
    """Return the teacher's logits for images that it may not be able to process.

    Args:
        images: ``(B, C, H, W)`` as the student gets them.
        size_option: what sets the size of its images, for the message.
        autocast: makes the context of the forward pass in training.

    Raises:
        LskdError: it cannot process images of this shape.
    """
    try:
        with autocast():
            return teacher(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shape = " x ".join(str(size) for size in images.shape[1:])
        raise LskdError(
            f"teacher '{teacher.name}' cannot process {shape} images ({one_line(error)}); "
            f"set {size_option} to the size it was trained on."
        ) from None


def check_teacher(
    teacher: FrozenTeacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    size_option: str,
    skip_option: str,
    autocast: Autocast = nullcontext,
    multi_label: bool = False,
) -> str:
    """Measure the teacher's accuracy on validation images, over all processes, and return a line about it.

    Chance is the larger of ``1 / num_classes`` and the share of the most frequent class. Where an image may
    be of several classes, the teacher is right if the one that it is surest of is among them, and chance is
    the share of images of the most frequent one.

    Args:
        batches: this process's share of the images, as the student gets them, and their labels: class ids
            ``(B,)`` or probabilities ``(B, num_classes)``; with ``multi_label`` 0 to 1 for each class.
        size_option: what sets the size of the teacher's images, for messages.
        skip_option: what leaves this check out, for messages.
        autocast: makes the context of the forward pass in training.
        multi_label: whether classes do not exclude one another.

    Raises:
        LskdError: the teacher is not better than chance (:func:`compare_with_chance`), or cannot process the
            images.
    """
    device = teacher.device
    counts = torch.zeros(num_classes + 2, dtype=accumulator_dtype(device), device=device)
    for images, labels in batches:
        logits = ask(teacher, images, size_option, autocast)
        labels, guess = labels.to(logits.device), logits.argmax(-1, keepdim=True)
        if not multi_label:
            labels = labels.argmax(-1) if labels.ndim == 2 else labels
            labels = torch.nn.functional.one_hot(labels, num_classes)
        of_class = labels >= 0.5
        counts[0] += of_class.gather(-1, guess).sum()
        counts[1] += len(labels)
        counts[2:] += of_class.sum(0)
    # Every process then comes to the same verdict.
    right, total, *per_class = (int(value) for value in summed_over_processes(counts).tolist())
    who = f"teacher '{teacher.name}'"
    if not any(per_class):
        return f"{who}: no validation images with labels, its accuracy is not checked"
    chance = max(0.0 if multi_label else 1 / num_classes, max(per_class) / total)
    accuracy = accuracy_text(right, total, chance)
    match compare_with_chance(right, total, chance):
        case "at":
            raise LskdError(
                f"{who} is at chance: right on {accuracy}; check its checkpoint, normalisation, image size "
                f"({size_option}) and class order; {skip_option} trains on it nevertheless."
            )
        case "too few":
            return f"{who}: right on {accuracy}; too few images to tell it from chance"
    return f"{who}: right on {accuracy}"
