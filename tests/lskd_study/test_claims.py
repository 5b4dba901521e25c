import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

from lskd import LskdError
from lskd.analysis.classes import class_confusion, class_mean_probabilities, class_separation, nearest_classes
from lskd_study.claims import CLAIMS, claims_of, contrasts, judge, number_of_tests, settings_of, verdict
from lskd_study.claims.contrasts import Measure, estimate_contrast
from lskd_study.claims.findings import Finding, decide
from lskd_study.claims.judging import groups
from lskd_study.claims.statements import Setting
from lskd_study.pages.study import write_report
from lskd_study.pages.verdicts import VERDICTS_FILE
from lskd_study.plan.plan import CURVES, JOB, LOGITS
from lskd_study.results.images import ImageResult, Stored
from lskd_study.results.read import read_results
from lskd_study.results.results import BySeed, Failure, PerSample, Result, Results
from lskd_study.stats.intervals import LEVEL, Interval, Part, crossed_interval, target_std_pseudo_values
from lskd_study.stats.moderated import moderated
from lskd_study.stats.sequential import levels
from lskd_study.stats.trends import network_trend
from simulated import World, of_kind, simulate

pytestmark = pytest.mark.unit


def by_id(findings):
    """The first finding of each claim."""
    found = {}
    for finding in findings:
        found.setdefault(finding.claim.id, finding)
    return found


def interval(low: float, high: float, p: float) -> Interval:
    return Interval((low + high) / 2, low, high, p, 3, 100, "m")


def draft(name: str, p: float, low: float = 0.01, high: float = 0.3, **more: float) -> Finding:
    """The first claim of this name, before the verdict."""
    claim = next(claim for claim in CLAIMS if claim.id == name)
    return Finding(claim, None, interval(low, high, p), p, **more)


@pytest.mark.parametrize(
    ("low", "high", "p", "up", "down"),
    [
        (0.1, 0.3, 0.01, "supported", "contradicted"),
        (-0.3, -0.1, 0.01, "contradicted", "supported"),
        (-0.1, 0.3, 0.30, "cannot tell", "cannot tell"),
        (0.1, 0.3, 0.06, "cannot tell", "cannot tell"),  # Holm took it back
        (math.nan, math.nan, math.nan, "cannot tell", "cannot tell"),
    ],
)
def test_a_verdict_follows_the_side_of_the_interval(low, high, p, up, down):
    by_direction = {claim.direction: claim for claim in CLAIMS}
    found = interval(low, high, p)
    assert verdict(by_direction[1], found, p) == up
    assert verdict(by_direction[-1], found, p) == down
    assert verdict(by_direction[0], found, p) is None
    assert verdict(by_direction[1], None, math.nan) == "cannot tell"


def test_a_real_effect_is_found_and_pooled_over_students(fake_study):
    plan = fake_study(effect=2.0)
    results = read_results(plan)
    found = by_id(judge(results))
    assert {name: finding.verdict for name, finding in found.items()} == {
        "better-student": "supported",
        "no-worse-student": "supported",
        "larger-loss": "supported",
        "loss-part-kl": None,
        "loss-part-entropy": None,
        "better-teacher": "supported",
        "no-worse-teacher": "supported",
        "lower-instability": "supported",
        "similar-classes": "supported",
        "same-direction": "supported",
    }
    arms = {}
    for alpha in (0.0, 0.1):
        chosen = [
            r for r in results.finished.values() if r.run.role == "student" and r.run.smoothing == alpha
        ]
        arms[alpha] = np.mean([result.top1 for result in chosen])
    assert found["better-student"].interval.estimate == pytest.approx(arms[0.1] - arms[0.0])
    teachers = [r for r in results.finished.values() if r.run.role == "teacher"]
    drop = np.mean([r.instability if r.run.smoothing else -r.instability for r in teachers]) * 2
    assert found["lower-instability"].interval.estimate == pytest.approx(drop, abs=1e-6)
    parts = [found[f"loss-part-{name}"].interval.estimate for name in ("kl", "entropy")]
    assert found["larger-loss"].interval.estimate == pytest.approx(sum(parts))


def test_verdicts_of_no_difference_are_rare():
    """False alarms, seeds and samples drawn anew: at most 5 %, plus what 400 tables leave open (2 points)."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(400):
        shared = 3 + 2 * rng.standard_normal((1, 300))
        arms = [
            rng.random((3, 300)) < 1 / (1 + np.exp(-(shared + 0.2 * rng.standard_normal((3, 1)))))
            for _ in range(2)
        ]
        found = crossed_interval(arms[1].astype(float) - arms[0].astype(float), bounded=True)
        alarms += verdict(CLAIMS[0], found, found.p_value) != "cannot tell"
    assert alarms / 400 <= 0.07


def test_holm_takes_a_verdict_back_and_the_finding_says_so():
    first = draft("better-student", 0.04)
    (alone,) = decide([first])
    assert (alone.verdict, alone.changed_by_holm) == ("supported", False)
    others = [draft("lower-instability", 0.9, -1, 1), replace(draft("larger-loss", 0.9), interval=None)]
    found = decide([first, *others])[0]
    assert (found.verdict, found.changed_by_holm) == ("cannot tell", True)
    assert found.adjusted_p == pytest.approx(0.08)


def test_the_headline_has_half_of_the_error_rate():
    def adjusted(headline):
        others = [draft(name, 0.02) for name in ("larger-loss", "lower-instability")]
        return [finding.adjusted_p for finding in decide([draft("better-student", headline), *others])]

    assert adjusted(0.02) == pytest.approx([0.04, 0.04, 0.04])  # Holm's own are 0.06
    assert adjusted(0.9) == pytest.approx([0.9, 0.08, 0.08])  # and 0.06, 0.06


def test_claims_about_one_parameter_count_once():
    both = decide([draft("better-student", 0.04), draft("no-worse-student", 0.01, null=-0.2)])
    assert [finding.adjusted_p for finding in both] == pytest.approx([0.04, 0.01])
    assert [finding.verdict for finding in both] == ["supported", "supported"]


# The verdicts of a page against the rule of docs/study.md, spelled out

ONE, TWO = Setting(0.0, 0.1, 1.0, 0.0), Setting(0.0, 0.2, 1.0, 0.0)
# Claims, and what each is about.
ABOUT = {
    "better-student": "students",
    "no-worse-student": "students",
    "better-teacher": "teachers",
    "no-worse-teacher": "teachers",
    "long-tail": "teachers",
    "lower-instability": "stability",
    "larger-loss": "loss",
    "loss-part-kl": "",  # these are no claims, whatever their p-values
    "real-student": "",
    "same-direction": "",
}
ENDS = (0.01, 0.3), (-0.3, -0.01), (-0.5, -0.3)


def rejected(tests, weights, level=0.05):
    """Return which of ``{test: (parameter, p)}`` Holm's steps reject, of one parameter one may be true."""
    left = dict(tests)
    while left:
        share = {test: weights[about] for test, (about, _) in left.items()}
        first = min(left, key=lambda test: left[test][1] / share[test])
        everything = sum(weights[about] for about in {about for about, _ in left.values()})
        if not left[first][1] < level * share[first] / everything:
            break
        del left[first]
    return tests.keys() - left.keys()


