"""What a study says that it can tell before it runs, and the seeds that are added until it is decided."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lskd_study.base.text import duration
from lskd_study.claims import CLAIMS
from lskd_study.claims.findings import Finding, decide
from lskd_study.claims.outlook import (
    after,
    assumed,
    before,
    claims_planned,
    level_of,
    line_to_change,
    measured,
    prospect,
    seconds_a_seed,
    two_digits,
)
from lskd_study.claims.recommendation import Recommendation
from lskd_study.claims.statements import Setting, claims_of, settings_of
from lskd_study.pages.verdicts import DataRecord, teachers_record
from lskd_study.results.results import Failure
from lskd_study.stats.intervals import Interval, Part, parts_interval
from lskd_study.stats.power import Variances
from lskd_study.study import engine
from lskd_study.study.planning import outlooks_of
from simulated import World, simulate

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


@pytest.mark.parametrize(
    "matrix",
    [
        {},
        {"students": []},
        {"ecosystem": "fairseq", "students": []},
        {"smoothing": [0.0, 0.1, 0.2], "temperatures": [1.0, 4.0], "controls": ["hard", "smoothed"]},
        {"teachers": [(name, "teacher.yaml") for name in "abc"], "hard_weights": [0.0, 0.5]},
    ],
)
def test_the_level_is_that_at_which_the_page_decides_a_claim_first(plan_of, tmp_path, matrix):
    """Where no other test has a small p, in one setting of the claim."""
    plan = plan_of(tmp_path, **matrix)
    own = Interval(0.2, 0.1, 0.3, 0.0, 3, 100, "m")
    page = [
        Finding(claim, setting, own, 0.9) for claim in claims_of(plan) for setting in settings_of(claim, plan)
    ]
    planned = claims_planned(plan)
    assert planned[0] == page[0].claim
    for claim in planned:
        place = next(number for number, one in enumerate(page) if one.claim == claim)
        for factor, verdict in ((1 - 1e-9, "supported"), (1 + 1e-9, "cannot tell")):
            p = (1 - level_of(claim, plan)) * factor
            assert decide([*page[:place], replace(page[place], p_value=p), *page[place + 1 :]])[
                place
            ].verdict == (verdict)


def test_what_is_assumed_is_of_two_arms_and_of_the_images_that_they_differ_on(plan_of, tmp_path):
    plan = plan_of(tmp_path, controls=["hard"])
    found = assumed(plan, 5000)
    assert [one.claim.id for one in found] == ["better-student", "better-teacher", "distillation-helps"]
    for one in found:
        # 0.15 points in each arm; 5 % of the images are right in one arm alone, so differ by 100 points.
        assert one.variances == Variances(pytest.approx(2 * 0.15**2), 100**2 * 0.05 / 5000, 4999)
        assert "5 % of 5,000 images" in one.source
        assert one.level == level_of(one.claim, plan)
        assert np.isnan(one.seconds)
    assert assumed(plan, 0) == assumed(replace(plan, ecosystem="fairseq"), 5000) == []


KNOWN, MORE = Variances(0.09, 0.01, 999), Variances(0.36, 0.01, 999)


def lines_of(plan, **changes):
    """What is said of students that vary by what is known, of their controls and teachers that vary more."""
    planned = {claim.id: KNOWN if claim == claims_of(plan)[0] else MORE for claim in claims_planned(plan)}
    return before(plan, [replace(one, **changes) for one in measured(plan, planned, "as in x")])


def test_each_claims_line_has_its_power_its_time_and_the_seeds_that_it_takes(plan_of, tmp_path):
    plan = plan_of(tmp_path, controls=["hard"], seeds=list(range(4)))
    found = lines_of(plan, level=0.95, seconds=60.0)

    def line(own, papers):
        needed = own.seeds_for(0.4, 0.8)
        each = f"80 % power for {own.detectable(4, 0.8):.2f} points with 4 seeds (4.0 min of runs); "
        return f"{each}{papers} take {needed} seeds ({duration(needed * 60)} of runs)"

    needed = KNOWN.seeds_for(0.4, 0.8)
    assert found[-5:] == [
        "students' difference: " + line(KNOWN, "the paper's 0.4"),
        "teachers' difference: " + line(MORE, "0.4 points"),
        "students' and their controls' difference: " + line(MORE, "0.4 points"),
        "as in x",
        f"the margin of 0.2 points is less than the ±{KNOWN.half_width(4):.2g} of an interval over 4 seeds: "
        '"as good" and "too small to matter" can hardly be told',
    ]
    assert found[:-5] == [
        f"less than an even chance ({100 * KNOWN.power(4, 0.4):.0f} %) to see the paper's 0.4 points if they "
        "are there"
    ]
    untimed = lines_of(replace(plan, margin=5.0))
    assert untimed[1].endswith(f" seeds; the paper's 0.4 take {KNOWN.seeds_for(0.4, 0.8, 0.975)} seeds")
    assert untimed[-1].startswith("what a seed takes is known once a run of each kind has ended")
    # With as many seeds as are needed for 80 % nothing warns.
    enough = lines_of(replace(plan, seeds=list(range(needed)), margin=5.0), level=0.95, seconds=60.0)
    assert enough[0].startswith("students' difference: 80 % power for")
    assert "the paper's 0.4 take more samples, whatever the seeds" in "".join(
        lines_of(plan, variances=replace(KNOWN, sample=1.0))
    )
    assert f"with 9 seeds ({duration(540)} of runs)" in lines_of(replace(plan, looks=[4, 9]), seconds=60.0)[1]
    translation = plan_of(tmp_path, ecosystem="fairseq", seeds=[0, 1])
    assert not any("the paper's 0.4 take" in line for line in lines_of(translation))
    assert not any("margin" in line for line in lines_of(translation))
    alone = [line.partition(":")[0] for line in lines_of(plan_of(tmp_path, students=[]))]
    assert alone[1:3] == ["teachers' difference", "as in x"]


def test_one_seed_is_said_to_tell_nothing_and_two_to_tell_something(plan_of, tmp_path):
    found = lines_of(plan_of(tmp_path, seeds=[0]), seconds=60.0)
    nothing = "difference: one seed can tell nothing; list at least two"
    assert found == [
        "less than an even chance (0 %) to see the paper's 0.4 points if they are there",
        f"students' {nothing}",
        f"teachers' {nothing}",
        "as in x",
    ]
    found = lines_of(plan_of(tmp_path, seeds=[0, 1]), seconds=60.0, level=0.95)
    assert found[1].startswith(f"students' difference: 80 % power for {KNOWN.detectable(2, 0.8):.2f} points")
    assert found[0].startswith(f"less than an even chance ({100 * KNOWN.power(2, 0.4):.0f} %)")
    assert found[-1].startswith(f"the margin of 0.2 points is less than the ±{KNOWN.half_width(2):.2g}")


def test_another_number_of_students_is_reckoned_with(plan_of, tmp_path):
    known = {"better-student": Variances(1.0, 0.1, 99, students=2, student=0.4), "better-teacher": None}
    (one,) = measured(plan_of(tmp_path, student_seeds=4), known, "as in x", 7.0)
    assert (one.variances.seed, one.variances.student) == pytest.approx((0.8, 0.2))
    assert (one.claim.id, one.source, one.seconds) == ("better-student", "as in x", 7.0)


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


def half_widths(parts, seeds, numbers):
    """The half widths to expect with other numbers of seeds, by SciPy."""
    (seed, _), (sample, df) = parts
    t = stats.t.isf(0.025, df) if sample else 0.0
    return [np.sqrt(stats.t.isf(0.025, n - 1) ** 2 * seed * seeds / n + t**2 * sample) for n in numbers]


def open_finding(parts, seeds, **changes):
    interval = replace(parts_interval(0.1, [Part(*part) for part in parts], (seeds, 500), "t"), **changes)
    return Finding(CLAIMS[0], Setting(0.0, 0.1, 1.0, 0.0), interval, 0.9, verdict="cannot tell")


@pytest.mark.parametrize(("seeds", "more"), [(2, 5), (4, 5), (5, 10), (9, 10), (10, 20), (19, 20)])
def test_what_more_seeds_would_make_of_an_interval(plan_of, tmp_path, seeds, more):
    parts = [(0.5, seeds - 1), (0.001, 499)]
    one = open_finding(parts, seeds)
    found = prospect(one)
    now, half, least = half_widths(parts, seeds, (seeds, more, 10**9))
    assert (found.seeds, found.samples, found.students) == (seeds, 500, {})
    assert (found.now, found.least) == (pytest.approx(now), pytest.approx(least, rel=1e-2))
    twice = half_widths(parts, seeds, [2 * more])[0]
    assert found.widths == {more: pytest.approx(half), 2 * more: pytest.approx(twice)}
    times = f": {duration((more - seeds) * 60)} and {duration((2 * more - seeds) * 60)} more of runs"
    text = f"±{now:.2g} with {seeds} seeds; about ±{half:.2g} with {more}, ±{twice:.2g} with {2 * more}"
    assert (after(one), after(one, 60.0)) == (text, text + times)
    plan = plan_of(tmp_path, seeds=list(range(10, 10 + seeds)))
    assert line_to_change(plan, one) == f"seeds: {list(range(10, 10 + more))}"
    plan = plan_of(tmp_path, seeds=list(range(more - 1)))
    assert line_to_change(plan, one) == f"seeds: {list(range(more))}"
    assert line_to_change(plan_of(tmp_path, seeds=list(range(more))), one) == ""


@pytest.mark.parametrize(("share", "limit"), [(0.48, False), (0.5, True)])
def test_samples_are_the_limit_where_seeds_can_take_less_than_three_tenths_off(
    plan_of, tmp_path, share, limit
):
    """0.7 squared is 0.49 of the squared width."""
    squares = stats.t.isf(0.025, [4, 499]) ** 2
    parts = [(4 * (1 - share) / squares[0], 4), (4 * share / squares[1], 499)]
    one = open_finding(parts, 5)
    found = prospect(one)
    assert (not found.widths, found.now) == (limit, pytest.approx(2))
    assert found.least == pytest.approx(2 * share**0.5, rel=1e-5)
    assert bool(line_to_change(plan_of(tmp_path, seeds=list(range(5))), one)) is not limit
    if limit:
        assert after(one, 60.0) == (
            "±2 with 5 seeds, and not below ±1.4 with any number: the 500 samples are the limit"
        )


@pytest.mark.parametrize(("share", "named"), [(0.5, False), (0.6, True)])
def test_students_are_named_where_more_than_half_of_what_seeds_vary_is_theirs(share, named):
    parts = [(0.5, 4), (0.001, 499)]
    found = prospect(open_finding(parts, 5, students=3, by_student=Part(share * 0.5, 10)))
    with_twice = [(0.5 * (1 - share / 2), 4), (0.001, 499)]
    expected = {6: pytest.approx(half_widths(with_twice, 5, [5])[0])}
    assert found.students == (expected if named else {})
    assert prospect(open_finding([(1e-6, 4), (1.0, 499)], 5, by_student=Part(1e-6, 10))).students == {}


def test_where_seeds_say_nothing_there_is_no_prospect(plan_of, tmp_path):
    one = open_finding([(0.5, 2), (0.001, 499)], 3)
    assert prospect(one)
    plan = plan_of(tmp_path)
    for nothing in (
        replace(one, verdict="supported"),
        replace(one, interval=None),
        replace(one, interval=replace(one.interval, networks=4)),
        replace(one, of_looks=True),
        replace(one, interval=replace(one.interval, parts=())),
    ):
        assert prospect(nothing) is None
        assert line_to_change(plan, nothing) == ""
        assert after(nothing).startswith("more teacher networks than these 4") == bool(
            nothing.interval and nothing.interval.networks
        )
    assert [two_digits(value) for value in (142.0, 2.66, 0.83)] == ["140", "2.7", "0.83"]


def test_a_seeds_time_is_the_sum_of_the_means_of_each_kind(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[4, 7])
    results = simulate(plan, World(per_class=3), 0)
    seconds = {run.id: float(number) for number, run in enumerate(plan.runs, start=1)}
    finished = {n: replace(one, job={"wall_time_s": seconds[n]}) for n, one in results.finished.items()}
    results = replace(results, finished=finished)
    assert seconds_a_seed(results) == sum(seconds.values()) / 2
    one_seed = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=[4])
    mine = {run.id: finished[run.id] for run in one_seed.runs}
    assert seconds_a_seed(replace(results, plan=one_seed, finished=mine)) == sum(seconds[n] for n in mine)
    # A failed run counts where no other of its kind ended, and of a kind that has none nothing is known.
    first = plan.runs[0]
    second = next(run for run in plan.runs if run.seed == 7 and run.smoothing == 0 and run.role == "teacher")
    failed = {first.id: Failure(first, {"failed": "", "wall_time_s": 0.5})}
    without = {name: one for name, one in finished.items() if name != first.id}
    alone = seconds_a_seed(replace(results, finished=without, failed=failed))
    rest = sum(seconds.values()) - seconds[first.id] - seconds[second.id]
    assert alone == seconds[second.id] + rest / 2
    del without[second.id]
    assert seconds_a_seed(replace(results, finished=without, failed=failed)) == 0.5 + rest / 2
    assert np.isnan(seconds_a_seed(replace(results, finished=without)))


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"margin": 5}, "made with margin: 0.2, which may not change afterwards (now 5.0)"),
        ({"temperatures": [4, 1]}, "asks first about α 0.1 against 0, T = 1, λ = 0, which may not"),
        ({"temperatures": [4]}, "tests α 0.1 against 0, T = 1, λ = 0, which may not change afterwards"),
        (
            {"temperatures": [1, 4], "smoothing": {"values": [0, 0.2], "convention": "paper"}},
            "tests α 0.1 against 0",
        ),
    ],
)
def test_neither_margin_nor_headline_nor_what_was_tested_is_chosen_afterwards(scene, trained, change, words):
    assert trained() == 0
    scene.write(**change)
    assert words in scene.refused("study", "study.yaml", "--dry-run")


def test_a_temperature_can_be_added_afterwards(scene, trained):
    assert trained() == 0
    scene.write(temperatures=[1, 4])
    assert trained() == 0


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


def test_every_page_is_a_look_and_one_of_a_single_seed_is_none(scene, trained):
    scene.write(seeds=[0])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == []
    scene.write(seeds=[0, 1, 2])
    assert trained() == 0
    assert verdicts(scene)["looked_at"] == [3]
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
