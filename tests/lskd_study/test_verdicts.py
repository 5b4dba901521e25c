"""Verdicts on simulated studies with a known truth: found where it is there, and rarely where it is not."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lskd.analysis.classes import class_confusion, class_mean_probabilities, class_separation, nearest_classes
from lskd_study.claims import DECIDED, judge, judge_several, several
from lskd_study.claims.several import combine
from lskd_study.claims.statements import Setting
from lskd_study.results.results import Failure, Results
from lskd_study.stats.intervals import crossed_interval
from simulated import World, of_kind, simulate

pytestmark = pytest.mark.unit


@pytest.fixture
def verdicts(plan_of, tmp_path):
    """Judge simulated studies; returns the verdicts by claim, one for each study and setting."""

    def many(world, studies, **plan):
        plan = plan_of(tmp_path, **{"students": [("s", "student.yaml")], **plan})
        found = []
        for seed in range(studies):
            found.append(judge(simulate(plan, world, seed)))
        return found

    return many


def share(studies, claim, verdict):
    found = [finding.verdict for study in studies for finding in study if finding.claim.id == claim]
    assert found
    return sum(one == verdict for one in found) / len(found)


TEACHERS = [(name, "teacher.yaml") for name in "abcde"]


def test_what_is_true_is_found(verdicts):
    world = World(teacher_gain=1.0, student_gain=1.0, loss_gain=0.3, per_class=500)
    found = verdicts(world, 25)
    for claim in ("better-student", "no-worse-student", "larger-loss", "better-teacher", "same-direction"):
        assert share(found, claim, "supported") > 0.7, claim
        assert share(found, claim, "contradicted") == 0


def test_what_is_the_other_way_round_contradicts(verdicts):
    world = World(teacher_gain=-1.0, student_gain=1.0, loss_gain=-0.3, per_class=500)
    found = verdicts(world, 25)
    assert share(found, "better-teacher", "contradicted") > 0.7
    assert share(found, "no-worse-teacher", "contradicted") > 0.7
    assert share(found, "larger-loss", "contradicted") > 0.7
    assert share(found, "same-direction", "contradicted") > 0.5
    assert share(found, "same-direction", "supported") == 0


def test_as_good_is_held_against_the_margin_and_better_against_zero(verdicts, plan_of, tmp_path):
    plan = replace(plan_of(tmp_path, students=[("s", "student.yaml")]), margin=10.0)

    def shares(world):
        found = [judge(simulate(plan, world, seed)) for seed in range(25)]
        return [
            share(found, claim, v)
            for claim, v in (
                ("better-student", "supported"),
                ("no-worse-student", "supported"),
                ("no-worse-student", "contradicted"),
            )
        ]

    better, as_good, worse = shares(World(per_class=500))
    assert (better <= 0.1, as_good > 0.7, worse) == (True, True, 0)
    better, as_good, worse = shares(World(student_gain=-2.0, per_class=500))  # some 30 points
    assert (better, as_good, worse > 0.7) == (0, 0, True)


def test_hard_labels_and_temperature_are_told_apart_from_smoothing(verdicts):
    world = World(student_gain=0.8, hard=-1.5, hot=-1.6, per_class=500)
    matrix = {"hard_weights": [0.0, 0.5, 1.0], "temperatures": [1.0, 4.0], "seeds": [0, 1, 2, 3, 4]}
    found = verdicts(world, 20, **matrix)
    assert share(found, "more-hard-label", "supported") > 0.7
    assert share(found, "temperature", "supported") > 0.7
    for study in found:
        by_temperature = {f.setting.temperature: f for f in study if f.claim.id == "better-student"}
        assert by_temperature[1.0].interval.estimate > 0 > by_temperature[4.0].interval.estimate


def test_better_teachers_are_found_to_teach_better(verdicts):
    world = World(slope=1.0, network_spread=1.2, own_ways=0.1)
    found = verdicts(world, 25, teachers=TEACHERS)
    assert share(found, "better-teachers", "supported") > 0.6
    assert share(found, "better-teachers", "contradicted") == 0
    assert share(found, "stability-follows-accuracy", "contradicted") == 0


def test_two_networks_are_no_trend_and_three_mostly_cannot_tell(verdicts):
    world = World(slope=1.0, network_spread=1.2, own_ways=0.3)
    assert not any(f.claim.id == "better-teachers" for f in verdicts(world, 1, teachers=TEACHERS[:2])[0])
    found = verdicts(world, 12, teachers=TEACHERS[:3])
    assert share(found, "better-teachers", "cannot tell") > 0.6


NULLS = {
    "better-student",
    "larger-loss",
    "better-teacher",
    "lower-instability",
    "same-direction",
    "better-teachers",
    "more-hard-label",
    "temperature",
    "distillation-helps",
    "more-than-smoothing",
}
CONTROLS = {"controls": ["hard", "smoothed"]}


def wrong_pages(studies):
    """The share of studies with at least one wrong verdict, when nothing that was compared does anything."""
    wrong = 0
    for study in studies:
        alarms = [f for f in study if f.claim.id in NULLS and f.verdict in ("supported", "contradicted")]
        # As good is true here; worse by the margin is not.
        alarms += [f for f in study if f.claim.non_inferior and f.verdict == "contradicted"]
        wrong += bool(alarms)
    return wrong / len(studies)


def test_a_page_without_any_effect_rarely_has_a_verdict(verdicts):
    matrix = {"teachers": TEACHERS[:3], "hard_weights": [0.0, 0.5], **CONTROLS}
    found = verdicts(World(network_spread=1.0), 60, **matrix)
    assert {f.claim.id for f in found[0]} >= NULLS - {"temperature"}
    assert wrong_pages(found) <= 0.05 + 0.05  # 60 pages have a standard error of 0.03


@pytest.mark.slow
@pytest.mark.parametrize("world", [World(luck=0.3, copied=1.0), World(network_spread=1.5, luck=0.0)])
def test_pages_without_any_effect_have_a_verdict_in_five_of_a_hundred_at_most(verdicts, world):
    matrix = {"hard_weights": [0.0, 0.5], "temperatures": [1.0, 4.0], "teachers": TEACHERS[:4], **CONTROLS}
    assert wrong_pages(verdicts(world, 100, **matrix)) <= 0.05 + 0.03


def test_one_effect_does_not_raise_the_false_alarms_of_the_others(verdicts):
    """A family with one true effect: the others' share of the error rate grows when it is found, not more."""
    found = verdicts(World(loss_gain=1.0), 60)
    assert share(found, "larger-loss", "supported") > 0.9
    alarms = [
        any(f.claim.id in NULLS - {"larger-loss"} and f.verdict != "cannot tell" for f in study)
        for study in found
    ]
    assert np.mean(alarms) <= 0.05 + 0.05


