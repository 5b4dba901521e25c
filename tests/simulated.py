"""Simulated results of runs, and tables as they were written."""

import csv
import io
import re
import zlib
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from lskd_study.plan.plan import Plan, Run
from lskd_study.plan.recipes import catalogue
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results
from lskd_study.study.engine import make_plan


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
