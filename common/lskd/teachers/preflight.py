"""Whether a classifier does better than guessing."""

import math
from typing import Literal


def binomial_tail(right: int, total: int, chance: float) -> float:
    """Return the probability of ``right`` or more successes in ``total`` draws of probability ``chance``.

    >>> binomial_tail(2, 2, 0.5)
    0.25
    """
    if right <= 0 or chance >= 1:
        return 1.0
    log_p, log_q = math.log(chance), math.log1p(-chance)

    def log_mass(k: int) -> float:
        choices = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return choices + k * log_p + (total - k) * log_q

    return min(1.0, math.fsum(math.exp(log_mass(k)) for k in range(right, total + 1)))


def compare_with_chance(
    right: int, total: int, chance: float, significance: float = 0.01
) -> Literal["above", "at", "too few"]:
    """Say whether ``right`` of ``total`` answers are more than chance gives: a one-sided binomial test.

    Args:
        right: right answers.
        total: answers.
        chance: probability of a right answer by guessing.
        significance: level of the test.

    Returns:
        ``"too few"`` where not even ``total`` right answers would tell.

    >>> compare_with_chance(60, 100, 0.1), compare_with_chance(10, 100, 0.1), compare_with_chance(1, 1, 0.1)
    ('above', 'at', 'too few')
    """
    if total == 0 or binomial_tail(total, total, chance) > significance:
        return "too few"
    return "at" if binomial_tail(right, total, chance) > significance else "above"
