"""Normalisation of images."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and deviation of pixels in [0, 1], and where they come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = ""

    @classmethod
    def of(
        cls, mean: Sequence[float], std: Sequence[float], channels: int, source: str = ""
    ) -> "Normalisation":
        """Build one for `channels` channels; other counts are averaged, as timm's loader does."""
        return cls(_for_channels(mean, channels), _for_channels(std, channels), source)

    def same_as(self, other: "Normalisation") -> bool:
        """Tell whether both give the same numbers."""
        return self.mean == other.mean and self.std == other.std

    def __str__(self) -> str:
        """Show mean and deviation to three digits."""
        numbers = [", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std)]
        return f"mean ({numbers[0]}) std ({numbers[1]})"


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (float(sum(values) / len(values)),) * channels
