"""The section "Measures" of a study's page: right numbers, honest about few teachers, and no claims."""

import json
import os
import re
import signal
import threading
from collections import defaultdict
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import special, stats

from lskd_study.claims import judge, measures
from lskd_study.claims.measures import MEASURES, Rank, Ranking, correlate, measure_study
from lskd_study.claims.statements import Setting
from lskd_study.pages.measures import chances_sentence, picks_sentence
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report
from lskd_study.pages.verdicts import study_record
from lskd_study.paper.sources import SOURCES
from lskd_study.plan.plan import JOB, LOGITS
from lskd_study.results.read import read_results
from lskd_study.stats.intervals import crossed_interval
from lskd_study.stats.ranks import pick, rank_correlation

pytestmark = pytest.mark.unit


def test_each_run_s_logits_are_read_once_however_many_students_a_teacher_has(fake_study, monkeypatch):
    results, read, reader = read_results(fake_study()), [], measures.stored_of
    monkeypatch.setattr(measures, "stored_of", lambda plan, one: read.append(one.run.id) or reader(plan, one))
    measure_study(results)
    assert sorted(read) == sorted(results.finished)


def test_ctrl_c_waits_for_the_runs_under_way_and_not_for_all_students_of_a_teacher(fake_study, monkeypatch):
    results, begun, ended = read_results(fake_study()), [], threading.Event()

    def of_classifier(*_):
        begun.append(threading.current_thread())
        if len(begun) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        ended.wait(60)
        return {}

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(measures, "Event", lambda: ended)
    monkeypatch.setattr(measures, "_of_classifier", of_classifier)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            measure_study(results)
    finally:
        signal.signal(signal.SIGINT, before)
    begun[0].join()  # a signal while it was being started leaves it to itself
    assert len(begun) == 1


def test_a_student_s_file_need_not_have_the_order_of_its_teacher_s(fake_study):
    plan = fake_study()
    before = repr(measured(plan).estimates)
    file = plan.folder(next(run for run in plan.runs if run.role == "student")) / LOGITS
    tensors = load_file(file)
    order = np.random.default_rng(0).permutation(len(tensors["labels"]))
    names = bytes(tensors.pop("keys")).decode().split("\n")
    keys = np.frombuffer("\n".join(names[i] for i in order).encode(), dtype=np.uint8)
    save_file({name: rows[order] for name, rows in tensors.items()} | {"keys": keys}, file)
    assert repr(measured(plan).estimates) == before


def stored(plan, run):
    found = load_file(plan.folder(run) / LOGITS)
    return found["logits"].astype(np.float64), found["labels"]


def rewrite(plan, run, logits):
    """Let a run have said something else."""
    tensors = load_file(plan.folder(run) / LOGITS)
    save_file(tensors | {"logits": logits.astype(np.float16)}, plan.folder(run) / LOGITS)


def measured(plan):
    return measure_study(read_results(plan))


def record_of(plan):
    results = read_results(plan)
    record = study_record(results, judge(results), "An answer.", measures=measure_study(results))
    return json.loads(record.text())