def drawn(rng, name, setting):
    """A finding with p-values and an estimate as they come, or with one of the things that are no test."""
    made = draft(name, 10 ** rng.uniform(-3.5, 0), *ENDS[rng.integers(3)])
    p_small = 10 ** rng.uniform(-3.5, 0) if made.claim.has_margin else math.nan
    null = -0.2 if made.claim.non_inferior else 0.0
    made = replace(made, setting=setting, p_small=p_small, null=null, runs=int(rng.integers(1, 9)))
    failed = replace(made, interval=None, failed=True, note=f"run of {name} failed")
    no_spread = replace(made.interval, low=math.nan, high=math.nan)
    others = [
        replace(made, interval=None),
        failed,
        replace(made, interval=replace(made.interval, seeds=1, note="one seed")),
        replace(made, interval=no_spread, p_value=math.nan, p_small=1.0),
    ]
    return others[rng.integers(4)] if rng.random() < 0.25 and name != "same-direction" else made


def expected_of_page(page, headline=True):
    """The verdicts, and the weights and tests that they follow from."""
    tests = {}
    for place, one in enumerate(page):
        about = ABOUT[one.claim.id]
        if about and one.interval is not None and one.interval.seeds > 1 and one.interval.known:
            tests[place, "zero"] = (about, one.setting), one.p_value
            if not math.isnan(one.p_small):
                tests[place, "margin"] = (about, one.setting), one.p_small
    first = ABOUT[page[0].claim.id], page[0].setting
    others = {about for about, _ in tests.values()} - {first}
    weights = {**dict.fromkeys(others, 1), first: max(len(others), 1) if headline else 1}
    found, rejections = {}, rejected(tests, weights)
    for place, one in enumerate(page):
        own = one.claim.id, one.setting
        if one.claim.direction == 0:
            found[own] = None
        elif one.failed:
            found[own] = "no verdict"
        elif (place, "zero") in rejections:
            agrees = (one.interval.estimate > one.null) == (one.claim.direction > 0)
            found[own] = "supported" if agrees else "contradicted"
        else:
            found[own] = "too small to matter" if (place, "margin") in rejections else "cannot tell"
    for name, setting in found:
        if name == "same-direction":
            both = [found.get((of, setting)) for of in ("better-teacher", "better-student")]
            if "no verdict" in both:
                found[name, setting] = "no verdict"
            elif all(one in ("supported", "contradicted") for one in both):
                found[name, setting] = "supported" if both[0] == both[1] else "contradicted"
            else:
                found[name, setting] = "cannot tell"
    return found, weights, tests


@pytest.mark.parametrize("headline", [True, False])
def test_the_verdicts_of_any_page_are_those_of_the_rule(headline):
    rng = np.random.default_rng(8)
    seen = set()
    for _ in range(150):
        page = [drawn(rng, name, setting) for name in ABOUT for setting in (ONE, TWO) if rng.random() < 0.7]
        page = [page[place] for place in rng.permutation(len(page))]
        expected, weights, tests = expected_of_page(page, headline)
        found = decide(page, headline=headline)
        assert {(one.claim.id, one.setting): one.verdict for one in found} == expected
        assert number_of_tests(found) == len({about for about, _ in tests.values()})
        seen |= {(one.claim.id, one.verdict) for one in found}
        for place, one in enumerate(found):
            zero = place, "zero"
            if zero in tests:  # the level from which on it is rejected
                just = [rejected(tests, weights, one.adjusted_p * (1 + off)) for off in (-1e-9, 1e-9)]
                assert one.adjusted_p == 1 or [zero in done for done in just] == [False, True]
            elif one.claim.id != "same-direction":
                assert math.isnan(one.adjusted_p)
            decided = one.verdict in ("supported", "contradicted")
            alone = zero in tests and page[place].p_value < 0.05
            if one.claim.id != "same-direction":
                assert one.changed_by_holm == (alone and one.verdict == "cannot tell")
                assert not (decided and not alone)
    assert len(seen) == 3 * 5 + 5 * 4 + 2 * 1  # every verdict that each of the claims can have


def test_the_direction_has_the_interval_of_the_students_seen_from_the_teachers():
    student = replace(draft("better-student", 1e-4, 0.1, 0.5, runs=6), setting=ONE)
    teacher = replace(
        draft("better-teacher", 1e-3, -0.3, -0.1, runs=4), setting=replace(ONE, temperature=4.0)
    )
    follows = replace(draft("same-direction", math.nan, runs=6), setting=ONE, interval=None)
    found = decide([student, teacher, follows])[-1]
    assert (found.verdict, found.runs, found.p_value) == ("contradicted", 10, 1e-4)
    assert (found.interval.estimate, found.interval.low, found.interval.high) == (-0.3, -0.5, -0.1)
    assert found.adjusted_p == max(one.adjusted_p for one in decide([student, teacher]))
    # The teachers' sign is not known: there is nothing to follow.
    found = decide([student, replace(teacher, p_value=0.2), follows])[-1]
    assert (found.verdict, found.interval, found.runs) == ("cannot tell", None, 10)
    assert math.isnan(found.p_value)
    assert found.note.startswith("the teachers’ difference may have either sign")
    one_seed = replace(teacher, interval=replace(teacher.interval, seeds=1, note="one seed"))
    assert decide([student, one_seed, follows])[-1].note == "one seed"
    lost = replace(teacher, interval=None, failed=True, note="run x failed")
    found = decide([student, lost, follows])[-1]
    assert (found.verdict, found.interval, found.runs, found.note) == ("no verdict", None, 0, "run x failed")
    elsewhere = decide([student, teacher, replace(follows, setting=TWO)])[-1]
    assert (elsewhere.verdict, elsewhere.interval, elsewhere.runs) == ("cannot tell", None, 6)


