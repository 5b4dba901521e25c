"""What a run has logged, by TensorBoard's own reader."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lskd.base.files import read_csv


def scalars(folder: Path, but: tuple[str, ...] = ()) -> dict[str, dict[int, float]]:
    """Return the values by name and step; each step must be there once, ``but`` of some names."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found = {name: reader.Scalars(name) for name in reader.Tags()["scalars"] if name not in but}
    for name, events in found.items():
        steps = [event.step for event in events]
        assert steps == sorted(set(steps)), name
    return {name: {event.step: event.value for event in events} for name, events in found.items()}


def text(folder: Path, name: str) -> str:
    """Return the last text of a name."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return reader.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def assert_are_curves(folder: Path) -> None:
    """Insist on all numbers of a run's ``curves.csv``, and no others."""
    rows, found = read_csv(folder / "curves.csv"), scalars(folder)
    for name in rows[0]:
        expected = {int(row["epoch"]): float(row[name]) for row in rows if row[name]}
        assert found.pop(name, {}) == pytest.approx(expected), name
    assert not found
