"""The paper's numbers checked against themselves, and which row of them a run belongs to."""

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from lskd_study.paper.printed import Paper, Row, Value, load_tables
from lskd_study.plan.matching import (
    OF_STUDENTS,
    OF_TEACHERS,
    problem_of_table,
    row_of,
    runs_by_row,
    teacher_name,
)
from lskd_study.plan.recipes import catalogue
from simulated import recipes_plans

pytestmark = pytest.mark.unit

RUNS = 3
KNOWN = yaml.safe_load(Path(__file__).with_name("known_inconsistencies.yaml").read_text(encoding="utf-8"))
RESNEXT = ("ResNeXt50 32x4d", "ResNeXt101 32x8d")
# Runs of recipes that their table has no row for: (recipe, table, teacher, alpha).
NOT_IN_THE_PAPER = {
    *(("imagenet/table1", "Table 1", teacher, 0.1) for teacher in ("MobileNetV2", "DenseNet121")),
    *(
        ("imagenet/table1", "Table 4", teacher, alpha)
        for teacher in ("ResNet-50", "MobileNetV2", "DenseNet121", "Wide ResNet50", *RESNEXT)
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
TEST_IMAGES = {
    "ImageNet-1K": 50_000,
    "CUB200-2011": 5_794,
    "iMaterialist": 10_095,
    "iNaturalist 2019": 3_030,
    "ImageNet-LT": 20_000,
    "Places-LT": 7_300,
    "ImageNet-100": 100 * 50,
    "ImageNet-500": 500 * 50,
}
ACCURACIES = re.compile(r"(teacher_|student_)?top[15k](_without|_with)?")


def cell(row: Row, column: str) -> float:
    """Return a number that is printed."""
    value = row.number(column)
    assert value is not None, f"{row.place} has no {column}"
    return value


def same(first: float | None, second: float | None) -> bool:
    """Say whether two printed values are equal; sums of decimals carry rounding in the 16th place."""
    if first is None or second is None:
        return first is second
    return abs(first - second) < 1e-9


def side(row: Row) -> str:
    return "with" if row["smoothed"] else "without"


def deltas(tables: Paper) -> Iterator[str]:
    for name in ("Table 1", "Table 10"):
        for row in tables[name].rows:
            if row["delta"] is not None:
                difference = cell(row, "instability_with") - cell(row, "instability_without")
                if not same(difference, row.number("delta")):
                    yield f"delta: {row.place}"


def averages(tables: Paper) -> Iterator[str]:
    for average in tables["Table 4 (average)"].rows:
        for column in ("top1", "top5"):
            gains = {True: 0.0, False: 0.0}
            rows = tables["Table 4"].where(dataset=average["dataset"])
            for row in rows:
                gains[bool(row["smoothed"])] += 2 * cell(row, column) / len(rows)
            if not same(gains[True] - gains[False], average.number(f"{column}_gain")):
                yield f"average: Table 4, {average['dataset']}, {column}"


def reuse(tables: Paper) -> Iterator[str]:
    """Yield numbers that the paper prints in two places, differently."""
    for row in tables["Table 2"].rows:
        if row.values != tables["Table 7"].row(row.name).values:
            yield f"reuse: {row.place}"
    table1 = tables["Table 1"]
    for row in tables["Table 10"].rows:
        other = table1.row(row.name)
        if any(row[c] != other[c] for c in ("top1_without", "top5_without", "top1_with", "top5_with")):
            yield f"reuse: {row.place}"
        if (row["instability_with"] is None) != (other["instability_with"] is None):
            yield f"reuse: {row.place} with"
    for row in tables["Table 4"].where(dataset="ImageNet-1K"):
        other = table1.row(str(row["network"]))
        if (row["top1"], row["top5"]) != (other[f"top1_{side(row)}"], other[f"top5_{side(row)}"]):
            yield f"reuse: {row.place}"
    for row in tables["Table 7"].where(dataset="ImageNet-1K", teacher="ResNet-101"):
        other = table1.row("ResNet-101")
        if (row["teacher_top1"], row["teacher_topk"]) != (
            other[f"top1_{side(row)}"],
            other[f"top5_{side(row)}"],
        ):
            yield f"reuse: {row.table}, ImageNet-1K, ResNet-101 {side(row)}"
    for row in tables["Table 6"].rows:
        (other,) = tables["Table 3"].where(
            dataset=row["dataset"], network=row["teacher"], smoothed=row["smoothed"]
        )
        if (row["teacher_top1"], row["teacher_topk"]) != (other["top1"], other["topk"]):
            yield f"reuse: {row.place}"
    for row, other in zip(tables["Fig. 6"].rows, tables["Sec. 5"].rows, strict=True):
        if row["student_top1"] != other["student_top1"]:
            yield f"reuse: {row.place}"
    for row in tables["Fig. 5"].where(teacher="ResNet-101"):
        other = tables["Table 7"].row(f"CUB200-2011, {row.name}")
        if row["student_top1"] != other["student_top1"]:
            yield f"reuse: {row.place}"
    yield from _reuse_in_table_8(tables)


def _reuse_in_table_8(tables: Paper) -> Iterator[str]:
    """Yield teachers that Tables 1 and 2 do not have as Table 8 describes them, and students not in Table 2.

    Sec. 6 says that all these teachers were trained with label smoothing; R50 alone is named without.
    """
    for row in tables["Table 8"].rows:
        smoothed = row.name != "R50"
        expected = {tables["Table 1"].row(str(row["network"]))[f"top1_{'with' if smoothed else 'without'}"]}
        means = tables["Table 2"].where(
            dataset="ImageNet-1K", teacher=row["network"], smoothed=smoothed, student=row["student"]
        )
        expected |= {mean["teacher_top1"] for mean in means}
        if row["teacher_top1"] not in expected:
            yield f"reuse: {row.place}, teacher"
        if any(mean["student_top1"] != row["student_top1"] for mean in means):
            yield f"reuse: {row.place}, student"
        if not smoothed:
            yield f"text: {row.place}"


def arithmetic(tables: Paper) -> Iterator[str]:
    for row in tables["Table 9"].rows:
        if not same(cell(row, "hard_ratio") + cell(row, "soft_ratio"), 1):
            yield f"ratio: {row.place}"
    for row in tables["Table 5"].rows:
        text = tables["Appendix A"].row(row.name)
        if row["head"] is not None and cell(row, "head") + cell(row, "tail") != row["classes"]:
            yield f"classes: {row.place}"
        if text["largest_class"] is not None and row["head"] != text["largest_class"]:
            yield f"class size: {row.place}"
        total, each = text.number("images"), text.number("test_images_per_class")
        if total is not None and cell(row, "training_images") + cell(row, "test_images") != total:
            yield f"images: {row.place}"
        exact = "test_images_per_class" not in text.about
        if each is not None and exact and each * cell(row, "classes") != row["test_images"]:
            yield f"images per class: {row.place}"
        for column in ("classes", "training_images", "test_images", "noise_percent"):
            printed, said = row.number(column), text.number(column)
            tolerance = 0.02 if column in row.about | text.about else 1e-9
            if (
                printed is not None
                and said is not None
                and not math.isclose(printed, said, rel_tol=tolerance)
            ):
                yield f"text: {row.place}, {column}"


def accuracies(tables: Paper) -> Iterator[tuple[Row, str, str, str, float, float | None]]:
    """Yield row, data set, network, column, accuracy and standard deviation of every accuracy printed."""
    for table in tables.tables.values():
        for row in table.rows:
            for column, value in row.values.items():
                if ACCURACIES.fullmatch(column) and value is not None:
                    role = column.partition("_")[0]
                    role = role if role in ("teacher", "student") else "network"
                    network = row.values.get(role, row.name)
                    dataset = str(row.values.get("dataset", "ImageNet-1K"))
                    deviation = row.values.get(f"{column}_std")
                    deviation = row.number(f"{column}_std") if deviation is not None else None
                    yield row, dataset, str(network), column, cell(row, column), deviation


def possible(percent: float, images: int) -> bool:
    """Say whether a percentage to three decimals is a count out of ``images``."""
    right = round(percent / 100 * images)
    return abs(100 * right / images - percent) <= 0.0005 + 1e-9


def granularity(tables: Paper) -> Iterator[str]:
    """Yield accuracies of one run that no count of right answers gives (means of three have a finer grid)."""
    for row, dataset, network, _, value, deviation in accuracies(tables):
        if deviation is None and not possible(value, TEST_IMAGES[dataset]):
            yield f"count: {row.table}, {dataset}, {network}"


def single_runs(tables: Paper) -> Iterator[tuple[str, float, float, float]]:
    """Yield place, value, mean and printed deviation where one run of Table 2 is printed elsewhere."""
    for smoothed in (False, True):
        rows = tables["Table 2"].where(dataset="ImageNet-1K", smoothed=smoothed, student="ResNet-18")
        mean = rows[0]
        one = tables["Table 1"].row("ResNet-50")
        for column, mean_column in (("top1", "teacher_top1"), ("top5", "teacher_topk")):
            name = f"{column}_{side(mean)}"
            deviation = cell(mean, f"{mean_column}_std")
            yield f"Table 1, ResNet-50, {name}", cell(one, name), cell(mean, mean_column), deviation
        one = tables["Table 8"].row("R50+LS" if smoothed else "R50")
        for column in ("teacher_top1", "student_top1"):
            yield f"{one.place}, {column}", cell(one, column), cell(mean, column), cell(mean, f"{column}_std")
    for one in tables["Fig. 5"].where(teacher="ResNet-50"):
        mean = tables["Table 2"].row(f"CUB200-2011, {one.name}")
        yield one.place, cell(one, "student_top1"), cell(mean, "student_top1"), cell(mean, "student_top1_std")


def spread(tables: Paper, ddof: int) -> set[str]:
    """Return runs farther from the mean of three than their standard deviation allows.

    The farthest of n values lies at most sqrt(n - 1) population deviations from their mean.
    """
    step = 0.0005  # half a unit of the last printed digit, of the run, the mean and the deviation
    bound = math.sqrt(RUNS - 1) * math.sqrt((RUNS - ddof) / RUNS)
    return {
        place
        for place, value, mean, deviation in single_runs(tables)
        if abs(value - mean) - step > bound * (deviation + step)
    }


def pairs(tables: Paper, name: str, *keys: str) -> Iterator[tuple[Row, Row]]:
    """Yield the rows without and with smoothing that agree in the columns ``keys``."""
    for row in tables[name].where(smoothed=False):
        (other,) = tables[name].where(smoothed=True, **{key: row[key] for key in keys})
        yield row, other


def claims(tables: Paper) -> Iterator[str]:
    """Yield the exceptions, among the paper's own numbers, to what its text states without exception."""
    for row in tables["Table 1"].rows:  # Sec. 5: smoothing always lowers 1 - S
        if row["delta"] is not None and cell(row, "delta") >= 0:
            yield f"claim: {row.place}"
    plain, cutmix = (tables["Table 1"].row(name) for name in ("ResNet-50", "ResNet50+Long+CutMix"))
    for column in ("instability_without", "instability_with"):  # Sec. 5: so do CutMix and longer training
        if cell(cutmix, column) >= cell(plain, column):
            yield f"claim: {cutmix.place}, {column}"
    for row in tables["Table 10"].rows:  # caption: the difference is information erased
        if cell(row, "delta") >= 0:
            yield f"claim: {row.place}"
    for row, other in pairs(tables, "Table 3", "dataset", "network"):  # Sec. 7: smoothing hurts
        for column in ("top1", "topk"):
            if row[column] is not None and cell(other, column) >= cell(row, column):
                yield f"claim: Table 3, {row['dataset']}, {row['network']}, {column}"
    gains = tables["Table 4 (average)"].rows  # Sec. 7: less gain with more classes
    for column in ("top1_gain", "top5_gain"):
        values = [cell(row, column) for row in gains]
        if values != sorted(values, reverse=True):
            yield f"claim: Table 4, {column}"
    for row, other in pairs(tables, "Table 7", "dataset", "teacher", "student"):  # Sec. 5: a better student
        for column in ("student_top1", "student_topk"):
            if cell(other, column) <= cell(row, column):
                yield f"claim: Table 7, {row['dataset']}, {row['teacher']} > {row['student']}, {column}"
    for smoothed in (False, True):  # Secs. 1, 6 and Appendix B: a better teacher, a better student
        first, second = tables["Table 6"].where(student="ResNet-50", smoothed=smoothed)
        better_teacher = cell(second, "teacher_top1") > cell(first, "teacher_top1")
        if better_teacher != (cell(second, "student_top1") > cell(first, "student_top1")):
            yield f"claim: {second.place}"
    ordered = sorted(tables["Table 8"].rows, key=lambda row: cell(row, "teacher_top1"))
    for first, second in pairwise(ordered):
        if cell(second, "student_top1") <= cell(first, "student_top1"):
            yield f"claim: {second.place}"
    yield from _claims_on_hard_labels(tables)


def _claims_on_hard_labels(tables: Paper) -> Iterator[str]:
    """Yield what rises with the weight of the hard labels (Appendix E).

    Table 2 stands for weight 0, which Appendix E does not compare.
    """
    for smoothed in (False, True):
        (soft,) = tables["Table 2"].where(
            dataset="ImageNet-1K", teacher="ResNet-50", student="ResNet-18", smoothed=smoothed
        )
        rows = tables["Table 9"].where(smoothed=smoothed)
        for column, soft_column in (("top1", "student_top1"), ("top5", "student_topk")):
            curve = [cell(soft, soft_column), *(cell(row, column) for row in rows)]
            for before, after, row in zip(curve, curve[1:], rows, strict=False):
                if after >= before:
                    yield f"claim: {row.place}, {column}"


def inconsistencies(tables: Paper) -> set[str]:
    checks = (deltas, averages, reuse, arithmetic, granularity, claims)
    found = {name for check in checks for name in check(tables)}
    return found | {f"spread: {place}" for place in spread(tables, ddof=1)}


@pytest.fixture(scope="module")
def tables() -> Paper:
    return load_tables()


def test_inconsistencies_are_exactly_those_listed(tables: Paper) -> None:
    listed = [entry["id"] for entry in KNOWN]
    assert len(listed) == len(set(listed))
    assert inconsistencies(tables) == set(listed)


def changed(tables: Paper, table: str, name: str, column: str, value: Value) -> Paper:
    """Return the tables with one cell changed."""
    rows = tuple(
        replace(row, values={**row.values, column: value}) if row.name == name else row
        for row in tables[table].rows
    )
    assert rows != tables[table].rows
    return replace(tables, tables={**tables.tables, table: replace(tables[table], rows=rows)})


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("Table 1", "ResNet-101", "instability_with", 0.3071),
        ("Table 1", "Wide ResNet50", "top1_with", 77.809),
        ("Table 2", "CUB200-2011, ResNet-50 with > ResNet-50", "student_topk_std", 0.076),
        ("Table 3", "iNaturalist 2019, ResNet-50 with", "top1", 72.940),
        ("Table 3", "Places-LT, ResNet-18 with", "top1", 25.887),
        ("Table 4", "ImageNet-100, ResNet-101 with", "top5", 95.320),
        ("Table 4 (average)", "ImageNet-500, Average", "top1_gain", 0.456),
        ("Table 5", "CUB200-2011", "test_images", 5_749),
        ("Table 5", "iMaterialist", "training_images", 100_000),
        ("Table 5", "Places-LT", "classes", 356),
        ("Table 5", "iNaturalist 2019", "test_images", 3_003),
        ("Table 6", "ResNet-50 with > ResNet-18", "teacher_topk", 87.945),
        ("Table 7", "iMaterialist, ResNet-50 with > ResNet-18", "student_top1", 65.395),
        ("Table 8", "Wide ResNet-50-2", "teacher_top1", 77.880),
        ("Table 8", "R50+LS", "student_top1", 71.861),
        ("Table 9", "0.7 – 0.3 with", "top1", 71.913),
        ("Table 10", "ResNet-18", "delta", -0.0143),
        ("Table 10", "ResNeXt50 32x4d", "top5_without", 93.689),
        ("Fig. 5", "ResNet-101 with > ResNet-101", "student_top1", 82.252),
        ("Fig. 6", "with", "student_top1", 63.180),
    ],
)
def test_a_wrong_number_is_found(tables: Paper, table: str, row: str, column: str, value: Value) -> None:
    assert inconsistencies(changed(tables, table, row, column, value)) != {entry["id"] for entry in KNOWN}