def text_of(plan):
    html = re.sub(r"<(style|script)>.*?</\1>", "", (plan.root / "index.html").read_text(), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


# Each measure spelled out


def test_a_measure_looks_up_who_proposed_it():
    assert replace(MEASURES[1], id="nll").source == SOURCES["nll"] != MEASURES[1].source


def nll(logits, labels):
    return -special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()


def ece(logits, labels):
    p = special.softmax(logits, axis=1)
    bins, right = np.minimum((p.max(1) * 15).astype(int), 14), p.argmax(1) == labels
    parts = [bins == b for b in range(15)]
    return sum(part.mean() * abs(right[part].mean() - p.max(1)[part].mean()) for part in parts if part.any())


def aurc(sure, logits, labels):
    wrong = (logits.argmax(1) != labels)[np.argsort(-sure, kind="stable")]
    return 100 * np.mean([wrong[: k + 1].mean() for k in range(len(wrong))])


def normalised(logits):
    centred = logits - logits.mean(1, keepdims=True)
    return centred.max(1) / (np.abs(centred) ** 5).sum(1) ** 0.2


def variances(logits, labels):
    p = special.softmax(logits, axis=1)
    return np.array([np.var(np.delete(row, label)) for row, label in zip(p, labels, strict=True)])


ALONE = {
    "nll": nll,
    "ece": ece,
    "aurc": lambda z, y: aurc(special.softmax(z, axis=1).max(1), z, y),
    "aurc_normalised": lambda z, y: aurc(normalised(z), z, y),
    "dark_knowledge": lambda z, y: variances(z, y).mean(),
}
WITH_TEACHER = {
    "agreement": lambda z, own: 100 * (z.argmax(1) == own.argmax(1)).mean(),
    "divergence": lambda z, own: np.sum(
        special.softmax(z, axis=1) * (special.log_softmax(z, axis=1) - special.log_softmax(own, axis=1)), 1
    ).mean(),
}


def test_values_and_differences_are_the_measures_spelled_out_in_every_arm(fake_study):
    plan = fake_study(effect=0.5)
    found = {
        (one.quantity.id, one.role, one.kind, one.setting.smoothing): one for one in measured(plan).estimates
    }
    for role in ("teacher", "student"):
        means = {}
        for alpha in plan.smoothing:
            runs = [run for run in plan.runs if (run.role, run.smoothing) == (role, alpha)]
            values = {name: [of(*stored(plan, run)) for run in runs] for name, of in ALONE.items()}
            if role == "student":
                del values["dark_knowledge"]
                for name, of in WITH_TEACHER.items():
                    pairs = [(plan.by_id[run.teacher], run) for run in runs]
                    values[name] = [of(stored(plan, t)[0], stored(plan, s)[0]) for t, s in pairs]
            for name, numbers in values.items():
                means[name, alpha] = np.mean(numbers)
                one = found[name, role, "value", alpha]
                # float32 logits less their largest; 1e-6 of a calibration error lies at a bin's edge
                assert one.interval.estimate == pytest.approx(np.mean(numbers), rel=1e-4), (name, role)
                assert one.interval.low < one.interval.estimate < one.interval.high
                assert (one.interval.seeds, one.interval.samples) == (3, 240)
        for name in {name for name, _ in means} - {"dark_knowledge"}:
            one = found[name, role, "difference", 0.1].interval
            assert one.estimate == pytest.approx(means[name, 0.1] - means[name, 0.0], abs=1e-4), (name, role)
            assert one.low < one.estimate < one.high
    ratio = found["dark_knowledge", "teacher", "ratio", 0.1].interval
    plain, smoothed = (
        np.array(
            [
                variances(*stored(plan, run))
                for run in plan.runs
                if run.role == "teacher" and run.smoothing == a
            ]
        )
        for a in plan.smoothing
    )
    assert ratio.estimate == pytest.approx(smoothed.mean() / plain.mean(), rel=1e-5)
    assert ratio.low < ratio.estimate < ratio.high
    assert ratio.parts == ()  # they would be those of the logarithm
    assert len(found) == (2 * 5 + 4 + 1) + (2 * 6 + 6)  # values, differences and the ratio


def test_a_ratio_is_the_geometric_mean_over_networks_with_an_interval_of_its_logarithm(fake_study):
    plan = fake_study(teachers=NETWORKS["teachers"][:2], students=NETWORKS["students"])
    logs = []
    for model in "ab":
        plain, smoothed = (
            np.array(
                [
                    variances(*stored(plan, run))
                    for run in plan.runs
                    if (run.role, run.model, run.smoothing) == ("teacher", model, alpha)
                ]
            )
            for alpha in plan.smoothing
        )
        gains = smoothed / smoothed.mean() - plain / plain.mean()  # the first-order influence of a sample
        logs.append(gains + np.log(smoothed.mean() / plain.mean()))
    expected = crossed_interval(np.mean(logs, axis=0))
    (found,) = [one.interval for one in measured(plan).estimates if one.kind == "ratio"]
    ends = np.exp([expected.estimate, expected.low, expected.high])
    assert [found.estimate, found.low, found.high] == pytest.approx(ends, rel=1e-5)


def test_several_students_of_a_seed_count_as_their_mean(fake_study):
    plan = fake_study(student_seeds=2, per_class=6)
    expected = {}
    for alpha in plan.smoothing:
        own = [run for run in plan.runs if (run.role, run.smoothing) == ("student", alpha)]
        expected[alpha] = np.mean([nll(*stored(plan, run)) for run in own])
    found = {
        one.setting.smoothing: one.interval.estimate
        for one in measured(plan).estimates
        if (one.quantity.id, one.role, one.kind) == ("nll", "student", "value")
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_smoothing_erased_is_found_and_what_it_left_is_not(fake_study):
    """Teachers whose wrong classes are told apart less by half are told from those that only vary."""
    plan = fake_study()
    rng = np.random.default_rng(4)
    taste = 2 * rng.standard_normal((240, 4))  # of images, the same for every run
    for run in plan.runs:
        _, labels = stored(plan, run)
        own = np.eye(4)[labels]
        said = 3 * own + (1 - own) * (taste + 0.3 * rng.standard_normal((240, 4)))
        if run.role == "teacher" and run.smoothing:
            said = 3 * own + (said - 3 * own) * 0.5
        rewrite(plan, run, said)
    erased = {
        (one.quantity.id, one.kind): one.interval for one in measured(plan).estimates if one.role == "teacher"
    }
    assert erased["dark_knowledge", "ratio"].high < 0.7
    assert erased["dark_knowledge", "ratio"].p_value < 0.01


def test_the_ratios_interval_covers_the_truth():
    from lskd.analysis.dark_knowledge import log_ratio_contributions

    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(500):
        image = 0.8 * rng.standard_normal((1, 300))
        tables = [
            np.exp(image + shift + 0.1 * rng.standard_normal((3, 1)) + 0.3 * rng.standard_normal((3, 300)))
            for shift in (0.0, -1.0)
        ]
        found = crossed_interval(log_ratio_contributions(*tables))
        covered += found.low <= -1 <= found.high
    assert 0.92 <= covered / 500 <= 0.99


# Which measure would have picked the best teacher


def taught(plan, quality, noise=0.05):
    """Make teachers and students as good as given by (model, alpha), one number or one of each."""
    rng = np.random.default_rng(6)
    for run in plan.runs:
        teacher = plan.by_id[run.teacher or run.id]
        good = quality[teacher.model, teacher.smoothing]
        good = good[run.role == "student"] if isinstance(good, tuple) else good
        _, labels = stored(plan, run)
        easy = np.random.default_rng(7).normal(0.6, 1.0, len(labels))
        logits = np.eye(4)[labels] * (easy + good)[:, None] + noise * rng.standard_normal((len(labels), 4))
        rewrite(plan, run, logits)
    return plan


NETWORKS = {"teachers": [(name, "teacher.yaml") for name in "abc"], "students": [("small", "student.yaml")]}
ORDER = {
    (model, alpha): 0.25 * i for i, (model, alpha) in enumerate((m, a) for m in "abc" for a in (0.0, 0.1))
}


def test_measures_that_go_with_the_students_would_have_picked_the_best_teacher(fake_study):
    plan = taught(fake_study(per_class=150, **NETWORKS), ORDER)
    ranking = measured(plan).ranking
    assert ranking.teachers[ranking.best.teacher] == "c, α = 0.1"
    by_name = {rank.quantity.id: rank for rank in ranking.ranks}
    for name in ("top1", "nll", "aurc"):
        assert by_name[name].correlation.estimate == pytest.approx(1)
        assert by_name[name].correlation.p_value == pytest.approx(2 / 6)  # of 3! orders two are perfect
        assert by_name[name].correlation.teachers == 3
        assert by_name[name].picked.regret == 0
    assert len(by_name) == 1 + 4 + 5
    assert ranking.networks == ["a", "b", "c"]
    for name, of in ALONE.items():
        values = defaultdict(list)
        for run in plan.runs:
            if run.role == "teacher":
                values[run.model, run.smoothing].append(of(*stored(plan, run)))
        best = max if name == "dark_knowledge" else min
        picked = list(ORDER)[by_name[name].picked.teacher]
        assert picked == best(values, key=lambda kind: np.mean(values[kind])), name
    right = defaultdict(list)
    for run in plan.runs:
        logits, labels = stored(plan, run)
        right[run.role, plan.by_id[run.teacher or run.id].model, run.smoothing].append(
            logits.argmax(1) == labels
        )
    expected = [[100 * np.mean(right[role, *kind]) for role in ("teacher", "student")] for kind in ORDER]
    np.testing.assert_allclose(by_name["top1"].values, expected)
    shares = [[share for share, _ in by_name[name].values] for name in ("top1", "nll", "aurc")]
    assert np.mean(shares[0]) > 50 > 5 > np.mean(shares[2]) > 1 > np.mean(shares[1])  # percent, percent, nats
    sentence = picks_sentence(ranking)
    assert sentence.startswith("Of 6 teachers c, α = 0.1 had the most accurate students")
    assert re.search(r"It would have been picked by accuracy, .*NLL", sentence)


def test_how_measures_rank_teachers_is_in_the_record_and_on_the_page(fake_study):
    plan = taught(fake_study(per_class=150, **NETWORKS), ORDER)
    ranking, record = measured(plan).ranking, record_of(plan)
    of_ranks = [one for one in record["measures"] if one["kind"] == "rank correlation"]
    assert {one["measure"]: one["estimate"] for one in of_ranks}["nll"] == pytest.approx(1)
    regrets = {one["measure"]: one for one in record["measures"] if one["kind"] == "regret"}
    assert regrets["top1"]["picked"] == "c, α = 0.1"
    assert (regrets["top1"]["estimate"], regrets["top1"]["unit"]) == (0, "points")
    assert regrets["top1"]["teachers"] == ranking.teachers
    assert of_ranks[0]["teachers"] == ["a", "b", "c"]
    write_report(plan)
    assert picks_sentence(ranking) in text_of(plan)


def test_a_measure_that_goes_against_the_students_costs_what_the_page_says(fake_study):
    quality = {
        kind: (good, 1.25 - good) for kind, good in ORDER.items()
    }  # the better, the worse its students
    plan = taught(fake_study(per_class=150, teachers=NETWORKS["teachers"]), quality)
    ranking = measured(plan).ranking
    accuracy = next(rank for rank in ranking.ranks if rank.quantity.id == "top1")
    assert accuracy.correlation.estimate == pytest.approx(-1)

    def right(role):  # (teachers, seeds, images), the mean over students
        table = defaultdict(list)
        for run in plan.runs:
            if run.role == role:
                logits, labels = stored(plan, run)
                kind = plan.by_id[run.teacher or run.id].model, run.smoothing
                table[kind, run.seed].append(100.0 * (logits.argmax(1) == labels))
        return np.array([[np.mean(table[kind, seed], axis=0) for seed in plan.seeds] for kind in ORDER])

    top1 = right("student").mean((1, 2))
    assert accuracy.picked.regret == pytest.approx(max(top1) - top1[-1])
    expected = pick(right("teacher"), right("student"))
    assert (accuracy.picked.low, accuracy.picked.high) == pytest.approx((expected.low, expected.high))
    assert accuracy.picked.low > 0
    assert re.search(
        r"accuracy.* would have picked c, α = 0\.1, whose students are \d+\.\d\d points worse",
        picks_sentence(ranking),
    )


def test_a_network_counts_by_the_mean_of_its_teachers():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(8, 1, 1)) + 0.1 * rng.normal(size=(2, 8, 3, 5))
    means = [np.array([table[2 * n : 2 * n + 2].mean((0, 2)) for n in range(4)]) for table in (x, y)]
    assert correlate(x, y, 4) == rank_correlation(*means)
    assert correlate(x, y, 4).teachers == 4
    assert correlate(x.mean((1, 2)), y.mean((1, 2)), 4) == rank_correlation(*(m.mean(1) for m in means))
    few = correlate([1, 2, 3, 4], [1, 3, 2, 4], 2)
    assert few.estimate == pytest.approx(2 / 3)
    assert not few.known
    assert np.isnan([few.low, few.high, few.p_value]).all()
    assert "fewer than 3 networks" in few.note


def test_of_two_teachers_with_equally_good_students_a_measure_picked_the_one_that_it_picked():
    accuracy = [70.0, 72.0, 72.0]
    ranks = [
        Rank(one, rank_correlation(values, accuracy), pick(values, accuracy), [])
        for one, values in zip(MEASURES, ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), strict=False)
    ]
    names = ["a", "b", "c"]
    said = picks_sentence(Ranking(Setting(0, 0.1, 1, 0), names, names, pick(accuracy, accuracy), ranks))
    assert (
        "It would have been picked by calibration error; NLL would have picked c, whose students are as"
        in said
    )


