"""What runs cost, how large their networks are, and in which classes accuracy changed."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lskd_study.claims import claims_of, settings_of
from lskd_study.claims.by_class import class_changes
from lskd_study.pages.costs import costs_csv, costs_of
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import JOB
from lskd_study.results.read import read_results
from lskd_study.results.results import Failure
from lskd_study.stats.intervals import crossed_interval
from lskd_study.trainers import trainer_of
from simulated import World, of_kind, simulate

pytestmark = pytest.mark.unit
LOGGED = [(0, " 1", 11), (0, "18", 800), (1, " 1", 12), (1, "18", 1000)]  # epoch, step, images/s


def record(plan, run, **more):
    path = plan.folder(run) / JOB
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def test_a_kind_of_run_costs_the_mean_of_its_runs(fake_study):
    plan = fake_study(students=[("small", "student.yaml")])
    first, second, third = [run for run in plan.runs if run.role == "teacher" and not run.smoothing]
    size = {"parameters": 11_689_512, "operations": 3_628_000_000, "binary": 10_000_000}
    sized = [("11.7 M, 10 M of 1 bit", 11_689_512), ("3.63 G", 3_628_000_000)]
    for run, seconds in ((first, 10.0), (second, 20.0), (third, 60.0)):
        record(plan, run, wall_time_s=seconds, size=size)
    lines = (f"epoch {n} [{at}/18]  loss 1  lr 1.0e-02  {rate} images/s" for n, at, rate in LOGGED)
    (plan.folder(first) / "train.log").write_text("\n".join(lines))
    (plan.folder(second) / "train.log").write_text("nothing of that kind")
    cost, *others = costs_of(read_results(plan))
    assert cost.name == "teacher big, α = 0"
    assert cost.cells() == ["Teacher big, α = 0", "3", ("30 s", 30), ("1.5 min", 90), "1,000", *sized]
    assert [other.cells()[4:] for other in others] == [["–", ("–", ""), ("–", "")]] * 3
    row, *_ = csv.DictReader(io.StringIO(costs_csv([cost, *others])))
    assert float(row["parameters"]) == 11_689_512
    assert costs_csv(others).splitlines()[1].endswith(",,,,")
    record(plan, first, wall_time_s=10.0, size={**size, "file_bytes": 1_400_000, "image_ms": 7.123})
    cost, *others = costs_of(read_results(plan))
    assert cost.deployed() == [("1.4 MB", 1_400_000), ("7.12 ms", 7.123)]
    assert others[0].deployed() == [("–", "")] * 2
    write_report(plan)
    html = (plan.root / "index.html").read_text()
    costs = html.split('id="costs"')[1]
    assert all(text in costs for text in ("11.7 M", "7.12 ms", "One image"))


def test_the_size_is_that_of_the_network_that_was_trained(scene):
    timm = pytest.importorskip("timm")
    plan = scene.plan()
    run = plan.runs[0]
    found = trainer_of(plan.ecosystem, "teacher").size(plan, run)
    model = timm.create_model(run.model, num_classes=plan.num_classes)
    assert found.parameters == sum(weights.numel() for weights in model.parameters())
    assert found.operations > found.parameters


# By class


def of_one_class(plan, gain, seed=1):
    """A study in which smoothing changes the second of eight classes alone."""
    results = simulate(plan, World(per_class=200), 0)
    labels = np.repeat(np.arange(8), 50)
    keys = [f"val/class {label}/{i}" for i, label in enumerate(labels)]
    rng, finished = np.random.default_rng(seed), {}
    for name, one in results.finished.items():
        share = np.where(labels == 1, 0.5 + gain * (one.run.smoothing > 0), 0.5)
        correct = (rng.random(400) < share).astype(float)
        finished[name] = replace(one, labels=labels, keys=keys, correct=correct)
    return replace(results, finished=finished)


def changes(results):
    claim = claims_of(results.plan)[0]
    return class_changes(results, claim, settings_of(claim, results.plan)[0])


def test_the_class_that_changed_comes_first_and_no_other_is_clear(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[0, 1, 2, 3, 4])
    found = changes(of_one_class(plan, 0.45))
    assert (found.classes, found.clear) == (8, 1)
    first, *others = found.largest
    assert (first.name, first.images) == ("class 1", 50)
    assert first.interval.estimate == pytest.approx(first.after - first.before)
    assert first.adjusted_p < 0.05 < min(other.adjusted_p for other in others)
    assert changes(of_one_class(plan, -0.45)).largest[0].interval.high < 0


def by_hand(results):
    """Every class of two images or more: name, images, accuracies, interval and p by Holm's steps."""
    found, labels = [], next(iter(results.finished.values())).labels
    models = sorted({one.run.model for one in of_kind(results, role="student")})
    for label in np.unique(labels):
        own = labels == label
        arms = [
            np.mean(
                [
                    [one.correct[own] for one in of_kind(results, role="student", model=m, smoothing=a)]
                    for m in models
                ],
                axis=0,
            )
            for a in (0.0, 0.1)
        ]
        if own.sum() >= 2:
            interval = crossed_interval(arms[1] - arms[0], bounded=len(models) == 1).scaled(100)
            found.append([f"class {label}", own.sum(), *(100 * arm.mean() for arm in arms), interval])
    by_p = sorted((one for one in found if one[4].known), key=lambda one: one[4].p_value)
    largest = 0.0
    for place, one in enumerate(by_p):
        largest = max(largest, min((len(by_p) - place) * one[4].p_value, 1))
        one.append(largest)
    changed = [one if one[4].known else [*one, math.nan] for one in found]
    return sorted(changed, key=lambda one: (np.nan_to_num(one[5], nan=1), -abs(one[4].estimate)))


