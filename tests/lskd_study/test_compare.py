import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import special

from lskd import LskdError, target_mass
from lskd.targets import chance_like_mass
from lskd_study.pages.teachers import stability_csv, stability_table
from lskd_study.paper.printed import load_tables
from lskd_study.plan.teacher_list import TeacherEntry, Tolerance
from lskd_study.teachers.compare import DEFINITIONS, QUANTITIES, RATIOS, compare, looks, measure
from lskd_study.teachers.outputs import Outputs
from lskd_study.teachers.report import advice, as_csv, as_json, print_comparison, reading

pytestmark = pytest.mark.unit

CLASSES, IMAGES = 6, 30


def outputs(name="teacher", seed=0, strength=3.0, shared=7, labels=None, **more):
    generator = np.random.default_rng(shared)
    labels = np.repeat(np.arange(CLASSES), IMAGES) if labels is None else labels
    logits = generator.normal(size=(len(labels), CLASSES))
    logits += 0.3 * np.random.default_rng(seed).normal(size=logits.shape)
    logits[np.arange(len(labels)), labels] += strength
    return Outputs(name, torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels), **more)


def measured(*several, **settings):
    return [measure(o, f"{o.name}.npz", influence=True, **settings) for o in several]


def test_values_against_their_definitions():
    o = outputs()
    (teacher,) = measured(o, temperatures=[1.0, 4.0])
    logits, labels = o.logits.double().numpy(), o.labels.numpy()
    p = special.softmax(logits, axis=1)
    own = p[np.arange(len(labels)), labels]
    assert teacher.value("top1") == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    order = np.argsort(-logits, axis=1)[:, :5]
    assert teacher.value("top5") == pytest.approx(100 * (order == labels[:, None]).any(1).mean())
    assert teacher.value("nll") == pytest.approx(-np.log(own).mean(), abs=1e-6)
    assert teacher.value("entropy") == pytest.approx(special.entr(p).sum(1).mean(), abs=1e-6)
    spread = [own[labels == c].std(ddof=1) for c in range(CLASSES)]
    assert teacher.value("target_std") == pytest.approx(np.mean(spread), abs=1e-6)
    one, four = teacher.masses
    at_four = special.softmax(logits / 4, axis=1)[np.arange(len(labels)), labels].mean()
    assert (one.measured, four.measured) == pytest.approx((own.mean(), at_four), abs=1e-6)
    assert four.ideal == pytest.approx(target_mass(CLASSES, 1 - own.mean(), 4), abs=1e-5)
    assert four.chance_like == (four.measured < chance_like_mass(CLASSES))


def test_a_temperature_that_leaves_hardly_more_than_chance_is_warned_of():
    cold, hot = (measured(outputs(), temperatures=[t])[0] for t in (1.0, 30.0))
    assert not [line for line in cold.warnings if "temperature" in line]
    assert [line for line in hot.warnings if "at temperature 30" in line and "lower temperature" in line]


def test_progress_adds_up():
    steps = []
    o = outputs()
    measure(o, "x", [1.0, 2.0, 3.0], influence=True, progress=steps.append)
    assert sum(steps) == looks(len(o.labels), [1.0, 2.0, 3.0], True)


def test_classes_that_cannot_count_are_named():
    labels = np.array([0] * 10 + [1] * 10 + [3] + [4] * 10)
    o = outputs(labels=labels, class_names=["ant", "bee", "cat", "dog", "eel", "fox"])
    (teacher,) = measured(o)
    assert any("without samples" in line and "cat, fox" in line for line in teacher.warnings)
    assert any("one sample" in line and "dog" in line for line in teacher.warnings)
    assert any("10 samples" in line and "not corrected" in line for line in teacher.warnings)
    found = json.loads(as_json(compare([teacher])))[0]
    assert found["classes_without_samples"] == [2, 5]
    assert found["classes_of_one_sample"] == [3]
    assert found["class_counts"] == [10, 10, 0, 1, 10, 0]


