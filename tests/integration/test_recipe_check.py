"""`lskd recipe check` on all recipes, the paper's protocol in what it prints, its figures in headers."""

import os
import re
import subprocess
import sys

import pytest

from lskd_study.paper.printed import load_tables
from lskd_study.plan.recipes import catalogue, header_of, recipes_folder

pytestmark = [pytest.mark.integration, pytest.mark.slow]

VISION = (
    "imagenet",
    "cub200",
    "imaterialist",
    "inat2019",
    "places_lt",
    "imagenet_lt",
    "imagenet_100_500",
    "fixres",
)


@pytest.fixture(scope="module")
def checked():
    """The output by recipe: its own line and those of its runs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lskd_study", "recipe", "check"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    found, lines = {}, done.stdout.splitlines()
    assert lines.pop().startswith("GPU-hours: an estimate")
    for line in lines:
        if not line.startswith("  "):
            name = line.split(":")[0]
        found.setdefault(name, []).append(line)
    return found


def test_every_recipe_is_in_order(checked):
    assert checked.keys() == {recipe.name for recipe in catalogue()}
    assert all(": ok, " in lines[0] for lines in checked.values())


def test_schedules_are_the_papers(checked):
    """Appendix A: teachers 90 epochs, /10 every 30; students 200, x 0.1 at 80 and 160; Long 160."""
    for name, lines in checked.items():
        folder, _, table = name.partition("/")
        if folder not in VISION[:-1]:
            continue
        for line in lines[1:]:
            short = line.startswith("  teacher") and folder in ("imagenet", "imagenet_100_500")
            first = 0.01 if ".tv_in1k" in line.split(",")[0] else 0.1
            marks, epochs = ((30, 60), 90) if short else ((80, 160), 200)
            if short and "long" in table:
                marks, epochs = (53, 107), 160
            schedule = f"lr {first:g} at 0, {first / 10:g} at {marks[0]}, {first / 100:g} at {marks[1]}"
            assert f"{schedule} of {epochs} epochs" in line


def test_gpu_hours_are_those_of_record(checked):
    """90 epochs of a ResNet-50 at 2,790 images/s are 11.5 hours on an H100."""
    (line,) = (line for line in checked["imagenet/table2"] if line.startswith("  teacher"))
    assert line.endswith("6 x 12 GPU-hours")


def headers():
    paths = sorted(path for folder in VISION for path in (recipes_folder() / folder).glob("*.yaml"))
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in paths]


@pytest.mark.parametrize("path", headers())
def test_expected_figures_are_the_papers(path):
    if path.stem == "temperature":  # Chandrasegaran et al.'s
        return
    printed = {
        f"{value:.3f}"
        for table in load_tables().tables.values()
        for row in table.rows
        for value in row.values.values()
        if isinstance(value, float)
    }
    assert set(re.findall(r"\b\d\d\.\d{3}\b", header_of(path))) <= printed