def test_a_p_value_of_exactly_the_level_is_not_below_it():
    """The interval then ends at zero."""
    on_edge = interval(0.0, 0.3, 1 - LEVEL)
    assert verdict(CLAIMS[0], on_edge, 1 - LEVEL) == "cannot tell"
    small = replace(draft("better-student", 0.9, -0.2, 0.2), p_small=1 - LEVEL)
    assert decide([small])[0].verdict == "cannot tell"
    assert not replace(small, p_value=1 - LEVEL, verdict="cannot tell").changed_by_holm


MARGIN = 0.2


@pytest.mark.parametrize("look", [None, 0, 1, 2])
def test_small_to_either_side_is_an_interval_within_the_margin_at_every_look(look):
    """And other than zero, or than the margin, is one that does not contain it."""
    rng, looks, inside = np.random.default_rng(9), (3, 5, 8), set()
    claims = {name: draft(name, 1.0).claim for name in ("better-student", "no-worse-student", "larger-loss")}
    for _ in range(60):
        seeds = looks[look or 0]
        table = rng.normal(rng.uniform(-0.3, 0.3), rng.uniform(0.05, 1.0), (seeds, 100))
        own = crossed_interval(table + 0.02 * rng.standard_normal((seeds, 1)))
        for name, claim in claims.items():
            null = -MARGIN if claim.non_inferior else 0.0
            found = Finding(claim, ONE, null=null).tested(own, MARGIN)
            assert (found.of_looks, found.interval) == (False, own)
            if look is not None:
                found = found.at_look(looks, look)
                alpha = levels(looks)[look]
                half = np.sqrt(sum(v * stats.t.isf(alpha / 2, df) ** 2 for v, df in own.parts))
                assert (found.of_looks, found.interval.estimate) == (True, own.estimate)
                assert found.interval.high - own.estimate == pytest.approx(half)
            low, high = found.interval.low, found.interval.high
            assert (found.p_value < 0.05) == (not low <= null <= high)
            if name == "better-student":
                assert (found.p_small < 0.05) == (low > -MARGIN and high < MARGIN)
                assert found.p_small <= 1
                inside.add(found.p_small < 0.05)
            else:
                assert math.isnan(found.p_small)
    assert inside == {True, False}
    nothing = Finding(CLAIMS[0], ONE)
    assert nothing.at_look(looks, 0) is nothing


def test_one_seed_is_not_tested_against_the_margin():
    own = crossed_interval(np.random.default_rng(0).normal(0, 0.01, (1, 100)))
    assert math.isnan(Finding(CLAIMS[0], ONE).tested(own, MARGIN).p_small)


def test_a_finding_rests_on_the_runs_of_the_seeds_that_all_have(plan_of, tmp_path):
    runs = {seed: SimpleNamespace(each=[object(), object()]) for seed in range(4)}
    blank = Finding(CLAIMS[0], ONE, note="before")
    found, seeds = blank.on_seeds([runs, {seed: runs[seed] for seed in (0, 1, 2)}], [0, 1, 2, 3, 4])
    assert (seeds, found.runs, found.failed) == ([0, 1, 2], 6, False)  # one that counts twice counts once
    assert found.note == "without seed 3, 4: runs are missing"
    found, seeds = blank.on_seeds([runs], [0, 1, 2, 3])
    assert (seeds, found.runs, found.note) == ([0, 1, 2, 3], 8, "")
    found, seeds = blank.on_seeds([runs, {}])
    assert (seeds, found.runs, found.note) == ([], 0, "no seed has all of its runs")
    run = plan_of(tmp_path).runs[0]
    broken = BySeed({0: runs[0]}, [Failure(run, {"failed": "epoch 3: the training loss is nan"})])
    found, seeds = blank.on_seeds([runs, broken], [0])
    assert (seeds, found.failed, found.note) == ([], True, f"run {run.id} failed in epoch 3")
    assert blank.noting("first").note == "first; before"
    assert Finding(CLAIMS[0], ONE).noting("first").note == "first"


def test_a_missing_run_takes_its_seed_out_of_every_pair(fake_study):
    plan = fake_study(effect=2.0)
    lost = next(run for run in plan.runs if run.role == "student" and run.seed == 1)
    (plan.folder(lost) / JOB).unlink()
    found = by_id(judge(read_results(plan)))
    assert found["better-student"].interval.seeds == 2
    assert found["better-student"].runs == 8  # 2 students x 2 arms x 2 seeds
    assert "seed 1" in found["better-student"].note
    assert found["lower-instability"].interval.seeds == 3  # the teachers are all there
    assert found["lower-instability"].runs == 6