@pytest.mark.parametrize("models", ["s", "st"])
def test_classes_are_those_of_a_comparison_by_hand(plan_of, tmp_path, models):
    """Twelve that differ, one that changed everywhere alike, one of one image, one that nobody saw."""
    plan = plan_of(tmp_path, students=[(model, "student.yaml") for model in models], seeds=list(range(5)))
    labels = np.repeat([*range(13), 13, 15], [2, *[40] * 11, 30, 1, 2])
    rng, results = np.random.default_rng(6), simulate(plan, World(), 0)
    gains, order = np.linspace(-0.5, 0.5, 16) * (np.arange(16) % 2), rng.permutation(len(labels))
    labels = labels[order]
    for name, one in results.finished.items():
        smoothed = one.run.smoothing > 0
        correct = (rng.random(len(labels)) < 0.5 + gains[labels] * smoothed).astype(float)
        correct[labels == 12] = float(smoothed)
        keys = [f"val/class {label}/{i}" for i, label in enumerate(labels)]
        results.finished[name] = replace(one, labels=labels, keys=keys, correct=correct)
    expected, found = by_hand(results), changes(results)
    assert (found.classes, len(found.largest)) == (len(expected), 10) == (14, 10)
    assert found.clear == sum(one[5] < 0.05 for one in expected) > 2
    for own, (name, images, before, after, interval, p) in zip(found.largest, expected, strict=False):
        assert (own.name, own.images, own.interval.method) == (name, images, interval.method)
        numbers = own.before, own.after, own.adjusted_p, own.interval.low, own.interval.high
        assert numbers == pytest.approx((before, after, p, interval.low, interval.high), nan_ok=True)
    nameless = {n: replace(one, keys=list(map(str, labels))) for n, one in results.finished.items()}
    names = [one.name for one in changes(replace(results, finished=nameless)).largest]
    assert names == [one.name.removeprefix("class ") for one in found.largest]


def test_where_nothing_changed_hardly_any_class_did(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")])
    clear = [changes(of_one_class(plan, 0.0, seed)).clear > 0 for seed in range(40)]
    assert sum(clear) <= stats.binom.ppf(0.999, 40, 0.05)  # 5 % are due


def test_one_seed_and_failed_runs_show_no_classes(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[0])
    assert changes(of_one_class(plan, 0.4)) is None
    results = of_one_class(plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[0, 1]), 0.4)
    assert changes(results).classes == 8
    lost = next(one.run for one in of_kind(results, role="student"))
    del results.finished[lost.id]
    assert changes(replace(results)) is None
    three = of_one_class(plan_of(tmp_path, students=[("s", "student.yaml")]), 0.4)
    del three.finished[lost.id]
    assert changes(replace(three)).classes == 8
    assert changes(replace(three, failed={lost.id: Failure(lost, {"failed": "its loss"})})) is None
    for one in three.finished.values():
        one.correct[:] = 1.0
    assert changes(replace(three)) is None  # no class changed


def test_the_page_says_that_classes_are_exploration(fake_study):
    plan = fake_study(effect=2.0)
    write_report(plan)
    section = (plan.root / "index.html").read_text().split('id="classes"')[1].split("</section>")[0]
    assert "Exploration, no claim" in section
    assert re.search(r"of 4 classes, (none|\d) of them with p below 0\.05", section)
