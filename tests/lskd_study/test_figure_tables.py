"""Figs. 8 (left) and 9: from the paper's tables, from a study's, and from any."""

import numpy as np
import pytest
from scipy.stats import rankdata

from lskd import LskdError
from lskd_study.drawing import class_count, scatter
from lskd_study.pages.tables import table_csv, table_rows
from lskd_study.paper.printed import load_tables
from lskd_study.results.read import read_results
from simulated import rows

pytestmark = pytest.mark.unit


def write(path, text):
    path.write_text(text)
    return path


# Fig. 8


def test_papers_table_8_is_drawn_named_and_written():
    drawing = scatter.teacher_student_figure(scatter.paper_pairs())
    table = rows(drawing.tables[""])
    printed = load_tables()["Table 8"].rows
    assert [(r["teacher"], float(r["teacher_accuracy"]), float(r["student_accuracy"])) for r in table] == [
        (row.name, row["teacher_top1"], row["student_top1"]) for row in printed
    ]
    assert [r["teacher"] for r in table if r["smoothed"] == "false"] == ["R50", "MobileNet V2"]
    x, y = (np.array([row[c] for row in printed]) for c in ("teacher_top1", "student_top1"))
    (summary,) = rows(drawing.tables["correlations"])
    assert int(summary["n"]) == 8
    assert float(summary["pearson"]) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert float(summary["spearman"]) == pytest.approx(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
    (legend,) = drawing.figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["ResNet-18: n = 8, Pearson 0.96, Spearman 1.00"]
    (axes,) = drawing.figure.axes
    drawn = {(float(x), float(y)) for line in axes.lines for x, y in line.get_xydata()}
    assert drawn == {(float(r["teacher_accuracy"]), float(r["student_accuracy"])) for r in table}
    assert sorted(t.get_text() for t in axes.texts) == sorted(r["teacher"] for r in table)
    boxes = [t.get_window_extent() for t in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_studys_own_table(fake_study, tmp_path):
    path = write(tmp_path / "table.csv", table_csv(table_rows(read_results(fake_study()))))
    pairs = scatter.table_pairs(path)
    assert len(pairs) == 4
    assert {p.group for p in pairs} == {"small", "big"}
    assert [p.smoothed for p in pairs].count(False) == 2
    found = scatter.correlations(pairs)
    assert [c.n for c in found] == [2, 2]
    assert all("too few" in c.text for c in found)
    assert scatter.teacher_student_figure(pairs).tables["correlations"].count("\n") == 3


def test_any_table_with_columns_of_its_own(tmp_path):
    text = (
        "﻿net,acc,s,sacc\n" + "".join(f"n{i},{70 + i},r,{60 + i * i % 5}\n" for i in range(5)) + "n9,80,r,\n"
    )
    path = write(tmp_path / "t.csv", text)
    pairs = scatter.table_pairs(path, "acc", "sacc", "net", "s")
    assert [p.name for p in pairs] == ["n0", "n1", "n2", "n3", "n4"]
    assert {p.smoothed for p in pairs} == {None}
    (found,) = scatter.correlations(pairs)
    assert found.pearson == pytest.approx(np.corrcoef(range(5), [0, 1, 4, 4, 1])[0, 1])


def test_no_correlation_of_what_does_not_vary():
    pairs = [scatter.Point(str(i), 70.0, 60.0 + i, "s") for i in range(4)]
    (found,) = scatter.correlations(pairs)
    assert np.isnan(found.pearson)
    assert found.text == "s: n = 4, no correlation: values do not vary"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("x\n1\n", "no column 'teacher_top1_mean'"),
        ("teacher,student,teacher_top1_mean,student_top1_men\na,b,1,2\n", "did you mean 'student_top1_men'?"),
        ("teacher,student,teacher_top1_mean,student_top1_mean\n", "no rows"),
        ("teacher,student,teacher_top1_mean,student_top1_mean\na,b,good,71\n", "'good' in column"),
        ("teacher,student,teacher_top1_mean,student_top1_mean\na,b,nan,71\n", "'nan' in column"),
        ("teacher,student,teacher_top1_mean,student_top1_mean\na,b,,71\n", "no row with both"),
    ],
)
def test_bad_tables(tmp_path, content, words):
    with pytest.raises(LskdError) as caught:
        scatter.table_pairs(write(tmp_path / "t.csv", content))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Fig. 9


def test_lines_are_those_of_the_csv():
    drawing = class_count.class_count_figure(class_count.paper_accuracies())
    table = rows(drawing.tables[""])
    lines = {line.get_label(): line for line in drawing.figure.axes[0].lines}
    for network in ("ResNet-18", "ResNet-101", "average"):
        written = [(int(r["classes"]), float(r["gain_points"])) for r in table if r["network"] == network]
        np.testing.assert_allclose(lines[network].get_xydata(), written, rtol=1e-6)


def test_runs_are_averaged_and_gaps_left_out(tmp_path):
    text = "classes,teacher,smoothing,teacher_top1_mean\n"
    text += (
        "10,a,0,80\n10,a,0,82\n10,a,0.1,83\n100,a,0,70\n100,a,0.1,69\n10,b,0,50\n10,b,0.2,51\n100,b,0,40\n"
    )
    accuracies = class_count.table_accuracies(write(tmp_path / "t.csv", text))
    found = class_count.gains(accuracies)
    assert [(g.network, g.classes, g.points) for g in found] == [
        ("a", 10, 2.0),
        ("a", 100, -1.0),
        ("b", 10, 1.0),
    ]
    assert [(g.classes, g.points) for g in class_count.average_gains(found)] == [(10, 1.5)]
    class_count.class_count_figure(accuracies)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("classes,teacher,smoothing,teacher_top1_mean\nmany,a,0,80\n", "'many' in column 'classes'"),
        ("classes,teacher,smoothing,teacher_top1_mean\n1.5,a,0,80\n", "no number of classes"),
        ("classes,teacher,smoothing,teacher_top1_mean\n10,a,maybe,80\n", "'maybe' in column 'smoothing'"),
        ("classes,teacher,smoothing,teacher_top1_mean\n10,a,0,80\n20,a,0.1,80\n", "no network has"),
        ("class,teacher,smoothing,teacher_top1_mean\n10,a,0,80\n", "did you mean 'class'?"),
    ],
)
def test_bad_accuracies(tmp_path, content, words):
    with pytest.raises(LskdError) as caught:
        class_count.class_count_figure(class_count.table_accuracies(write(tmp_path / "t.csv", content)))
    assert words in str(caught.value)