def test_no_single_run_is_farther_than_a_population_deviation_allows(tables: Paper) -> None:
    assert spread(tables, ddof=0) == set()


def test_accuracies_are_percentages_and_top1_is_not_above_top5(tables: Paper) -> None:
    values: dict[tuple[str, str, str], float] = {}
    for row, _, _, column, value, _ in accuracies(tables):
        assert 20 < value < 100
        values[row.table, row.name, column] = value
    assert len(values) == 334
    for (table, name, column), value in values.items():
        for other in (column.replace("top1", "top5"), column.replace("top1", "topk")):
            assert value <= values.get((table, name, other), 100)


WEIGHTS = {
    "ResNet-18": ("resnet", "ResNet18_Weights"),
    "ResNet-50": ("resnet", "ResNet50_Weights"),
    "ResNet-101": ("resnet", "ResNet101_Weights"),
    "MobileNetV2": ("mobilenetv2", "MobileNet_V2_Weights"),
    "DenseNet121": ("densenet", "DenseNet121_Weights"),
    "ResNeXt50 32x4d": ("resnet", "ResNeXt50_32X4D_Weights"),
    "Wide ResNet50": ("resnet", "Wide_ResNet50_2_Weights"),
    "ResNeXt101 32x8d": ("resnet", "ResNeXt101_32X8D_Weights"),
}


