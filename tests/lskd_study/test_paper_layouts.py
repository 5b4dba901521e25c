"""The paper's tables beside measured figures: layouts, files and pages."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lskd_study.cli.main import main
from lskd_study.pages.paper_figures import read_studies, shared_tables
from lskd_study.pages.paper_tables import (
    Accuracy,
    PaperTable,
    Part,
    Text,
    paper_table,
    papers_tables,
    published_table,
)
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report
from lskd_study.paper.printed import load_tables
from lskd_study.plan.recipes import catalogue
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Failure, Results
from simulated import cells, html_tables, image_result, of_kind, recipes_plans, rows

pytestmark = pytest.mark.unit

ERRATA = (Path(__file__).parents[2] / "docs" / "errata.md").read_text(encoding="utf-8")


def simulated(name: str, keep=lambda run: True, **changes: object) -> Results[ImageResult]:
    plan = replace(recipes_plans()[name], **changes)
    ranks = [0, 0, 0, 1, 2, 3, 4, 7, plan.num_classes - 1]
    finished = {run.id: image_result(run, ranks, 40) for run in plan.runs if keep(run)}
    return Results(plan, finished, [run.id for run in plan.runs if run.id not in finished])


def filled(table: str, *names: str, **changes) -> tuple[PaperTable, Part]:
    """A table of one part, filled by simulated recipes."""
    layout = paper_table(table, [simulated(name, **changes) for name in names])
    (part,) = layout.parts
    return layout, part


def topk(results: Results[ImageResult], k: int, **wanted: object) -> np.ndarray:
    """Top-k accuracies of the runs of some kind, from the simulated ranks."""
    return np.array([100 * np.mean(one.rank < k) for one in of_kind(results, **wanted)])


# Layouts


def test_printed_figures_are_the_papers_and_differences_are_measured_minus_printed():
    """Also in the files: each cell in the CSV, each printed figure in the Markdown."""
    names = [
        name
        for name, plan in recipes_plans().items()
        if any(load_tables()[name].layout for name in plan.paper)
    ]
    assert len(names) == 18
    for layout in (layout for name in names for layout in papers_tables([simulated(name)])):
        seen, text = 0, layout.markdown()
        lines = [(part.columns, line) for part in layout.parts for line in part.lines]
        written = rows(layout.csv())
        feet = [part.foot for part in layout.parts if part.foot]
        assert len(written) == len(lines) + len(feet)
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
        assert all(figure.printed in text for foot in feet for figure in foot.accuracies)
        for (columns, line), row in zip(lines, written, strict=bool(not feet)):
            for column, figure in zip(columns, line.cells, strict=True):
                if not isinstance(figure, Accuracy):
                    continue
                paper = printed(layout.name, line.printed, column.name) if line.printed else None
                assert figure.paper == paper
                assert figure.printed in text
                measured, own, difference = (
                    row[f"{column.name}{end}"] for end in ("", "_paper", "_difference")
                )
                assert (float(own) if own else None) == paper
                if figure.measured.seeds:
                    assert float(measured) == pytest.approx(figure.measured.mean)
                if paper is not None and figure.measured.seeds:
                    assert figure.difference == pytest.approx(figure.measured.mean - paper)
                    assert float(difference) == pytest.approx(figure.difference, abs=1e-5)
                    seen += 1
                else:
                    assert math.isnan(figure.difference)
                    assert (figure.difference_text, difference) == ("", "")
        assert seen, layout


def printed(table: str, row: str, column: str) -> float | None:
    """The figure of ``tables.yaml`` for a column of a layout, e.g. ``student_top3``, ``places_lt_top1``."""
    values = load_tables()[table].row(row).values
    rank = re.sub(r"top[35]$", "topk" if "k" in values else "top5", column)
    return values[rank if rank in values else rank.rpartition("_")[2]]


@pytest.mark.parametrize(
    ("table", "name", "line", "cell", "k", "wanted"),
    [
        *(
            ("Table 7", "imaterialist/table7_resnet50", 2, cell, k, {**kind, "smoothing": 0.1})
            for cell, (kind, k) in enumerate(
                (kind, k) for kind in ({"role": "teacher"}, {"model": "resnet18"}) for k in (1, 3)
            )
        ),
        (
            *("Table 2", "cub200/table2", 1, 2, 1),
            {"role": "student", "model": "resnet50.tv_in1k", "smoothing": 0.0},
        ),
        ("Table 9", "imagenet/table9", 5, 1, 5, {"role": "student", "smoothing": 0.1, "hard_weight": 0.7}),
    ],
)
def test_measured_figures_are_means_over_the_seeds_of_the_runs(table, name, line, cell, k, wanted):
    _, part = filled(table, name)
    values = topk(simulated(name), k, **wanted)
    measured = part.lines[line].accuracies[cell].measured
    assert (measured.mean, measured.seeds) == (pytest.approx(values.mean()), len(values))
    assert len(values) == 1 or measured.std == pytest.approx(values.std(ddof=1))


def test_table_7_of_imaterialist_has_top_3_and_the_rows_of_the_other_teacher_without_a_measured_figure():
    _, part = filled("Table 7", "imaterialist/table7_resnet50")
    assert part.caption == "iMaterialist (Noisy)"
    assert [column.label for column in part.columns][3::3] == ["Acc. (Top-3)", "Acc. (Top-3)"]
    printed = load_tables()["Table 7"].where(dataset="iMaterialist")
    assert [line.printed for line in part.lines] == [row.name for row in printed]
    texts = [cell.text for cell in part.lines[2].cells if isinstance(cell, Text)]
    assert texts == ["ResNet-50", "✓", "ResNet-18"]
    assert all(not figure.measured.seeds for line in part.lines[4:] for figure in line.accuracies)


def test_missing_runs_leave_a_dash_and_their_seeds_out():
    _, part = filled("Table 2", "cub200/table2")
    assert [line.seeds for line in part.lines] == [3] * 4
    assert (part.caption, part.errata) == ("CUB200-2011 (Fine-grained)", ("E14", "E23"))
    assert part.lines[1].accuracies[2].printed == "80.910 ± 0.033"
    layout, part = filled("Table 2", "cub200/table2", keep=lambda run: run.seed == 1 and run.smoothing == 0)
    assert [line.seeds for line in part.lines] == [1, 1, 0, 0]
    figure = part.lines[3].accuracies[0]
    assert (figure.measured_text, figure.difference_text) == ("–", "")
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
    by_name = {line.printed: line.accuracies for part in layout.parts for line in part.lines}
    assert by_name["MobileNet V2"][0].errata == ("E17",)
    assert by_name["R50"][1].errata == ("E14", "E16")
    assert by_name["Wide ResNet-50-2"][0].errata == ()
    assert [entry.id for entry in layout.errata] == ["E14", "E16", "E17", "E18"]


def test_table_9_has_a_row_for_each_ratio_as_printed():
    _, part = filled("Table 9", "imagenet/table9")
    ratios = [(line.cells[0].text, line.cells[1].text) for line in part.lines]
    assert ratios == [(r, m) for r in ("0.3 – 0.5", "0.5 – 0.5", "0.7 – 0.3") for m in "✗✓"]
    assert part.lines[0].cells[0].errata == ("E21",)


def test_table_3_over_its_data_sets_has_the_papers_columns():
    _, part = filled("Table 3", "imagenet_lt/table3", "places_lt/table3", "inat2019/table3")
    assert [column.label for column in part.columns[2:]] == [
        f"{place} Acc. (Top-{k})"
        for place, second in (("ImageNet-LT", 5), ("Places-LT", 3), ("iNaturalist 2019", 3))
        for k in (1, second)
    ]
    assert [(line.cells[0].text, line.cells[1].text) for line in part.lines] == [
        (f"ResNet-{depth}", mark) for depth in (18, 34, 50, 101) for mark in "✗✓"
    ]
    nothing = part.lines[6].accuracies[0]  # a dash in the paper, and no recipe
    assert (nothing.measured_text, nothing.printed, nothing.difference_text) == ("–", "", "")
    assert part.columns[4].errata == ("E25",)
    assert part.lines[5].accuracies[2].errata == ("E19",)


def test_table_4_averages_the_gains_of_the_papers_networks_when_all_are_measured():
    names = ("imagenet_100_500/classes100", "imagenet/table1")
    _, part = filled("Table 4", *names)
    assert [figure.paper for figure in part.foot.accuracies] == [0.880, 0.440, 0.155, 0.206]
    assert [figure.errata for figure in part.foot.accuracies] == [("E22",), ()] * 2
    for column, (name, k) in enumerate((name, k) for name in names for k in (1, 5)):
        results = simulated(name)
        gains = [
            topk(results, k, model=model, smoothing=0.1) - topk(results, k, model=model, smoothing=0.0)
            for model in ("resnet18", "resnet101")
        ]
        assert part.foot.accuracies[column].measured.mean == pytest.approx(np.mean(gains))
    _, part = filled("Table 4", names[0], keep=lambda run: run.model == "resnet18")
    assert part.foot.accuracies[0].measured_text == "–"
    assert part.foot.accuracies[0].printed == "+0.880"


def test_a_data_set_of_ones_own_has_the_layout_and_no_figure_of_the_paper():
    layout, part = filled("Table 9", "imagenet/table9", num_classes=7, data="data/mine")
    assert part.caption == "mine"
    assert all(figure.paper is None for line in part.lines for figure in line.accuracies)
    assert [line.seeds for line in part.lines] == [1] * 6
    assert "not in its table" in layout.notes[0]


@pytest.mark.parametrize(
    ("name", "first"), [("imagenet/temperature", 71.488), ("cub200/temperature", 80.169)]
)
def test_published_figures_of_the_temperature_studies(name, first):
    results = simulated(name)
    layout = published_table(results)
    assert "Chandrasegaran" in layout.title
    (part,) = layout.parts
    header = next(recipe.header for recipe in catalogue() if recipe.name == name)
    table = re.findall(r"T = (\d+) +([\d.]+) +([\d.]+)", header)
    expected = [(t, s, float(v)) for t, a, b in table for s, v in (("0", a), ("0.1", b))]
    shown = [(line.cells[0].text, line.cells[1].text, line.cells[2].paper) for line in part.lines]
    assert shown == expected
    assert (len(shown), shown[0][2]) == (8, first)
    values = [
        one.top1
        for one in results.finished.values()
        if (one.run.role, one.run.temperature, one.run.smoothing) == ("student", 64, 0.1)
    ]
    assert part.lines[-1].accuracies[0].measured.mean == pytest.approx(np.mean(values))
    assert f"published {first}" in layout.markdown()
    assert published_table(simulated("imagenet/table2")) is None


def test_a_failed_run_is_seen_in_its_cell_and_in_no_average():
    results = simulated("imagenet/table2")
    failed = results.plan.runs[0]
    finished = {name: one for name, one in results.finished.items() if name != failed.id}
    lost = {failed.id: Failure(failed, {"failed": "epoch 1: nan"})}
    text = paper_table("Table 2", [replace(results, finished=finished, failed=lost)]).markdown()
    assert "failed" not in paper_table("Table 2", [results]).markdown()
    assert ("1 failed" if len(results.plan.seeds) > 1 else "| failed") in text


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
    path = Path(__file__).with_name("known_inconsistencies.yaml")
    for known in yaml.safe_load(path.read_text(encoding="utf-8")):
        table = re.match(r"[\w ]+: ((?:Table|Fig\.) \d+)", known["id"]).group(1)
        if paper[table].layout:
            (entry,) = [one for one in paper.errata if one.id == known["errata"]]
            assert table in {*entry.data_sets, *(cell[0] for cell in entry.cells)}, known["id"]


# Pages


def shown(plan):
    """The paper's tables on a page: one line of headings, every row as long, and no cell over several."""
    tables = html_tables(plan.root / "index.html", 'class="data compared"')
    for table in tables:
        assert "".join(table.find("caption").itertext())
        (head,) = cells(table, "thead")
        assert {len(row) for part in ("tbody", "tfoot") for row in cells(table, part)} == {len(head)}
        assert not [cell for cell in table.iter() if {"rowspan", "colspan"} & set(cell.keys())]
        for part, scope in (("thead", "col"), ("tbody", "row"), ("tfoot", "row")):
            assert {cell.get("scope") for cell in table.iterfind(f"{part}//th")} <= {scope}
    return tables


