"""Recommendations: what each verdict allows, over random tables of verdicts and simulated studies."""

import itertools
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from lskd_study.claims import CLAIMS, judge
from lskd_study.claims.findings import Finding
from lskd_study.claims.outlook import after, line_to_change, prospect, seconds_a_seed, two_digits
from lskd_study.claims.recommendation import (
    CHOICES,
    TEACHER,
    WHY,
    Recommendation,
    recommend,
    state_of,
)
from lskd_study.claims.statements import Setting, claims_of
from lskd_study.claims.statements import settings_of as settings_of_claim
from lskd_study.results.results import Failure
from lskd_study.stats.intervals import Part, no_interval, parts_interval
from simulated import World, simulate

pytestmark = pytest.mark.unit
STUDENT = {"students": [("s", "student.yaml")]}
VERDICTS = ("supported", "contradicted", "too small to matter", "cannot tell", "no verdict")
SIGNED = re.compile(r"[+−]\d+\.\d\d")
# What no text may say where nothing was decided.
PREFERS = re.compile(
    r"Distil from|Do not distil|Distilling (pays|gives)|Prefer|prefer|[Rr]ather|raised|lowered"
)


def claim_of(name, task="images"):
    for claim in CLAIMS:
        if claim.id == name and task in claim.tasks:
            return claim
    student = claim_of("better-student")
    return replace(student, id=name)  # of a control


def finding(name, verdict, setting, estimate=None, seeds=3, half=2.0, task="images"):
    """A finding whose estimate fits its verdict; of others it lies near zero."""
    claim = claim_of(name, task)
    if estimate is None:
        sign = {"supported": 3, "contradicted": -3}.get(verdict, 0.05)
        estimate = sign * (claim.direction if sign != 0.05 else 1)
    variance = (half / 4.303) ** 2
    interval = parts_interval(estimate, [Part(variance, 2), Part(0.0, 100)], (seeds, 500), "t interval")
    if verdict == "no verdict":
        return Finding(claim, setting, verdict=verdict, failed=True, note="run x failed in epoch 3")
    return Finding(claim, setting, interval, 0.9, verdict=verdict)


def with_jobs(results, seconds=60.0):
    """The results with what a job's record has of time."""
    job = {"wall_time_s": seconds, "resumed": 0, "data": {}}
    finished = {
        name: replace(one, job={**job, "seed": one.run.seed}) for name, one in results.finished.items()
    }
    return replace(results, finished=finished)


@pytest.fixture
def study(plan_of, tmp_path):
    """Make the results of a study whose runs say nothing; its findings are made by hand."""

    def make(**matrix):
        plan = plan_of(tmp_path, **{**STUDENT, **matrix})
        return with_jobs(simulate(plan, World(per_class=5), 0))

    return make


def settings_of(plan):
    students = [run for run in plan.runs if run.role == "student"]
    losses = list(dict.fromkeys((run.temperature, run.hard_weight) for run in students)) or [(1.0, 0.0)]
    baseline, *others = plan.smoothing
    return [Setting(baseline, alpha, *loss) for loss in losses for alpha in others]


ONE = Setting(0.0, 0.1, 1.0, 0.0)


# One verdict, one study


@pytest.mark.parametrize(
    ("student", "teacher", "sentence", "reason"),
    [
        (
            "supported",
            "supported",
            "Distil from the teacher with α = 0.1.",
            "raised the teachers’ own accuracy by +3",
        ),
        (
            "contradicted",
            "supported",
            "Distil from the teacher without smoothing, not from the one with α = 0.1.",
            "−3.00",
        ),
        (
            "too small to matter",
            "contradicted",
            "Either teacher will do.",
            "lowered the teachers’ own accuracy: −3",
        ),
        (
            "cannot tell",
            "supported",
            "Either teacher will do, as far as this study can tell.",
            "no effect on students was seen",
        ),
        (
            "no verdict",
            "cannot tell",
            "No recommendation: run x failed in epoch 3.",
            "No effect on the teachers’",
        ),
    ],
)
def test_the_verdict_on_students_says_which_teacher_to_take(study, student, teacher, sentence, reason):
    found = recommend(
        study(), [finding("better-student", student, ONE), finding("better-teacher", teacher, ONE)]
    )
    assert found.sentence == sentence
    assert reason in found.reason
    assert "not compared with each other" not in found.unknown