@pytest.mark.parametrize("network", WEIGHTS)
def test_rows_marked_as_public_weights_are_those_that_torchvision_publishes(
    tables: Paper, network: str
) -> None:
    pytest.importorskip("torchvision")
    module, name = WEIGHTS[network]
    weights = getattr(importlib.import_module(f"torchvision.models.{module}"), name).IMAGENET1K_V1
    published = weights.meta["_metrics"]["ImageNet-1K"]
    for table in ("Table 1", "Table 10"):
        row = tables[table].row(network)
        equal = (row["top1_without"], row["top5_without"]) == (published["acc@1"], published["acc@5"])
        assert row["weights"] == ("torchvision IMAGENET1K_V1" if equal else None)


def test_smoothed_resnet50_shares_its_top1_alone_with_public_unsmoothed_weights(tables: Paper) -> None:
    models = pytest.importorskip("torchvision.models")
    published = models.ResNet50_Weights.IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]
    row = tables["Table 1"].row("ResNet-50")
    assert (row["top1_with"], row["top5_with"]) == (76.130, 92.936)
    assert (published["acc@1"], published["acc@5"]) == (76.130, 92.862)


def test_lookups(tables: Paper) -> None:
    row = tables["Table 1"].row("MobileNetV2")
    assert row.place == "Table 1, MobileNetV2"
    assert row.number("delta") is None
    assert tables["Table 5"].row("iMaterialist").about == {"noise_percent", "training_images", "test_images"}
    with pytest.raises(TypeError, match="Table 1, MobileNetV2: weights is 'torchvision"):
        row.number("weights")
    with pytest.raises(KeyError, match="no row 'VGG'"):
        tables["Table 1"].row("VGG")
    with pytest.raises(KeyError):
        tables["Table 11"]