def test_without_any_whole_pair_there_is_nothing_to_tell(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.role == "student" and run.smoothing:
            (plan.folder(run) / JOB).unlink()
    found = judge(read_results(plan))[0]
    assert (found.interval, found.verdict) == (None, "cannot tell")
    assert "no seed" in found.note


def test_one_seed_gives_the_samples_interval_allows_no_verdict_and_is_no_test(fake_study):
    found = judge(read_results(fake_study(effect=2.0, seeds=[0])))
    student = by_id(found)["better-student"].interval
    assert "seed" in student.note
    assert student.known
    assert student.p_value < 0.001
    assert not by_id(found)["larger-loss"].interval.known  # one value per run
    claimed = [finding for finding in found if finding.claim.direction]
    assert {finding.verdict for finding in claimed} == {"cannot tell"}
    assert all(math.isnan(finding.adjusted_p) for finding in claimed)
    assert not any(finding.changed_by_holm for finding in found)


def test_a_quantity_that_was_not_logged_is_no_crash(fake_study):
    plan = fake_study()
    path = plan.folder(plan.runs[-1]) / CURVES
    lines = path.read_text().splitlines()
    empty = [line.split(",")[0] + "," * lines[0].count(",") for line in lines[1:]]
    path.write_text("".join(f"{line}\n" for line in [lines[0], *empty]))
    found = by_id(judge(read_results(plan)))["larger-loss"]
    assert found.interval is None
    assert "finite" in found.note


def test_every_temperature_and_smoothing_value_is_a_setting_of_its_own(fake_study):
    plan = fake_study(smoothing=[0.0, 0.1, 0.2], temperatures=[1.0, 4.0])
    results = read_results(plan)
    found = [(s.smoothing, s.temperature) for s in settings_of(claims_of(plan)[0], plan)]
    assert found == [(0.1, 1.0), (0.2, 1.0), (0.1, 4.0), (0.2, 4.0)]
    judged = judge(results)
    counts = {claim.id: 0 for claim in claims_of(plan)}
    for finding in judged:
        counts[finding.claim.id] += 1
    # Of teachers one for each smoothing value above the baseline, of students one for each temperature too.
    for claim in claims_of(plan):
        assert counts[claim.id] == (2 if claim.role == "teacher" or claim.id == "temperature" else 4)
    assert json.dumps([finding.setting.describe() for finding in judged])
    assert len({(finding.claim.id, finding.setting) for finding in judged}) == len(judged)


def test_similar_classes_are_chosen_by_both_arms_and_compared_in_numpy(fake_study):
    plan = fake_study(per_class=20)
    finding = by_id(judge(read_results(plan)))["similar-classes"]
    stored = {}
    for run in plan.runs:
        if run.role == "teacher":
            tensors = load_file(plan.folder(run) / LOGITS)
            stored[run.smoothing, run.seed] = tensors["logits"].astype(np.float64), tensors["labels"]
    means = np.zeros((4, 4))
    for logits, labels in stored.values():
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        means += [p[labels == c].mean(0) for c in range(4)]
    confusion = means + means.T - 1e9 * np.eye(4)
    pairs = {tuple(sorted((c, int(confusion[c].argmax())))) for c in range(4)}

    def separation(logits, labels):
        values = []
        for a, b in pairs:
            sides = [(logits[:, a] - logits[:, b])[labels == c] for c in (a, b)]
            spread = np.sqrt(np.mean([side.var(ddof=1) for side in sides]))  # classes of equal size
            values.append((sides[0].mean() - sides[1].mean()) / spread)
        return np.mean(values)

    differences = [separation(*stored[0.1, seed]) - separation(*stored[0.0, seed]) for seed in range(3)]
    assert finding.interval.estimate == pytest.approx(np.mean(differences), rel=1e-4)


def test_classes_without_images_count_in_no_pair_and_few_images_end_it_at_once(fake_study, monkeypatch):
    plan = replace(fake_study(), num_classes=7)
    rng, labels = np.random.default_rng(0), torch.arange(240) % 4 + (torch.arange(240) % 4 > 1)  # 0, 1, 3, 4
    logits = [torch.from_numpy(rng.normal(size=(240, 7))) for _ in range(2)]
    runs = [Result(run, {}, {}, []) for run in plan.runs[:2]]
    files = {run.run.id: own for run, own in zip(runs, logits, strict=True)}
    place = np.arange(240)
    monkeypatch.setattr(
        contrasts, "stored_of", lambda plan, one: Stored(files[one.run.id], labels, [], place)
    )
    measure = contrasts.separation_measure(plan, [runs])
    confusion = class_confusion([class_mean_probabilities(own, labels, 7) for own in logits])
    pairs = nearest_classes(confusion)
    for run, own in zip(runs, logits, strict=True):
        found = measure.per_sample(run).values
        np.testing.assert_array_equal(found, class_separation(own, labels, pairs))
        np.testing.assert_array_equal(measure.per_sample(run).strata, labels)
    logits[1][7, 2] = math.nan
    with pytest.raises(LskdError, match=f"^{runs[1].run.id}: "):
        contrasts.separation_measure(plan, [runs])
    labels[(labels == 3).nonzero()[2:]] = 4
    monkeypatch.setattr(contrasts, "class_mean_probabilities", None)
    with pytest.raises(LskdError, match="class 3 has 2 examples"):
        contrasts.separation_measure(plan, [runs])
    labels[:] = 4
    with pytest.raises(LskdError, match="all validation images are of one class"):
        contrasts.separation_measure(plan, [runs])


def test_two_classes_of_several_in_another_order_are_one_pair(plan_of, tmp_path, monkeypatch):
    rng, labels = np.random.default_rng(1), torch.arange(60) % 2 * 3  # 0 and 3 of four classes
    plan, logits, order = plan_of(tmp_path), torch.from_numpy(rng.normal(size=(60, 4))), rng.permutation(60)
    monkeypatch.setattr(contrasts, "stored_of", lambda plan, one: Stored(logits, labels, [], order))
    run = Result(plan.runs[0], {}, {}, [])
    found = contrasts.separation_measure(plan, [[run]]).per_sample(run)
    # Each class has the other; logits that are no class's of these two do not matter.
    expected = class_separation(logits, labels, [(0, 3), (3, 0)]).numpy()[order]
    np.testing.assert_allclose(found.values, expected)
    np.testing.assert_array_equal(found.strata, labels[order])


def names(plan):
    return {claim.id for claim in claims_of(plan)}


STUDENTS = {"better-student", "no-worse-student", "larger-loss", "loss-part-kl", "loss-part-entropy"}
TEACHERS = {"better-teacher", "no-worse-teacher", "lower-instability", "similar-classes"}


def test_a_study_tests_what_its_plan_allows_and_nothing_else(plan_of, tmp_path):
    assert names(plan_of(tmp_path)) == STUDENTS | TEACHERS | {"same-direction"}
    assert names(plan_of(tmp_path, students=[])) == TEACHERS
    assert names(replace(plan_of(tmp_path), num_classes=3)) == names(plan_of(tmp_path))
    assert names(replace(plan_of(tmp_path), num_classes=2)) == STUDENTS | TEACHERS - {"similar-classes"} | {
        "same-direction"
    }
    more = {
        "hard_weights": ([0.0, 0.5], {"more-hard-label", "gain-over-hard-weight"}),
        "temperatures": ([1.0, 4.0], {"temperature"}),
        "teachers": (
            [(name, "teacher.yaml") for name in "abc"],
            {"better-teachers", "stability-follows-accuracy"},
        ),
    }
    for key, (value, extra) in more.items():
        assert names(plan_of(tmp_path, **{key: value})) - names(plan_of(tmp_path)) == extra
    assert names(plan_of(tmp_path, teachers=[(n, "teacher.yaml") for n in "ab"])) == names(plan_of(tmp_path))


def test_each_contrast_has_the_settings_that_its_trend_is_not_over(plan_of, tmp_path):
    plan = plan_of(
        tmp_path,
        smoothing=[0.0, 0.1, 0.2, 0.3],
        teachers=[(name, "teacher.yaml") for name in "abc"],
        temperatures=[1.0, 4.0],
        hard_weights=[0.0, 0.5],
        controls=["hard", "smoothed"],
    )
    losses, arms, every = (
        [(1, 0), (1, 0.5), (4, 0), (4, 0.5)],
        (0.1, 0.2, 0.3),
        "mean over α 0, 0.1, 0.2, 0.3",
    )
    students = [(0, a, *loss, "") for loss in losses for a in arms]
    expected = {
        "better-student": students,
        "same-direction": students,
        "better-teacher": [(0, a, 1, 0, "") for a in arms],
        "better-teachers": [(0, 0.3, t, h, f"{every}; T = {t}, λ = {h}") for t, h in losses],
        "stability-follows-accuracy": [(0, 0.3, 1, 0, every)],
        "more-hard-label": [
            (0, a, t, 0, f"teacher’s α = {a}, T = {t}, λ 0 to 0.5") for t in (1, 4) for a in (0, *arms)
        ],
        "gain-over-hard-weight": [
            (0, a, t, 0, f"α {a} against 0, T = {t}, λ 0 to 0.5") for t in (1, 4) for a in arms
        ],
        "temperature": [
            (0, a, 1, h, f"α {a} against 0, T = 4 against 1, λ = {h}") for h in (0, 0.5) for a in arms
        ],
        "distillation-helps": [
            (0, a, t, h, f"teacher’s α = {a}, T = {t}, λ = {h} against labels’ α = 0")
            for t, h in losses
            for a in (0, *arms)
        ],
        "more-than-smoothing": [
            (a, a, t, h, f"teacher’s α = {a}, T = {t}, λ = {h} against labels’ α = {a}")
            for t, h in losses
            for a in arms
        ],
    }
    claims = {claim.id: claim for claim in claims_of(plan)}
    assert expected.keys() <= claims.keys()
    for name, settings_ in expected.items():
        assert settings_of(claims[name], plan) == [Setting(*one) for one in settings_], name
    # Without students a teacher's comparison has the paper's own loss, and labels are plain where they are.
    alone = plan_of(tmp_path, smoothing=[0.05, 0.1], students=[])
    assert settings_of(claims["better-teacher"], alone) == [Setting(0.05, 0.1, 1.0, 0.0)]
    kinds = {"hard_weights": [0.3], "temperatures": [2.0, 4.0, 20.0], "controls": ["hard", "real"]}
    plan = plan_of(tmp_path, ecosystem="mmcls", smoothing=[0.05, 0.1], **kinds)
    claims = {claim.id: claim for claim in claims_of(plan)}
    for name in ("distillation-helps", "real-student"):
        assert settings_of(claims[name], plan)[:2] == [
            Setting(0.0, a, 2.0, 0.3, f"teacher’s α = {a}, T = 2 against labels’ α = 0") for a in (0.05, 0.1)
        ]
    assert [one.words for one in settings_of(claims["temperature"], plan)] == [
        "α 0.1 against 0.05, T = 4, 20 against 2, λ = 0.3"
    ]
    plan = plan_of(tmp_path, hard_weights=[0.0, 0.5], controls=["hard"])
    words = settings_of(claims["distillation-helps"], plan)[-1].words
    assert words == "teacher’s α = 0.1, λ = 0.5 against labels’ α = 0"


def test_a_teacher_has_no_loss_in_words():
    setting = Setting(0.0, 0.1, 4.0, 0.5)
    assert setting.describe() == "α 0.1 against 0, T = 4, λ = 0.5"
    assert setting.describe("teacher") == "α 0.1 against 0"
    assert replace(setting, words="in words").describe("teacher") == "in words"


def test_studies_of_translation_and_of_binary_networks_have_statements_of_their_own(plan_of, tmp_path):
    translation = claims_of(replace(plan_of(tmp_path, ecosystem="fairseq"), num_classes=0))
    assert [claim.id for claim in translation] == [
        "better-student",
        "larger-loss",
        "loss-part-kl",
        "loss-part-entropy",
        "better-teacher",
        "worse-perplexity",
    ]
    assert {claim.quantity for claim in translation if claim.id.startswith("better")} == {"bleu"}
    binary = {claim.id: claim.source for claim in claims_of(plan_of(tmp_path, ecosystem="mmcls"))}
    assert binary["better-student"] == "Fig. 6"
    assert binary["larger-loss"] == "Fig. 6, left"


@pytest.mark.parametrize("task", ["images", "binary", "translation"])
def test_every_kind_of_study_has_each_statement_once_and_a_student_as_its_headline(task):
    mine = [claim for claim in CLAIMS if task in claim.tasks]
    assert len({claim.id for claim in mine}) == len(mine)
    assert mine[0].id == "better-student"
    for claim in mine:
        assert claim.text
        assert claim.tested
        assert claim.source
        assert not claim.tested.endswith(".")  # the page puts the full stop


def make_training_images(plan, counts):
    for name, count in enumerate(counts):
        folder = plan.data_dir / "train" / str(name)
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.png").touch()


@pytest.mark.parametrize(
    ("counts", "tailed"),
    [
        ([120, 50, 15, 13], set()),
        ([120, 50, 15, 12], {"", "-head", "-tail"}),
        ([101, 30, 20, 10], {"", "-head", "-tail"}),
        ([100, 30, 19, 10], {""}),  # more than 100 images are many,
        ([250, 30, 30, 20], {""}),  # fewer than 20 are few
        ([], set()),
    ],
)
def test_long_tails_are_seen_in_the_training_folders(plan_of, tmp_path, counts, tailed):
    plan = plan_of(tmp_path)
    make_training_images(plan, counts)
    assert {name for name in names(plan) if name.startswith("long")} == {
        f"long-tail{part}" for part in tailed
    }


def test_many_shot_and_few_shot_classes_are_told_apart(fake_study):
    plan = fake_study()
    make_training_images(plan, [120, 50, 15, 12])
    results = read_results(plan)
    found = by_id(judge(results))

    def difference(classes):
        values = [
            (1 if r.run.smoothing else -1) * r.correct[np.isin(r.labels, classes)].mean()
            for r in results.finished.values()
            if r.run.role == "teacher"
        ]
        return 100 * sum(values) / 3

    for claim, classes in (("long-tail", [0, 1, 2, 3]), ("long-tail-head", [0]), ("long-tail-tail", [2, 3])):
        assert found[claim].interval.estimate == pytest.approx(difference(classes))
    assert found["long-tail"].verdict == "contradicted"  # smoothing helps these teachers
    assert found["long-tail"].adjusted_p == found["better-teacher"].adjusted_p  # one number, one test
    assert (found["long-tail-head"].verdict, found["long-tail-tail"].verdict) == (None, None)


def test_shots_without_validation_images_have_no_number(fake_study):
    plan = fake_study(per_class=6)
    make_training_images(plan, [120, 50, 30, 30, 12])  # the fifth class was never validated
    found = by_id(judge(read_results(plan)))
    assert found["long-tail-head"].interval.estimate is not None
    assert found["long-tail-tail"].interval is None
    assert found["long-tail-tail"].note == "no validation image of these classes"


def test_shots_without_validation_images_have_no_number_on_the_page_and_in_its_record(fake_study):
    plan = fake_study(per_class=6)
    make_training_images(plan, [120, 50, 30, 30, 12])
    write_report(plan)
    record = {one["claim"]: one for one in json.loads((plan.root / VERDICTS_FILE).read_text())["findings"]}
    told = [record["long-tail-tail"][name] for name in ("estimate", "low", "high", "p", "verdict", "note")]
    assert told == [None] * 5 + ["no validation image of these classes"]
    (row,) = [part for part in (plan.root / "index.html").read_text().split("<tr") if "fewer than 20" in part]
    assert "No validation image of these classes." in row
    assert re.findall(r'data-label="(?:Estimate|95 % interval|p, corrected)">(.*?)</td>', row) == ["–"] * 3


def test_shots_that_are_all_right_are_bounded_by_the_rule_of_three(plan_of, tmp_path):
    plan = plan_of(tmp_path)
    make_training_images(plan, [120, 12])
    results = simulate(plan, World(per_class=40), 0)
    for one in results.finished.values():
        one.correct[one.labels == 1] = 1.0
    found = by_id(judge(results))["long-tail-tail"].interval
    assert (found.method, found.samples, found.high) == ("rule of three", 40, 100 * 3 / 40)


def test_the_class_of_an_image_is_its_folder():
    for key in ("val/pike/0001.png", "pike/0001.png", "a/val/pike/0001.png"):
        assert contrasts.class_of_key(key) == "pike"
    assert contrasts.class_of_key("0001.png") == ""


# Weighted sums of runs


def of_runs(tables, students=1):
    """The runs of one kind, ``{seed: values}``; several students of a seed have it as their mean."""
    rng = np.random.default_rng(len(tables))
    found = {}
    for seed, values in tables.items():
        spread = rng.standard_normal((students, 1)) * 0.01
        parts = [SimpleNamespace(values=values + one) for one in spread - spread.mean()]
        found[seed] = SimpleNamespace(values=values, each=parts)
    for one in found.values():
        for part in one.each:
            part.each = [part]
    return found


def by_sample(**more):
    return Measure(lambda run: PerSample(run.values, **more), lambda run: math.nan)


SEEDS = [3, 5, 8]
WEIGHTS = [[-1.0, 0.5, 0.5], [-1.0, 0.25, 0.75]]


def of_networks(weights, students=1, seeds=SEEDS):
    """Random values of every kind of run of every network."""
    rng = np.random.default_rng(11)
    return [
        [(w, of_runs({seed: rng.normal(size=30) for seed in seeds}, students)) for w in row]
        for row in weights
    ]


def spelled_out(networks, seeds=SEEDS):
    """The weighted sum at each seed and sample, mean over networks."""
    return np.array(
        [np.mean([sum(w * runs[s].values for w, runs in cells) for cells in networks], 0) for s in seeds]
    )


def assert_same(found, expected):
    assert found.by_seed == pytest.approx(expected.by_seed)
    for name in ("estimate", "low", "high", "p_value"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name
    for name in ("seeds", "samples", "method", "note"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS[:1], [[-1.0, 1.0]]])
def test_a_contrast_is_the_weighted_sum_at_each_seed_and_sample(weights):
    networks, strata = of_networks(weights), np.arange(30) % 3
    found = estimate_contrast(by_sample(scale=100.0, strata=strata), networks, SEEDS)
    assert_same(found, crossed_interval(spelled_out(networks), strata).scaled(100))
    assert found.estimate == pytest.approx(100 * spelled_out(networks).mean())
    one_seed = estimate_contrast(by_sample(scale=100.0), networks, SEEDS[:1])
    assert_same(one_seed, crossed_interval(spelled_out(networks, SEEDS[:1])).scaled(100))
    troubled = Measure(
        lambda run: PerSample(
            run.values, scale=100.0, problem="odd" if run is networks[-1][-1][1][8] else ""
        ),
        lambda run: math.nan,
    )
    found = estimate_contrast(troubled, networks, SEEDS)
    assert (found.known, found.note, found.seeds, found.samples) == (False, "odd", 3, 30)
    assert found.estimate == pytest.approx(100 * spelled_out(networks).mean())


def test_a_quantity_of_whole_runs_is_compared_by_seed():
    networks = of_networks(WEIGHTS)
    measure = Measure(lambda run: None, lambda run: run.values[0])
    found = estimate_contrast(measure, networks, SEEDS)
    by_seed = spelled_out(networks)[:, 0]
    half = stats.t.isf(0.025, 2) * by_seed.std(ddof=1) / np.sqrt(3)
    assert (found.estimate, found.high) == pytest.approx((by_seed.mean(), by_seed.mean() + half))
    networks[0][1][1][5].values[0] = math.nan
    with pytest.raises(LskdError, match="leave out the run that diverged"):
        estimate_contrast(measure, networks, SEEDS)


@pytest.mark.parametrize(
    ("weights", "bounded", "method"),
    [
        ([[-1.0, 1.0]], True, "rule of three"),
        ([[-1.0, 1.0]], False, "t interval, seeds and samples crossed"),
        ([[-1.0, 1.0], [-1.0, 1.0]], True, "rule of three"),
        ([[-1.0, 1.0], [-0.5, 0.5]], True, "t interval, seeds and samples crossed"),
    ],
)
def test_the_rule_of_three_is_for_right_answers_of_two_runs(weights, bounded, method):
    answers = {seed: np.ones(30) for seed in SEEDS}
    networks = [[(w, of_runs(answers)) for w in row] for row in weights]
    assert estimate_contrast(by_sample(bounded=bounded), networks, SEEDS).method == method


@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[:2]])
def test_what_students_of_a_teacher_vary_is_known_where_all_have_as_many(seeds):
    networks = of_networks(WEIGHTS, students=4)
    found = estimate_contrast(by_sample(scale=100.0), networks, seeds)
    plain = crossed_interval(spelled_out(networks, seeds)).scaled(100)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    means = [
        [
            100 * np.mean([sum(w * runs[s].each[k].values.mean() for w, runs in c) for c in networks])
            for k in range(4)
        ]
        for s in seeds
    ]
    within = np.mean([np.var(of_seed, ddof=1) for of_seed in means])
    assert found.students == 4
    assert found.by_student == pytest.approx(Part(within / (4 * len(seeds)), 3 * len(seeds)))
    others = of_networks(WEIGHTS)
    for nothing in (
        estimate_contrast(by_sample(), networks, SEEDS[:1]),
        estimate_contrast(by_sample(), others, SEEDS),
        estimate_contrast(by_sample(), [networks[0][:2] + others[0][2:]], SEEDS),
        estimate_contrast(by_sample(problem="odd"), networks, SEEDS),
    ):
        assert (nothing.students, nothing.by_student) == (1, None)


