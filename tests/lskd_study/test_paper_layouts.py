"""The paper's tables beside measured figures: which row a run belongs to, the layouts and their files."""

import csv
import io
import math
import re
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lskd_study.pages.paper_tables import Accuracy, Text, paper_table, papers_tables, published_table
from lskd_study.paper.printed import load_tables
from lskd_study.plan.matching import OF_STUDENTS, OF_TEACHERS, check_table, row_of, runs_by_row, teacher_name
from lskd_study.plan.plan import Plan, Run
from lskd_study.plan.recipes import catalogue
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Failure, Results
from lskd_study.study import engine

pytestmark = pytest.mark.unit

ERRATA = (Path(__file__).parents[2] / "docs" / "errata.md").read_text(encoding="utf-8")
SAMPLES = 40
# Runs of recipes that their table has no row for: (recipe, table, teacher, alpha).
NOT_IN_THE_PAPER = {
    *(("imagenet/table1", "Table 1", teacher, 0.1) for teacher in ("MobileNetV2", "DenseNet121")),
    *(
        ("imagenet/table1", "Table 4", teacher, alpha)
        for teacher in ("ResNet-50", "MobileNetV2", "DenseNet121", "Wide ResNet50")
        for alpha in (0.0, 0.1)
    ),
    *(
        ("imagenet/table1", "Table 4", teacher, alpha)
        for teacher in ("ResNeXt50 32x4d", "ResNeXt101 32x8d")
        for alpha in (0.0, 0.1)
    ),
    # Students that are no ResNet-18: Table 8 has one student.
    *(("imagenet/table2", "Table 8", "ResNet-50", alpha) for alpha in (0.0, 0.1)),
    ("imagenet/table8", "Table 8", "MobileNetV2", 0.1),
    *(
        ("imagenet/table8", "Table 8", teacher, 0.0)
        for teacher in ("DenseNet121", "Wide ResNet50", "ResNeXt101 32x8d")
    ),
    ("imagenet/table8_long", "Table 8", "ResNet50+Long", 0.0),
    ("imagenet/table8_long_cutmix", "Table 8", "ResNet50+Long+CutMix", 0.0),
}


@cache
def plans() -> dict[str, Plan]:
    """The plans of all recipes that train and measure images."""
    found = {}
    for recipe in catalogue():
        if recipe.kind == "study" and recipe.ecosystem == "timm":
            found[recipe.name] = engine.make_plan(str(recipe.path), None)
    return found


def result(run: Run, classes: int) -> ImageResult:
    rng = np.random.default_rng(zlib.crc32(run.id.encode()))
    rank = rng.choice([0, 0, 0, 1, 2, 3, 4, 7, classes - 1], SAMPLES)
    keys = [str(i) for i in range(SAMPLES)]
    labels, probability = np.zeros(SAMPLES, dtype=np.int64), np.full(SAMPLES, 0.5)
    correct = [(rank < k).astype(float) for k in (1, 5)]
    return ImageResult(run, {}, {}, keys, labels, rank, *correct, probability, 0.3)


def simulated(name: str, keep=lambda run: True, **changes: object) -> Results[ImageResult]:
    plan = replace(plans()[name], **changes)
    finished = {run.id: result(run, plan.num_classes) for run in plan.runs if keep(run)}
    return Results(plan, finished, [run.id for run in plan.runs if run.id not in finished])


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def topk(results: Results[ImageResult], k: int, **wanted: object) -> np.ndarray:
    """Top-k accuracies of the runs of some kind, from the simulated ranks."""
    teachers = results.plan.by_id
    found = []
    for one in results.finished.values():
        own = {name: getattr(one.run, name) for name in ("role", "model", "smoothing", "hard_weight")}
        own["teacher"] = teachers[one.run.teacher].model if one.run.teacher else ""
        if all(own[name] == value for name, value in wanted.items()):
            found.append(100 * np.mean(one.rank < k))
    assert found
    return np.array(found)


# Rows


