"""What runs cost, how large their networks are, and in which classes accuracy changed."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lskd_study.claims import claims_of, settings
from lskd_study.claims.by_class import class_changes
from lskd_study.pages.costs import costs_csv, costs_of
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import JOB
from lskd_study.results.read import read_results
from lskd_study.trainers import trainer_of
from simulated import World, simulate

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
    return class_changes(results, claims_of(results.plan)[0], settings(results)[0])


def test_the_class_that_changed_comes_first_and_no_other_is_clear(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[0, 1, 2, 3, 4])
    found = changes(of_one_class(plan, 0.45))
    assert (found.classes, found.clear) == (8, 1)
    first, *others = found.largest
    assert (first.name, first.images) == ("class 1", 50)
    assert first.interval.estimate == pytest.approx(first.after - first.before)
    assert first.adjusted_p < 0.05 < min(other.adjusted_p for other in others)
    assert changes(of_one_class(plan, -0.45)).largest[0].interval.high < 0


def test_where_nothing_changed_hardly_any_class_did(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")])
    clear = [changes(of_one_class(plan, 0.0, seed)).clear > 0 for seed in range(40)]
    assert sum(clear) <= stats.binom.ppf(0.999, 40, 0.05)  # 5 % are due


def test_one_seed_and_failed_runs_show_no_classes(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[0])
    assert changes(of_one_class(plan, 0.4)) is None


def test_the_page_says_that_classes_are_exploration(fake_study):
    plan = fake_study(effect=2.0)
    write_report(plan)
    section = (plan.root / "index.html").read_text().split('id="classes"')[1].split("</section>")[0]
    assert "Exploration, no claim" in section
    assert re.search(r"of 4 classes, (none|\d) of them with p below 0\.05", section)
