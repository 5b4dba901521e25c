"""Students without a teacher: their runs, commands, results, claims and what the page shows of them."""

import csv
import json
import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from lskd_study.claims import judge, number_of_tests
from lskd_study.claims.outlook import claims_planned
from lskd_study.claims.statements import claims_of, settings_of
from lskd_study.drawing.curves import student_kinds
from lskd_study.pages import page
from lskd_study.pages.notices import at_ceiling, notices_of
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import Run, expand
from lskd_study.plan.recipes import find_recipe, runs_and_data
from lskd_study.results.read import read_results
from lskd_study.results.results import kind_name, kind_of_run
from lskd_study.study.engine import make_plan
from lskd_study.trainers import trainer_of
from simulated import rows

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
BOTH = ["hard", "smoothed"]


def controls_of(plan) -> list[Run]:
    return [run for run in plan.runs if run.role == "control"]


def test_a_control_is_there_once_for_each_student_smoothing_and_seed():
    """Whatever teachers, temperatures and hard weights there are."""
    matrix = (
        [0.1, 0.0, 0.2],
        [3, 4],
        [("a", "t"), ("b", "t")],
        [("c", "s"), ("d", "s")],
        [1.0, 4.0],
        [0.0, 0.5],
    )
    without, runs = expand(*matrix), expand(*matrix, ["hard", "smoothed", "real"])
    assert runs[: len(without)] == without
    controls = runs[len(without) :]
    assert {run.role for run in controls} == {"control"}
    kinds = {(run.model, run.real, run.smoothing, run.seed) for run in controls}
    assert len(kinds) == len(controls) == 2 * 2 * 4
    assert {smoothing for _, real, smoothing, _ in kinds if not real} == {0.0, 0.1, 0.2}
    assert {(model, smoothing) for model, real, smoothing, _ in kinds if real} == {
        ("c-real", 0),
        ("d-real", 0),
    }
    assert {(run.teacher, run.temperature, run.hard_weight, run.config) for run in controls} == {
        ("", 1, 1, "s")
    }
    assert controls[0].folder == "controls/control-c-smoothing0-seed3"
    assert len({run.id for run in runs}) == len(runs)
    # The baseline of a study that never trains without smoothing is no arm of the controls.
    labels = [run.smoothing for run in expand([0.1, 0.3], [0], [("a", "t")], [("c", "s")], [1], [0], BOTH)]
    assert labels[-2:] == [0.0, 0.3]


def test_runs_without_controls_are_what_they_were(plan_of, tmp_path):
    """Finished runs of a study that gets controls later are not of other settings."""
    before, after = plan_of(tmp_path), plan_of(tmp_path, controls=BOTH)
    assert [after.settings(run) for run in before.runs] == [before.settings(run) for run in before.runs]
    assert "real" not in before.settings(before.runs[0])
    assert (before.controls, after.controls) == ([], BOTH)
    for words in (["hard"], ["smoothed"], ["real"], ["hard", "real"]):
        assert plan_of(tmp_path, controls=words).controls == words


def test_a_control_is_trained_as_a_student_is_but_on_labels(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = make_plan("recipes/digits/study.yaml", None)
    by_id = plan.by_id
    control = by_id["control-test_byobnet-smoothing0.1-seed1"]
    student = by_id["student-test_byobnet-of-test_resnet-smoothing0.1-T1-hard0-seed1"]
    trainer = trainer_of("timm", "control")
    words, taught = trainer.command(plan, control), trainer.command(plan, student)
    first = taught.index("--kd-teacher")
    expected = [*taught[:first], *taught[taught.index("--output") :]]
    expected[expected.index("--smoothing") + 1] = "0.1"
    expected[-3:] = ["runs/digits/controls", "--experiment", control.id]
    assert words == expected
    as_teacher = trainer.command(plan, replace(control, role="teacher"))
    assert words[: words.index("--output")] == as_teacher[: as_teacher.index("--output")]


def test_in_translation_a_control_has_no_teacher_and_no_store(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = make_plan("recipes/number_words_de_en/study.yaml", None)
    for control in controls_of(plan):
        options = dict(
            word.split("=", 1) for word in trainer_of("fairseq", "control").command(plan, control)[5:]
        )
        own = {name.rpartition(".")[2]: value for name, value in options.items() if name.startswith("++")}
        assert own == {
            "_name": "ls_kd",
            "kd_weight": "0",
            "kd_soft_labels": "null",
            "label_smoothing": f"{control.smoothing:g}",
            "smoothing_convention": "paper",
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ["hard", "soft"]}, "study.yaml:20: controls.1: input should be 'hard', 'smoothed' or "),
        ({"controls": ["hard", "hard"]}, "controls: hard given twice"),
        ({"controls": "hard"}, "controls: input should be a valid list"),
        ({"controls": ["real"]}, "controls: only mmcls' students are binary"),
        ({"controls": ["hard"], "students": []}, "controls: a control is a student's network"),
    ],
)
def test_controls_that_cannot_be_are_one_line(scene, changes, message):
    scene.write(**changes)
    assert message in scene.refused("study", "study.yaml", "--dry-run")