@pytest.mark.parametrize("page", [False, True])
def test_few_teachers_are_said_to_be_few_and_fewer_than_three_not_ranked(fake_study, page):
    plan = taught(
        fake_study(smoothing=[0.0, 0.1, 0.2], students=[("small", "student.yaml")]),
        {("big", a): 5 * a for a in (0.0, 0.1, 0.2)},
    )
    ranking = measured(plan).ranking
    assert ranking.networks == ranking.teachers == ["α = 0", "α = 0.1", "α = 0.2"]
    assert ranking.setting == Setting(0.0, 0.2, 1.0, 0.0)
    one_seed = replace(plan, seeds=[0], runs=[run for run in plan.runs if run.seed == 0])
    assert len(measured(one_seed).ranking.ranks) == len(ranking.ranks) == 1 + 4 + 5
    two = replace(plan, smoothing=[0.0, 0.1], runs=[run for run in plan.runs if run.smoothing < 0.2])
    assert measured(two).ranking is None
    alone = replace(plan, runs=[run for run in plan.runs if run.role == "teacher"])
    assert measured(alone).ranking is None
    if not page:
        return
    write_report(plan)
    assert "Fewer than 3 networks: no interval." in text_of(plan)
    assert "Kendall’s τ over the 3 teachers, with" in text_of(plan)
    write_report(two)
    assert "Measures" in text_of(two)
    assert "would have been picked" not in text_of(two)
    assert "Rank correlation" not in text_of(two)


