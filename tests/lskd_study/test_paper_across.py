"""Tables and figures of the paper over several studies: the index page, and ``lskd figure --study``."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lskd_study.cli.main import main
from lskd_study.pages.paper_figures import read_studies, shared_tables
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report

pytestmark = pytest.mark.unit


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


def test_the_index_page_has_the_tables_that_studies_share(table_4, tmp_path, capsys):
    for folder in table_4:
        (results,) = read_studies([folder])
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


def test_figure_9_from_the_folders_of_studies(table_4, tmp_path, capsys):
    words = [word for folder in table_4 for word in ("--study", str(folder))]
    assert main(["figure", "class-count", *words, "--output", str(tmp_path / "f9")]) == 0
    rows = list(csv.DictReader((tmp_path / "f9.csv").open()))
    assert {(row["network"], row["classes"]) for row in rows} == {
        (network, classes) for network in ("ResNet-18", "ResNet-101", "average") for classes in ("7", "100")
    }
    assert {path.suffix for path in tmp_path.glob("f9*")} == {".png", ".svg", ".csv"}


def test_figure_8_and_stability_from_a_study(fake_study, tmp_path, capsys):
    plan = fake_study(seeds=[0], teachers=[("big", "teacher.yaml"), ("wide", "teacher.yaml")])
    write_report(plan)
    for name in ("teacher-student", "accuracy-stability"):
        stem = tmp_path / "f" / name
        assert main(["figure", name, "--study", str(plan.root), "--output", str(stem)]) == 0
        assert stem.with_suffix(".csv").read_text() == (plan.root / "figures" / f"{name}.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["class-count", "--study", "{folder}", "--paper"],
            "--study is another source than --table and --paper",
        ),
        (["class-count", "--study", "{nothing}"], "contains no study (plan.json is missing)"),
        (["teacher-student", "--study", "{folder}"], "nothing to draw: no teacher with a student"),
        (["accuracy-stability", "--study", "{translation}"], "contains a study of translation"),
    ],
)
def test_what_cannot_be_drawn(table_4, translation_study, tmp_path, capsys, words, message):
    places = {"folder": table_4[0], "nothing": tmp_path}
    if "{translation}" in words:
        places["translation"] = translation_study(seeds=[0], sentences=5).root
    words = [word.format(**{"translation": "", **places}) for word in words]
    assert main(["figure", *words, "--output", str(tmp_path / "none" / "f")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "none").exists()
