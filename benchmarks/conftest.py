"""Ratios of our time to a peer's, measured side by side in one run, as a table and in results.json."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch

Ratio = Callable[..., None]

_ROWS: list[dict[str, object]] = []


@pytest.fixture
def ratio() -> Ratio:
    """Record the time of ``ours`` over the time of ``peer``.

    The two take turns, because the speed of a shared machine drifts; the median ratio is kept.
    """

    def measure(
        name: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        bar: float | None = None,
        rounds: int = 15,
    ) -> None:
        ours(), peer()
        _keep(name, [_seconds(ours) / _seconds(peer) for _ in range(rounds)], bar)

    return measure


@pytest.fixture
def quantity() -> Ratio:
    """Record ratios of something else than time, such as memory, that a test has measured."""
    return _keep


def _keep(name: str, ratios: list[float], bar: float | None = None) -> None:
    ratios = sorted(ratios)
    value = statistics.median(ratios)
    spread = (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])
    holds = None if bar is None else value <= bar
    _ROWS.append({"name": name, "ratio": value, "quartiles": spread, "bar": bar, "holds": holds})


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.fixture(scope="session", autouse=True)
def report() -> Iterator[None]:
    """Print the table and write results.json when all are measured."""
    yield
    Path(__file__).with_name("results.json").write_text(json.dumps(_ROWS, indent=2) + "\n")
    print(
        f"\n\n{platform.machine()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}\n"
    )
    for row in _ROWS:
        low, high = row["quartiles"]  # type: ignore[misc]
        print(f"{row['ratio']:6.2f}  (quartiles {low:.2f} to {high:.2f})  {row['name']}")