def test_a_file_that_asks_a_teacher_in_its_own_way_is_no_controls(scene):
    (scene.folder / "s.yaml").write_text("epochs: 1\nbatch_size: 2\nkd_teacher_dtype: bfloat16\n")
    assert scene.plan().runs
    scene.write(controls=["hard"])
    line = scene.refused("study", "study.yaml", "--dry-run")
    assert "s.yaml says --kd-teacher-dtype of a teacher, and a control has none; remove it there" in line


def test_dry_run_counts_them(scene):
    scene.write(controls=BOTH)
    out = scene.run("study", "study.yaml", "--dry-run")
    assert "controls   2  test_byobnet" in out
    assert "6 runs: 0 finished, 6 to do" in out
    assert runs_and_data(find_recipe("digits"))[0] == str(10 + 20 + 20)
    assert runs_and_data(find_recipe("digits_bnn"))[0] == str(10 + 10 + 15)


def test_results_of_controls_are_found_and_named(fake_study):
    plan = fake_study(controls=BOTH)
    results = read_results(plan)
    found = results.controls("small", 0.1)
    assert sorted(found) == [0, 1, 2]
    assert {result.run.id for result in found.values()} == {
        f"control-small-smoothing0.1-seed{seed}" for seed in range(3)
    }
    assert not results.controls("small", 0.2)
    names = [kind_name(plan, kind_of_run(plan, run)) for run in controls_of(plan)[:2]]
    assert names == ["control small, labels’ α = 0", "control small, labels’ α = 0.1"]


def findings_of(plan):
    found = judge(read_results(plan))
    return found, [finding for finding in found if finding.claim.contrast == "control"]


def test_students_are_compared_with_the_same_network_without_a_teacher(fake_study):
    seeds = [0, 1, 2, 3, 4]
    plan = fake_study(effect=2.0, seeds=seeds, controls=BOTH)
    every, found = findings_of(plan)
    runs = read_results(plan).finished.values()

    def accuracy(*kind) -> float:
        return np.mean([one.top1 for one in runs if (one.run.role, one.run.smoothing) == kind])

    expected = [
        ("distillation-helps", accuracy("student", 0.0) - accuracy("control", 0.0)),
        ("distillation-helps", accuracy("student", 0.1) - accuracy("control", 0.0)),
        ("more-than-smoothing", accuracy("student", 0.1) - accuracy("control", 0.1)),
    ]
    assert [finding.claim.id for finding in found] == [name for name, _ in expected]
    for finding, (_, difference) in zip(found, expected, strict=True):
        assert finding.interval.estimate == pytest.approx(difference)
        assert (finding.interval.seeds, finding.interval.samples, finding.runs) == (5, 240, 20)
    assert [finding.verdict for finding in found] == ["cannot tell", "supported", "supported"]
    # Each is a test of its own in the page's family, and the headline is what it was.
    without = judge(read_results(fake_study(effect=2.0, seeds=seeds)))
    assert number_of_tests(every) == number_of_tests(without) + 3
    assert every[0].claim.id == without[0].claim.id == "better-student"
    assert every[0].interval == without[0].interval
    assert [claim.id for claim in claims_planned(plan)] == [
        "better-student",
        "better-teacher",
        "distillation-helps",
    ]