# Which row a run belongs to


def test_every_run_of_a_recipe_that_names_a_table_has_a_row_or_is_known_to_have_none():
    missing, seen = set(), set()
    for name, plan in recipes_plans().items():
        for table in plan.paper:
            for kind in runs_by_row(plan, load_tables()[table]):
                row = row_of(load_tables(), table, kind)
                if row is None:
                    missing.add((name, table, kind.teacher, kind.smoothing))
                else:
                    seen.add((table, row.name))
    assert missing == NOT_IN_THE_PAPER
    every = {(table, row.name) for table in (*OF_TEACHERS, *OF_STUDENTS) for row in load_tables()[table].rows}
    # Table 2's rows are a part of Table 7's. Table 1's Long are table8's. ImageNet-LT's ResNet-101 is a dash.
    # The binary network of Fig. 6 has a recipe for mmcls alone.
    assert every - seen == {
        *(("Table 7", row.name) for row in load_tables()["Table 2"].rows),
        *(("Table 1", f"ResNet50+{kind}") for kind in ("Long", "Long+CutMix")),
        *(("Table 3", f"ImageNet-LT, ResNet-101 {side}") for side in ("without", "with")),
        *(("Fig. 6", side) for side in ("without", "with")),
    }


def test_recipes_whose_header_names_a_table_have_the_key():
    headers = {recipe.name: recipe.place for recipe in catalogue()}
    for name, plan in recipes_plans().items():
        keys = {re.sub(r"\D", "", table) for table in plan.paper}
        assert keys <= set(re.findall(r"\d+", headers[name] or "")), name
        tables = " ".join(re.findall(r"Tables? [\d and]+", headers[name] or ""))
        assert {"2", "3", "4", "6", "7", "9"} & set(re.findall(r"\d+", tables)) <= keys, name


@pytest.mark.parametrize(
    ("model", "config", "classes", "name"),
    [
        ("resnet50.tv_in1k", {}, 1000, "ResNet-50"),
        ("resnet50", {"epochs": 160}, 1000, "ResNet50+Long"),
        ("resnet50", {"epochs": 160, "cutmix": 1.0}, 1000, "ResNet50+Long+CutMix"),
        ("resnet50", {"epochs": 160}, 200, "ResNet-50"),
        ("my_net", {}, 1000, "my_net"),
    ],
)
def test_what_makes_a_teacher_long(model, config, classes, name):
    assert teacher_name(model, config, classes) == name


@pytest.mark.parametrize("change", [{"temperature": 2.0}, {"smoothing": 0.05}, {"hard_weight": 0.3}])
def test_another_setting_is_not_the_papers_row(change):
    (kind, *_) = runs_by_row(recipes_plans()["imagenet/table2"], load_tables()["Table 2"])
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
    assert words in problem_of_table(name, students)
