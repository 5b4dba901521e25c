"""The mean accuracy of the last epochs: its interval, what it is compared with, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from lskd import LskdError
from lskd_study.claims import judge
from lskd_study.export.choice import best_student, place, read_last_epochs
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report
from lskd_study.plan.plan import CURVES
from lskd_study.results.read import read_results
from lskd_study.stats.intervals import crossed_interval, crossed_moments
from lskd_study.trainers import trainer_of
from simulated import half_width, of_kind, rows

pytestmark = pytest.mark.unit


def with_curves(plan, rng, epochs=5):
    """Give every run a curve of its own."""
    for run in plan.runs:
        path = plan.folder(run) / CURVES
        found = rows(path)
        for row in found:
            row["val_top1"] = f"{70 + rng.standard_normal():.4f}"
        lines = [",".join(found[0]), *(",".join(row.values()) for row in found)]
        path.write_text("\n".join(lines) + "\n")
    return plan


def test_the_mean_of_the_curves_is_judged_with_the_images_of_the_last_epoch(fake_study):
    plan = with_curves(fake_study(per_class=20, controls=["hard"]), np.random.default_rng(1))
    plan = dataclasses.replace(plan, last_epochs=3)
    results = read_results(plan)
    table = []
    for seed in plan.seeds:
        arms = []
        for alpha in plan.smoothing:
            own = [one for one in of_kind(results, role="student", smoothing=alpha) if one.run.seed == seed]
            means = [
                float(np.mean([float(row["val_top1"]) for row in rows(plan.folder(one.run) / CURVES)[-3:]]))
                for one in own
            ]
            assert [one.top1 for one in own] == pytest.approx(means)
            arms.append(
                np.mean(
                    [
                        100 * (one.correct - one.correct.mean()) + mean
                        for one, mean in zip(own, means, strict=True)
                    ],
                    axis=0,
                )
            )
        table.append(arms[1] - arms[0])
    expected = crossed_interval(table)
    found = judge(results)[0].interval
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (expected.estimate, expected.low, expected.high)
    )
    of_last = judge(read_results(dataclasses.replace(plan, last_epochs=1)))[0].interval
    assert found.parts[1].variance == pytest.approx(of_last.parts[1].variance)
    assert found.estimate != pytest.approx(of_last.estimate)

    plan.write()
    write_report(plan)
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert (record["last_epochs"], record["findings"][0]["estimate"]) == (3, pytest.approx(found.estimate))
    page = (plan.root / "index.html").read_text()
    assert "Top-1, here and in every claim, is the mean of the last 3 epochs" in page
    assert "Top-1 is the mean of the last 3 epochs." in (plan.root / "table.md").read_text()
    mean = np.mean([one.top1 for one in of_kind(results, role="teacher", smoothing=0.0)])
    assert float(rows(plan.root / "table.csv")[0]["teacher_top1_mean"]) == pytest.approx(mean)


def test_an_export_says_that_its_number_is_of_the_last_epoch(fake_study):
    plan = with_curves(fake_study(per_class=3), np.random.default_rng(1))
    for last, there in ((1, False), (3, True)):
        dataclasses.replace(plan, last_epochs=last).write()
        found, _ = place(plan.root)
        chosen = best_student(read_last_epochs(found))
        score = 100 * chosen.result.correct.mean()
        assert f", {score:.2f} % top-1 accuracy" in chosen.because
        assert ("in the last epoch" in chosen.because) == there


def test_where_all_agree_the_rule_of_three_bounds_it_and_a_constant_is_no_sign_test(fake_study):
    plan = dataclasses.replace(fake_study(), last_epochs=3)
    results = read_results(plan)

    def found(of_smoothed):
        def right(one):
            judged = of_smoothed if one.run.smoothing else 1.0
            return dataclasses.replace(one, correct=np.ones_like(one.correct), judged=judged)

        all_right = {name: right(one) for name, one in results.finished.items()}
        return judge(dataclasses.replace(results, finished=all_right))[0].interval

    same = found(1.0)
    assert (same.method, same.low, same.high) == ("rule of three", pytest.approx(-1.25), pytest.approx(1.25))
    # Earlier epochs alone differ, by the same in every run: no image says anything of it.
    lower = found(0.5)
    assert lower.estimate == pytest.approx(-50)
    assert not lower.known


def test_teachers_alone_say_which_epochs_count(fake_study):
    plan = dataclasses.replace(
        with_curves(fake_study(students=[], per_class=20), np.random.default_rng(1)), last_epochs=3
    )
    write_teachers_report(plan)
    page = (plan.root / "index.html").read_text()
    assert "in every claim it is the mean of the last 3 epochs" in page
    write_teachers_report(dataclasses.replace(plan, last_epochs=1))
    assert "Top-1 is that of the last epoch" not in (plan.root / "index.html").read_text()


def test_an_epoch_without_accuracy_is_one_line(fake_study):
    plan = dataclasses.replace(with_curves(fake_study(per_class=3), np.random.default_rng(1)), last_epochs=3)
    path = plan.folder(plan.runs[0]) / CURVES
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], lines[-1]]) + "\n")
    with pytest.raises(LskdError, match="has not the accuracy of each of the last 3 epochs"):
        read_results(plan)


# Whether it may be trusted


def simulated(seeds, epochs, of_seed, of_epoch, drift, trials=1500, samples=100):
    """Differences ``(trials, seeds, samples)`` of the last epoch, and means over images of each epoch.

    The truth is 0. ``of_epoch``: what a single epoch of a run varies by; ``drift``: of each image from one
    epoch to the next, the same for all seeds.
    """
    rng = np.random.default_rng([3, seeds, epochs])
    image = 0.3 * rng.standard_normal((trials, 1, 1, samples))
    image = image + drift * rng.standard_normal((trials, epochs, 1, samples))
    run = of_seed * rng.standard_normal((trials, 1, seeds, 1))
    run = run + of_epoch * rng.standard_normal((trials, epochs, seeds, 1))
    table = image + run + rng.standard_normal((trials, 1, seeds, samples)) / 2
    table = table + rng.standard_normal((trials, epochs, seeds, samples)) / 2
    return table[:, -1], table.mean(-1)


def covers_and_width(tables):
    moments = crossed_moments(tables)
    seeds, samples = tables.shape[1:]
    half = half_width(moments.seed_variance, moments.sample_variance, seeds - 1, samples - 1)
    return (np.abs(moments.mean) <= half).mean(), np.sqrt(np.mean(half**2))


@pytest.mark.parametrize(("of_seed", "of_epoch"), [(0.4, 0.0), (0.283, 0.283), (0.126, 0.38)])
def test_coverage_is_kept_and_what_the_width_gains(of_seed, of_epoch):
    """`pytest -s` prints the table of docs/study.md."""
    for seeds in (3, 5, 10):
        for drift in (0.0, 0.3):
            last, by_epoch = simulated(seeds, 10, of_seed, of_epoch, drift)
            moved = last - last.mean(-1, keepdims=True) + by_epoch.mean(1)[..., None]
            coverage, width = covers_and_width(moved)
            _, plain = covers_and_width(last)
            own = f"{of_epoch} an epoch, {seeds:2} seeds, drift {drift}"
            print(f"{own}: {coverage:.3f}, width {width / plain:.2f}")
            assert 0.93 <= coverage <= (0.97 if not drift else 0.98)
            assert width < 1.01 * plain


# What is refused


@pytest.mark.parametrize(
    ("file", "last", "message"),
    [
        ("epochs: 4\n", 5, "study.yaml: last_epochs is 5, and s.yaml trains 4; lower it"),
        (
            "epochs: 9\nsched: step\ndecay_epochs: 4\n",
            2,
            "the rate in s.yaml steps down after 8; set it to 1 at most",
        ),
        (
            "epochs: 9\nsched: multistep\ndecay_milestones: [5, 8]\n",
            3,
            "of 9, and the rate in s.yaml steps down after 7; set it to 2",
        ),
        (
            "epochs: 9\nval_interval: 2\n",
            2,
            "s.yaml: last_epochs needs the accuracy of each epoch; remove val_interval",
        ),
    ],
)
def test_what_cannot_be_is_one_line(scene, file, last, message):
    for name in ("s.yaml", "t.yaml"):
        (scene.folder / name).write_text("epochs: 20\nbatch_size: 2\nwarmup_epochs: 0\n")
    (scene.folder / "s.yaml").write_text(f"{file}batch_size: 2\nwarmup_epochs: 0\n")
    scene.write(last_epochs=last)
    assert message in scene.refused("study", "study.yaml", "--dry-run")


def test_a_schedule_that_falls_all_the_time_and_the_last_step_are_allowed(scene):
    for name, text in (
        ("t.yaml", "epochs: 9\nwarmup_epochs: 3\n"),
        ("s.yaml", "epochs: 9\nsched: step\ndecay_epochs: 3\nwarmup_epochs: 0\n"),
    ):
        (scene.folder / name).write_text(f"{text}batch_size: 2\n")
    scene.write(last_epochs=3)
    assert "accuracy is the mean of the last 3 epochs; where the rate" in scene.run(
        "study", "study.yaml", "--dry-run"
    )
    scene.write(last_epochs=0)
    assert "last_epochs: input should be greater than or equal to 1" in scene.refused("study", "study.yaml")


def test_the_steps_of_each_framework(plan_of, tmp_path):
    plan = plan_of(tmp_path, ecosystem="mmcls")
    student = next(run for run in plan.runs if run.role == "student")
    schedules = [
        {"type": "LinearLR", "end": 3},
        {"type": "MultiStepLR", "milestones": [6, 8], "by_epoch": True},
        {"type": "StepLR", "step_size": 4},
        {"type": "MultiStepLR", "milestones": [600], "by_epoch": False},
    ]
    config = {"train_cfg": {"max_epochs": 10}, "param_scheduler": schedules}
    plan = dataclasses.replace(plan, configs=plan.configs | {student.config: config})
    assert trainer_of("mmcls", "student").decays(plan, student) == [4, 6, 8]
    config |= {"custom_hooks": [{"type": "CurvesHook"}, {"type": "TwoStepHook", "epochs": 5}]}
    assert trainer_of("mmcls", "student").decays(plan, student) == [4, 5, 6, 8]