def test_the_tables_of_a_study_stand_on_its_page(plan_of, finish, tmp_path):
    networks = {"teachers": [("resnet50.tv_in1k", "teacher.yaml")]}
    networks["students"] = [("resnet18", "student.yaml"), ("resnet50", "student.yaml")]
    figure = {
        "student": "resnet18",
        "teacher": None,
        "smoothing": 0.1,
        "temperature": 1.0,
        "hard_weight": 0.0,
    }
    published = {"source": "Others & others, 2022", "figures": [{**figure, "top1": 77.5}]}
    cub = replace(
        plan_of(tmp_path, seeds=[0, 1], **networks),
        num_classes=200,
        paper=["Table 2", "Fig. 5"],
        published=published,
    )
    finish(cub)
    write_report(cub)
    tables = shown(cub)
    assert ["".join(table.find("caption").itertext()).replace(" ", "") for table in tables] == [
        "CUB200-2011(Fine-grained)E14E23",
        "CUB200-2011(Fine-grained)E23",
        "Top-1accuracyofstudents",
    ]
    accuracies = ["Acc. (Top‑1)", "Acc. (Top‑5)"]
    heads = ["Teacher", "w/\u00a0LS", *accuracies, "Student", *accuracies, "Seeds"]
    assert cells(tables[0], "thead") == [heads]
    students = read_results(cub).students("resnet18", "resnet50.tv_in1k", 0.1, 1.0, 0.0)
    top1 = np.array([one.top1 for one in students.values()])
    printed = load_tables()["Table 2"].row("CUB200-2011, ResNet-50 with > ResNet-18")
    change = f"{top1.mean() - printed['student_top1']:+.3f}".replace("-", "−")
    *_, row, _ = body = cells(tables[0], "tbody")
    assert len(body) == 4
    assert [row[i] for i in (0, 1, 4, 5, 7)] == [
        *("ResNet-50", "✓", "ResNet-18"),
        f"{top1.mean():.3f} ± {top1.std(ddof=1):.3f} paper 78.382 ± 0.099 {change}",
        "2",
    ]
    assert len(cells(tables[1], "tbody")) == 8  # four of Fig. 5 belong to the other study
    ((*_, own, _, _, _),) = cells(tables[2], "tbody")
    assert re.match(rf"{top1.mean():.3f} ± [\d.]+ published 77.500 ", own)
    files = {path.name for path in cub.root.iterdir()}
    assert {f"{stem}.{end}" for stem in ("table2", "fig5", "published") for end in ("csv", "md")} <= files
    html = (cub.root / "index.html").read_text()
    for text in ("Others &amp; others, 2022", "± seems to be the population’s", "counts of 5,790 images"):
        assert text in html


