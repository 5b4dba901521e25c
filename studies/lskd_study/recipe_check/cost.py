"""What a recipe costs: parameters, operations, the schedule's corners, GPU-hours."""

import math
from collections.abc import Sequence

from lskd_study.trainers.size import Network

# What one H100 reaches when it trains a ResNet-50 in mixed precision: 2,790 images a second (published), of
# 3 x 8.18 GFLOPs each.
SUSTAINED = 68.5e12
# Of small models in float32, which keep no GPU busy: no more than a guess.
SUSTAINED_FLOAT32 = 10e12
ASSUMPTION = (
    "of an H100 that sustains 68.5 TFLOP/s, as for ResNet-50 at 2,790 training images/s in mixed precision "
    "(fairseq in float32: 10, a guess); a backward pass costs two forward passes; data come in time"
)
BACKWARD = 2.0
_MOST_CORNERS = 8


def gpu_hours(
    epochs: int,
    images: int,
    validation_images: int,
    student_flops: float,
    teacher_flops: float = 0.0,
    backward: float = BACKWARD,
    sustained: float = SUSTAINED,
) -> float:
    """Estimate the hours of one training on one GPU.

    Args:
        epochs: of training, each with a validation.
        images: training images.
        validation_images: the student alone sees them.
        student_flops: of one image's forward pass.
        teacher_flops: likewise, 0 without a teacher.
        backward: cost of a backward pass in forward passes; 0 where next to nothing is trained.
        sustained: operations in a second.
    """
    training = images * ((1 + backward) * student_flops + teacher_flops)
    return epochs * (training + validation_images * student_flops) / sustained / 3600


def corner_points(rates: Sequence[float]) -> list[tuple[int, float]]:
    """Return (epoch, rate) where the curve of the learning rate starts, steps, turns and ends.

    A step between two epochs is the later one; of a curve that turns in every epoch the first, the highest
    and the last are given.

    Args:
        rates: the rate of each epoch, counted from 0.
    """
    last = len(rates) - 1
    if last < 1:
        return [(epoch, rates[epoch]) for epoch in range(last + 1)]
    changes = [rates[i + 1] - rates[i] for i in range(last)]
    tolerance = 1e-9 * max(abs(rate) for rate in rates)

    def flat(epoch: int) -> bool:
        return not 0 <= epoch < last or abs(changes[epoch]) <= tolerance

    corners = {0}
    for epoch in range(1, last + 1):
        step = not flat(epoch - 1) and flat(epoch) and flat(epoch - 2)
        turn = epoch < last and not math.isclose(
            changes[epoch - 1], changes[epoch], rel_tol=1e-6, abs_tol=tolerance
        )
        # Before a step the rate is flat and then falls: a turn of the lines, but not a corner of its own.
        before_step = flat(epoch - 1) and not flat(epoch) and flat(epoch + 1)
        if step or (turn and not before_step):
            corners.add(epoch)
    if not flat(last - 1) and last not in corners:
        corners.add(last)
    if len(corners) > _MOST_CORNERS:
        corners = {0, max(range(last + 1), key=rates.__getitem__), last}
    return [(epoch, rates[epoch]) for epoch in sorted(corners)]


def schedule_text(corners: Sequence[tuple[int, float]], epochs: int, unit: str = "epochs") -> str:
    """Return the corners in words."""
    points = ", ".join(f"{rate:.3g} at {epoch}" for epoch, rate in corners)
    return f"lr {points} of {epochs} {unit}"


def size_text(network: Network) -> str:
    """Return parameters and operations in words."""
    return f"{network.parameters / 1e6:.3g} M parameters, {network.flops / 1e9:.3g} GFLOPs"
