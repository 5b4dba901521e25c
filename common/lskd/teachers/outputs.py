"""What teachers say: logits of an output, answers to chosen images, an ensemble, and how much it counts."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lskd.base.tensors import require_finite
from lskd.errors import LskdError, one_line
from lskd.terms import centred

Keys = TypeVar("Keys")
# Numbers of the samples, logits, labels, features where they were asked for.
AnswerBatch = tuple[Tensor, Tensor, Tensor, Tensor | None]
AlphaSchedule = Literal["fixed", "threshold", "adaptive"]
Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass in training, such as ``torch.autocast``."""


@dataclass(frozen=True)
class Evaluation:
    """What a model says of a whole data set, in its order.

    Attributes:
        logits: ``(N, K)`` float32, on the CPU.
        labels: ``(N,)`` int64.
        keys: names of the N images, as in :class:`Answers`.
    """

    logits: Tensor
    labels: Tensor
    keys: list[str]


@dataclass(frozen=True)
class Answers:
    """A model's answers to the images of a data set, computed while they are taken.

    Attributes:
        batches: of this process's share; ``(B,)`` positions in the data set, ``(B, K)`` logits, ``(B,)``
            labels and ``(B, D)`` features, the input of the classifier, or None.
        samples: N, of the whole data set.
        num_classes: K.
        keys: names of the N images, relative to the data's root (``split/index`` where there are no files).
        class_names: names of the K classes, where the data set has them.
        templates: ``(K, D)``, the classifier's weight, with features only.
    """

    batches: Iterable[AnswerBatch]
    samples: int
    num_classes: int
    keys: list[str]
    class_names: list[str] | None
    templates: Tensor | None

    def evaluation(self) -> Evaluation:
        """Take all batches, and return them in the data set's order; for one process, with all of them."""
        # To the CPU batch by batch: all logits of large data sets are more than a GPU has beside the model.
        taken = [(numbers, logits.cpu(), labels.cpu()) for numbers, logits, labels, _ in self.batches]
        positions, logits, labels = map(torch.cat, zip(*taken, strict=True))
        order = positions.argsort()
        return Evaluation(logits[order], labels[order].long(), self.keys)