@pytest.fixture
def table_4(plan_of, finish, tmp_path) -> list[Path]:
    """Two finished studies of Table 4, 100 classes and a data set of one's own with 7."""
    folders = []
    for classes in (7, 100):
        teachers = [("resnet18", "teacher.yaml"), ("resnet101", "teacher.yaml")]
        plan = plan_of(tmp_path / str(classes), seeds=[0], students=[], teachers=teachers)
        plan = replace(plan, num_classes=classes, paper=["Table 4"], data=f"data/of_{classes}")
        finish(plan)
        plan.write()
        folders.append(plan.root)
    return folders


def test_table_4_on_the_page_of_teachers(table_4):
    plan = read_studies(table_4)[1].plan
    write_teachers_report(plan)
    (table,) = shown(plan)
    assert cells(table, "thead")[0][2:4] == ["ImageNet-100 Acc. (Top‑1)", "ImageNet-100 Acc. (Top‑5)"]
    body = cells(table, "tbody")
    assert [row[0] for row in body] == ["ResNet-18", "ResNet-18", "ResNet-101", "ResNet-101"]
    assert "83.400" in body[3][2]
    assert "+0.880" in cells(table, "tfoot")[0][2]
    assert (plan.root / "table4.csv").read_text().count("\n") == 6


# Several studies