@pytest.mark.parametrize(("taught", "verdict"), [(2.0, "supported"), (-2.0, "contradicted")])
def test_whether_distillation_helps_is_told_either_way(fake_study, taught, verdict):
    _, found = findings_of(fake_study(taught=taught, controls=["hard"]))
    assert [(finding.claim.id, finding.verdict) for finding in found] == [("distillation-helps", verdict)] * 2


def test_a_failed_control_takes_its_verdicts_and_no_others(fake_study, fail):
    plan = fake_study(effect=2.0, controls=BOTH)
    fail(plan, plan.by_id["control-small-smoothing0.1-seed1"], "epoch 2: the training loss is nan")
    every, found = findings_of(plan)
    assert [finding.verdict for finding in found] == ["cannot tell", "supported", "no verdict"]
    assert every[0].verdict == "supported"
    write_report(plan)
    (row,) = [row for row in rows(plan.root / "table.csv") if row["failed"] == "1"]
    assert (row["teacher"], row["student"], row["smoothing"]) == ("", "small", "0.1")


def test_binary_students_are_compared_with_the_real_valued_one_too(fake_study):
    every, found = findings_of(fake_study(ecosystem="mmcls", controls=["hard", "real"]))
    assert {finding.claim.id for finding in found} == {"distillation-helps", "real-student"}
    real = next(finding for finding in found if finding.claim.id == "real-student")
    assert (real.verdict, real.runs) == (None, 12)
    assert number_of_tests(every) == number_of_tests(findings_of(fake_study(ecosystem="mmcls"))[0]) + 2


def test_the_page_shows_controls(fake_study):
    plan = fake_study(effect=2.0, controls=BOTH)
    write_report(plan)
    html = unescape((plan.root / "index.html").read_text())
    results = read_results(plan)
    found = {
        (row["smoothing"], row["student"]): row for row in rows(plan.root / "table.csv") if not row["teacher"]
    }
    assert set(found) == {(alpha, model) for alpha in ("0.0", "0.1") for model in ("small", "big")}
    row = found["0.1", "big"]
    values = [result.top1 for result in results.controls("big", 0.1).values()]
    assert float(row["student_top1_mean"]) == pytest.approx(np.mean(values))
    names = ("temperature", "hard_weight", "seeds", "teacher_top1_mean")
    assert [row[name] for name in names] == ["1.0", "1.0", "3", ""]
    assert html.count('<th scope="row">none: the labels</th>') == 4
    assert "| none: the labels | 0.1 | – | – | small | 1 | 1 | " in (plan.root / "table.md").read_text()
    # Its cell leads to the commands of its runs.
    text = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    place = html[html.index('<th scope="row">none: the labels</th>') :]
    anchor = place.split(text)[0].rpartition('<a href="#')[2].partition('"')[0]
    assert f'<h3 id="{anchor}" tabindex="-1">Control big, labels’ α = 0.1</h3>' in html
    assert html.count("no teacher, labels’ α = 0.1") == 1  # the legend
    assert {"control"} < {row["role"] for row in rows(plan.root / "runs.csv")}
    assert {"control"} < {row["role"] for row in rows(plan.root / "figures" / "curves.csv")}
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert record["controls"] == BOTH
    (setting,) = [f["setting"] for f in record["findings"] if f["claim"] == "more-than-smoothing"]
    assert (setting["baseline"], setting["smoothing"]) == (0.1, 0.1)
    assert setting["words"] == "teacher’s α = 0.1 against labels’ α = 0.1"
    varied = replace(plan, runs=expand([0.1], [0], [("a", "t")], [("b", "s")], [1, 4], [0.5], ["hard"]))
    claim = next(claim for claim in claims_of(varied) if claim.id == "distillation-helps")
    words = [one.words for one in settings_of(claim, varied)]
    assert "teacher’s α = 0.1, T = 4 against labels’ α = 0" in words