# Seeds are added until the headline is decided.


def at_looks(plan, world, seed, numbers):
    """Judge a simulated study at growing numbers of seeds, and stop as `--until-decided` does."""
    whole = simulate(plan, world, seed)
    for number in numbers:
        seeds = plan.seeds[:number]
        runs = [run for run in plan.runs if run.seed in seeds]
        cut = replace(whole.plan, runs=runs, seeds=seeds, looks=list(numbers))
        findings = judge(Results(cut, {run.id: whole.finished[run.id] for run in runs}))
        if findings[0].verdict in DECIDED:
            break
    return findings


def sequential(plan_of, tmp_path, world, studies, numbers=(3, 5, 8, 12), **matrix):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], seeds=list(range(numbers[-1])), **matrix)
    return [at_looks(plan, world, seed, numbers) for seed in range(studies)]


def test_pages_that_are_looked_at_again_and_again_keep_their_error_rate(plan_of, tmp_path):
    found = sequential(plan_of, tmp_path, World(luck=0.3, per_class=20), 300, (3, 8, 30))
    # Half of the 5 % is the headline's, which alone stops them; 300 pages have a standard error of 0.013.
    print(f"a wrong verdict: {wrong_pages(found):.3f}")
    assert wrong_pages(found) <= 0.07
    headline = [study[0].verdict in ("supported", "contradicted") for study in found]
    print(f"of the headline: {np.mean(headline):.3f}")
    assert np.mean(headline) <= 0.04


def test_seeds_are_added_until_a_difference_is_seen(plan_of, tmp_path):
    found = sequential(plan_of, tmp_path, World(student_gain=0.6, luck=0.1, per_class=500), 25)
    assert share([study[:1] for study in found], "better-student", "supported") > 0.8
    assert len({study[0].interval.seeds for study in found}) > 1  # some needed more than others