def test_the_fitted_change_is_that_of_numpys_line():
    rng = np.random.default_rng(12)
    for points in ([0.0, 0.5, 1.0], [0.0, 0.1], [0, 1, 5, 6]):
        y = rng.normal(size=len(points))
        slope = np.polyfit(points, y, 1)[0]
        change = np.dot(contrasts.fitted_change(points), y)
        assert change == pytest.approx(slope * (points[-1] - points[0]))


def test_the_difference_is_smoothed_minus_baseline():
    assert contrasts.difference(("without", "with")) == [(-1, "without"), (1, "with")]


def test_what_drawn_classes_cannot_say_is_no_run_that_diverged():
    runs = {seed: SimpleNamespace(each=[1]) for seed in (0, 1)}
    measure = Measure(lambda run: None, lambda run: math.nan)
    with pytest.raises(LskdError, match="no run has measured it; of drawn classes"):
        estimate_contrast(measure, [[(1.0, runs), (-1.0, runs)]], [0, 1])


# What a study's claims are estimated as, from its runs


ABC = [(name, "teacher.yaml") for name in "abc"]
PAIR = [(name, "student.yaml") for name in "st"]


def in_points(results, seed, role, smoothing, temperature=1.0, hard_weight=0.0, real=False, quantity="top1"):
    """A quantity's mean over the networks of one kind."""
    kind = role, smoothing, temperature, hard_weight, real
    found = [
        100 * one.correct.mean() if quantity == "top1" else one.curves[quantity][-1]
        for one in results.finished.values()
        if one.run.seed == seed
        if (one.run.role, one.run.smoothing, one.run.temperature, one.run.hard_weight, one.run.real) == kind
    ]
    assert found
    return np.mean(found)