def test_students_that_differ_by_luck_rank_nothing(fake_study):
    plan = fake_study(noise=1.0, **NETWORKS)
    ranking = measured(plan).ranking
    assert not any(rank.correlation.known for rank in ranking.ranks)
    assert "differ by little more than what seeds and samples vary" in picks_sentence(ranking)
    assert "may be up to" in picks_sentence(ranking)


# What is missing, failed or not there


def test_a_failed_run_has_no_measures_of_its_role_and_no_ranking(fake_study, fail):
    plan = fake_study(**NETWORKS)
    fail(plan, next(run for run in plan.runs if run.role == "student"), "epoch 3: the training loss is nan")
    found = measured(plan)
    assert found.ranking is None
    for one in found.estimates:
        assert (one.interval is None) == (one.role == "student")
        assert ("failed in epoch 3" in one.note) == (one.role == "student")
    records = record_of(plan)["measures"]
    assert [one["estimate"] for one in records if one["role"] == "student"] == [None] * 18


def test_without_a_seed_that_has_all_its_runs_there_is_no_number_and_that_is_said(fake_study):
    plan = fake_study(per_class=6)
    for run in plan.runs:
        if run.role == "student" and run.smoothing:
            (plan.folder(run) / JOB).unlink()
    told = {(one.interval, one.note) for one in measured(plan).estimates if one.role == "student"}
    assert told == {(None, "no seed has all of its runs")}