def test_small_classes_are_corrected_on_request():
    labels = np.repeat(np.arange(CLASSES), 4)
    plain, corrected = (
        measure(outputs(labels=labels), "x", small_class_correction=flag) for flag in (False, True)
    )
    assert corrected.value("target_std") == pytest.approx(plain.value("target_std") / 0.921318, rel=1e-5)
    assert corrected.value("vector_l2") == pytest.approx(plain.value("vector_l2") * (4 / 3) ** 0.5)
    assert corrected.value("between_target_std") < plain.value("between_target_std")
    assert any("(corrected)" in line for line in corrected.warnings)


def test_differences_are_later_less_earlier_in_points_or_a_ratio():
    weak, strong = measured(outputs("weak", strength=1.0), outputs("strong", strength=3.0, seed=1))
    comparison = compare([weak, strong], replicates=400)
    estimates = comparison.differences[0, 1]
    assert list(estimates) == [*QUANTITIES, *DEFINITIONS]
    for name, e in estimates.items():
        before, after = weak.value(name), strong.value(name)
        assert e.value == pytest.approx(after / before if name in RATIOS else after - before)
    gain = estimates["top1"]
    assert gain.low > 5
    assert gain.low < gain.value < gain.high
    assert gain.p_value < 0.01


def test_samples_in_another_order_are_matched_by_their_keys():
    keys = [f"val/{i}.png" for i in range(CLASSES * IMAGES)]
    one, two = outputs("one", keys=keys), outputs("two", seed=1, strength=2.5, keys=keys)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(keys)))
    shuffled = Outputs("two", two.logits[order], two.labels[order], [keys[i] for i in order])
    straight, matched = (compare(measured(one, other), 300) for other in (two, shuffled))
    for name, e in straight.differences[0, 1].items():
        other = matched.differences[0, 1][name]
        assert (other.value, other.low, other.high) == pytest.approx(
            (e.value, e.low, e.high), abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize("kind", ["labels", "samples", "keys"])
def test_no_differences_between_other_samples(kind):
    keys = [f"a{i}" for i in range(CLASSES * IMAGES)]
    one = outputs("one", keys=keys)
    other = {
        "labels": {"labels": np.roll(one.labels.numpy(), 1)},
        "samples": {"labels": one.labels.numpy()[:-1]},
        "keys": {"keys": ["another", *keys[1:]]},
    }[kind]
    comparison = compare(measured(one, outputs("two", seed=1, **other)), 100)
    assert not comparison.differences
    assert "not measured on the same samples" in comparison.warnings[0]
    assert json.loads(as_json(comparison))[1]["differences"] == []


@pytest.mark.parametrize(
    ("sizes", "without"),
    [
        ([2] * 6, {"target_std", "vector_l2"}),  # two samples say nothing about how much they vary
        ([2] * 3 + [20] * 3, {"target_std", "vector_l2"}),
        ([1] * 3 + [20] * 3, {"between_vector_l2", "between_target_std"}),
        ([20] * 6, set()),
    ],
)
def test_no_interval_from_classes_that_show_no_error(sizes, without):
    labels = np.repeat(np.arange(CLASSES), sizes)
    pair = [outputs("a", labels=labels, strength=1.0), outputs("b", 1, labels=labels, strength=3.0)]
    comparison = compare(measured(*pair), 200)
    estimates = comparison.differences[0, 1]
    for name in without:
        assert np.isnan(estimates[name].low), name
        assert np.isnan(estimates[name].p_value)
        assert "too few samples" in estimates[name].note
        assert estimates[name].note in as_csv(comparison)
    known = {"target_std", "vector_l2"} - without
    assert all(estimates[name].low < estimates[name].high for name in known)
    assert "NaN" not in as_json(comparison)


def test_top5_of_five_classes_is_no_measure():
    labels = np.arange(60) % 5
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 60, 5)))
    pair = [Outputs(name, logits[i], torch.from_numpy(labels)) for i, name in enumerate("ab")]
    assert "top5" not in compare(measured(*pair), 100).differences[0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named_by_teacher_and_sample(bad):
    o = outputs("broken")
    o.logits[17, 3] = bad
    with pytest.raises(LskdError, match=r"broken: .*sample 17\b") as caught:
        measure(o, "x")
    assert "\n" not in str(caught.value)


def test_outputs_without_logits():
    with pytest.raises(LskdError, match="has no logits"):
        measure(Outputs("features", None, torch.tensor([0, 1])), "x")


def test_json_has_an_object_for_each_teacher():
    comparison = compare(measured(outputs("a"), outputs("b", 1)), 200)
    found = json.loads(as_json(comparison))
    assert [teacher["name"] for teacher in found] == ["a", "b"]
    for teacher, object_ in zip(comparison.teachers, found, strict=True):
        assert object_["top1"] == pytest.approx(teacher.value("top1"))
        assert set(object_["one_minus_stability"]) == set(DEFINITIONS)
        for name, value in object_["one_minus_stability"].items():
            assert value == pytest.approx(teacher.value(name))
        assert {"top5", "nll", "ece", "entropy", "calibrated", "equivalent_smoothing"} <= set(object_)
    assert found[0]["differences"] == []
    assert {d["quantity"] for d in found[1]["differences"]} == {*QUANTITIES, *DEFINITIONS}
    assert all(d["from"] == "a" for d in found[1]["differences"])


def test_nothing_that_is_not_json_where_a_definition_has_no_value():
    o = outputs(labels=np.zeros(5, dtype=np.int64))
    text = as_json(compare([measure(o, "x")]))
    assert "NaN" not in text
    assert json.loads(text)[0]["one_minus_stability"]["between_target_std"] is None


def test_csv_has_every_value_and_difference():
    comparison = compare(measured(outputs("a|b"), outputs("c", 1)), 200)
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    values = {(r["teacher"], r["compared_with"], r["quantity"]): r for r in rows}
    assert len(values) == len(rows)
    assert float(values["c", "", "nll"]["value"]) == pytest.approx(comparison.teachers[1].value("nll"))
    e = comparison.differences[0, 1]["nll"]
    row = values["c", "a|b", "nll"]
    assert [float(row[k]) for k in ("value", "low", "high")] == pytest.approx([e.value, e.low, e.high])


def test_terminal_shows_every_value_and_warning():
    comparison = compare(measured(outputs("a"), outputs("b", 1), temperatures=[1.0, 50.0]), 200)
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=160))
    text = stream.getvalue()
    for label in (
        *QUANTITIES.values(),
        *DEFINITIONS.values(),
        "equivalent",
        "warning: b: at temperature 50",
        "is one training run",
    ):
        assert label.replace("equivalent", "smoothing it looks trained with") in text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_most_accurate_is_named_only_where_it_is_no_chance(order):
    pair = [outputs("weak", strength=1.0), outputs("strong", strength=3.0, seed=1)]
    (line,) = reading(compare(measured(*(pair[i] for i in order)), 400))
    assert line.startswith("most accurate: strong")
    assert "above weak" in line
    low, high = (float(x) for x in line.rsplit("interval ", 1)[1].rstrip(")").split(" to "))
    assert 5 < low < high
    close = [outputs("one", strength=3.0), outputs("two", strength=3.0, seed=1)]
    (line,) = reading(compare(measured(*(close[i] for i in order)), 400))
    assert line.startswith("no teacher is clearly the most accurate")