def by_hand(results, finding, seed):
    """The estimate of a finding at one seed."""
    claim, own, plan = finding.claim, finding.setting, results.plan

    def student(alpha, t=own.temperature, hard=own.hard_weight):
        return in_points(results, seed, "student", alpha, t, hard, quantity=claim.quantity)

    def gain(*loss):
        return student(own.smoothing, *loss) - student(plan.smoothing[0], *loss)

    points = sorted({run.hard_weight for run in plan.runs if run.role == "student"})
    temperatures = sorted({run.temperature for run in plan.runs if run.role == "student"})
    if claim.control:
        labels = own.smoothing if claim.control == "smoothed" else 0.0
        own_labels = in_points(results, seed, "control", labels, 1.0, 1.0, claim.control == "real")
        return student(own.smoothing) - own_labels
    if claim.contrast in ("hard-weight", "gain-hard-weight"):
        of = student if claim.contrast == "hard-weight" else lambda _, *loss: gain(*loss)
        values = [of(own.smoothing, own.temperature, hard) for hard in points]
        return np.polyfit(points, values, 1)[0] * (points[-1] - points[0])
    if claim.contrast == "gain-temperature":
        low, *higher = [gain(t, own.hard_weight) for t in temperatures]
        return np.mean(higher) - low
    if claim.role == "teacher":
        arms = [in_points(results, seed, "teacher", a) for a in (own.smoothing, plan.smoothing[0])]
        return arms[0] - arms[1]
    return gain()


