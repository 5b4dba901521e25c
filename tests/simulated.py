"""Simulated results of runs, and tables as they were written."""

import csv
import io
import re
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from scipy import stats

from lskd_study.plan.plan import Plan, Run
from lskd_study.plan.recipes import catalogue
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results
from lskd_study.study.engine import make_plan


def half_width(seed_variance, sample_variance, seed_df, sample_df):
    """The half width of 95 % intervals, of arrays of variances: each part by its own t quantile."""
    seed_t, sample_t = (stats.t.ppf(0.975, df) for df in (seed_df, sample_df))
    return np.sqrt(seed_t**2 * seed_variance + sample_t**2 * sample_variance)


@cache
def recipes_plans() -> dict[str, Plan]:
    """The plans of all recipes that train and measure images."""
    return {
        recipe.name: make_plan(str(recipe.path), None)
        for recipe in catalogue()
        if recipe.kind == "study" and recipe.ecosystem == "timm"
    }


def image_result(run: Run, ranks: list[int], samples: int) -> ImageResult:
    """What a finished run would have: the label's rank in each sample is one of these, by the run's name."""
    rng = np.random.default_rng(zlib.crc32(run.id.encode()))
    rank = rng.choice(ranks, samples)
    labels, probability = np.zeros(samples, dtype=np.int64), np.full(samples, 0.5)
    correct = (rank < 1).astype(float)
    keys = [str(i) for i in range(samples)]
    return ImageResult(run, {}, {}, keys, labels, rank, correct, probability, float(rng.random()))


def of_kind(results: Results[ImageResult], **wanted: object) -> list[ImageResult]:
    """The results of the runs that are so; ``teacher``: the model of the teacher, of a teacher its own."""
    found = []
    for one in results.finished.values():
        own = {name: getattr(one.run, name) for name in ("role", "model", "smoothing", "hard_weight")}
        own["teacher"] = results.plan.by_id[one.run.teacher or one.run.id].model
        if wanted.items() <= own.items():
            found.append(one)
    assert found
    return found


def rows(table: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV table, its text or its file."""
    text = table.read_text(encoding="utf-8") if isinstance(table, Path) else table
    return list(csv.DictReader(io.StringIO(text, newline="")))


def html_tables(page: Path, attributes: str) -> list[ElementTree.Element]:
    """The tables of a page that have exactly these attributes."""
    html = page.read_text(encoding="utf-8").replace("&nbsp;", "\u00a0")
    found = re.findall(f"<table {attributes}>.*?</table>", html, re.DOTALL)
    return [ElementTree.fromstring(table) for table in found]


def cells(table: ElementTree.Element, part: str) -> list[list[str]]:
    """The texts of ``thead``, ``tbody`` or ``tfoot`` by row."""
    return [
        [re.sub("[ \n]+", " ", " ".join(cell.itertext())).strip() for cell in row]
        for row in table.iterfind(f"{part}/tr")
    ]


# Studies with a known truth


def logistic(x):
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True)
class World:
    """What is true, in log-odds of a right answer; each run has luck of its own, and so has its teacher."""

    teacher_gain: float = 0.0
    student_gain: float = 0.0
    taught: float = 0.0  # of a student, above the same network without a teacher
    loss_gain: float = 0.0
    network_spread: float = 0.6
    slope: float = 0.0  # of the student's log-odds on the teacher's, over networks
    own_ways: float = 0.0  # of networks as teachers, whatever their accuracy
    hard: float = 0.0  # for each unit of the hard weight
    hot: float = 0.0  # of the gain, above the lowest temperature
    luck: float = 0.05
    copied: float = 0.7  # share of what its teacher gets right by chance that a student takes over
    level: float = 1.5
    per_class: int = 100


def simulate(plan, world, seed):
    """Make the results of a study with two classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], world.per_class)
    samples = len(labels)
    keys = [f"val/{label}/{i}" for i, label in enumerate(labels)]
    easy = world.level + 1.5 * rng.standard_normal(samples)
    teachers = list(dict.fromkeys(run.model for run in plan.runs if run.role == "teacher"))
    strength = {name: world.network_spread * rng.standard_normal() for name in teachers}
    ways = {name: world.own_ways * rng.standard_normal() for name in teachers}
    taste = {name: 0.7 * rng.standard_normal(samples) for name in teachers}
    nobodys = 0.7 * rng.standard_normal(samples) if plan.controls else 0.0
    errors, finished = {}, {}
    for run in plan.runs:
        smoothed = float(run.smoothing > 0)
        error = world.luck * rng.standard_normal() + 0.5 * rng.standard_normal(samples)
        if run.role == "teacher":
            errors[run.id] = error = error + taste[run.model]
            odds = easy + strength[run.model] + world.teacher_gain * smoothed + error
        elif run.role == "control":
            # By chance as much is right and wrong as in a student, who has a part of that from its teacher.
            chance = nobodys + world.luck * rng.standard_normal() + 0.5 * rng.standard_normal(samples)
            odds = easy + error + world.copied * chance
        else:
            teacher = plan.by_id[run.teacher].model
            gain = world.student_gain + world.hot * (run.temperature > 1)
            odds = easy + world.slope * strength[teacher] + ways[teacher] + gain * smoothed + error
            odds += world.taught + world.hard * run.hard_weight + world.copied * errors[run.teacher]
        loss = 1 + world.loss_gain * smoothed + 0.02 * rng.standard_normal()
        curves = {name: np.array([loss]) for name in ("train_ce", "train_kl", "train_teacher_entropy")}
        correct = (rng.random(samples) < logistic(odds)).astype(float)
        probability = logistic(odds)
        finished[run.id] = ImageResult(
            run=run,
            job={},
            curves=curves,
            keys=keys,
            labels=labels,
            rank=1 - correct.astype(np.int64),
            correct=correct,
            target_probability=probability,
            instability=0.2,
        )
    return Results(replace(plan, num_classes=2), finished)