@pytest.mark.filterwarnings("error")
def test_of_a_teacher_that_is_sure_of_everything_there_is_no_ratio():
    (tame, sure) = (outputs(name, strength=s) for name, s in (("tame", 3.0), ("sure", 1e4)))
    found = compare(measured(tame, sure), 100).differences[0, 1]["dark_knowledge"]
    assert np.isnan([found.value, found.low, found.high]).all()
    assert "no value" in found.note


def advised(*teachers):
    return advice(compare(measured(*teachers), 400)).sentence


def test_a_teacher_is_recommended_where_it_is_above_every_other():
    strong = outputs("strong", strength=3.0, seed=1)
    weak = [outputs(name, strength=1.0, seed=seed) for name, seed in (("weak", 0), ("weaker", 2))]
    assert advised(weak[0], strong, weak[1]) == "Distil from strong, the most accurate of 3."
    assert advised(weak[0], strong) == "Distil from strong, the more accurate."
    close = outputs("close", strength=3.0)
    said = advised(weak[0], strong, close)
    assert re.fullmatch(r"(strong or close|close or strong) will do: which .* cannot be told\.", said)


def test_one_teacher_is_said_to_be_what_it_is_and_guessing_is_no_teacher():
    assert re.match(
        r"only is right on \d\d\.\d\d %; to choose takes another", advised(outputs("only", strength=3.0))
    )
    assert re.match(
        r"Distil from none: guess is right on .*no better than guess", advised(outputs("guess", strength=0.0))
    )