def test_controls_at_chance_leave_the_choice_of_a_teacher(fake_study, monkeypatch):
    plan = fake_study(effect=2.0, controls=BOTH)
    results, weak = read_results(plan), ["control-small-smoothing0-seed1"]
    monkeypatch.setattr(page, "at_chance", lambda results: dict.fromkeys(weak, "50 %"))
    advice = page.advice_of(results, judge(results))
    assert advice.sentence.startswith("Distil from the teacher with α = 0.1")
    note = "Whether distilling pays at all: networks without a teacher are no better than chance"
    assert note in advice.unknown
    assert "more than smoothing" in str(advice) or "own labels" in str(advice)  # the other kind still speaks
    weak.append(plan.runs[0].id)
    assert page.advice_of(results, judge(results)).sentence == (
        "No recommendation: 1 run is no better than chance."
    )


def test_controls_weaken_verdicts_as_other_runs_do(fake_study):
    plan = fake_study(controls=["hard"])
    for control in controls_of(plan):
        if control.model == "big":
            table = plan.folder(control) / "curves.csv"
            header, *lines = csv.reader(table.read_text().splitlines())
            where = header.index("train_hard_ce")
            for epoch, line in enumerate(lines):
                line[where] = str(9 - epoch)
            table.write_text("\n".join(",".join(line) for line in (header, *lines)) + "\n")
    write_report(plan)
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert record["still_falling"] == ["control big, labels’ α = 0"]


@pytest.mark.parametrize(("taught", "as_good"), [(0.0, True), (3.0, True), (-4.0, False)])
def test_students_that_score_no_lower_than_their_teachers_are_named(fake_study, taught, as_good):
    plan = fake_study(taught=taught, smoothing=[0.0, 0.1], students=[("small", "student.yaml")])
    write_report(plan)
    html = unescape((plan.root / "index.html").read_text())
    above = html[html.index("<h1>") : html.index('id="answer"')]
    named = at_ceiling(read_results(plan))
    assert ("student small of big, α = 0" in named) == as_good
    assert ("Students scored no lower than their teachers, to the margin of 0.2 points" in above) == bool(
        named
    )
    assert json.loads((plan.root / "verdicts.json").read_text())["at_ceiling"] == list(named)
    one_seed = fake_study(taught=taught, seeds=[0])
    assert not at_ceiling(read_results(one_seed))


def test_in_translation_no_lower_has_no_margin(translation_study):
    plan = replace(translation_study(effect=-3.0), margin=100.0)  # of accuracies
    results = read_results(plan)
    (above,) = (str(one) for one in notices_of(results) if "no lower" in one.title)
    assert above.startswith("Students scored no lower than their teachers: where little is left to learn")
    assert all("+" in words.split()[0] for words in at_ceiling(results).values())
    assert len(at_ceiling(results)) < 4


def test_the_legend_names_the_controls_that_are_drawn(fake_study):
    plan = fake_study(ecosystem="mmcls", controls=["smoothed", "real"])
    write_report(plan)
    html = unescape((plan.root / "index.html").read_text())
    (legend,) = re.findall('<p class="legend">.*', html)
    assert legend.count("no teacher") == 1
    assert "no teacher, labels’ α = 0.1" in legend
    # Of both the first has the first style of line.
    assert list(student_kinds(plan)[0].controls(read_results(plan))) == [0.1]


def test_translation_has_them_too(translation_study):
    plan = translation_study(controls=BOTH, effect=1.0)
    _, found = findings_of(plan)
    assert [(finding.claim.id, finding.claim.quantity) for finding in found] == [
        ("distillation-helps", "bleu"),
        ("distillation-helps", "bleu"),
        ("more-than-smoothing", "bleu"),
    ]
    assert found[1].interval.estimate > 0
    write_report(plan)
    html = unescape((plan.root / "index.html").read_text())
    assert html.count("no teacher, labels’ α = 0.1") == 1
    assert html.count("none: the labels") == 4
    # The bootstrap of single seeds is about the teachers' smoothing.
    assert {row["setting"] for row in rows(plan.root / "bootstrap.csv")} == {"α 0.1 against 0"}


def test_a_command_that_repeats_a_control_is_shown(fake_study):
    plan = fake_study(controls=["hard"])
    write_report(plan)
    html = unescape((plan.root / "index.html").read_text())
    control = controls_of(plan)[0]
    words = shlex.join(trainer_of("timm", "control").command(plan, control, "rerun"))
    assert words in html
