"""Several students for one seed of their teacher: their runs, and that the teacher's seed stays the unit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lskd_study.claims import judge
from lskd_study.claims.outlook import after, prospect, seconds_a_seed
from lskd_study.export.choice import best_student, named
from lskd_study.pages.paper_tables import published_table
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import expand
from lskd_study.plan.recipes import Recipe, runs_and_data
from lskd_study.results.read import read_results
from lskd_study.stats.intervals import Interval, Part, crossed_interval, crossed_moments
from lskd_study.stats.power import Variances
from lskd_study.stores.decide import with_stores
from lskd_study.study.engine import make_plan
from lskd_study.trainers import trainer_of
from simulated import half_width, of_kind, rows

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PUBLISHED = {"student": "small", "smoothing": 0.0, "temperature": 1.0, "hard_weight": 0.0, "top1": 70.0}
MATRIX = ([0.0, 0.1], [0, 3], [("big", "t")], [("small", "s")], [1.0, 4.0], [0.0])


# The runs


def test_one_student_is_what_it_was_and_more_have_names_and_seeds_of_their_own(plan_of, tmp_path):
    one, three = expand(*MATRIX, ["hard"]), expand(*MATRIX, ["hard"], student_seeds=3)
    assert [run for run in three if not run.repeat] == one
    assert len({run.id for run in three}) == len(three) == 4 + 3 * (len(one) - 4)
    assert {run.repeat for run in three if run.role == "teacher"} == {0}
    last = next(run for run in three if run.role == "student" and run.seed == 2_000_003)
    assert last.id == "student-small-of-big-smoothing0-T1-hard0-seed3-student2"
    assert (last.study_seed, last.teacher) == (3, "teacher-big-smoothing0-seed3")
    # A control has a student of its own seed beside it, in every one of them.
    seeds = [sorted({run.seed for run in three if run.role == role}) for role in ("student", "control")]
    assert seeds[0] == seeds[1] == [0, 3, 1_000_000, 1_000_003, 2_000_000, 2_000_003]
    before, later = plan_of(tmp_path), plan_of(tmp_path, student_seeds=2)
    assert [later.settings(run) for run in before.runs] == [before.settings(run) for run in before.runs]
    assert "repeat" not in before.settings(before.runs[-1])


@pytest.mark.parametrize(
    ("ecosystem", "recipe", "word"),
    [
        ("timm", "digits", "--seed 1000001"),
        ("mmcls", "digits_bnn", "randomness.seed=1000001"),
        ("fairseq", "number_words_de_en", "common.seed=1000001"),
    ],
)
def test_each_trainer_gets_the_students_own_seed(monkeypatch, ecosystem, recipe, word):
    monkeypatch.chdir(ROOT)
    plan = make_plan(f"recipes/{recipe}/study.yaml", None)
    student = next(run for run in plan.runs if run.role == "student" and run.seed == 1)
    second = dataclasses.replace(student, seed=1_000_001, repeat=1, id=f"{student.id}-student1")
    plan = dataclasses.replace(plan, runs=[*plan.runs, second])
    command = " ".join(trainer_of(ecosystem, "student").command(plan, second))
    assert word in command
    assert f"{student.teacher}/" in command


def test_students_of_another_seed_see_other_images_and_read_a_store_of_their_own(scene):
    plan = with_stores(scene.plan(student_seeds=2, temperatures=[1, 2], soft_labels={"mode": "always"}))
    students = [run for run in plan.runs if run.role == "student"]
    assert len(plan.stores) == 4  # two teachers, two seeds of students
    for store in plan.stores:
        own = [plan.by_id[name] for name in store.students]
        assert {(run.teacher, run.seed) for run in own} == {(store.teacher, store.seed)}
    assert sum(len(store.students) for store in plan.stores) == len(students) == 8
    notes = with_stores(scene.plan(student_seeds=2)).store_notes
    assert notes == ["test_byobnet: each teacher has one student of a seed"]


def test_what_cannot_be_is_one_line_and_the_dry_run_counts_them(scene):
    scene.write(student_seeds=3, controls=["hard"])
    out = scene.run("study", "study.yaml", "--dry-run")
    assert "3 students of each kind for one seed of their teacher" in out
    assert "11 runs: 0 finished, 11 to do" in out
    assert runs_and_data(Recipe("own", scene.folder / "study.yaml", "study", "timm"))[0] == "11"
    for changes, message in (
        ({"student_seeds": 0}, "student_seeds: input should be greater than or equal to 1 (given: 0)"),
        ({"student_seeds": 1.5}, "student_seeds: input should be a valid integer"),
        ({"student_seeds": 2, "controls": [], "students": []}, "student_seeds: they are of students, and"),
        ({"student_seeds": 2, "seeds": [0, 10**6]}, "seeds: with student_seeds they must be below 1,000,000"),
    ):
        scene.write(**changes)
        assert message in scene.refused("study", "study.yaml", "--dry-run")


# What they tell


def values(results, smoothing):
    """Whether each image is right, ``(seeds, students, images)``, mean over networks."""
    found = of_kind(results, role="student", smoothing=smoothing)
    models = sorted({one.run.model for one in found})
    return np.mean(
        [
            [
                [
                    next(
                        one.correct
                        for one in found
                        if (one.run.model, one.run.study_seed, one.run.repeat) == (model, seed, repeat)
                    )
                    for repeat in range(results.plan.student_seeds)
                ]
                for seed in results.plan.seeds
            ]
            for model in models
        ],
        axis=0,
    )


def test_students_of_a_teacher_are_averaged_before_seeds_are_compared(fake_study):
    plan = fake_study(student_seeds=3, controls=["hard"], effect=0.2, per_class=20)
    results = read_results(plan)
    table = 100 * (values(results, 0.1) - values(results, 0.0))
    expected = crossed_interval(table.mean(1))
    headline = judge(results)[0]
    found = headline.interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.seeds, found.students, headline.runs) == (3, 3, 2 * 2 * 3 * 3)
    # A one-way layout spelled out: students within teachers.
    means = table.mean(-1)
    within = sum((means[s, k] - means[s].mean()) ** 2 for s in range(3) for k in range(3)) / (3 * 2)
    assert found.by_student == pytest.approx(Part(within / 9, 6))
    assert seconds_a_seed(results) == pytest.approx(12.3 * len(plan.runs) / 3)

    write_report(plan)
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert (record["student_seeds"], record["findings"][0]["students"]) == (3, 3)
    assert record["findings"][0]["by_student"] == pytest.approx([within / 9, 6])
    table_csv = rows(plan.root / "table.csv")
    assert {row["seeds"] for row in table_csv} == {"3"}
    top1 = 100 * np.mean(
        [one.correct for one in of_kind(results, model="small", smoothing=0.1, role="student")]
    )
    row = next(row for row in table_csv if (row["student"], row["smoothing"]) == ("small", "0.1"))
    assert float(row["student_top1_mean"]) == pytest.approx(top1)
    runs = rows(plan.root / "runs.csv")
    assert len(runs) == len(plan.runs)
    for row in (*runs, *rows(plan.root / "figures" / "curves.csv")):
        assert int(row["study_seed"]) == plan.by_id[row["run"]].study_seed == int(row["seed"]) % 1_000_000
    costs = {row["kind"]: row["runs"] for row in rows(plan.root / "costs.csv")}
    assert costs["teacher big, α = 0"] == "3"
    assert costs["student small of big, α = 0"] == costs["control small, labels’ α = 0"] == "9"
    page = (plan.root / "index.html").read_text()
    assert "3 seeds with 3 runs of each student, 2 students" in page
    agreement = [m for m in record["measures"] if (m["measure"], m["kind"]) == ("agreement", "value")]
    assert [one["seeds"] for one in agreement] == [3, 3]


def test_a_seed_counts_when_all_its_students_are_there_and_one_that_failed_takes_the_verdict(
    fake_study, fail
):
    plan = fake_study(student_seeds=2, per_class=6)
    student = next(run for run in plan.runs if run.role == "student" and run.repeat)
    (plan.folder(student) / "job.json").rename(plan.folder(student) / "job")
    results = read_results(plan)
    headline = judge(results)[0]
    assert headline.note == "without seed 0: runs are missing"
    assert headline.interval.seeds == 2
    (plan.folder(student) / "job").rename(plan.folder(student) / "job.json")
    other = next(run for run in plan.runs if run.id == student.id.removesuffix("-student1"))
    for run in (student, other):
        fail(plan, run, "the loss is not finite in epoch 1")
    assert judge(read_results(plan))[0].verdict == "no verdict"
    # Both are of one seed, and what the others of that kind took is known.
    third = next(run for run in plan.runs if (run.model, run.role, run.repeat) == ("big", "student", 1))
    fail(plan, third, "the loss is not finite in epoch 1")
    write_report(plan)
    failed = {(row["student"], row["smoothing"]): row["failed"] for row in rows(plan.root / "table.csv")}
    assert failed == {("small", "0.0"): "1", ("big", "0.0"): "1", ("small", "0.1"): "0", ("big", "0.1"): "0"}
    assert "1 failed" in (plan.root / "table.md").read_text()
    assert "2 failed" not in (plan.root / "table.md").read_text()
    costs = {row["kind"]: row["runs"] for row in rows(plan.root / "costs.csv")}
    assert (costs["student small of big, α = 0"], costs["student big of big, α = 0"]) == ("4", "5")
    paper = {**PUBLISHED, "teacher": "big"}
    named = dataclasses.replace(plan, published={"source": "Others", "figures": [paper]})
    (line,) = published_table(read_results(named)).parts[0].lines
    assert line.accuracies[0].measured.failed == 1


def test_one_run_is_exported_not_a_mean(fake_study):
    results = read_results(fake_study(student_seeds=3, per_class=6))
    chosen = best_student(results)
    kind = [
        one
        for one in results.finished.values()
        if one.run.id in {r.run.id for m in chosen.seeds.values() for r in m.each}
    ]
    assert len(kind) == 9
    assert chosen.result.value("top1") == np.median([one.value("top1") for one in kind])
    assert chosen.result is results.finished[chosen.run.id]
    assert named(results.plan, kind[-1].run).run == kind[-1].run


def test_translations_of_several_students_are_averaged_too(translation_study):
    plan = translation_study(student_seeds=2, sentences=60)
    results = read_results(plan)
    headline = judge(results)[0]
    assert headline.interval.students == 2
    scores = {
        alpha: [
            np.mean(
                [
                    one.value("bleu")
                    for one in results.finished.values()
                    if (one.run.role, one.run.smoothing, one.run.study_seed) == ("student", alpha, seed)
                ]
            )
            for seed in plan.seeds
        ]
        for alpha in plan.smoothing
    }
    assert headline.interval.estimate == pytest.approx(np.mean(np.subtract(scores[0.1], scores[0.0])))
    write_report(plan)
    assert len({row["seed"] for row in rows(plan.root / "bootstrap.csv") if row["role"] == "student"}) == 6


# Whether it may be trusted


def differences(seeds, students, by_teacher, by_student, by_sample, trials=1500, samples=100, noise=1.0):
    """Differences of simulated studies ``(trials, seeds, students, samples)`` whose truth is 0."""
    rng = np.random.default_rng([7, seeds, students])
    parts = [
        by_teacher * rng.standard_normal((trials, seeds, 1, 1)),
        by_student * rng.standard_normal((trials, seeds, students, 1)),
        by_sample * rng.standard_normal((trials, 1, 1, samples)),
        noise * rng.standard_normal((trials, seeds, students, samples)),
    ]
    return sum(parts)


MIXES = {
    "teachers": (0.3, 0.1, 0.3),
    "alike": (0.3, 0.3, 0.3),
    "students": (0.0, 0.4, 0.3),
    "samples": (0.05, 0.05, 2.0),
}


def covers_and_width(tables):
    """How often intervals of tables ``(trials, seeds, samples)`` contain 0, and half of their width."""
    seeds, samples = tables.shape[1:]
    moments = crossed_moments(tables)
    half = half_width(moments.seed_variance, moments.sample_variance, seeds - 1, samples - 1)
    return (np.abs(moments.mean) <= half).mean(), np.sqrt(np.mean(half**2))


@pytest.mark.parametrize("mix", MIXES)
def test_coverage_is_kept_and_what_the_width_gains(mix):
    """`pytest -s` prints the table of docs/study.md."""
    for seeds in (3, 5, 10):
        _, plain = covers_and_width(differences(seeds, 4, *MIXES[mix])[:, :, 0])
        for students in (2, 4):
            tables = differences(seeds, students, *MIXES[mix])
            coverage, width = covers_and_width(tables.mean(2))
            print(f"{mix:9} {seeds:2} seeds, {students} students: {coverage:.3f}, width {width / plain:.2f}")
            assert 0.93 <= coverage <= 0.97
            assert width < 1.02 * plain
    if mix == "teachers":  # to take every student for a seed is what this rule is not
        wrong, _ = covers_and_width(differences(5, 4, *MIXES[mix]).reshape(1500, 20, 100))
        assert wrong < 0.85


def test_the_width_promised_for_more_students_is_the_width_that_comes():
    promised = []
    for table in differences(6, 2, *MIXES["alike"], trials=400):
        found = crossed_interval(table.mean(1)).of_students(table.mean(-1))
        own = Variances.of(found.seeds, found.parts, found.students, found.by_student)
        promised.append(own.with_students(8).half_width(6))
        assert own.with_students(2).half_width(6) == pytest.approx(own.half_width(6))
    _, came = covers_and_width(differences(6, 8, *MIXES["alike"], trials=400).mean(2))
    # A teacher's part below zero counts as none, so a little too much is promised at times.
    assert np.sqrt(np.mean(np.square(promised))) == pytest.approx(came, rel=0.06)


def test_more_students_are_named_where_most_of_what_seeds_vary_is_theirs(fake_study):
    finding = judge(read_results(fake_study(student_seeds=2, per_class=6)))[0]
    for share, there in ((0.8, True), (0.2, False)):
        interval = Interval(*(0.1, -1.9, 2.1, 0.8, 5, 5000, ""), parts=(Part(0.5, 4), Part(1e-4, 4999)))
        interval = dataclasses.replace(interval, students=2, by_student=Part(share * 0.5, 5))
        found = dataclasses.replace(finding, interval=interval, verdict="cannot tell")
        assert bool(prospect(found).students) == there
        assert (
            "a new study with student_seeds: 4 would have about ±1.5 with 5 seeds" in after(found)
        ) == there


# Declared before


def test_what_was_declared_may_not_change_when_a_page_was_made(scene):
    plan = scene.plan()
    plan.root.mkdir()
    plan.write()
    scene.write(student_seeds=2)
    assert "6 to do" in scene.run("study", "study.yaml", "--dry-run")
    (plan.root / "verdicts.json").write_text("{}")
    line = scene.refused("study", "study.yaml", "--dry-run")
    assert "has a page that was made with student_seeds: 1, which may not change afterwards (now 2)" in line
    scene.write(student_seeds=1)
    assert scene.run("study", "study.yaml", "--dry-run")
