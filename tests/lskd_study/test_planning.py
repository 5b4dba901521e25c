"""What a study says that it can tell before it runs, and the seeds that are added until it is decided."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lskd_study.base.text import duration
from lskd_study.claims import CLAIMS
from lskd_study.claims.outlook import before, measured
from lskd_study.claims.recommendation import Recommendation
from lskd_study.pages.verdicts import DataRecord, teachers_record
from lskd_study.stats.intervals import Part
from lskd_study.stats.power import Variances
from lskd_study.study import engine
from lskd_study.study.planning import outlooks_of

pytestmark = pytest.mark.unit

CLASSES, PER_CLASS = 2, 200
LITTLE = "less than an even chance"


@pytest.fixture
def trained(scene, monkeypatch, leave):
    """Have runs "train" at once: students of smoothed teachers are right more often by ``effect`` log-odds.

    Returns a function that runs the command and gives its exit status.
    """
    state = {"effect": 0.0}

    def train(plan, schedule, held):
        labels = np.repeat(np.arange(CLASSES), PER_CLASS)
        easy = np.random.default_rng(0).normal(1.5, 1.0, len(labels))
        for number, run in enumerate(plan.runs):
            if plan.done(run):
                continue
            rng = np.random.default_rng([1, run.seed, number % 7])
            gain = state["effect"] if run.role == "student" and run.smoothing > 0 else 0.0
            right = rng.random(len(labels)) < 1 / (1 + np.exp(-easy - gain))
            logits = np.where(np.eye(CLASSES, dtype=bool)[labels], np.where(right, 2.0, -2.0)[:, None], 0.0)
            curves = {name: float(rng.random()) for name in ("val_top1", "train_ce", "train_hard_ce")}
            leave(plan, run, logits, labels, curves)
            (plan.folder(run) / "begun.json").write_text(json.dumps({"settings": plan.settings(run)}))

    monkeypatch.setattr(engine, "_snakemake", train)
    scene.write(seeds=[0, 1, 2])

    def study(*flags, effect=0.0, file="study.yaml"):
        from lskd_study.cli import main as cli

        state["effect"] = effect
        scene.capsys.readouterr()
        return cli.main(["study", file, *flags])

    return study


def verdicts(scene):
    return json.loads((scene.folder / "out" / "verdicts.json").read_text())


# Before


def test_a_plan_says_what_it_can_tell_and_warns_first(scene, trained):
    out = scene.run("study", "study.yaml", "--dry-run").splitlines()
    assert out[0].startswith(f"warning: {LITTLE} (")
    lines = [line for line in out if line.startswith("  power ")]
    assert "students' difference: 80 % power for" in lines[0]
    assert "points with 3 seeds; the paper's 0.4 take more samples, whatever the seeds" in lines[0]
    assert "teachers' difference" in lines[1]
    assert "; 0.4 points take" in lines[1]
    assert "assumed: accuracy varies by 0.15 points between seeds" in lines[2]
    assert "2 images" in lines[2]
    assert "what a seed takes is known once a run of each kind has ended" in lines[3]


@pytest.mark.parametrize(("prepare", "images"), [("digits", "596"), ("fashion-mnist", "10,000")])
def test_what_a_plan_can_tell_is_said_before_its_data_are_made(scene, prepare, images):
    scene.write(data={"path": "data/made", "num_classes": 10, "prepare": prepare}, seeds=[0, 1, 2])
    out = scene.run("study", "study.yaml", "--dry-run")
    assert out.startswith(f"warning: {LITTLE} (")
    assert f"the arms differ on 5 % of {images} images" in out


def test_own_runs_take_the_place_of_what_was_assumed(scene, trained):
    assert trained() == 0
    assert f"warning: {LITTLE}" in scene.capsys.readouterr().err
    scene.write(seeds=[0, 1, 2, 3, 4])
    out = scene.run("study", "study.yaml", "--dry-run")
    assert "measured over the 3 seeds at hand" in out
    assert "points with 5 seeds" in out
    assert "of runs)" in out
    assert "GPU-hours" not in out
    plan = replace(scene.plan(seeds=[0, 1, 2, 3, 4]), resources={"gpu": 2})
    of_an_hour = [replace(one, seconds=3600) for one in outlooks_of(plan)]
    assert "points with 5 seeds (5.0 hours of runs, 10 GPU-hours)" in before(plan, of_an_hour)[1]


def test_controls_asked_for_later_leave_what_was_measured(scene, trained):
    assert trained() == 0
    before = scene.run("study", "study.yaml", "--dry-run")
    scene.write(seeds=[0, 1, 2], controls=["hard"])
    out = scene.run("study", "study.yaml", "--dry-run")
    assert "measured over the 3 seeds at hand" in out
    assert "of runs)" in before
    assert "of runs)" not in out  # what a control takes is not known


def test_the_variance_comes_from_another_study(scene, trained):
    assert trained() == 0
    other = scene.folder / "other.yaml"
    other.write_text((scene.folder / "study.yaml").read_text().replace("output: out", "output: elsewhere"))
    out = scene.run("study", "other.yaml", "--dry-run", "--variance-from", "out")
    assert "as in out, over 3 seeds" in out
    known = verdicts(scene)["findings"][0]
    half = (known["high"] - known["low"]) / 2
    variances = Variances.of(3, [Part(*part) for part in known["parts"]])
    detectable = float(out.split("80 % power for ")[1].split()[0])
    # Time is by run: with controls a seed has six in place of four.
    of_four = verdicts(scene)["runs"]["seconds"] / 12 * 4 * 3
    assert f"points with 3 seeds ({duration(of_four)} of runs)" in out
    scene.write(output="more", controls=["hard"], seeds=[0, 1, 2])
    runs = len(scene.plan(output="more", controls=["hard"], seeds=[0, 1, 2]).runs)
    out = scene.run("study", "study.yaml", "--dry-run", "--variance-from", "out")
    assert f"points with 3 seeds ({duration(of_four * runs / 12)} of runs)" in out
    # Detected with 80 % after the correction for the page's tests, so beyond the interval's own reach.
    assert detectable == pytest.approx(variances.detectable(3, 0.8, 0.975), abs=0.006)
    assert detectable > half


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere", "contains no study"),
        ("one", "does not say how much seeds vary"),
        ("text", "is a study of translation, this one of images"),
    ],
)
def test_results_that_say_nothing_of_it_are_refused(scene, trained, translation_study_at, folder, words):
    if folder == "one":
        scene.write(seeds=[0], output="one")
        assert trained() == 0
        scene.write(seeds=[0, 1, 2])
    elif folder == "text":
        plan = translation_study_at(scene.folder)()
        from lskd_study.pages.study import write_report

        write_report(plan)
        plan.root.rename(scene.folder / "text")
    assert words in scene.refused("study", "study.yaml", "--dry-run", "--variance-from", folder)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [[-1.0, 2], [0.1, 9]]},
        {"parts": [[1e300, 2], [0.1, 9]]},
        {"parts": [[1.0, 0], [0.1, 9]]},
        {"parts": [[1.0, 10**30], [0.1, 9]]},
        {"seeds": 10**30},
        {"parts": "many"},
        {"parts": []},
        {"claim": "another"},
    ],
)
def test_results_that_nothing_can_be_made_of_are_one_line(scene, trained, change):
    assert trained() == 0
    path = scene.folder / "out" / "verdicts.json"
    record = json.loads(path.read_text())
    other = record | {"findings": [finding | change for finding in record["findings"]]}
    path.write_text(json.dumps(other | {"runs": record["runs"] | {"seconds": 1e300}}))
    scene.write(output="elsewhere")
    err = scene.refused("study", "study.yaml", "--dry-run", "--variance-from", "out")
    assert "does not say how much seeds vary" in err or "verdicts.json is damaged" in err


def test_what_another_study_pooled_is_not_pooled_here(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")])
    known = {"better-student": Variances(1.0, 0.1, 99, pooled_df=7.0)}
    for pools, df in ((False, 0.0), (True, 7.0)):
        (one,) = measured(replace(plan, pool_seed_variance=pools), known, "as in x")
        assert one.variances.pooled_df == df


def test_of_translation_nothing_is_assumed(translation_study):
    line = "how much BLEU varies is not assumed for these data; two seeds will tell"
    assert before(translation_study(sentences=5), []) == [line]


def test_a_page_of_teachers_says_nothing_of_seeds(scene, trained):
    record = teachers_record("T", ["a"], "", DataRecord(path="", classes=2, samples=9), Recommendation(""))
    (scene.folder / "list").mkdir()
    (scene.folder / "list" / "verdicts.json").write_text(record.text())
    err = scene.refused("study", "study.yaml", "--dry-run", "--variance-from", "list")
    assert "list does not say how much seeds vary" in err


def test_a_margin_below_what_can_be_told_is_said_before(scene, trained):
    said = "the margin of 0.2 points is less than the ±"
    assert said in scene.run("study", "study.yaml", "--dry-run")
    scene.write(seeds=[0, 1, 2], margin=1000)
    assert "the margin of" not in scene.run("study", "study.yaml", "--dry-run")


# After


def test_an_open_verdict_says_what_would_decide_it(scene, trained):
    assert trained() == 0
    said = scene.capsys.readouterr().out
    found = verdicts(scene)["findings"][0]
    assert f"What would decide it: {found['outlook']}." in said
    assert "`seeds: [0, 1, 2, 3, 4]`" in said
    assert found["outlook"].startswith("±")
    assert " with 3 seeds" in found["outlook"]
    page = (scene.folder / "out" / "index.html").read_text()
    assert found["outlook"] in page
    assert "<code>seeds: [0, 1, 2, 3, 4]</code>" in page.split('id="recommendation"')[1].split("</header>")[0]
    assert len(found["parts"]) == 2
    assert trained("--output", "clear", effect=4.0) == 0
    clear = json.loads((scene.folder / "clear" / "verdicts.json").read_text())
    assert (clear["headline"]["verdict"], clear["findings"][0]["outlook"]) == ("supported", "")


# Seeds until it is decided


def test_seeds_are_added_until_a_difference_is_seen(scene, trained):
    assert trained("--until-decided", "--max-seeds", "12", effect=1.0) == 0
    record = verdicts(scene)
    assert record["looks"] == [3, 5, 8, 12]
    assert record["headline"]["verdict"] == "supported"
    assert len(record["seeds"]) < 12
    assert "95 % interval for looks after 3, 5, 8, 12 seeds" in record["headline"]["answer"]
    assert f"; {len(record['seeds'])} seeds, 1 student" in record["headline"]["answer"]
    assert "fixed before the first run" in (scene.folder / "out" / "index.html").read_text()
    assert record["looked_at"] == []


def test_without_a_difference_it_ends_with_the_most_seeds_and_goes_on_as_it_began(scene, trained):
    assert trained("--until-decided", "--max-seeds", "8") == 0
    err = scene.capsys.readouterr().err
    assert "not decided with 3 seeds; going on to 5" in err
    assert verdicts(scene)["seeds"] == list(range(8))
    assert verdicts(scene)["headline"]["verdict"] == "cannot tell"
    assert trained() == 0  # the rule is the study's own now
    assert verdicts(scene)["looks"] == [3, 5, 8]
    assert "which may not change afterwards" in scene.refused(
        "study", "study.yaml", "--until-decided", "--max-seeds", "20"
    )
    scene.write(seeds=[0, 1])
    assert "was begun with 3 seeds" in scene.refused("study", "study.yaml")


@pytest.mark.parametrize(
    ("seeds", "flags", "words"),
    [
        ([0], ["--until-decided"], "list at least two"),
        ([0, 1, 2], ["--until-decided", "--max-seeds", "3"], "has 3 seeds already"),
        ([0, 1, 2], ["--max-seeds", "9"], "--max-seeds is for --until-decided"),
    ],
)
def test_what_the_rule_cannot_be_is_refused(scene, trained, seeds, flags, words):
    scene.write(seeds=seeds)
    assert words in scene.refused("study", "study.yaml", *flags)


def test_a_study_that_was_looked_at_gets_no_rule_afterwards(scene, trained):
    assert trained() == 0
    assert "made without the rule" in scene.refused("study", "study.yaml", "--until-decided")


def test_only_a_difference_of_accuracies_has_a_margin():
    assert {claim.quantity for claim in CLAIMS if claim.has_margin} == {"top1"}
    assert not any(claim.has_margin for claim in CLAIMS if "translation" in claim.tasks)


def test_at_a_look_nothing_contradicts_the_interval_of_the_look(scene, trained):
    assert trained("--until-decided", "--max-seeds", "5") == 0
    found = verdicts(scene)["findings"][0]
    table = (scene.folder / "out" / "figures" / "difference.csv").read_text().splitlines()
    low, high = (float(end) for end in table[-1].split(",")[2:4])
    assert (low, high) == pytest.approx((found["low"], found["high"]), rel=1e-6)
    assert found["outlook"] == ""
    assert "What would decide it" not in verdicts(scene)["headline"]["answer"]


def test_a_page_of_a_version_that_did_not_count_is_a_look_and_one_seed_is_none(scene, trained):
    scene.write(seeds=[0])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == []
    scene.write(seeds=[0, 1, 2])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == [3]
    path = scene.folder / "out" / "verdicts.json"
    old = {key: value for key, value in verdicts(scene).items() if key != "looked_at"}
    path.write_text(json.dumps(old))
    scene.write(seeds=[0, 1, 2, 3, 4])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == [3, 5]
    scene.write(seeds=[0])
    assert trained() == 0
    assert "looked at after 3 and 5 seeds" in verdicts(scene)["notices"][0]


def test_seeds_added_without_the_rule_are_named_with_their_error_rate(scene, trained):
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == [3]
    assert trained() == 0  # the same page once more is no other look
    assert verdicts(scene)["looked_at"] == [3]
    scene.write(seeds=[0, 1, 2, 3, 4, 5])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == [3, 6]
    notice = "it was looked at after 3 and 6 seeds, each time at 5 %."
    assert notice in verdicts(scene)["notices"][0]
    assert "is found in 8 %" in verdicts(scene)["notices"][0]
    assert notice in (scene.folder / "out" / "index.html").read_text()
