"""What each kind of run of a study cost, and how large its network is."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lskd_study.base.text import cell, csv_text, duration
from lskd_study.plan.folders import LOG
from lskd_study.results.results import Result, Results, kind_name

# The mean of an epoch, at its last batch: timm's images a second, mmengine's seconds a batch.
_RATE = re.compile(rb"\[ *(\d+)/\1\].* (?:(\d+) images/s|time: ([\d.]+)  data_time)")
_END = 1 << 18  # bytes of a log
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Cost:
    """What the runs of one kind cost, the mean of one; NaN where that is not known.

    Attributes:
        name: of the kind, in words.
        runs: how many finished.
        seconds: of one run.
        images_per_s: while it trained, as its log has it.
        parameters: of the network.
        operations: floating-point ones for one image forward; a multiply-add is two.
        binary: parameters of one bit.
        file_bytes: of the weights as they are deployed.
        image_ms: of one image forward, deployed, on the CPU of the run.
    """

    name: str
    runs: int
    seconds: float
    images_per_s: float
    parameters: float
    operations: float
    binary: float
    file_bytes: float
    image_ms: float

    def cells(self) -> list[str | tuple[str, float | str]]:
        """Return its row: texts, some with what they sort by."""
        rate = "–" if np.isnan(self.images_per_s) else f"{self.images_per_s:,.0f}"
        bits = f", {short(self.binary)} of 1 bit" if self.binary > 0 else ""
        size = f"{short(self.parameters)}{bits}"
        sized = ((size, self.parameters), (short(self.operations), self.operations))
        return [
            self.name[:1].upper() + self.name[1:],
            str(self.runs),
            *((duration(seconds), seconds) for seconds in (self.seconds, self.runs * self.seconds)),
            rate,
            *((text, "" if np.isnan(number) else number) for text, number in sized),
        ]

    def deployed(self) -> list[str | tuple[str, float | str]]:
        """Return the cells of what it takes to run the network."""
        found = (f"{short(self.file_bytes)}B", self.file_bytes), (f"{self.image_ms:.3g} ms", self.image_ms)
        return [("–", "") if np.isnan(number) else (text, number) for text, number in found]


def costs_of(results: Results[Any]) -> list[Cost]:
    """Return the costs of each kind of run that finished, in the order of the study."""
    plan, finished = results.plan, results.finished_by_kind
    return [_cost(results, kind_name(plan, kind), runs) for kind, runs in finished.items()]


def costs_csv(costs: list[Cost]) -> str:
    """Return the same in full precision."""
    header = ["kind", "runs", "seconds", "images_per_s", "parameters", "operations"]
    header += ["binary_parameters", "file_bytes", "image_ms"]
    return csv_text(header, ([one.name, one.runs, *map(cell, list(vars(one).values())[2:])] for one in costs))


def short(number: float) -> str:
    """Return a number in three digits with its unit; a dash for NaN.

    >>> short(11_689_512), short(float("nan")), short(940)
    ('11.7 M', '–', '940')
    """
    if np.isnan(number):
        return "–"
    size, unit = next(((size, f" {unit}") for size, unit in UNITS if number >= size), (1.0, ""))
    return f"{number / size:.3g}{unit}"


def _cost(results: Results[Any], name: str, runs: list[Result]) -> Cost:
    jobs = [result.job for result in runs]
    sizes = [job.get("size") or {} for job in jobs]
    config = results.plan.configs.get(runs[0].run.config, {})
    batch = config.get("train_dataloader", {}).get("batch_size", 0)  # mmcls's
    rates = [rate for result in runs if (rate := _rate(results.plan.folder(result.run) / LOG, batch))]
    return Cost(
        name,
        len(runs),
        float(np.mean([job["wall_time_s"] for job in jobs])),
        float(np.mean(rates)) if rates else float("nan"),
        *(
            next((float(size[key]) for size in sizes if size.get(key)), float("nan"))
            for key in ("parameters", "operations", "binary", "file_bytes", "image_ms")
        ),
    )


def _rate(log: Path, batch: int) -> float:
    """Return the images a second of a run's last epoch; 0 where its log does not say."""
    try:
        with log.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _END, 0))
            found = _RATE.findall(file.read())
    except OSError:
        return 0.0
    if not found:
        return 0.0
    _, images, seconds = found[-1]
    return float(images) if images else batch / max(float(seconds), 1e-6)