def test_what_is_smaller_than_the_margin_ends_the_search(plan_of, tmp_path):
    wide = replace(plan_of(tmp_path, students=[("s", "student.yaml")], seeds=list(range(12))), margin=8.0)
    found = [at_looks(wide, World(per_class=500), seed, (3, 5, 8, 12)) for seed in range(20)]
    assert share([study[:1] for study in found], "better-student", "too small to matter") > 0.8
    far = [at_looks(wide, World(student_gain=1.2, per_class=500), seed, (3, 5, 8, 12)) for seed in range(20)]
    assert share([study[:1] for study in far], "better-student", "too small to matter") == 0


# The separation of similar classes.


def teachers_logits(rng, labels, tightness):
    """Four classes in two similar pairs; a sample and its class are the same for both arms."""
    own = np.eye(4)[labels]
    twin = np.eye(4)[labels ^ 1]
    noise = rng.standard_normal((len(labels), 4))
    for tight in tightness:
        logits = 3 * own + 2 * twin + tight * (0.8 * noise + 0.5 * rng.standard_normal(noise.shape))
        yield torch.from_numpy(logits + 0.05 * rng.standard_normal((1, 4)))


def separations(rng, seeds, per_class, tightness):
    labels = np.repeat(np.arange(4), per_class)
    torch_labels = torch.from_numpy(labels)
    runs = [list(teachers_logits(rng, labels, tightness)) for _ in range(seeds)]
    means = [class_mean_probabilities(one, torch_labels, 4) for pair in runs for one in pair]
    pairs = nearest_classes(class_confusion(means))
    values = [[class_separation(one, torch_labels, pairs).numpy() for one in pair] for pair in runs]
    return crossed_interval([after - before for before, after in values], labels)


def test_separation_keeps_its_coverage_and_finds_what_is_there():
    rng = np.random.default_rng(24)
    none = [separations(rng, 3, 25, (1.0, 1.0)) for _ in range(150)]
    assert np.mean([interval.p_value < 0.05 for interval in none]) <= 0.08
    some = [separations(rng, 3, 25, (1.0, 0.5)) for _ in range(40)]
    assert np.mean([interval.p_value < 0.05 and interval.estimate > 0 for interval in some]) > 0.9


# Several studies.


def test_the_sum_over_independent_studies_keeps_its_coverage():
    rng = np.random.default_rng(25)
    missed, weights = 0, [-0.8, 0.1, 0.7]
    for _ in range(400):
        intervals = []
        for seeds, seed_noise, sample_noise in ((2, 0.1, 0.5), (3, 0.0, 1.0), (3, 0.2, 0.1)):
            d = seed_noise * rng.standard_normal((seeds, 1)) + sample_noise * rng.standard_normal((1, 60))
            intervals.append(crossed_interval(d + rng.standard_normal((seeds, 60))))
        found = combine(intervals, weights)
        missed += not found.low <= 0 <= found.high
    assert 0.002 <= missed / 400 <= 0.07


def test_the_sum_over_studies_weighs_variances_by_the_square():
    rng = np.random.default_rng(27)
    one, other = (crossed_interval(rng.normal(size=(3, 40))) for _ in range(2))
    found = combine([one, other], [-2.0, 0.5])
    assert found.estimate == pytest.approx(-2 * one.estimate + 0.5 * other.estimate)
    expected = np.hypot(2 * (one.high - one.estimate), 0.5 * (other.high - other.estimate))
    assert found.high - found.estimate == pytest.approx(expected)


def studies_of_classes(plan_of, folder, gains, long_tailed=(), **plan):
    made = []
    for number, (classes, gain) in enumerate(gains):
        place = folder / str(number)
        plan_ = plan_of(place, students=[], teachers=TEACHERS[:2], **plan)
        results = simulate(plan_, World(teacher_gain=gain, per_class=150), seed=number)
        for name, count in (("0", 100), ("1", 5 if number in long_tailed else 90)):
            train = plan_.data_dir / "train" / name
            train.mkdir(parents=True)
            for i in range(count):
                (train / f"{i}.png").touch()
        made.append(replace(results, plan=replace(results.plan, num_classes=classes)))
    return made