def logits_of(output: Any) -> Tensor:
    """Return the logits `(B, K)` in what a classifier returned.

    A tensor is itself; of several outputs the first counts, as in timm's own validation.

    Args:
        output: a tensor, or a tuple or list that starts with one.

    Raises:
        LskdError: anything else, such as a dict, or another number of dimensions.

    >>> logits_of((torch.zeros(2, 3), torch.ones(2, 3))).sum().item()
    0.0
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or first.ndim != 2:
        found = f"a tensor {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise LskdError(f"the model returns {found}, not logits (batch, classes); use a classifier")
    return first


def answer_batches(
    batches: Iterable[tuple[Any, Tensor]],
    positions: Iterable[int],
    ask: Callable[[Any], Any],
    *,
    model: str,
    advice: str,
    classifier: nn.Linear | None,
    device: torch.device,
    amp: bool,
) -> Iterator[AnswerBatch]:
    """Ask a model about labelled images: yield the batches of :class:`Answers`.

    Args:
        batches: images, in the form that ``ask`` takes, and labels ``(B,)``.
        positions: of these images in the data set.
        ask: returns what the model returns for the images of a batch.
        advice: what to do where it cannot process its images.
        classifier: its input is yielded as features; None: there are none.
        amp: mixed precision: float16 on CUDA, bfloat16 on CPU.

    Raises:
        LskdError: images that the model cannot process, no logits, or no one vector of features an image.
        DivergedError: a logit is not finite.
    """
    entered: list[Tensor] = []
    hook = classifier and classifier.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    positions = iter(positions)
    try:
        for images, labels in batches:
            entered.clear()
            try:
                # Within the loop: a generator's context would apply to whoever takes the batches.
                with torch.inference_mode(), torch.autocast(device.type, enabled=amp):
                    logits = logits_of(ask(images))
            except torch.OutOfMemoryError:
                raise LskdError(
                    f"{model}: a batch of {len(labels)} does not fit the GPU; use a smaller one"
                ) from None
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                shape = " x ".join(map(str, images.shape[1:])) if isinstance(images, Tensor) else "its"
                raise LskdError(
                    f"{model} cannot process {shape} images ({one_line(error)}); {advice}"
                ) from None
            except LskdError as error:
                raise LskdError(f"{model}: {error}") from None
            require_finite(f"{model}: the logits", logits)
            features = entered[-1].float() if entered else None
            if features is not None and features.ndim != 2:
                raise LskdError(f"{model} has no features of one vector an image; choose another model")
            numbers = torch.tensor([next(positions) for _ in range(len(labels))])
            yield numbers, logits.float(), labels, features
    finally:
        if hook:
            hook.remove()


def whole_batch(images: Tensor, batch_size: int) -> Tensor:
    """Return ``batch_size`` images: the first of ``(n, ...)``, repeated in turn where there are fewer.

    >>> whole_batch(torch.tensor([1, 2]), 3).tolist()
    [1, 2, 1]
    """
    if len(images) == batch_size:
        return images
    return images[torch.arange(batch_size, device=images.device) % len(images)]


def answers_to(
    batches: Iterable[tuple[Keys, Tensor]],
    teacher: Callable[[Tensor], Tensor],
    batch_size: int,
    autocast: Autocast = nullcontext,
) -> Iterator[tuple[Keys, Tensor]]:
    """Ask a teacher about images: yield the keys of each batch and the logits ``(n, K)`` of its images.

    The last batch is filled up for the teacher: one of another size would be rounded otherwise.

    Args:
        batches: keys of images, in any form, and these images ``(n, C, H, W)``.
        autocast: makes the context of the forward pass in training.
    """
    for keys, images in batches:
        with autocast():
            logits = teacher(whole_batch(images, batch_size))
        yield keys, logits[: len(images)]


def ensemble_logits(members: Sequence[Tensor]) -> Tensor:
    """Return logits of an ensemble: one teacher's as they are, several teachers' mean probabilities as logs.

    Args:
        members: one or more tensors ``(..., K)`` of logits.

    Raises:
        ValueError: for no member.

    >>> ensemble_logits([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])]).exp().tolist()
    [0.75, 0.25]
    """
    if not members:
        raise ValueError("an ensemble needs at least one member")
    if len(members) == 1:
        return members[0]
    logs = [centred(member).log_softmax(-1) for member in members]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def selective_weight(
    weight: float, schedule: AlphaSchedule, student_bleu: float | None, teacher_bleu: float | None
) -> float:
    """Return the weight of the teacher after a validation (selective distillation, Tan et al., ICLR 2019).

    ``"fixed"``: always ``weight``. ``"threshold"``: ``weight`` while the student's BLEU is below the
    teacher's plus 1, then 0. ``"adaptive"``: ``weight`` while it is below the teacher's minus 2, from there
    on halved with every point of BLEU: ``weight * 0.5 ** (student - teacher + 2)``.

    Args:
        weight: 0 to 1, the weight to begin with.
        student_bleu: validation BLEU in points, 0 to 100; None before the first validation.

    Raises:
        ValueError: for an unknown schedule, or no BLEU of the teacher where one is needed.

    >>> selective_weight(0.8, "adaptive", 31.0, 32.0), selective_weight(0.8, "threshold", 33.0, 32.0)
    (0.4, 0.0)
    """
    if schedule not in ("fixed", "threshold", "adaptive"):
        raise ValueError(f"schedule is {schedule!r}; it must be fixed, threshold or adaptive")
    if schedule == "fixed":
        return weight
    if teacher_bleu is None:
        raise ValueError(f"the schedule {schedule} needs the teacher's BLEU")
    if student_bleu is None:
        return weight
    if schedule == "threshold":
        return weight if student_bleu < teacher_bleu + 1 else 0.0
    return weight * math.pow(0.5, max(student_bleu - teacher_bleu + 2, 0.0))