def test_every_run_of_a_recipe_that_names_a_table_has_a_row_or_is_known_to_have_none():
    missing, seen = set(), set()
    for name, plan in plans().items():
        for table in plan.paper:
            for kind in runs_by_row(plan, load_tables()[table]):
                row = row_of(load_tables(), table, kind)
                if row is None:
                    missing.add((name, table, kind.teacher, kind.smoothing))
                else:
                    seen.add((table, row.name))
    assert missing == NOT_IN_THE_PAPER
    unseen = {
        (table, row.name)
        for table in (*OF_TEACHERS, *OF_STUDENTS)
        for row in load_tables()[table].rows
        if (table, row.name) not in seen
    }
    # Table 2's rows are a part of Table 7's. Table 1's Long are table8's. ImageNet-LT's ResNet-101 is a dash.
    # The binary network of Fig. 6 has a recipe for mmcls alone.
    assert unseen == {
        *(("Table 7", row.name) for row in load_tables()["Table 2"].rows),
        *((t, f"ResNet50+{kind}") for t in ("Table 1",) for kind in ("Long", "Long+CutMix")),
        *(("Table 3", f"ImageNet-LT, ResNet-101 {side}") for side in ("without", "with")),
        *(("Fig. 6", side) for side in ("without", "with")),
    }


def test_recipes_whose_header_names_a_table_have_the_key():
    headers = {recipe.name: recipe.place for recipe in catalogue()}
    for name, plan in plans().items():
        named = set(re.findall(r"\d+", headers[name])) if headers[name] else set()
        keys = {re.sub(r"\D", "", table) for table in plan.paper}
        assert keys <= named, name
        shown = {"2", "3", "4", "6", "7", "9"} & set(
            re.findall(r"\d+", " ".join(re.findall(r"Tables? [\d and]+", headers[name])))
        )
        assert shown <= keys, name


def test_what_makes_a_teacher_long():
    assert teacher_name("resnet50.tv_in1k", {}, 1000) == "ResNet-50"
    assert teacher_name("resnet50", {"epochs": 160}, 1000) == "ResNet50+Long"
    assert teacher_name("resnet50", {"epochs": 160, "cutmix": 1.0}, 1000) == "ResNet50+Long+CutMix"
    assert teacher_name("resnet50", {"epochs": 160}, 200) == "ResNet-50"
    assert teacher_name("my_net", {}, 1000) == "my_net"


@pytest.mark.parametrize("change", [{"temperature": 2.0}, {"smoothing": 0.05}, {"hard_weight": 0.3}])
def test_another_setting_is_not_the_papers_row(change):
    (kind, *_) = runs_by_row(plans()["imagenet/table2"], load_tables()["Table 2"])
    assert row_of(load_tables(), "Table 2", kind) is not None
    assert row_of(load_tables(), "Table 2", replace(kind, **change)) is None