def test_more_classes_shrink_the_gain_over_several_studies(plan_of, tmp_path):
    studies = studies_of_classes(plan_of, tmp_path, [(100, 2.5), (1000, 0.0), (500, 1.0)])
    (found,) = judge_several(studies)
    assert (found.claim.id, found.verdict, found.runs) == ("more-classes", "supported", 36)
    gains = [
        next(f for f in judge(replace(s, plan=replace(s.plan, num_classes=2))) if f.claim.quantity == "top1")
        for s in studies
    ]
    slope = np.polyfit(np.log10([100, 1000, 500]), [gain.interval.estimate for gain in gains], 1)[0]
    assert found.interval.estimate == pytest.approx(slope)
    assert "100, 500, 1,000 classes" in found.setting.describe()


def gain_of(study):
    """How much more accurate the smoothed teachers are, in points."""
    means = [
        100 * np.mean([one.correct for one in of_kind(study, smoothing=a)]) for a in study.plan.smoothing
    ]
    return means[-1] - means[0]


def test_a_long_tail_is_held_against_the_same_number_of_classes(plan_of, tmp_path):
    studies = studies_of_classes(plan_of, tmp_path, [(100, 2.0), (100, -1.0), (100, 2.0)], long_tailed={1})
    (found,) = judge_several(studies)
    assert (found.claim.id, found.verdict) == ("long-tail-shrinks", "supported")
    assert found.interval.estimate == pytest.approx(gain_of(studies[1]) - gain_of(studies[0]))
    title = studies[0].plan.title
    assert found.setting.words == f"α 0.1 against 0; a, b; “{title}” against “{title}”"
    assert (found.setting.temperature, found.setting.hard_weight) == (1, 0)
    # Not against other networks or other classes.
    runs = [replace(run, model=f"other {run.model}") for run in studies[0].plan.runs]
    for even in (replace(studies[0], plan=replace(studies[0].plan, runs=runs)), elsewhere(studies[0])):
        assert "long-tail-shrinks" not in {one.claim.id for one in judge_several([even, studies[1]])}


def elsewhere(study):
    """The same runs on images of other classes."""
    finished = {
        name: replace(result, keys=[key.replace("val/", "val/other ") for key in result.keys])
        for name, result in study.finished.items()
    }
    return replace(study, finished=finished)


def test_studies_that_cannot_be_compared_are_not(plan_of, tmp_path):
    assert judge_several([]) == []
    same = studies_of_classes(plan_of, tmp_path / "same", [(100, 1.0), (100, 0.0)])
    assert judge_several(same) == []
    one, other = studies_of_classes(plan_of, tmp_path / "arms", [(100, 1.0), (1000, 0.0)])
    assert judge_several([one, replace(other, plan=replace(other.plan, convention="uniform"))]) == []
    assert judge_several([one, replace(other, plan=replace(other.plan, last_epochs=3))]) == []
    runs = [replace(run, model=f"other {run.model}") for run in other.plan.runs]
    assert judge_several([one, replace(other, plan=replace(other.plan, runs=runs))]) == []
    longer = {**other.plan.configs, "teacher.yaml": {"epochs": 160}}
    assert judge_several([one, replace(other, plan=replace(other.plan, configs=longer))]) == []
    assert judge_several([one, elsewhere(other)]) == []
    assert judge_several([one, Results(other.plan, {})]) == []


def test_studies_are_related_by_way_of_another():
    def of(names):
        return SimpleNamespace(
            finished={"run": SimpleNamespace(keys=[f"val/{name}/0.png" for name in names])}
        )

    ab, cd, x, bc = map(of, ("ab", "cd", "x", "bc"))
    for order in itertools.permutations([ab, cd, x, bc]):
        found = [{id(study) for study in group} for group in several._related(order)]
        assert sorted(found, key=len) == [{id(x)}, {id(ab), id(cd), id(bc)}]


def test_a_file_is_the_same_in_any_order_and_a_number_that_shares_no_network_is_left_out(plan_of, tmp_path):
    one, other, third = studies_of_classes(plan_of, tmp_path, [(100, 2.0), (1000, 0.0), (500, 1.0)])
    config = {"epochs": 5, "lr": 0.1}
    for study, own in ((one, config), (other, dict(reversed(config.items())))):
        study.plan.configs["teacher.yaml"] = own
    (found,) = judge_several([one, third, other])  # the third's file is another
    assert found.setting.words == "α 0.1 against 0; a, b; 100, 1,000 classes"
    assert found.interval.estimate == pytest.approx(gain_of(other) - gain_of(one))
    assert found.runs == 24