def test_what_is_not_known_and_what_would_decide_it_stands_in_it(study):
    found = recommend(study(), [finding("better-student", "cannot tell", ONE, estimate=0.66)])
    # A minute a run, 4 runs a seed, two seeds more; t(4) = 2.776 in place of t(2) = 4.303.
    half = 2 * 2.776 / 4.303 * np.sqrt(3 / 5)
    assert (
        "An effect on students from −1.34 to +2.66 points is possible; 5 seeds (8.0 min more of runs) would "
        in found.unknown
    )
    assert f"about ±{half:.2g}" in found.unknown
    # Looked at after 3 and 5: `test_sequential` has what that does.
    assert "[0, 1, 2, 3, 4]`; to look again turns a claim's 5 % into 8 %" in found.unknown
    assert "Whether distilling pays at all: not tested; `controls: [hard]`" in found.unknown
    assert "would narrow the interval to" in found.unknown
    assert found.cost == "A teacher takes 60 s; a student takes 60 s; all 12 runs took 12 min."
    results = study()
    again = replace(
        results, finished={n: replace(o, job=o.job | {"resumed": 1}) for n, o in results.finished.items()}
    )
    assert recommend(again, []).cost.endswith(
        "12 runs took 12 min (of 12 resumed ones the last part counts)."
    )
    none = recommend(replace(results, finished={}), [finding("better-student", "cannot tell", ONE)])
    assert none.cost == ""
    assert "5 seeds would narrow the interval" in none.unknown


def test_of_several_settings_the_widest_interval_is_the_one_to_narrow(study):
    results = study(smoothing=[0.0, 0.1, 0.2])
    both = [
        finding("better-student", "cannot tell", replace(ONE, smoothing=alpha), estimate=0.0, half=half)
        for alpha, half in ((0.1, 0.5), (0.2, 4.0))
    ]
    narrowed = 4 * 2.776 / 4.303 * np.sqrt(3 / 5)
    unknown = recommend(results, both).unknown
    assert "An effect on students from −4.00 to +4.00 points is possible" in unknown
    assert f"would narrow the widest interval to about ±{narrowed:.2g}: `seeds:" in unknown


def test_where_samples_are_the_limit_no_seeds_are_asked_for(study):
    one = finding("better-student", "cannot tell", ONE)
    interval = parts_interval(0.1, [Part(1e-6, 2), Part(1.0, 499)], (3, 500), "t interval")
    found = recommend(study(), [replace(one, interval=interval)])
    assert "more seeds would hardly narrow that: the 500 validation images are the limit" in found.unknown
    assert "the same command again" not in found.unknown


@pytest.mark.parametrize(("seeds", "more"), [(20, (40, 80)), (40, (80, 160))])
@pytest.mark.parametrize("samples", [0, 600])
def test_seeds_are_named_relative_to_those_at_hand(study, seeds, more, samples):
    """Where seeds are most of the variance they can be added without end; a loss has no samples."""
    parts = [Part(1.0, seeds - 1), Part(0.01, samples - 1)] if samples else [Part(1.0, seeds - 1)]
    interval = parts_interval(0.1, parts, (seeds, samples), "t interval")
    one = replace(finding("better-student", "cannot tell", ONE), interval=interval)
    said = after(one)
    assert re.findall(r"with (\d+)", said) == [str(number) for number in (seeds, *more)]
    plan = study(seeds=list(range(seeds))).plan
    assert line_to_change(plan, one) == f"seeds: {list(range(more[0]))}"
    unknown = recommend(study(seeds=[0, 1]), [one]).unknown
    assert "limit" not in said + unknown


def test_what_would_decide_it_where_more_seeds_say_nothing():
    one = finding("better-student", "cannot tell", ONE, seeds=1)
    assert after(one).startswith("a second seed")
    several = finding("better-teachers", "cannot tell", ONE)
    several = replace(several, interval=replace(several.interval, networks=4))
    assert after(several).startswith("more teacher networks than these 4")
    assert after(replace(several, of_looks=True)) == ""
    assert after(replace(one, verdict="supported")) == ""
    taken_back = replace(finding("better-student", "cannot tell", ONE, estimate=2.5), p_value=0.04)
    assert after(taken_back).startswith("uncorrected ±2 with 3 seeds; about ±")


def test_missing_runs_are_finished_before_seeds_are_added(study):
    one = finding("better-student", "cannot tell", ONE, seeds=3)
    found = recommend(study(seeds=[0, 1, 2, 3, 4]), [one])
    assert "; the same command again finishes the runs that are missing" in found.unknown
    assert "`seeds:" not in found.unknown


def test_time_is_that_of_finished_runs(study):
    """A run that broke off took less, and the student of a failed teacher none."""
    results = study(seeds=[0, 1, 2])
    expected = seconds_a_seed(results)
    run = next(run for run in results.plan.runs if run.role == "student")
    finished = {name: one for name, one in results.finished.items() if name != run.id}
    failed = {run.id: Failure(run, {"failed": "its teacher failed", "wall_time_s": 0.0})}
    assert seconds_a_seed(replace(results, finished=finished, failed=failed)) == expected == 4 * 60.0


def test_an_interval_without_zero_that_the_correction_took_back_prefers_nothing(study):
    one = replace(finding("better-student", "cannot tell", ONE, estimate=2.5), p_value=0.04)
    found = recommend(study(), [one])
    assert found.sentence == "This study cannot tell these teachers apart."
    assert "holds after correction" in found.reason
    assert "from +0.00 to +4.50 points is possible" in found.unknown