def test_every_estimate_is_what_its_contrast_says_at_each_seed(plan_of, tmp_path):
    plan = plan_of(
        tmp_path,
        ecosystem="mmcls",
        smoothing=[0.0, 0.1, 0.2],
        teachers=ABC[:2],
        students=PAIR,
        temperatures=[1.0, 4.0, 20.0],
        hard_weights=[0.0, 0.3, 1.0],
        controls=["hard", "smoothed", "real"],
    )
    results = simulate(plan, World(student_gain=1.0, hard=-0.5, hot=-1.0, per_class=10), 0)
    seen = set()
    for finding in judge(results):
        assert finding.null == (-0.2 if finding.claim.non_inferior else 0.0)
        if finding.claim.quantity != "instability" and finding.claim.contrast != "direction":
            expected = [by_hand(results, finding, seed) for seed in plan.seeds]
            assert finding.interval.by_seed == pytest.approx(expected), (finding.claim.id, finding.setting)
            assert finding.interval.estimate == pytest.approx(np.mean(expected))
            seen.add(finding.claim.contrast if not finding.claim.control else finding.claim.control)
    contrasts_ = {"difference", "hard-weight", "gain-hard-weight", "gain-temperature"}
    assert seen == contrasts_ | {"hard", "smoothed", "real"}