def test_students_without_their_teachers_run_have_all_but_fidelity(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.role == "teacher" and run.seed == 0:
            (plan.folder(run) / JOB).unlink()
    found = {(one.quantity.id, one.role): one for one in measured(plan).estimates}
    assert found["nll", "student"].interval.seeds == 3
    assert found["nll", "teacher"].interval.seeds == 2
    assert found["agreement", "student"].interval is None
    assert "teacher is missing" in found["agreement", "student"].note


def cut(plan, classes, images=None):
    """Let all runs have answered of fewer classes (and images)."""
    for run in plan.runs:
        tensors = load_file(plan.folder(run) / LOGITS)
        logits = np.ascontiguousarray(tensors["logits"][:images, :classes])
        keys = b"\n".join(bytes(tensors["keys"]).split(b"\n")[:images])
        small = {"logits": logits, "labels": tensors["labels"][:images] % classes}
        save_file({**small, "keys": np.frombuffer(keys, dtype=np.uint8)}, plan.folder(run) / LOGITS)
    return replace(plan, num_classes=classes)


def test_of_two_classes_nothing_is_measured_that_needs_three(fake_study, fail):
    every = {one.id for one in MEASURES}
    plan = cut(fake_study(), 3)
    assert {one.quantity.id for one in measured(plan).estimates} == every
    plan = cut(plan, 2)
    names = {one.quantity.id for one in measured(plan).estimates}
    assert names == every - {"aurc_normalised", "dark_knowledge"}
    fail(
        plan, plan.runs[-1], "epoch 3: the training loss is nan"
    )  # which does not make it one that is missing
    found = measured(plan).estimates
    assert {one.quantity.id for one in found} == names
    assert {one.role for one in found if one.interval is None} == {"student"}


@pytest.mark.filterwarnings("ignore:stability leaves out")
def test_two_images_can_be_measured_and_one_cannot(fake_study):
    plan = cut(fake_study(noise=2.0), 4, images=2)
    found = [one.interval for one in measured(plan).estimates if one.kind == "value"]
    assert {one.samples for one in found} == {2}
    assert min(one.low for one in found) == 0  # none of them can be negative
    assert measured(cut(plan, 4, images=1)).estimates == []


def test_students_that_always_agree_with_their_teachers_are_bounded_by_the_rule_of_three(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.teacher:
            rewrite(plan, run, stored(plan, plan.by_id[run.teacher])[0])
    found = {(one.quantity.id, one.kind): one.interval for one in measured(plan).estimates}
    change = found["agreement", "difference"]
    assert (change.method, change.estimate, change.high) == ("rule of three", 0, 100 * 3 / 240)
    assert found["agreement", "value"].method != "rule of three"


def test_a_ratio_to_nothing_is_said_to_be_none(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.role == "teacher" and not run.smoothing:  # its wrong classes are all alike
            rewrite(plan, run, 3 * np.eye(4)[stored(plan, run)[1]])
    found = {(one.quantity.id, one.kind): one for one in measured(plan).estimates}["dark_knowledge", "ratio"]
    assert found.interval is None
    assert "a ratio needs positive ones" in found.note


def test_dark_knowledge_is_that_of_the_temperature_that_teaches(fake_study):
    plan = fake_study(temperatures=[2.0, 4.0], students=[("small", "student.yaml")])
    runs = [run for run in plan.runs if run.role == "teacher" and not run.smoothing]
    expected = np.mean([variances(z / 2, y).mean() for z, y in (stored(plan, run) for run in runs)])
    estimates = measured(plan).estimates
    found = next(one for one in estimates if one.quantity.id == "dark_knowledge")
    assert found.interval.estimate == pytest.approx(expected, rel=1e-5)
    for role, temperatures in (("teacher", {2.0}), ("student", {2.0, 4.0})):
        assert {one.setting.temperature for one in estimates if one.role == role} == temperatures
    record = record_of(plan)
    assert {one["temperature"] for one in record["measures"] if one["measure"] == "dark_knowledge"} == {2}


def test_translation_has_none(translation_study):
    plan = translation_study(sentences=20, seeds=[0, 1], students=[("small", "student.yaml")])
    record = record_of(plan)
    assert record["measures"] == []
    write_report(plan)
    assert "Measures" not in text_of(plan)
    assert record["headline"]["chances"] is None or sum(record["headline"]["chances"].values()) > 1


def test_they_are_no_claims(fake_study):
    plan = fake_study(effect=2.0)
    expected = [(one.claim.id, one.verdict, one.adjusted_p) for one in judge(read_results(plan))]
    record = record_of(plan)
    seen = [(one["claim"], one["verdict"], one["p_holm"]) for one in record["findings"]]
    assert len(seen) == len(expected)
    for (claim, verdict, p), (name, word, q) in zip(seen, expected, strict=True):
        assert (claim, verdict) == (name, word)
        assert p == pytest.approx(q, nan_ok=True) if p is not None else np.isnan(q)
    assert not any("verdict" in one for one in record["measures"])


def test_a_study_of_teachers_alone_has_those_of_teachers(fake_study):
    plan = fake_study(students=[])
    write_teachers_report(plan)
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert {one["role"] for one in record["measures"]} == {"teacher"}
    assert {one["kind"] for one in record["measures"]} == {"value", "difference", "ratio"}


# Beside the headline


def test_probabilities_stand_beside_the_headlines_interval(fake_study):
    plan = fake_study(effect=2.0)
    record = record_of(plan)
    found = record["headline"]["chances"]
    finding = record["findings"][0]
    (seed, df), (sample, sample_df) = finding["parts"]
    rng = np.random.default_rng(9)
    draws = finding["estimate"] + seed**0.5 * rng.standard_t(df, 10**6)
    draws += sample**0.5 * stats.t(sample_df).rvs(10**6, random_state=rng)
    assert found["margin"] == 0.2
    assert found["better"] == pytest.approx((draws > 0.2).mean(), abs=0.003)
    assert found["worse"] == pytest.approx((draws < -0.2).mean(), abs=0.003)
    assert found["better"] + found["within"] + found["worse"] == pytest.approx(1)
    write_report(plan)
    sentence = chances_sentence(judge(read_results(plan))[0], 0.2)
    assert sentence.startswith("P(better) > 99\u00a0%, P(within ±0.2 points) < 1\u00a0%, P(worse) < 1\u00a0%")
    assert " ".join(sentence.split()) in text_of(plan)


def test_one_seed_has_no_probabilities(fake_study):
    plan = fake_study(seeds=[0])
    assert record_of(plan)["headline"]["chances"] is None
    assert chances_sentence(judge(read_results(plan))[0], 0.2) == ""