def test_claims_over_studies_are_corrected_together_without_a_headline(plan_of, tmp_path):
    matrix = {"smoothing": [0.0, 0.1, 0.2, 0.3]}
    found = judge_several(studies_of_classes(plan_of, tmp_path, [(10, 0.4), (1000, 0.0)], **matrix))
    assert [one.setting.smoothing for one in found] == [0.1, 0.2, 0.3]
    by_holm = np.maximum.accumulate([3, 2, 1] * np.sort([one.p_value for one in found]))
    assert sorted(one.adjusted_p for one in found) == pytest.approx(np.minimum(by_holm, 1))


def test_the_gain_is_compared_for_ten_times_the_classes(plan_of, tmp_path):
    one, other = studies_of_classes(plan_of, tmp_path, [(10, 2.0), (1000, 0.0)])
    (found,) = judge_several([one, other])
    assert found.interval.estimate == pytest.approx((gain_of(other) - gain_of(one)) / 2)


def test_what_has_no_variance_has_no_sum():
    fine = crossed_interval(np.random.default_rng(28).normal(size=(4, 40)))
    flat = crossed_interval(np.zeros((3, 30)), bounded=True)
    found = combine([fine, flat], [-2.0, 0.5])
    assert (found.known, found.seeds, found.samples) == (False, 3, 70)
    assert found.estimate == pytest.approx(-2 * fine.estimate)
    assert found.note == flat.note != ""
    assert (
        combine([fine, replace(flat, note="")], [1.0, 1.0]).note == "one of the differences has no variance"
    )
    assert combine([replace(fine, note="odd"), fine], [1.0, 1.0]).note == "odd"


def test_of_two_studies_of_one_number_of_classes_the_one_that_shares_more_networks_is_taken(
    plan_of, tmp_path
):
    """As in the recipes: Table 2 has one network on 1,000 classes, Table 1 all of them."""
    one, other = studies_of_classes(plan_of, tmp_path, [(100, 2.0), (1000, 0.0)])
    (found,) = judge_several([part_of(other, "a", "one network"), one, other])
    assert found.runs == 24
    assert "; a, b; 100, 1,000 classes" in found.setting.describe()
    runs = [replace(run, model=f"other {run.model}") for run in other.plan.runs]
    more = [replace(run, id=f"third {run.id}", model=f"third {run.model}") for run in other.plan.runs]
    strangers = replace(other, plan=replace(other.plan, runs=[*runs, *more]))
    # It has more networks, and shares none.
    (found,) = (f for f in judge_several([strangers, one, other]) if f.claim.contrast == "gain-classes")
    assert found.runs == 24


def part_of(results, teachers, title):
    """The study with these of its teachers alone."""
    plan = results.plan
    models = {run.id: plan.by_id[run.teacher].model if run.teacher else run.model for run in plan.runs}
    runs = [run for run in plan.runs if models[run.id] in teachers]
    finished = {run.id: results.finished[run.id] for run in runs}
    return Results(replace(plan, runs=runs, title=title), finished)


def test_teachers_of_several_studies_make_one_trend(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], teachers=TEACHERS)
    whole = simulate(plan, World(slope=1.0, network_spread=1.2, own_ways=0.1), seed=3)
    one, other = part_of(whole, "ab", "First"), part_of(whole, "cde", "Second")
    together = {finding.claim.id: finding for finding in judge_several([one, other])}
    alone = {f.claim.id: f for f in judge(whole) if f.claim.contrast == "networks"}
    assert together.keys() == alone.keys() == {"better-teachers", "stability-follows-accuracy"}
    for name, finding in together.items():
        assert finding.interval == alone[name].interval
        assert finding.runs == alone[name].runs
        assert "teachers of “First”, “Second”" in finding.setting.describe()
    assert together["better-teachers"].verdict == "supported"