def test_one_seed_and_missing_runs_recommend_nothing_yet(study):
    one = finding("better-student", "cannot tell", ONE, seeds=1)
    assert recommend(study(seeds=[0]), [one]).sentence.startswith("No recommendation yet: one seed")
    missing = Finding(
        claim_of("better-student"), ONE, note="no seed has all of its runs", verdict="cannot tell"
    )
    assert recommend(study(), [missing]).sentence == "No recommendation yet: no seed has all of its runs."
    same = replace(one, interval=no_interval(2.0, 3, 500, "t", "the difference is the same in every run"))
    found = recommend(study(), [same])
    assert found.sentence == "No recommendation yet: the difference is the same in every run."


def test_runs_that_cannot_be_compared_bar_every_recommendation(study):
    found = recommend(study(), [finding("better-student", "supported", ONE)], "the data changed")
    assert (found.sentence, found.reason, found.unknown) == ("No recommendation: the data changed.", "", "")
    assert found.cost.startswith("A teacher takes")


def test_as_good_by_the_margin_is_no_harm(study):
    found = recommend(
        study(),
        [finding("better-student", "cannot tell", ONE), finding("no-worse-student", "supported", ONE)],
    )
    assert found.sentence == "The teacher with α = 0.1 can be taken: it costs students less than 0.2 points."
    assert "lose less than 0.2 points" in found.reason


@pytest.mark.parametrize(
    ("name", "verdict", "setting"),
    [
        ("no-worse-student", "cannot tell", ONE),
        ("no-worse-student", "supported", replace(ONE, smoothing=0.2)),
        ("no-worse-teacher", "supported", ONE),
        ("better-teacher", "supported", ONE),
    ],
)
def test_another_verdict_makes_no_harm_of_nothing(study, name, verdict, setting):
    found = recommend(
        study(), [finding("better-student", "cannot tell", ONE), finding(name, verdict, setting)]
    )
    assert found.sentence == "Either teacher will do, as far as this study can tell."


