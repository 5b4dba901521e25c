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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add where steps are taken."""
    parser.addoption(
        "--device", default="cpu", help="cpu or cuda: where losses and timm's steps are computed"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device that is asked for."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def ratio() -> Ratio:
    """Record the time of ``ours`` over the time of ``peer``.

    The two take turns, because the speed of a shared machine drifts; the median ratio is kept. For short work
    of one thread ``least=True`` keeps the ratio of the least times of the processor instead, to which what
    others do on the machine only adds.
    """

    def measure(
        name: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        bar: float | None = None,
        rounds: int = 15,
        clock: Callable[[], float] = time.perf_counter,
        least: bool = False,
    ) -> None:
        ours(), peer()
        if least:
            clock = time.process_time
            times = [(_seconds(ours, clock), _seconds(peer, clock)) for _ in range(rounds)]
            _keep(name, [min(own for own, _ in times) / min(other for _, other in times)], bar)
            return
        _keep(name, [_seconds(ours, clock) / _seconds(peer, clock) for _ in range(rounds)], bar)

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


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    _finish()
    start = clock()
    work()
    _finish()
    return clock() - start


def _finish() -> None:
    """Wait for a card, which computes after its calls have returned."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.fixture(scope="session", autouse=True)
def report() -> Iterator[None]:
    """Print the table and write results.json when all are measured."""
    yield
    Path(__file__).with_name("results.json").write_text(json.dumps(_ROWS, indent=2) + "\n")
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_initialized() else ""
    print(
        f"\n\n{card}{platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}\n"
    )
    for row in _ROWS:
        low, high = row["quartiles"]  # type: ignore[misc]
        print(f"{row['ratio']:6.2f}  (quartiles {low:.2f} to {high:.2f})  {row['name']}")