# The paper's tables


def entry(name, network="ResNet-18", smoothing=0.0, **more):
    return TeacherEntry(name=name, logits=f"{name}.npz", network=network, smoothing=smoothing, **more)


def test_papers_figures_stand_beside_the_measured_ones():
    teachers = measured(outputs("plain"), outputs("smooth", 1, 2.0), outputs("mine", 2))
    entries = [entry("plain"), entry("smooth", smoothing=0.1), entry("mine", None, None)]
    comparison = compare(teachers, 200)
    for name, definition in (("Table 1", "target_std"), ("Table 10", "between_target_std")):
        table = stability_table(name, comparison, entries)
        row = load_tables()[name].row("ResNet-18")
        plain, smooth, mine = table.lines
        assert plain.measured.instability == pytest.approx(teachers[0].value(definition))
        assert plain.paper == (
            row.number("top1_without"),
            row.number("top5_without"),
            row.number("instability_without"),
        )
        assert smooth.paper.instability == row.number("instability_with")
        assert all(np.isnan(mine.paper))
        values = [(t.value("top1"), t.value(definition)) for t in teachers]
        assert table.correlation.n == 3
        assert table.correlation.pearson == pytest.approx(np.corrcoef(np.transpose(values))[0, 1])
        (change,) = table.changes
        e = comparison.differences[0, 1][definition]
        assert (change.measured.value, change.paper) == (e.value, row.number("delta"))
        rows = list(csv.DictReader(io.StringIO(stability_csv(table))))
        assert float(rows[0]["paper_one_minus_s"]) == row.number("instability_without")
        assert rows[2]["paper_one_minus_s"] == ""


def test_change_starts_from_the_teacher_without_smoothing_whatever_the_order():
    smooth, plain = outputs("smooth", 1, 2.0), outputs("plain")
    entries = [entry("plain"), entry("smooth", smoothing=0.1)]
    forward, backward = (
        stability_table("Table 1", compare(measured(*several), 300), of_each).changes[0]
        for several, of_each in (((plain, smooth), entries), ((smooth, plain), entries[::-1]))
    )
    assert (backward.without, backward.with_) == (forward.without, forward.with_) == ("plain", "smooth")
    assert backward.measured.value == pytest.approx(forward.measured.value)
    assert backward.measured.low == pytest.approx(forward.measured.low, abs=1e-3)
    assert backward.measured.low < backward.measured.value < backward.measured.high


@pytest.mark.parametrize(("off", "verdict"), [(0.0004, True), (0.0006, False)])
def test_reproduced_within_the_tolerance(monkeypatch, off, verdict):
    row = load_tables()["Table 1"].row("ResNet-18")
    printed = {"top1": "top1_without", "top5": "top5_without", "target_std": "instability_without"}
    (teacher,) = measured(outputs("public"))
    monkeypatch.setattr(
        type(teacher),
        "value",
        lambda self, quantity: row.number(printed[quantity]) + (off if quantity == "target_std" else 0),
    )
    entries = [entry("public", tolerance=Tolerance(accuracy=0.05, one_minus_s=0.0005))]
    assert stability_table("Table 1", compare([teacher]), entries).lines[0].reproduced is verdict