def test_the_trend_of_several_studies_says_where_it_is(plan_of, tmp_path):
    matrix = {"smoothing": [0.0, 0.1, 0.2, 0.3], "temperatures": [4.0], "hard_weights": [0.5]}
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], teachers=TEACHERS, **matrix)
    whole = simulate(plan, World(per_class=10), seed=3)
    parts = [part_of(whole, *own) for own in (("ab", "First"), ("c", "Second"), ("de", "Third"))]
    found = {one.claim.id: one.setting for one in judge_several(parts)}
    assert len(judge_several(parts)) == len(found) == 2  # each study is in one group
    every, titles = "mean over α 0, 0.1, 0.2, 0.3", "teachers of “First”, “Second”, “Third”"
    words = f"{every}; student s, T = 4, λ = 0.5; {titles}"
    assert found["better-teachers"] == Setting(0.0, 0.3, 4.0, 0.5, words)
    assert found["stability-follows-accuracy"] == Setting(0.0, 0.3, 1.0, 0.0, f"{every}; {titles}")
    assert judge_several([part_of(whole, "a", "First"), parts[1]]) == []  # two networks are no trend
    assert judge_several(parts[:2])[0].interval.networks == 3
    more = replace(parts[1], plan=replace(parts[1].plan, num_classes=3))
    assert judge_several([parts[0], more]) == []
    assert judge_several([parts[0], elsewhere(parts[1])]) == []


def test_a_teacher_that_two_studies_trained_alike_counts_once(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=[("s", "student.yaml")], teachers=TEACHERS)
    whole = simulate(plan, World(slope=1.0), seed=3)
    assert judge_several([whole, part_of(whole, "ab", "the same two")]) == []
    one, other = part_of(whole, "abc", "First"), part_of(whole, "bcd", "Second")
    found = {f.claim.id: f for f in judge_several([one, other])}
    assert found["better-teachers"].interval.networks == 4
    # Of another protocol they are other teachers, of another student's protocol they teach someone else.
    longer = {**plan.configs, "teacher.yaml": {"epochs": 160}}
    long = replace(other, plan=replace(other.plan, configs=longer))
    assert judge_several([one, long])[0].interval.networks == 6
    elsewhere = {**plan.configs, "student.yaml": {"epochs": 160}}
    found = judge_several([one, replace(other, plan=replace(other.plan, configs=elsewhere))])
    assert [finding.claim.id for finding in found] == ["stability-follows-accuracy"]


def test_one_seed_gives_several_studies_no_verdict(plan_of, tmp_path):
    (found,) = judge_several(studies_of_classes(plan_of, tmp_path, [(100, 3.0), (1000, 0.0)], seeds=[0]))
    assert found.verdict == "cannot tell"
    assert found.interval.known
    assert "seed" in found.interval.note


def test_a_failed_run_takes_the_verdict_of_every_claim_that_needs_it(plan_of, tmp_path):
    def without(results, run):
        finished = {name: one for name, one in results.finished.items() if name != run.id}
        failure = Failure(run, {"failed": "epoch 3: the training loss is nan"})
        return replace(results, finished=finished, failed={run.id: failure})

    plan = plan_of(
        tmp_path,
        teachers=TEACHERS,
        students=[("s", "student.yaml")],
        temperatures=[1.0, 4.0],
        hard_weights=[0.0, 0.5],
    )
    results = simulate(plan, World(per_class=30), 0)
    student = next(run for run in plan.runs if run.role == "student" and run.smoothing)
    for finding in judge(without(results, student)):
        needs_it = finding.claim.measured_on == "student" or finding.claim.contrast == "direction"
        here = (finding.setting.temperature, finding.setting.hard_weight) == (1.0, 0.0)
        if finding.claim.role == "student" and not here:
            assert finding.interval is not None
        elif needs_it and finding.claim.role == "student":
            assert finding.interval is None
            assert finding.note == f"run {student.id} failed in epoch 3"
            assert finding.verdict in ("no verdict", None)
        elif not needs_it:
            assert finding.verdict != "no verdict"
    one, other = studies_of_classes(plan_of, tmp_path / "more", [(100, 2.0), (1000, 0.0)])
    (found,) = judge_several([without(one, one.plan.runs[0]), other])
    assert (found.verdict, found.interval) == ("no verdict", None)
    assert f"run {one.plan.runs[0].id} failed in epoch 3" in found.note