def test_of_several_estimates_the_ends_are_given_and_what_each_can_be_once(study):
    results = study(smoothing=[0.0, 0.1, 0.2, 0.3, 0.4])
    arms = [replace(ONE, smoothing=alpha) for alpha in (0.1, 0.2, 0.3, 0.4)]
    found = recommend(
        results,
        [finding("better-student", "supported", arm, 3.0 + n) for n, arm in enumerate(arms[:3])]
        + [finding("better-student", "cannot tell", arms[3], 0.5)],
    )
    # The page's answer has the first one's interval: of +3.00 ± 2.00.
    assert "Students (α = 0.1, 0.2 and 0.3) gained +3.00 to +5.00 points of accuracy" in found.reason
    assert "An effect on students (α = 0.4) from −1.50 to +2.50 points is possible" in found.unknown
    assert "n effect on students (α = 0.2 and 0.3) from +2.00 to +7.00 points is possible" in found.unknown
    assert "not compared with each other, only with α = 0." in found.unknown
    assert found.unknown.count("is possible") == 2
    four = recommend(results, [finding("better-student", "supported", arm, 3.0) for arm in arms]).reason
    assert four == "Students gained +3.00 points of accuracy."
    results = study(smoothing=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    five = [finding("better-student", "supported", arm, 3.0) for arm in arms]
    five.append(finding("better-student", "contradicted", replace(ONE, smoothing=0.5)))
    reason = recommend(results, five).reason
    assert reason.startswith("Students (α = 0.1, 0.2, 0.3 and 0.4) gained +3.00 points")
    assert "students (α = 0.5) lost accuracy: −3.00 points" in reason
    several = study(smoothing=[0.0, 0.1, 0.2])
    assert recommend(several, [finding("better-student", "cannot tell", arms[0])]).sentence.startswith(
        "Any of these teachers will do"
    )


def test_a_loss_that_was_not_corrected_away_ends_at_zero(study):
    one = replace(finding("better-student", "cannot tell", ONE, estimate=-2.5), p_value=0.04)
    assert "An effect on students from −4.50 to +0.00 points" in recommend(study(), [one]).unknown
    sure = finding("better-student", "supported", ONE, estimate=4.0)
    other = replace(sure, setting=replace(ONE, smoothing=0.2))
    unknown = recommend(study(smoothing=[0.0, 0.1, 0.2]), [sure, other]).unknown
    assert "An effect on students (α = 0.2) from +2.00 to +6.00 points is possible" in unknown


def test_a_study_by_looks_says_when_the_next_one_is(study):
    results = study(seeds=[0, 1, 2])
    one = replace(finding("better-student", "cannot tell", ONE), of_looks=True)
    for looks, said in (
        ([3, 5, 8], "; the next look is after 5 seeds."),
        ([2, 3, 8, 9], "; the next look is after 8 seeds."),
        ([2, 3], "; no look is left."),
    ):
        unknown = recommend(replace(results, plan=replace(results.plan, looks=looks)), [one]).unknown
        assert f"An effect on students from −1.95 to +2.05 points is possible{said}" in unknown
    other = finding("better-student", "cannot tell", replace(ONE, smoothing=0.2))
    decided = [finding("better-student", "supported", ONE), replace(other, of_looks=True)]
    results = study(seeds=[0, 1, 2], smoothing=[0.0, 0.1, 0.2])
    looks = replace(results, plan=replace(results.plan, looks=[3, 5]))
    assert "; the headline is decided, so there is no further look." in recommend(looks, decided).unknown


def test_what_a_study_does_not_test_is_asked_where_it_could_be(study):
    one = finding("better-student", "cannot tell", ONE)

    def unknown(**matrix):
        return recommend(study(**matrix), [one]).unknown

    plain, networks = unknown(), "Which teacher network teaches best: not tested, which takes three of them"
    for text in (networks, "Which T is best", "Effects are means over"):
        assert text not in plain
    pair = [(name, "teacher.yaml") for name in "ab"]
    assert networks in unknown(teachers=pair)
    assert "Effects are means over 1 student of 2 teacher networks; none" in unknown(teachers=pair)
    two = [(name, "student.yaml") for name in "st"]
    assert "Effects are means over 2 students; none was tested" in unknown(students=two)
    assert "Which T is best: not tested, only how the gain" in unknown(temperatures=[1.0, 4.0])


def test_what_is_missing_beside_a_control_leaves_what_is_there(study):
    arms = [replace(ONE, smoothing=alpha, words="beside a control") for alpha in (0.0, 0.1)]
    student = finding("better-student", "cannot tell", ONE)

    def said(*helps):
        unknown = recommend(study(), [student, *helps]).unknown
        return unknown.partition("Whether distilling")[2].partition(". ")[0].removesuffix(".")

    there = [finding("distillation-helps", "cannot tell", arm) for arm in arms]
    gone = [replace(one, interval=None, note=f"nothing of {one.setting.smoothing:g}") for one in there]
    flat = replace(there[0], interval=no_interval(0.0, 3, 500, "t", "the same everywhere"))
    assert said(*there).startswith(" pays at all: an effect from −1")
    assert said(gone[0], there[1]).startswith(" from the teacher with α = 0.1 pays at all: an effect from −1")
    assert said(flat, there[1]).startswith(" from the teacher with α = 0.1 pays at all: an effect from −1")
    assert said(flat) == " pays at all: the same everywhere"
    assert said(replace(gone[0], note="")) == " pays at all: there is no result"
    failed = [finding("distillation-helps", "no verdict", arm) for arm in arms]
    assert said(failed[0]) == " pays at all: run x failed in epoch 3"
    unknown = recommend(study(), [student, failed[0], there[1]]).unknown
    assert "Whether distilling from the teacher without smoothing pays at all: run x failed in" in unknown


def test_arms_that_were_not_decided_stand_beside_the_baseline(study):
    results = study(smoothing=[0.0, 0.1, 0.2, 0.3])
    three = [replace(ONE, smoothing=alpha) for alpha in (0.1, 0.2, 0.3)]

    def sentence(*verdicts):
        return recommend(
            results, [finding("better-student", v, s) for v, s in zip(verdicts, three, strict=True)]
        ).sentence

    assert (
        sentence("supported", "supported", "contradicted") == "Distil from the teacher with α = 0.1 or 0.2."
    )
    assert (
        sentence("contradicted", "cannot tell", "too small to matter")
        == "Distil from the teacher without smoothing or with α = 0.2 or 0.3, not from the one with α = 0.1."
    )
    some = sentence("too small to matter", "cannot tell", "no verdict")
    assert some == "Any of the teachers with α = 0, 0.1 or 0.2 will do, as far as this study can tell."
    assert sentence("no verdict", "no verdict", "no verdict").startswith("No recommendation: run x failed")
    taken_back = replace(finding("better-student", "cannot tell", three[0], estimate=2.5), p_value=0.04)
    found = recommend(results, [taken_back, finding("better-student", "no verdict", three[1])])
    assert found.sentence == "This study cannot tell the teachers with α = 0 and 0.1 apart."
    results = study(smoothing=[0.05, 0.1, 0.2])
    both = [finding("better-student", "supported", Setting(0.05, alpha, 1.0, 0.0)) for alpha in (0.1, 0.2)]
    assert "compared with each other, only with α = 0.05." in recommend(results, both).unknown
    worse = [replace(one, verdict="contradicted") for one in both]
    said = "Distil from the teacher with α = 0.05, not from the one with α = 0.1 or 0.2."
    assert recommend(results, worse).sentence == said


def test_temperatures_and_hard_weights_are_told_apart_where_they_differ(study):
    results = study(temperatures=[1.0, 4.0], hard_weights=[0.0, 0.5])
    first, second, third, fourth = settings_of(results.plan)
    verdicts = ("supported", "supported", "contradicted", "contradicted")
    found = recommend(
        results,
        [
            finding("better-student", v, s)
            for v, s in zip(verdicts, (first, second, third, fourth), strict=True)
        ]
        + [
            finding(
                "more-hard-label", "supported", replace(first, words="teacher’s α = 0.1, T = 1, λ 0 to 0.5")
            )
        ],
    )
    assert found.sentence == (
        "For T = 1, λ = 0; T = 1, λ = 0.5: distil from the teacher with α = 0.1. For T = 4, λ = 0; "
        "T = 4, λ = 0.5: distil from the teacher without smoothing, not from the one with α = 0.1. "
        "Prefer the smaller λ: −3.00 points from the smallest to the largest."
    )
    assert "Which T is best: not tested" in found.unknown


def over_grid(study, **verdicts):
    """The sentence of a study of three smoothing values and temperatures, by verdicts on each."""
    results = study(smoothing=[0.0, 0.1, 0.2], temperatures=[1.0, 4.0, 16.0], controls=["hard", "smoothed"])
    found = []
    for claim in claims_of(results.plan):
        verdict = verdicts.get(claim.id.replace("-", "_"))
        if verdict is not None:
            found += [
                finding(claim.id, verdict(one.smoothing, one.temperature), one)
                for one in settings_of_claim(claim, results.plan)
            ]
    return recommend(results, found).sentence


def test_where_it_harms_at_one_temperature_no_teacher_is_named_for_that(study):
    def at(bad, verdict="contradicted"):
        return lambda alpha, temperature: verdict if temperature in bad else "cannot tell"

    assert over_grid(study, better_student=at(()), distillation_helps=at((16,))) == (
        "For T = 1 and 4: any of these teachers will do, as far as this study can tell. Do not distil at "
        "T = 16: −3.00 points against the same network trained on the labels alone."
    )
    gains = {"better_student": lambda alpha, t: "supported" if (alpha, t) == (0.1, 1) else "cannot tell"}
    found = over_grid(study, **gains, distillation_helps=at((1, 4)))
    assert found.startswith("For T = 16: any of these teachers will do")
    assert "Do not distil at T = 1 and 4: −3.00" in found
    both = over_grid(
        study,
        better_student=at(()),
        distillation_helps=lambda alpha, t: "contradicted" if t == 16 else "too small to matter",
    )
    assert both.startswith("Do not distil at T = 16: −3.00")
    assert "Distilling at T = 1 and 4 is not worth a teacher" in both
    assert "If you distil all the same: any of these teachers will do" in both
    some = over_grid(
        study,
        better_student=at(()),
        distillation_helps=lambda alpha, t: "contradicted" if alpha and t > 1 else "cannot tell",
        more_than_smoothing=at((4,), "supported"),
    )
    assert some.startswith(
        "For T = 1: any of these teachers will do, as far as this study can tell. For T = 4 and 16: this "
        "study cannot tell these teachers apart."
    )
    assert "Do not distil from the teachers with α = 0.1 and 0.2 at T = 4 and 16: −3.00" in some
    assert "A smoothed teacher (T = 4) gives +3.00 points more than" in some


def test_no_teacher_is_named_to_which_the_labels_were_preferred(study):
    def labels(*worse):
        return lambda alpha, t: "contradicted" if alpha in worse else "cannot tell"

    def students(**verdicts):
        return lambda alpha, t: verdicts.get(f"at{alpha}".replace(".", ""), "cannot tell")

    def found(worse, **verdicts):
        sentence = over_grid(study, better_student=students(**verdicts), distillation_helps=labels(*worse))
        return sentence.split(". ")[0]

    for beaten in ([0.0], [0.2], [0.0, 0.1]):  # which the others were not compared with by the labels
        assert found(beaten) == "This study cannot tell these teachers apart"
        assert found(beaten, at01="too small to matter") == "This study cannot tell these teachers apart"
    assert found([0.1], at01="too small to matter", at02="too small to matter") == (
        "Smoothing these teachers changes their students by less than 0.2 points"
    )
    assert found([0.0], at01="contradicted") == "Of these teachers rather not the one with α = 0.1"
    assert found([0.1], at01="contradicted", at02="contradicted") == (
        "Distil from the teacher without smoothing, not from the one with α = 0.1 or 0.2"
    )
    assert found([0.1], at01="supported", at02="supported") == (
        "Of these teachers rather the one with α = 0.1 or 0.2"
    )
    assert found([0.0, 0.1, 0.2]).startswith("Do not distil: −3.00")
    no_harm = {"better_student": students(), "no_worse_student": lambda *_: "supported"}
    said = over_grid(study, **no_harm, distillation_helps=labels(0.1))
    assert said.startswith(
        "The teacher with α = 0.1 or 0.2 costs students less than 0.2 points against the one without "
        "smoothing."
    )


def test_places_of_some_findings_are_named_and_those_with_commas_set_apart(study):
    results = study(smoothing=[0.0, 0.1, 0.2], temperatures=[1.0, 4.0, 16.0])
    places = [f"teacher’s α = 0.1, T = {t}, λ 0 to 0.5" for t in (1, 4, 16)]

    def preferred(words):
        settings = [replace(Setting(0.1, 0.1, 1.0, 0.5), words=one) for one in words]
        verdicts = ["supported", "supported", "cannot tell"]
        found = map(partial(finding, "more-hard-label"), verdicts, settings)
        return recommend(results, [finding("better-student", "cannot tell", ONE), *found]).sentence

    assert f"smaller λ ({places[0]}; {places[1]}): −3.00" in preferred(places)
    assert "smaller λ (here and there): −3.00" in preferred(["here", "there", "nowhere"])


def test_the_widest_interval_is_that_of_any_number_of_seeds(study):
    results = study(smoothing=[0.0, 0.1, 0.2])
    narrow, wide = (
        finding("better-student", "cannot tell", Setting(0.0, alpha, 1.0, 0.0), seeds=seeds, half=half)
        for alpha, seeds, half in ((0.1, 5, 1.0), (0.2, 3, 4.0))
    )
    seeds, half = next(iter(prospect(wide).widths.items()))
    assert prospect(narrow).seeds > prospect(wide).seeds
    said = recommend(results, [narrow, wide]).unknown
    assert f"; {seeds} seeds" in said
    assert f"would narrow the widest interval to about ±{two_digits(half)}" in said


def test_where_each_temperature_harms_by_another_control_teachers_are_named_all_the_same(study):
    found = over_grid(
        study,
        better_student=lambda alpha, t: "supported" if t == 4 else "cannot tell",
        distillation_helps=lambda alpha, t: "cannot tell" if t == 4 else "contradicted",
        more_than_smoothing=lambda alpha, t: "contradicted" if t == 4 else "cannot tell",
    )
    assert found.startswith("For T = 1 and 16: this study cannot tell these teachers apart.")
    assert "or T = 4: of these teachers rather the one with α = 0.1 or 0.2." in found
    assert "Do not distil at T = 1 and 16" in found
    assert "Rather than from a smoothed teacher (T = 4) train the student on labels" in found


def test_temperatures_stand_in_the_order_of_the_study(study):
    results = study(temperatures=[4.0, 16.0, 1.0])
    verdicts = ("supported", "cannot tell", "supported")
    students = [
        finding("better-student", *pair) for pair in zip(verdicts, settings_of(results.plan), strict=True)
    ]
    assert "students (T = 4 and 1) gained" in recommend(results, students).reason.lower().replace(
        "t =", "T ="
    )


def beside_controls(study, student, helps, more):
    """For verdicts on students, and beside the controls: of both teachers, of the smoothed one."""
    arms = [replace(ONE, smoothing=alpha, words="beside a control") for alpha in (0.0, 0.1)]
    findings = [finding("better-student", student, ONE), finding("more-than-smoothing", more, arms[1])]
    findings += [finding("distillation-helps", v, arm) for v, arm in zip(helps, arms, strict=True)]
    return recommend(study(), findings)


@pytest.mark.parametrize(
    ("helps", "more", "expected"),
    [
        ("supported", "supported", "Distilling pays: +3.00 points over the same network"),
        ("contradicted", "cannot tell", "Do not distil: −3.00 points against"),
        ("too small to matter", "cannot tell", "Distilling is not worth a teacher"),
        (
            "supported",
            "contradicted",
            "Rather than from a smoothed teacher train the student on labels smoothed alike: distilling",
        ),
    ],
)
def test_whether_distilling_pays_at_all(study, helps, more, expected):
    found = beside_controls(study, "supported", (helps, helps), more)
    assert expected in found.sentence
    harm = helps != "supported" or more == "contradicted"
    assert found.sentence.startswith("Distil from") is not harm
    assert ("If you distil all the same: distil from" in found.sentence) is harm
    assert "not tested" not in found.unknown
    assert ("Whether a smoothed teacher gives more" in found.unknown) is (more == "cannot tell")


def test_a_control_of_one_teacher_says_nothing_of_the_other(study):
    found = beside_controls(study, "cannot tell", ("cannot tell", "supported"), "cannot tell")
    assert "Distilling from the teacher with α = 0.1 pays: +3.00 points over" in found.sentence
    assert "Whether distilling from the teacher without smoothing pays at all: an effect" in found.unknown
    found = beside_controls(study, "contradicted", ("supported", "contradicted"), "contradicted")
    assert found.sentence == (
        "Distil from the teacher without smoothing, not from the one with α = 0.1. Distilling from the "
        "teacher without smoothing pays: +3.00 points over the same network trained on the labels alone. "
        "Do not distil from the teacher with α = 0.1: −3.00 points against the same network trained on the "
        "labels alone. Rather than from a smoothed teacher train the student on labels smoothed alike: "
        "distilling gave −3.00 points against that."
    )
    # Of two that may be taken one is not worth it; of the better one it is known that it is not.
    found = beside_controls(study, "cannot tell", ("cannot tell", "contradicted"), "cannot tell")
    assert found.sentence.startswith("This study cannot tell these teachers apart. Do not distil from the")
    found = beside_controls(study, "supported", ("cannot tell", "contradicted"), "cannot tell")
    assert found.sentence.startswith("Do not distil: −3.00")
    assert found.sentence.count("o not distil") == 1


@pytest.mark.parametrize("student", VERDICTS)
@pytest.mark.parametrize("more", VERDICTS)
def test_distilling_is_refused_or_praised_of_what_was_compared(study, student, more):
    """Whatever the verdicts, no sentence takes another back, and none speaks of another teacher."""
    for helps in itertools.product(VERDICTS, repeat=2):
        found = beside_controls(study, student, helps, more)
        refused = bool(re.match(r"Do not distil|Distilling[^:]* is not worth", found.sentence))
        assert not (refused and "Distilling pays:" in found.sentence)
        # Of all teachers, and so of every one that could be taken; and of no other it is known to pay.
        taken = {"supported": [1], "contradicted": [0]}.get(student, [0, 1])
        harm = {helps[arm] for arm in taken} <= {"contradicted", "too small to matter"}
        first = harm and "supported" not in helps
        assert refused is first
        lost = {arm for arm in taken if helps[arm] in ("contradicted", "too small to matter")}
        lost |= {1} & set(taken) if more == "contradicted" else set()
        named = re.search(r"[Dd]istil from the teacher[^.]*, not|^Distil from| will do", found.sentence)
        assert not (named and lost and "all the same" not in found.sentence)
        own_labels = student == "supported" and more == "contradicted"
        assert ("If you distil all the same" in found.sentence) == (first or own_labels)


def test_teachers_alone_are_not_said_to_teach(study):
    found = recommend(study(students=[]), [finding("better-teacher", "supported", ONE)])
    assert found.sentence == "Smoothing raised the teachers’ own accuracy by +3.00 points."
    assert "Which teacher teaches better: not tested" in found.unknown


def test_several_networks_are_a_mean_and_a_trend(study):
    results = study(teachers=[(name, "teacher.yaml") for name in "abc"])
    trend = replace(ONE, words="mean over α 0, 0.1")
    found = recommend(
        results,
        [finding("better-student", "cannot tell", ONE), finding("better-teachers", "supported", trend)],
    )
    assert "Of the teacher networks prefer the more accurate: +3.00 points per point of" in found.sentence
    assert "means over 1 student of 3 teacher networks" in found.unknown
    found = recommend(results, [finding("better-student", "cannot tell", ONE)])
    assert "Which teacher network teaches best: not tested" in found.unknown


def test_every_word_of_preference_stands_beside_a_verdict_and_every_template_can_be_filled():
    decided = ("better", "worse")
    for table in (TEACHER, *WHY.values(), *(choice.says for choice in CHOICES.values())):
        for state, template in table.items():
            assert set(re.findall(r"{(\w+)}", template)) <= {
                *("better", "worse", "others", "baseline", "either", "them", "no_harm", "note", "estimate"),
                *("of", "margin", "score"),
            }
            assert state in decided or not PREFERS.search(template), template
            assert state in decided or "{estimate}" not in template, template
    for choice in CHOICES.values():
        assert not PREFERS.search(choice.question + choice.untested)


# Any table of verdicts


def random_table(rng, plan):
    findings = []
    for setting in settings_of(plan):
        for name in ("better-student", "no-worse-student"):
            findings.append(finding(name, str(rng.choice(VERDICTS)), setting, rng.choice([None, 0.4])))
        for name in ("distillation-helps", "more-than-smoothing"):
            if rng.random() < 0.5:
                findings.append(finding(name, str(rng.choice(VERDICTS)), replace(setting, words="control")))
    for alpha in plan.smoothing[1:]:
        setting = Setting(plan.smoothing[0], alpha, 1.0, 0.0)
        findings.append(finding("better-teacher", str(rng.choice(VERDICTS)), setting))
    trend = replace(settings_of(plan)[0], words="a trend")
    for name in ("more-hard-label", "better-teachers"):
        if rng.random() < 0.5:
            findings.append(finding(name, str(rng.choice(VERDICTS)), trend))
    # Estimates of their own, with the sign that the verdict has.
    for position, one in enumerate(findings):
        if one.interval is not None:
            estimate = one.interval.estimate * rng.uniform(0.5, 1.5)
            findings[position] = replace(one, interval=replace(one.interval, estimate=estimate))
        if rng.random() < 0.1:
            findings[position] = replace(findings[position], interval=None, verdict="cannot tell")
    return findings


MATRICES = [
    {},
    {"smoothing": [0.0, 0.1, 0.2]},
    {"smoothing": [0.05, 0.1]},
    {"temperatures": [1.0, 4.0], "hard_weights": [0.0, 0.5, 1.0]},
    {"teachers": [("a", "teacher.yaml"), ("b", "teacher.yaml")], "students": [("s", "x"), ("t", "x")]},
]


@pytest.mark.parametrize("number", range(len(MATRICES)))
def test_no_text_claims_a_difference_without_a_verdict_behind_it(study, number):
    rng, results = np.random.default_rng(number), study(**MATRICES[number])
    for _ in range(150):
        findings = random_table(rng, results.plan)
        found = recommend(results, findings)
        said = f"{found.sentence} {found.reason}"
        decided = [one for one in findings if one.verdict in ("supported", "contradicted")]
        estimates = {f"{one.interval.estimate:+.2f}".replace("-", "−") for one in decided}
        assert set(SIGNED.findall(said)) <= estimates
        if not decided:
            assert not PREFERS.search(said), said
        # Each teacher that is preferred has won, or the one that it is preferred to has lost.
        students = [one for one in findings if one.claim.id == "better-student"]
        for preferred in re.findall(r"[Dd]istil from the teacher ([^.;]*)", found.sentence):
            won = {one.setting.smoothing for one in students if one.verdict == "supported"}
            named = {float(alpha) for alpha in re.findall(r"(?<![λT] = )\d+\.\d+", preferred)}
            lost = any(one.verdict == "contradicted" for one in students)
            assert named <= won or ("not from" in preferred and lost), preferred
        for part in (found.sentence, found.reason, found.unknown, found.cost):
            assert "{" not in part
            assert not re.search(r"nan|None|  |\(\)|\.\.", part), part
            assert part == "" or part.endswith(".")


# Studies with a known truth

# What is wrong of each study in which nothing has an effect.
ADVISES = re.compile(r"[Dd]istil from|Prefer|Distilling.* pays|Do not distil|[Rr]ather|gives .* more")


def advised(plan, world, seed):
    results = with_jobs(simulate(plan, world, seed))
    return recommend(results, judge(results)).sentence


def test_a_teacher_is_recommended_where_it_is_better(plan_of, tmp_path):
    plan = plan_of(tmp_path, **STUDENT)
    for gain, expected in (
        (1.0, "the teacher with α = 0.1."),
        (-1.0, "the teacher without smoothing, not from"),
    ):
        world = World(student_gain=gain, per_class=500)
        found = [advised(plan, world, seed) for seed in range(15)]
        assert np.mean([one.startswith(f"Distil from {expected}") for one in found]) > 0.7


def test_where_nothing_differs_hardly_any_arm_is_recommended(plan_of, tmp_path):
    for matrix in ({"controls": ["hard"]}, {"smoothing": [0.0, 0.1, 0.2], "hard_weights": [0.0, 0.5]}):
        plan = plan_of(tmp_path, **{**STUDENT, **matrix})
        worlds = [World(luck=luck, copied=copied) for luck, copied in ((0.05, 0.7), (0.3, 1.0))]
        found = [advised(plan, world, seed) for world, seed in itertools.product(worlds, range(50))]
        # 5 % at most are due; 100 studies have a standard error of 0.022.
        assert np.mean([bool(ADVISES.search(one)) for one in found]) <= 0.05 + 0.044


PAYS, HARMS = (
    ("Distilling pays", "A smoothed teacher gives"),
    ("Do not distil", "Rather than from a smoothed"),
)


@pytest.mark.parametrize(("taught", "right", "wrong"), [(0.8, PAYS, HARMS), (-0.8, HARMS, PAYS)])
def test_whether_distilling_pays_is_told_where_it_does_and_where_it_harms(
    plan_of, tmp_path, taught, right, wrong
):
    plan = plan_of(tmp_path, **STUDENT, seeds=[0, 1, 2, 3, 4], controls=["hard", "smoothed"])
    found = [advised(plan, World(taught=taught, per_class=400), seed) for seed in range(25)]
    for words in right:
        print(words, np.mean([words in one for one in found]))
        assert np.mean([words in one for one in found]) >= 0.8, words
    assert not [one for one in found if any(words in one for words in wrong)]


@pytest.mark.slow
def test_false_recommendations_are_five_of_a_hundred_at_most(plan_of, tmp_path):
    plan = plan_of(tmp_path, **STUDENT, hard_weights=[0.0, 0.5], controls=["hard", "smoothed"])
    found = [advised(plan, World(luck=0.2, per_class=50), seed) for seed in range(500)]
    assert np.mean([bool(ADVISES.search(one)) for one in found]) <= 0.05


def test_a_failed_run_leaves_no_recommendation(plan_of, tmp_path):
    plan = plan_of(tmp_path, **STUDENT)
    results = with_jobs(simulate(plan, World(student_gain=2.0, per_class=200), 0))
    lost = next(run for run in plan.runs if run.role == "student" and run.smoothing)
    finished = {name: one for name, one in results.finished.items() if name != lost.id}
    failed = {
        lost.id: Failure(lost, {"failed": "epoch 3: the training loss is nan", "seed": 0, "wall_time_s": 1})
    }
    broken = replace(results, finished=finished, failed=failed)
    found = recommend(broken, judge(broken))
    assert found.sentence == f"No recommendation: run {lost.id} failed in epoch 3."
    assert not SIGNED.search(found.reason.split("teachers")[0])


def test_states_cover_every_verdict():
    states = {state_of(finding("better-student", verdict, ONE)) for verdict in VERDICTS}
    assert states == {"better", "worse", "small", "open", "failed"}
    assert state_of(finding("more-hard-label", "supported", ONE)) == "worse"  # fewer points with more of it


def test_it_is_one_line():
    whole = Recommendation("Take it.", "", "Not known.", "A minute.")
    assert str(whole) == "Take it. Not known. A minute."
