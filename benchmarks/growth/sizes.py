"""What reading, pages, stores and scheduling cost over samples, classes, runs and studies."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from apart import Cost, cost
from safetensors.numpy import save_file
from steps import TOP_K, read, write

from lskd import SoftLabels
from lskd_study.data.published.small import prepare_digits
from lskd_study.pages.index import write_index
from lskd_study.pages.study import write_report
from lskd_study.plan.recipes import recipes_folder
from lskd_study.results.results import read_curves
from lskd_study.teachers.files import read_file
from simulated import finish, make_plan

THOUSANDS = (1000, 10_000, 100_000, 1_000_000)
CLASSES = (10, 100, 1000, 5000, 10_000, 21_843)
# A study's page draws figures, which take the same time whatever the study; a run more or less shows beyond.
PAGE_SAMPLES, RUNS, STUDIES = (1000, 10_000, 100_000, 1_000_000), (16, 104, 504, 2000), (2, 10, 30, 100)
SCHEDULED = (8, 80, 400, 2000)
IMAGENET: dict[str, Any] = {
    "samples": 50_000,
    "classes": 1000,
    "seeds": 5,
    "smoothing": (0.0, 0.1, 0.2, 0.3),
}


@dataclass(frozen=True)
class Sizes:
    """A panel: what is measured at each size, by the name of the curve."""

    name: str
    unit: str
    sizes: tuple[int, ...]
    measure: Callable[[Path, int], Iterator[tuple[str, Cost]]]


def files(folder: Path, samples: int, classes: int) -> Iterator[tuple[str, Cost]]:
    """Read a teacher's logits, float16, from each kind of file."""

    def make() -> None:
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((samples, classes), dtype=np.float32).astype(np.float16)
        labels = np.arange(samples) % classes
        rows = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), classes)
        np.savez(folder / "a.npz", logits=logits, labels=labels)
        save_file({"logits": logits, "labels": labels}, folder / "a.safetensors")
        pq.write_table(pa.table({"labels": labels, "logits": rows}), folder / "a.parquet")

    cost(make)  # or memory that is free again here would be used there, and not be seen
    for kind in ("npz", "safetensors", "parquet"):
        yield kind, cost(lambda kind=kind: read_file(folder / f"a.{kind}")["logits"].sum(), 3)


def curves(folder: Path, epochs: int) -> Iterator[tuple[str, Cost]]:
    """Read a run's CSV."""
    values = np.random.default_rng(0).random((epochs, 9)).round(6)
    np.savetxt(folder / "curves.csv", values, delimiter=",", header="epoch,a,b,c,d,e,f,g,h", comments="")
    yield "curves.csv", cost(lambda: read_curves(folder / "curves.csv"))


def stores(folder: Path, samples: int) -> Iterator[tuple[str, Cost]]:
    """Write, open, read and verify a store."""
    place, order = folder / "store", np.random.default_rng(0).permutation(samples)
    yield "written", cost(lambda: (shutil.rmtree(place, ignore_errors=True), write(place, samples, 1)), 3)
    yield "opened", cost(lambda: SoftLabels(place), 3)
    yield "read", cost(lambda: read(place, order), 3)
    yield "verified", cost(lambda: SoftLabels(place).verify(), 3)


def page(
    folder: Path,
    samples: int,
    classes: int,
    seeds: int,
    students: int = 1,
    smoothing: tuple[float, ...] = (0.0, 0.1),
) -> Iterator[tuple[str, Cost]]:
    """Make the page of a finished study."""
    plan = make_plan(folder, classes, seeds, smoothing, students)
    cost(lambda: finish(plan, samples))
    yield "page", cost(lambda: quietly(lambda: write_report(plan)))


def runs(folder: Path, count: int) -> Iterator[tuple[str, Cost]]:
    """Make the page of studies of small runs."""
    return page(folder, 60, 4, count // 8, students=3)


def index(folder: Path, studies: int) -> Iterator[tuple[str, Cost]]:
    """Make the page over several studies; no two of them are tested together."""
    places = [folder / str(number) / "out" for number in range(studies)]

    def make() -> None:
        for number in range(studies):
            plan = make_plan(folder / str(number), 4, 2, (0.0, 0.1 + number / 1000))
            finish(plan, 60)
            if number == 0:
                quietly(lambda plan=plan: write_report(plan))
                continue
            for name in ("index.html", "verdicts.json"):
                shutil.copy(places[0] / name, plan.root / name)

    cost(make)
    yield "index", cost(lambda: write_index(places, folder / "studies.html", "Studies"))


def scheduling(folder: Path, count: int) -> Iterator[tuple[str, Cost]]:
    """Start a study of so many runs, which do not train, until the first of them starts."""
    for name in ("teacher.yaml", "student.yaml"):
        shutil.copy(recipes_folder() / "digits" / name, folder)
    names = ("test_vit", "test_byobnet", "test_resnet")
    students = "".join(f"  - {{model: {name}, config: student.yaml}}\n" for name in names)
    (folder / "study.yaml").write_text(
        f"title: Scheduling\necosystem: timm\ndata: {{path: data, num_classes: 10}}\noutput: out\n"
        f"smoothing: {{values: [0, 0.1], convention: paper}}\nseeds: {list(range(count // 8))}\n"
        f"teachers:\n  - {{model: test_resnet, config: teacher.yaml}}\nstudents:\n{students}"
    )
    quietly(lambda: prepare_digits(folder / "data"))
    yield "first run starts", _until_first(folder)


_STUDY = """
import sys
from lskd_study.trainers.timm import Timm
Timm.modules = ("untrained",)
from lskd_study.cli.main import main
sys.exit(main(["study", "study.yaml"]))
"""


def _until_first(folder: Path) -> Cost:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    study = subprocess.Popen(
        [sys.executable, "-c", _STUDY],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    top, log = psutil.Process(study.pid), folder / "out" / "progress.log"
    while study.poll() is None and not (log.exists() and "starts" in log.read_text(encoding="utf-8")):
        time.sleep(0.1)
    if study.poll() is not None:
        raise SystemExit("the study has ended before its first run started")
    wall, cpu, memory = time.perf_counter() - begin, 0.0, 0.0
    for process in (top, *top.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu += sum(process.cpu_times()[:4])
            memory += process.memory_full_info().uss / 1e6
    study.send_signal(signal.SIGTERM)
    study.wait()
    return Cost(cpu, wall, memory)


def quietly(work: Callable[[], object]) -> None:
    """Do it without what it says."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()


PANELS = [
    Sizes("files", "samples of 100 classes", THOUSANDS, partial(files, classes=100)),
    Sizes("files-classes", "classes, 1,000 samples", CLASSES, lambda folder, size: files(folder, 1000, size)),
    Sizes("curves", "epochs", (100, 1000, 10_000, 100_000), curves),
    Sizes("store", f"images, top {TOP_K}", THOUSANDS, stores),
    Sizes("page-samples", "samples of 10 classes", PAGE_SAMPLES, lambda f, size: page(f, size, 10, 3)),
    Sizes("page-classes", "classes, 2,000 samples", CLASSES, lambda f, size: page(f, 2000, size, 2)),
    Sizes("page-runs", "runs of 60 samples", RUNS, runs),
    Sizes("index", "studies", STUDIES, index),
    Sizes("scheduler", "runs", SCHEDULED, scheduling),
]