def test_a_table_that_two_studies_name_is_filled_by_both(table_4):
    layouts, figures = shared_tables(table_4)
    (part,) = layouts[0].parts
    assert [column.label for column in part.columns[2::2]] == [
        "ImageNet-100 Acc. (Top-1)",
        "of_7 Acc. (Top-1)",
    ]
    assert [line.seeds for line in part.lines] == [1] * 4
    assert [figure.stem for figure in figures] == ["class-count"]
    assert shared_tables(table_4[:1]) == ([], [])
    shutil.move(table_4[1], table_4[1].parent / "elsewhere")
    moved = [table_4[0], table_4[1].parent / "elsewhere"]
    assert [len(results.finished) for results in read_studies(moved)] == [4, 4]


def test_the_index_page_has_the_tables_that_studies_share(table_4, tmp_path):
    for results in read_studies(table_4):
        write_teachers_report(results.plan)
    output = tmp_path / "all.html"
    assert main(["index", *map(str, table_4), "--output", str(output)]) == 0
    html = output.read_text()
    assert '<h3 id="layout-table4">Table 4 of the paper, and these studies</h3>' in html
    assert "paper 82.380" in html
    assert "table4.csv" not in html
    assert "Fig. 9" in html
    assert main(["index", str(table_4[0]), "--output", str(output)]) == 0
    assert "layout-table4" not in output.read_text()


