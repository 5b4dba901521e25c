import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lskd import LskdError
from lskd.analysis.classes import class_confusion, class_mean_probabilities, class_separation, nearest_classes
from lskd_study.claims import CLAIMS, claims_of, contrasts, judge, settings, verdict
from lskd_study.claims.contrasts import Measure, estimate_contrast
from lskd_study.claims.findings import Finding, decide
from lskd_study.plan.plan import CURVES, JOB, LOGITS
from lskd_study.results.images import Stored
from lskd_study.results.read import read_results
from lskd_study.results.results import Result
from lskd_study.stats.intervals import Interval, crossed_interval

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
    found = [(s.smoothing, s.temperature) for s in settings(results)]
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
    labels[(labels == 3).nonzero()[2:]] = 4
    monkeypatch.setattr(contrasts, "class_mean_probabilities", None)
    with pytest.raises(LskdError, match="class 3 has 2 examples"):
        contrasts.separation_measure(plan, [runs])


def names(plan):
    return {claim.id for claim in claims_of(plan)}


STUDENTS = {"better-student", "no-worse-student", "larger-loss", "loss-part-kl", "loss-part-entropy"}
TEACHERS = {"better-teacher", "no-worse-teacher", "lower-instability", "similar-classes"}


def test_a_study_tests_what_its_plan_allows_and_nothing_else(plan_of, tmp_path):
    assert names(plan_of(tmp_path)) == STUDENTS | TEACHERS | {"same-direction"}
    assert names(plan_of(tmp_path, students=[])) == TEACHERS
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


@pytest.mark.parametrize(("smallest", "tailed"), [(13, set()), (12, {"", "-head", "-tail"})])
def test_long_tails_are_seen_in_the_training_folders(plan_of, tmp_path, smallest, tailed):
    plan = plan_of(tmp_path)
    make_training_images(plan, [120, 50, 15, smallest])
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


def test_what_drawn_classes_cannot_say_is_no_run_that_diverged():
    runs = {seed: SimpleNamespace(each=[1]) for seed in (0, 1)}
    measure = Measure(lambda run: None, lambda run: math.nan)
    with pytest.raises(LskdError, match="no run has measured it; of drawn classes"):
        estimate_contrast(measure, [[(1.0, runs), (-1.0, runs)]], [0, 1])
