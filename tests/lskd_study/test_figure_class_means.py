"""Figs. 3 and 4: that the CSV holds what the picture shows, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from lskd import LskdError
from lskd_study.drawing.class_means import major_figure, measure_class_means, minor_figure, smoothing_loss
from lskd_study.drawing.inputs import check_teachers, class_names, propose, resolve_classes
from lskd_study.drawing.style import write_drawing
from lskd_study.teachers.outputs import Outputs
from simulated import rows

pytestmark = pytest.mark.unit


def teacher(name="plain", num_classes=6, samples=90, scale=2.0, seed=0, names=None):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, num_classes, generator=g)
    labels = torch.arange(samples) % num_classes
    logits[torch.arange(samples), labels] += 2
    return Outputs(name, logits, labels, None, names)


def means(outputs):
    p = softmax(outputs.logits.double().numpy(), axis=1)
    y = outputs.labels.numpy()
    return np.stack([p[y == c].mean(0) for c in range(p.shape[1])])


@pytest.fixture(scope="module")
def pair():
    return [teacher(), teacher("smoothed", scale=0.5, seed=1)]


def test_major_bars_are_those_of_the_csv_and_of_the_logits(pair):
    chosen = [4, 0, 2]
    drawing = major_figure([measure_class_means(outputs, chosen) for outputs in pair])
    table = rows(drawing.tables[""])
    assert [int(r["class_id"]) for r in table] == chosen
    assert [int(r["samples"]) for r in table] == [15, 15, 15]
    (axes,) = drawing.figure.axes
    for outputs, bars in zip(pair, axes.containers, strict=True):
        heights = [bar.get_height() for bar in bars]
        np.testing.assert_allclose(heights, means(outputs)[chosen, chosen], rtol=1e-5)
        np.testing.assert_allclose(
            [float(r[f"probability_{outputs.name}"]) for r in table], heights, rtol=1e-6
        )
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert axes.containers[1][0].get_width() < axes.containers[0][0].get_width()  # both can be seen


@pytest.mark.parametrize("logarithmic", [False, True])
def test_minor_dashes_are_those_of_the_csv_and_of_the_logits(pair, logarithmic):
    chosen = [4, 0]
    drawing = minor_figure([measure_class_means(outputs, chosen) for outputs in pair], logarithmic)
    table = rows(drawing.tables[""])
    assert [(int(r["class_id"]), int(r["other_id"])) for r in table] == [
        (c, k) for c in chosen for k in range(6) if k != c
    ]
    (axes,) = drawing.figure.axes
    places = []
    for outputs, dashes in zip(pair, axes.collections, strict=True):
        segments = np.array(dashes.get_segments())
        expected = [means(outputs)[c, k] for c in chosen for k in range(6) if k != c]
        np.testing.assert_allclose(segments[:, 0, 1], expected, rtol=1e-5)
        np.testing.assert_allclose(
            [float(r[f"probability_{outputs.name}"]) for r in table], segments[:, 0, 1], rtol=1e-6
        )
        places.append(segments[:, :, 0])
    drawing.figure.draw_without_rendering()
    assert not any("$" in label.get_text() for label in axes.get_yticklabels(which="both"))  # no formulas
    assert bool((places[0][:, 1] < places[1][:, 0]).all())  # the teachers stand beside each other


def test_many_dashes_do_not_make_a_huge_svg(tmp_path):
    outputs = teacher(num_classes=100, samples=400)
    drawing = minor_figure([measure_class_means(outputs, range(100))])
    write_drawing(drawing, tmp_path / "minor")
    assert (tmp_path / "minor.svg").stat().st_size < 400_000


def test_formulas_in_names_are_left_alone(tmp_path):
    names = [r"$\nothing{", "a$b$", "_c", "d", "e, f", "g"]
    outputs = teacher(r"$\frac{", names=names)
    drawing = major_figure([measure_class_means(outputs, range(6))])
    write_drawing(drawing, tmp_path / "names")
    assert r"$\nothing{" in (tmp_path / "names.svg").read_text()


# The loss


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_loss_curves_are_those_of_the_csv(convention):
    alphas = [0.0, 0.1, 0.3]
    drawing = smoothing_loss(alphas, convention, reach=5)
    table, minima = rows(drawing.tables[""]), rows(drawing.tables["minima"])
    (axes,) = drawing.figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) > 1]
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    for alpha, curve in zip(alphas, curves, strict=True):
        written = [float(r[f"loss_alpha_{alpha:g}"]) for r in table]
        np.testing.assert_allclose(curve.get_ydata(), written, rtol=1e-7)
        np.testing.assert_allclose(curve.get_xdata(), [float(r["margin"]) for r in table], atol=1e-7)
    assert (curves[0].get_color(), curves[0].get_linestyle()) == ("#1b1f24", ":")
    assert len({curve.get_linestyle() for curve in curves}) == 3
    drawn = [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points]
    written = [(float(r["margin"]), float(r["loss"])) for r in minima if r["alpha"] != "0"]
    np.testing.assert_allclose(drawn, written, rtol=1e-7)


# Which classes


def test_names_and_ids():
    names = ["cat", "tench, Tinca tinca", "3", "dog"]
    assert resolve_classes("dog,cat", names) == [3, 0]
    assert resolve_classes('dog, "tench, Tinca tinca",0', names) == [3, 1, 0]
    assert resolve_classes("3,0", names) == [2, 0]  # a name goes before an id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat,dgo", "no class is called 'dgo'; did you mean 'dog'?"),
        ("zebra", "no class is called 'zebra'; there are cat, dog, hen, or ids from 0"),
        ("3", "no class is called '3'; ids go from 0 to 2"),
        ("-1", "no class is called '-1'"),
        ("cat,0", "names a class twice"),
        ("", "no list of names"),
        ("cat,,dog", "no list of names"),
        ('"cat', "no list of names"),
    ],
)
def test_unknown_classes(text, words):
    with pytest.raises(LskdError) as caught:
        resolve_classes(text, ["cat", "dog", "hen"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_proposal_is_what_teachers_confuse_on_average():
    """The first teacher confuses 0 and 1 a little, the second 2 and 3 a lot."""
    logits = 8 * torch.eye(5)[torch.arange(50) % 5]
    first, second = logits.clone(), logits.clone()
    labels = torch.arange(50) % 5
    first[labels == 0, 1] += 4
    second[labels == 3, 2] += 7
    second[labels == 4, 2] += 3
    second[labels == 1, 3] += 2
    names = ["a", "b", "c", "d", "e"]
    teachers = [Outputs(n, x, labels, None, names) for n, x in (("one", first), ("two", second))]
    assert propose(teachers[:1])[0] == [0, 1, 2]
    found, reason = propose(teachers)
    assert found == [2, 3, 0]
    assert reason.startswith("c and d, which 2 teachers confuse most")
    assert "and a, which" in reason


def test_teachers_that_do_not_go_together():
    one = teacher("one")
    check_teachers([one, teacher("two", seed=1)])
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    check_teachers([one, Outputs("two", one.logits[shuffled], one.labels[shuffled])])
    for other, words in (
        (Outputs("two", one.logits, one.labels.roll(1) * 0), "different labels"),
        (Outputs("two", None, one.labels), "two: neither logits nor templates"),
    ):
        with pytest.raises(LskdError, match=words):
            check_teachers([one, other])
    named = [teacher(n, names=list(classes)) for n, classes in (("one", "abcdef"), ("two", "abcdfe"))]
    with pytest.raises(LskdError, match="different names"):
        check_teachers(named)
    assert class_names(one) == ["0", "1", "2", "3", "4", "5"]