def test_figure_9_from_the_folders_of_studies(table_4, tmp_path):
    words = [word for folder in table_4 for word in ("--study", str(folder))]
    assert main(["figure", "class-count", *words, "--output", str(tmp_path / "f9")]) == 0
    assert {(row["network"], row["classes"]) for row in rows(tmp_path / "f9.csv")} == {
        (network, classes) for network in ("ResNet-18", "ResNet-101", "average") for classes in ("7", "100")
    }
    assert {path.suffix for path in tmp_path.glob("f9*")} == {".png", ".svg", ".csv"}


def test_figure_8_and_stability_from_a_study(fake_study, tmp_path):
    plan = fake_study(seeds=[0], teachers=[("big", "teacher.yaml"), ("wide", "teacher.yaml")])
    write_report(plan)
    for name in ("teacher-student", "accuracy-stability"):
        stem = tmp_path / "f" / name
        assert main(["figure", name, "--study", str(plan.root), "--output", str(stem)]) == 0
        assert stem.with_suffix(".csv").read_text() == (plan.root / "figures" / f"{name}.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("class-count --study {folder} --paper", "--study is another source than --table and --paper"),
        ("class-count --study {nothing}", "contains no study (plan.json is missing)"),
        ("teacher-student --study {folder}", "nothing to draw: no teacher with a student"),
        ("accuracy-stability --study {translation}", "contains a study of translation"),
    ],
)
def test_what_cannot_be_drawn(table_4, translation_study, tmp_path, capsys, words, message):
    places = {"folder": table_4[0], "nothing": tmp_path, "translation": ""}
    if "{translation}" in words:
        places["translation"] = translation_study(seeds=[0], sentences=5).root
    output = ["--output", str(tmp_path / "none" / "f")]
    assert main(["figure", *(word.format(**places) for word in words.split()), *output]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "none").exists()