@pytest.mark.parametrize(
    ("name", "students", "words"),
    [
        ("Tabel 8", True, "did you mean 'Table 8'?"),
        ("Table 5", True, "there are Table 1, Table 3"),
        ("Table 8", False, "'Table 8' is about students"),
        ("Table 1", True, "teachers are compared alone"),
    ],
)
def test_tables_that_a_study_cannot_reproduce(name, students, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_table(name, students)


# Layouts


def test_printed_figures_are_the_papers_and_differences_are_measured_minus_printed():
    names = [name for name, plan in plans().items() if any(load_tables()[name].layout for name in plan.paper)]
    assert len(names) == 18
    for layout in (layout for name in names for layout in papers_tables([simulated(name)])):
        seen = 0
        for part in layout.parts:
            for line in part.lines:
                for column, figure in zip(part.columns, line.cells, strict=True):
                    if isinstance(figure, Accuracy) and line.printed:
                        assert figure.paper == printed(layout.name, line.printed, column.name)
                        if figure.paper is not None and figure.measured.seeds:
                            assert figure.difference == pytest.approx(figure.measured.mean - figure.paper)
                            seen += 1
                    elif isinstance(figure, Accuracy):
                        assert figure.paper is None
                        assert math.isnan(figure.difference)
        assert seen, layout


def printed(table: str, row: str, column: str) -> float | None:
    """The figure of ``tables.yaml`` for a column of a layout, e.g. ``student_top3``, ``places_lt_top1``."""
    values = load_tables()[table].row(row).values
    rank = re.sub(r"top[35]$", "topk" if "k" in values else "top5", column)
    return values[rank if rank in values else rank.rpartition("_")[2]]


def test_table_7_of_imaterialist_has_top_3_and_the_rows_of_the_other_teacher_without_a_measured_figure():
    results = simulated("imaterialist/table7_resnet50")
    (part,) = paper_table("Table 7", [results]).parts
    assert part.caption == "iMaterialist (Noisy)"
    assert [column.label for column in part.columns][3::3] == ["Acc. (Top-3)", "Acc. (Top-3)"]
    assert [line.printed for line in part.lines] == [
        row.name for row in load_tables()["Table 7"].where(dataset="iMaterialist")
    ]
    line = part.lines[2]
    assert [cell.text for cell in line.cells if isinstance(cell, Text)] == ["ResNet-50", "✓", "ResNet-18"]
    teacher, student = {"role": "teacher", "smoothing": 0.1}, {"model": "resnet18", "smoothing": 0.1}
    for figure, kind, k in zip(
        line.accuracies, (teacher, teacher, student, student), (1, 3, 1, 3), strict=True
    ):
        assert figure.measured.mean == pytest.approx(topk(results, k, **kind).mean())
    assert all(not figure.measured.seeds for line in part.lines[4:] for figure in line.accuracies)
    assert all(figure.paper is not None for line in part.lines for figure in line.accuracies)


def test_table_2_has_means_over_seeds_and_the_errata_of_its_data_set():
    results = simulated("cub200/table2")
    layout = paper_table("Table 2", [results])
    (part,) = layout.parts
    assert part.caption == "CUB200-2011 (Fine-grained)"
    assert part.errata == ("E14", "E23")
    measured = part.lines[1].accuracies[2].measured
    values = topk(results, 1, role="student", model="resnet50.tv_in1k", smoothing=0.0)
    assert (measured.mean, measured.std) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert part.lines[1].accuracies[2].printed == "80.910 ± 0.033"
    assert [line.seeds for line in part.lines] == [3] * 4


def test_missing_runs_leave_a_dash_and_their_seeds_out():
    results = simulated("cub200/table2", keep=lambda run: run.seed == 1 and run.smoothing == 0)
    layout = paper_table("Table 2", [results])
    (part,) = layout.parts
    assert [line.seeds for line in part.lines] == [1, 1, 0, 0]
    assert part.lines[3].accuracies[0].measured_text == "–"
    assert part.lines[3].accuracies[0].difference_text == ""
    assert "not measured" in layout.notes[0]


def test_table_8_over_several_studies_is_the_papers_and_what_it_lacks_follows():
    names = ("imagenet/table2", "imagenet/table8", "imagenet/table8_long", "imagenet/table8_long_cutmix")
    layout = paper_table("Table 8", [simulated(name) for name in names])
    assert [part.caption for part in layout.parts] == ["Teacher (same arch)", "Teacher (different archs)"]
    printed = load_tables()["Table 8"].rows
    firsts = [[line.cells[0].text for line in part.lines] for part in layout.parts]
    assert firsts[0][:4] + firsts[1][:4] == [row.name for row in printed]
    own = ["ResNet-50, without LS", "ResNet-50, with LS"]  # of the student ResNet-50
    assert firsts[0][4:] == [*own, "ResNet50+Long, without LS", "ResNet50+Long+CutMix, without LS"]
    assert firsts[1][4] == "MobileNetV2, with LS"
    assert [line.seeds for line in layout.parts[0].lines] == [3, 3, 1, 1, 3, 3, 1, 1]
    cells = {line.printed: line.accuracies for part in layout.parts for line in part.lines}
    assert cells["MobileNet V2"][0].errata == ("E17",)
    assert cells["R50"][1].errata == ("E14", "E16")
    assert cells["Wide ResNet-50-2"][0].errata == ()
    assert [entry.id for entry in layout.errata] == ["E14", "E16", "E17", "E18"]


def test_table_9_has_a_row_for_each_ratio_as_printed():
    results = simulated("imagenet/table9")
    (part,) = paper_table("Table 9", [results]).parts
    ratios = [(line.cells[0].text, line.cells[1].text) for line in part.lines]
    assert ratios == [(r, m) for r in ("0.3 – 0.5", "0.5 – 0.5", "0.7 – 0.3") for m in "✗✓"]
    assert part.lines[0].cells[0].errata == ("E21",)
    values = topk(results, 5, role="student", smoothing=0.1, hard_weight=0.7)
    assert part.lines[5].accuracies[1].measured.mean == pytest.approx(values.mean())


def test_table_3_over_its_data_sets_has_the_papers_columns():
    names = ("imagenet_lt/table3", "places_lt/table3", "inat2019/table3")
    (layout,) = papers_tables([simulated(name) for name in names])
    (part,) = layout.parts
    assert [column.label for column in part.columns[2:]] == [
        f"{place} Acc. (Top-{k})"
        for place, second in (("ImageNet-LT", 5), ("Places-LT", 3), ("iNaturalist 2019", 3))
        for k in (1, second)
    ]
    assert [(line.cells[0].text, line.cells[1].text) for line in part.lines] == [
        (f"ResNet-{depth}", mark) for depth in (18, 34, 50, 101) for mark in "✗✓"
    ]
    assert part.lines[6].accuracies[0].paper is None  # a dash in the paper, and no recipe
    assert part.columns[4].errata == ("E25",)
    assert part.lines[5].accuracies[2].errata == ("E19",)


def test_table_4_averages_the_gains_of_the_papers_networks_when_all_are_measured():
    names = ("imagenet_100_500/classes100", "imagenet/table1")
    studies = [simulated(name) for name in names]
    (part,) = paper_table("Table 4", studies).parts
    assert [figure.paper for figure in part.foot.accuracies] == [0.880, 0.440, 0.155, 0.206]
    assert [figure.errata for figure in part.foot.accuracies] == [("E22",), ()] * 2
    for column, (results, k) in enumerate((s, k) for s in studies for k in (1, 5)):
        gains = [
            topk(results, k, model=model, smoothing=0.1) - topk(results, k, model=model, smoothing=0.0)
            for model in ("resnet18", "resnet101")
        ]
        assert part.foot.accuracies[column].measured.mean == pytest.approx(np.mean(gains))
    half = simulated(names[0], keep=lambda run: run.model == "resnet18")
    (part,) = paper_table("Table 4", [half]).parts
    assert part.foot.accuracies[0].measured_text == "–"
    assert part.foot.accuracies[0].printed == "+0.880"


def test_a_data_set_of_ones_own_has_the_layout_and_no_figure_of_the_paper():
    results = simulated("imagenet/table9", num_classes=7, data="data/mine")
    layout = paper_table("Table 9", [results])
    (part,) = layout.parts
    assert part.caption == "mine"
    assert all(figure.paper is None for line in part.lines for figure in line.accuracies)
    assert len(part.lines) == 6
    assert all(line.seeds == 1 for line in part.lines)
    assert "not in its table" in layout.notes[0]


@pytest.mark.parametrize(
    ("name", "first"), [("imagenet/temperature", 71.488), ("cub200/temperature", 80.169)]
)
def test_published_figures_of_the_temperature_studies(name, first):
    results = simulated(name)
    layout = published_table(results)
    assert "Chandrasegaran" in layout.title
    (part,) = layout.parts
    assert len(part.lines) == 8
    assert part.lines[0].accuracies[0].paper == first
    header = next(recipe.header for recipe in catalogue() if recipe.name == name)
    table = re.findall(r"T = (\d+) +([\d.]+) +([\d.]+)", header)
    expected = [(t, s, float(v)) for t, a, b in table for s, v in (("0", a), ("0.1", b))]
    shown = [(line.cells[0].text, line.cells[1].text, line.cells[2].paper) for line in part.lines]
    assert shown == expected
    values = [
        one.top1
        for one in results.finished.values()
        if (one.run.role, one.run.temperature, one.run.smoothing) == ("student", 64, 0.1)
    ]
    assert part.lines[-1].accuracies[0].measured.mean == pytest.approx(np.mean(values))
    assert "published 71.488" in layout.markdown() or first != 71.488
    assert published_table(simulated("imagenet/table2")) is None


# Files


@pytest.mark.parametrize(
    "name", ["imagenet/table8", "cub200/table7", "imagenet_100_500/classes500", "imagenet/table9"]
)
def test_csv_and_markdown_hold_every_figure(name):
    for layout in papers_tables([simulated(name)]):
        table = rows(layout.csv())
        lines = [line for part in layout.parts for line in part.all_lines]
        assert len(table) == len(lines)
        for row, line in zip(table, lines, strict=True):
            numbers = [
                (row[c.removesuffix("_paper")], row[c], row[c.replace("_paper", "_difference")])
                for c in row
                if c.endswith("_paper")
            ]
            for (measured, paper, difference), figure in zip(numbers, line.accuracies, strict=True):
                assert (paper == "") == (figure.paper is None)
                if figure.measured.seeds:
                    assert float(measured) == pytest.approx(figure.measured.mean)
                if paper and measured:
                    assert float(difference) == pytest.approx(float(measured) - float(paper), abs=1e-5)
        text = layout.markdown()
        assert all(figure.printed in text for line in lines for figure in line.accuracies)
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1


# Errata


def test_errata_of_cells_are_entries_of_the_page_and_point_at_cells_that_are_there():
    entries = re.findall(r"^### (E\d\d) ", ERRATA, re.MULTILINE)
    paper = load_tables()
    for entry in paper.errata:
        assert entry.id in entries
        for table, names, columns in entry.cells:
            assert names <= {row.name for row in paper[table].rows}
            assert columns <= paper[table].columns.keys()
        for table, data_sets in entry.data_sets.items():
            assert set(data_sets) <= {row["dataset"] for row in paper[table].rows}


def test_contradictions_in_the_tables_are_marked_at_their_cells():
    paper = load_tables()
    for known in paper.known_inconsistencies:
        table = re.match(r"[\w ]+: ((?:Table|Fig\.) \d+)", known.id).group(1)
        if paper[table].layout:
            (entry,) = [one for one in paper.errata if one.id == known.errata]
            assert table in {*entry.data_sets, *(cell[0] for cell in entry.cells)}, known.id


def test_a_figure_says_nothing_where_there_is_nothing():
    layout = paper_table("Table 3", [simulated("imagenet_lt/table3", keep=lambda run: False)])
    figure = layout.parts[0].lines[-1].accuracies[0]
    assert isinstance(figure, Accuracy)
    assert (figure.measured_text, figure.printed, figure.difference_text) == ("–", "", "")


def test_a_failed_run_is_seen_in_its_cell_and_in_no_average():
    results = simulated("imagenet/table2")
    failed = results.plan.runs[0]
    whole = paper_table("Table 2", [results]).markdown()
    finished = {name: one for name, one in results.finished.items() if name != failed.id}
    lost = replace(
        results, finished=finished, failed={failed.id: Failure(failed, {"failed": "epoch 1: nan"})}
    )
    text = paper_table("Table 2", [lost]).markdown()
    seeds = len(results.plan.seeds)
    assert "failed" not in whole
    assert ("1 failed" if seeds > 1 else "| failed") in text
