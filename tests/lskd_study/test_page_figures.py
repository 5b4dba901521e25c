"""Figs. 8 and 9 and stability against accuracy from a study's own runs, the paper's points behind them."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lskd_study.drawing.scatter import paper_points
from lskd_study.drawing.style import ARMS, INK, SOFT, write_drawing
from lskd_study.pages.paper_figures import accuracy_stability, figure8, figure9, study_figures
from lskd_study.paper.printed import load_tables
from lskd_study.results.results import Results
from simulated import image_result, of_kind, rows

pytestmark = pytest.mark.unit

TEACHERS = [("mobilenetv2_100", "t.yaml"), ("densenet121", "t.yaml"), ("resnext101_32x8d", "t.yaml")]


@pytest.fixture
def study(plan_of, tmp_path):
    def make(classes=1000, paper=("Table 8",), keep=lambda run: True, **changes):
        changes = {"teachers": TEACHERS, "students": [("resnet18", "s.yaml")], "seeds": [0, 1]} | changes
        plan = replace(plan_of(tmp_path, **changes), num_classes=classes, paper=list(paper))
        finished = {run.id: image_result(run, [0, 1, 2], 60) for run in plan.runs if keep(run)}
        return Results(plan, finished)

    return make


def mean(results, attribute, **wanted):
    found = [getattr(one, attribute) for one in of_kind(results, **wanted)]
    assert len(found) == len(results.plan.seeds)
    return float(np.mean(found))


def test_figure_8_has_a_point_for_each_teacher_and_the_papers_behind(study):
    results = study()
    figure = figure8([results])
    table = rows(figure.drawing.tables[""])
    assert len(table) == 6
    for row in table:
        smoothing = 0.1 if row["smoothed"] == "true" else 0.0
        model = {"MobileNetV2": 0, "DenseNet121": 1, "ResNeXt101 32x8d": 2}[row["teacher"]]
        kind = {"teacher": TEACHERS[model][0], "smoothing": smoothing}
        assert float(row["teacher_accuracy"]) == pytest.approx(mean(results, "top1", role="teacher", **kind))
        assert float(row["student_accuracy"]) == pytest.approx(mean(results, "top1", role="student", **kind))
    paper = rows(figure.drawing.tables["paper"])
    printed = load_tables()["Table 8"].rows
    assert [(r["teacher"], float(r["student_accuracy"])) for r in paper] == [
        (row.name, row["student_top1"]) for row in printed
    ]
    (axes,) = figure.drawing.figure.axes
    drawn = {
        color: {(x, y) for line in axes.lines if line.get_color() == color for x, y in line.get_xydata()}
        for color in (ARMS[0], SOFT)
    }
    assert len(drawn[ARMS[0]]) == 6
    assert drawn[SOFT] == {(row["teacher_top1"], row["student_top1"]) for row in printed}
    assert "Grey: the paper’s Table 8" in figure.note


def test_stability_against_accuracy(study):
    results = study()
    figure = accuracy_stability([results])
    table = rows(figure.drawing.tables[""])
    assert len(table) == 6
    kind = {"teacher": "densenet121", "smoothing": 0.1, "role": "teacher"}
    (row,) = [r for r in table if (r["teacher"], r["smoothed"]) == ("DenseNet121", "true")]
    assert float(row["accuracy"]) == pytest.approx(mean(results, "top1", **kind))
    assert float(row["one_minus_s"]) == pytest.approx(mean(results, "instability", **kind))
    # Errata E12's correlations over all rows of Table 1.
    legend = [text.get_text() for text in figure.drawing.figure.legends[0].get_texts()]
    assert legend[:2] == [
        "paper, without smoothing: n = 10, Pearson -0.69, Spearman -0.75",
        "paper, with smoothing: n = 8, Pearson -0.65, Spearman 0.02",
    ]
    assert len(paper_points()) == 18


def test_two_teachers_of_a_study_that_names_no_table_are_not_drawn(study):
    one = study(paper=(), teachers=TEACHERS[:1])
    assert study_figures(one) == []
    assert figure8([study(paper=("Table 8",), teachers=TEACHERS[:1])]) is not None
    assert [figure.stem for figure in study_figures(study(paper=()))] == [
        "teacher-student",
        "accuracy-stability",
    ]
    assert "paper" not in figure8([study(paper=())]).drawing.tables


def test_figure_8_leaves_out_what_has_no_result(study):
    results = study(keep=lambda run: run.role == "teacher" or run.smoothing == 0)
    assert len(rows(figure8([results]).drawing.tables[""])) == 3
    assert figure8([study(keep=lambda run: run.role == "teacher")]) is None


def test_figure_9_over_several_studies_averages_gains_over_networks(study):
    networks = {"teachers": [("resnet18", "t.yaml"), ("resnet101", "t.yaml")], "students": []}
    studies = [study(classes=classes, paper=("Table 4",), **networks) for classes in (100, 500)]
    wide = [*networks["teachers"], ("resnet50", "t.yaml")]
    studies.append(study(classes=1000, paper=("Table 4",), teachers=wide, students=[]))
    figure = figure9(studies)
    table = rows(figure.drawing.tables[""])
    assert {row["network"] for row in table} == {"ResNet-18", "ResNet-101", "average"}
    for results in studies:
        gains = [
            mean(results, "top1", teacher=model, role="teacher", smoothing=0.1)
            - mean(results, "top1", teacher=model, role="teacher", smoothing=0.0)
            for model, _ in networks["teachers"]
        ]
        classes = str(results.plan.num_classes)
        (average,) = [r for r in table if (r["network"], r["classes"]) == ("average", classes)]
        assert float(average["gain_points"]) == pytest.approx(np.mean(gains))
    printed = load_tables()["Table 4 (average)"].rows
    behind = [float(row["gain_points"]) for row in rows(figure.drawing.tables["paper"])]
    np.testing.assert_allclose(behind, [row["top1_gain"] for row in printed], atol=0.00051)
    assert "One number of classes" not in figure.note


def test_figure_9_of_one_study_or_of_ones_own_data(study):
    alone = figure9([study(classes=100, paper=("Table 4",), students=[])])
    assert "One number of classes" in alone.note
    networks = [(name, "t.yaml") for name in ("resnet50", "resnet18", "resnet101")]
    papers = figure9([study(paper=("Table 4",), teachers=networks, students=[])])
    assert {row["network"] for row in rows(papers.drawing.tables[""])} == {
        "ResNet-18",
        "ResNet-101",
        "average",
    }
    own = figure9([study(classes=7, paper=(), students=[]), study(classes=70, paper=(), students=[])])
    assert set(own.drawing.tables) == {""}
    assert figure9([study(keep=lambda run: run.smoothing == 0)]) is None
    assert figure9([]) is None


def test_files_and_the_pages_colours(study, tmp_path):
    for figure in study_figures(study(paper=("Table 8", "Table 4"))):
        write_drawing(figure.drawing, tmp_path / "figures" / figure.stem)
        names = {path.name for path in (tmp_path / "figures").iterdir()}
        assert {f"{figure.stem}.png", f"{figure.stem}.svg", *figure.tables} <= names
        assert not re.findall(r"(?:fill|stroke): ?#(?!000000)[0-9a-f]{6}", figure.panel)
        for color in (INK, SOFT, "#ffffff", ARMS[0]):
            assert color not in figure.panel
        assert "var(--soft)" in figure.panel