def test_networks_are_named_by_the_teacher_where_there_are_several(plan_of, tmp_path):
    for teachers, names_ in ((ABC[:2], ["s of a", "t of a", "s of b", "t of b"]), (ABC[:1], ["s", "t"])):
        plan = plan_of(tmp_path, teachers=teachers, students=PAIR, smoothing=[0.0, 0.1, 0.2])
        results = simulate(plan, World(per_class=3), 0)
        found = groups(results, CLAIMS[0], TWO)
        assert list(found) == names_
        for name, arms in found.items():
            student, _, teacher = name.partition(" of ")
            for alpha, runs in zip((0.0, 0.2), arms, strict=True):
                own = [one.run for one in runs.values()]
                assert {(run.model, run.smoothing) for run in own} == {(student, alpha)}
                assert {plan.by_id[run.teacher].model for run in own} == {teacher or "a"}


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_a_trend_is_over_networks_each_the_mean_of_its_arms_and_students(plan_of, tmp_path, seeds):
    plan = plan_of(tmp_path, teachers=ABC, students=PAIR, seeds=seeds)
    results = simulate(plan, World(slope=1.0, network_spread=3.0, per_class=50), 4)
    found = by_id(judge(results))

    def table(role, values):
        return np.array(
            [
                [
                    np.mean(
                        [values(one) for one in of_kind(results, role=role, teacher=t) if one.run.seed == s],
                        0,
                    )
                    for s in seeds
                ]
                for t, _ in ABC
            ]
        )

    top1 = table("teacher", lambda one: 100 * one.correct)
    labels = next(iter(results.finished.values())).labels
    unstable = table("teacher", lambda one: target_std_pseudo_values(one.target_probability, labels))
    for name, expected, runs in (
        ("better-teachers", network_trend(top1, table("student", lambda one: 100 * one.correct)), 18),
        ("stability-follows-accuracy", network_trend(top1, unstable, labels), 6),
    ):
        assert expected.known
        assert_same(found[name].interval, expected)
        assert found[name].p_value == pytest.approx(expected.p_value)
        assert found[name].runs == runs * len(seeds)


class Odd(ImageResult):
    """A result that allows no interval."""

    def _per_sample(self, quantity):
        found = super()._per_sample(quantity)
        return replace(found, problem=f"a {self.run.role}’s are odd")


@pytest.mark.parametrize(
    ("odd", "students", "teachers"),
    [
        (["teacher"], "a teacher’s are odd", "a teacher’s are odd"),
        (["student"], "a student’s are odd", ""),
        (["teacher", "student"], "a teacher’s are odd", "a teacher’s are odd"),
    ],
)
def test_a_trend_of_what_allows_no_interval_has_none(plan_of, tmp_path, odd, students, teachers):
    results = simulate(plan_of(tmp_path, teachers=ABC), World(per_class=10), 0)
    for name, one in results.finished.items():
        if one.run.role in odd and "c" in (one.run.model, one.run.id.split("-")[3]):
            results.finished[name] = Odd(**vars(one))
    found = by_id(judge(results))
    for name, note in (("better-teachers", students), ("stability-follows-accuracy", teachers)):
        assert (found[name].interval is None, found[name].note) == (bool(note), note)


def test_a_trend_without_a_number_is_none(plan_of, tmp_path):
    results = simulate(plan_of(tmp_path, teachers=ABC), World(per_class=10), 0)
    next(iter(results.finished.values())).correct[3] = math.nan
    found = by_id(judge(results))["better-teachers"]
    assert (found.interval, found.verdict) == (None, "cannot tell")
    assert "NaN or infinity; leave out the run that diverged" in found.note
    empty = Results(results.plan, {})
    assert by_id(judge(empty))["better-teachers"].note == "no seed has all of its runs"


@pytest.mark.parametrize(("change", "pooled"), [("", 4), ("agree", 3), ("seeds", 3), ("two", 0)])
def test_settings_are_pooled_where_three_have_all_the_seeds_and_vary(plan_of, tmp_path, change, pooled):
    temperatures = [1.0, 2.0, 4.0, 20.0]
    plan = plan_of(tmp_path, students=PAIR[:1], temperatures=temperatures)
    results = simulate(replace(plan, pool_seed_variance=True), World(per_class=20, luck=0.5), 0)
    for name, one in list(results.finished.items()):
        last = one.run.temperature == 20.0
        if last and change == "agree":  # the same images are right at every seed
            rng = np.random.default_rng(int(one.run.smoothing * 10))
            results.finished[name] = replace(one, correct=np.round(rng.random(40)))
        if (last and change == "seeds" and one.run.seed == 0) or (change == "two" and one.run.seed == 2):
            del results.finished[name]
    mine = [one for one in judge(results) if one.claim.id == "better-student"]
    apart = replace(results, plan=replace(results.plan, pool_seed_variance=False))
    before = [one.interval for one in judge(apart)][:4]
    own = [one.interval for one in mine]
    assert [f"over {pooled} settings" in one.method for one in own] == [n < pooled for n in range(4)]
    parts = moderated([one.by_seed for one in before[:pooled]]) if pooled else []
    assert [one.parts[0] for one in own[:pooled]] == parts
    assert own[pooled:] == before[pooled:]
    for finding in mine:  # the p-values are those of the pooled intervals
        assert finding.p_value == finding.interval.p_against(0.0)
        assert finding.p_small == Finding(CLAIMS[0], ONE).tested(finding.interval, plan.margin).p_small


def test_a_study_by_looks_is_judged_at_its_look(plan_of, tmp_path):
    plan = plan_of(tmp_path, students=PAIR[:1])
    results = simulate(plan, World(per_class=20), 0)
    plain = judge(results)[0]
    found = judge(replace(results, plan=replace(results.plan, looks=[2, 3, 5])))[0]
    expected = plain.interval.at_level(1 - levels([2, 3, 5])[1])
    assert (found.of_looks, found.interval) == (True, expected)
    assert not plain.of_looks
