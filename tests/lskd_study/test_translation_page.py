"""A study of translation from its run folders to its page."""

import csv
import json
import math
import re

import numpy as np
import pytest
import sacrebleu
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lskd import LskdError
from lskd_study.claims import judge
from lskd_study.pages.notices import at_chance
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import CURVES, JOB, TRANSLATIONS
from lskd_study.results.read import read_results
from simulated import rows

pytestmark = pytest.mark.unit

ONE_STUDENT = {"students": [("small", "student.yaml")]}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_read_at_its_best_validation_bleu(translation_study):
    plan = translation_study(seeds=[0], sentences=30, **ONE_STUDENT)
    folder = plan.folder(plan.runs[0])
    path = folder / TRANSLATIONS
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))  # order is no matter
    found = read_results(plan).finished[plan.runs[0].id]
    content = sorted(lines_of(path), key=lambda line: line["id"])
    reference = sacrebleu.corpus_bleu([c["hypothesis"] for c in content], [[c["reference"] for c in content]])
    assert found.detokenised.value == pytest.approx(reference.score)
    table = rows(folder / CURVES)
    assert found.chosen == 4  # of six epochs
    assert found.value("val_ppl") == pytest.approx(float(table[4]["val_ppl"]))
    assert found.value("train_hard_ce") == pytest.approx(float(table[5]["train_hard_ce"]))
    assert found.per_sample("bleu").values.mean() == pytest.approx(reference.score)
    both = ([value for line in content for value in line[name]] for name in ("confidence", "correct"))
    error = 100 * float(binary_calibration_error(*map(torch.tensor, both), n_bins=15))
    assert found.value("calibration_error") == pytest.approx(error, abs=1e-3)  # theirs is of float32


def test_a_run_of_before_confidence_was_kept_has_no_calibration_error(translation_study):
    plan = translation_study(seeds=[0], sentences=12, **ONE_STUDENT)
    for run in plan.runs:
        path = plan.folder(run) / TRANSLATIONS
        lines = lines_of(path)
        for line in lines:
            del line["confidence"], line["correct"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(plan)
    assert {row["calibration_error"] for row in rows(plan.root / "runs.csv")} == {""}
    assert "nan" not in (plan.root / "table.md").read_text()


def test_an_arm_with_a_run_of_before_has_a_dash_and_counts_its_failures(translation_study, fail):
    plan = translation_study(sentences=12, **ONE_STUDENT)
    teachers = [run for run in plan.runs if run.role == "teacher" and run.smoothing]
    path = plan.folder(teachers[0]) / TRANSLATIONS
    path.write_text(re.sub(r', "confidence": \[.*?\], "correct": \[.*?\]', "", path.read_text()))
    fail(plan, teachers[1], "epoch 7: the training loss is nan")
    write_report(plan)
    assert " | –, 1 failed | " in (plan.root / "table.md").read_text()


def test_of_equally_good_epochs_the_later_one_is_fairseqs_best(translation_study):
    plan = translation_study(seeds=[0], sentences=10, **ONE_STUDENT)
    path = plan.folder(plan.runs[0]) / CURVES
    table = rows(path)
    lines = [dict(row, val_bleu=value) for row, value in zip(table, "124434", strict=True)]
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(lines)
    assert read_results(plan).finished[plan.runs[0].id].chosen == 5


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (TRANSLATIONS, lambda text: text[:-20], "line 12"),
        (TRANSLATIONS, lambda text: "", "line 1"),
        (TRANSLATIONS, lambda text: text + text, "two sentences of one id"),
        (TRANSLATIONS, lambda text: text.replace('"source"', '"sauce"', 1), "line 1: source: Field required"),
        (TRANSLATIONS, lambda text: text.replace('"id": 3', '"id": "3"'), "valid integer"),
        (TRANSLATIONS, lambda text: text.replace("[0.9,", "[1.9,", 1), "less than or equal to 1"),
        (TRANSLATIONS, lambda text: text.replace("[0.9,", "[NaN,", 1), "line 1"),
        (TRANSLATIONS, lambda text: text.replace("[0.9, ", "[", 1), "of different numbers"),
        (
            TRANSLATIONS,
            lambda text: re.sub(r', "confidence": .*?\], "correct": .*?\]', "", text, count=1),
            "confidence for some sentences alone",
        ),
        (CURVES, lambda text: text.replace("val_bleu", "bleu"), "no column val_bleu"),
        (CURVES, lambda text: text.splitlines()[0] + "\n", "no epochs"),
        (JOB, lambda text: "{", "damaged"),
        (TRANSLATIONS, None, "No such file"),
    ],
)
def test_a_damaged_run_folder_is_one_line(translation_study, name, change, said):
    plan = translation_study(seeds=[0], sentences=12, **ONE_STUDENT)
    path = plan.folder(plan.runs[1]) / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(LskdError, match="is damaged") as caught:
        read_results(plan)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda t: t.replace("word3", "word4"), lambda t: t[: t.rindex('{"id"')]])
def test_runs_on_other_test_sentences_are_not_compared(translation_study, change):
    plan = translation_study(seeds=[0], sentences=12, **ONE_STUDENT)
    path = plan.folder(plan.runs[-1]) / TRANSLATIONS
    path.write_text(change(path.read_text()))
    with pytest.raises(LskdError, match="different test sentences"):
        read_results(plan)


def test_real_effects_are_found(translation_study):
    plan = translation_study(
        effect=0.6, teacher_effect=-0.6, perplexity_effect=0.5, sentences=300, **ONE_STUDENT
    )
    results = read_results(plan)
    found = {finding.claim.id: finding for finding in judge(results)}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "better-student": "supported",
        "better-teacher": "contradicted",
        "worse-perplexity": "supported",
        "larger-loss": "supported",
        "loss-part-kl": None,
        "loss-part-entropy": None,
    }
    arms = [
        np.mean([r.detokenised.value for r in results.students("small", "big", alpha, 1.0, 0.0).values()])
        for alpha in (0.0, 0.1)
    ]
    assert found["better-student"].interval.estimate == pytest.approx(arms[1] - arms[0])
    assert found["better-student"].interval.samples == 300


def test_no_effect_is_rarely_taken_for_one(translation_study_at, tmp_path):
    """At most 5 % of verdicts on BLEU; of 24, three or more have a chance of 12 in 100, five of 0.6."""
    alarms = 0
    for seed in range(12):
        plan = translation_study_at(tmp_path / str(seed))(seed=seed, sentences=100, **ONE_STUDENT)
        verdicts = [f.verdict for f in judge(read_results(plan)) if f.claim.quantity == "bleu"]
        alarms += sum(verdict != "cannot tell" for verdict in verdicts)
    assert alarms < 5


def test_where_too_little_matches_there_is_no_interval(translation_study):
    plan = translation_study(level=-4, sentences=30, length=3, seeds=[0, 1], **ONE_STUDENT)
    finding = judge(read_results(plan))[0]
    assert (finding.interval.known, finding.verdict) == (False, "cannot tell")
    assert math.isnan(finding.adjusted_p)
    assert "no interval can be made: a run matches" in write_report(plan)


def test_the_page_has_figure_7_both_bleus_and_the_bootstrap(translation_study):
    plan = translation_study(effect=0.6, sentences=100, **ONE_STUDENT)
    lost = plan.runs[-1]
    (plan.folder(lost) / JOB).unlink()
    answer = write_report(plan)
    assert "points higher in BLEU than students of unsmoothed teachers" in answer
    assert "2 seeds, 1 student, 100 test sentences" in answer
    html = (plan.root / "index.html").read_text()
    signature = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    for part in (signature, signature.replace("13a", "none"), "1 of 12 runs are missing", lost.id, "Fig. 7"):
        assert part in html
    assert "image" not in html.split("</style>")[1].replace("the paper shows this for images", "").replace(
        "which is of images", ""
    )
    for column in ("val_bleu", "val_ppl"):
        assert f'id="figure7-0-students-{column}-' in html
        assert f'id="figure7-0-teachers-{column}-' in html
    bootstrap = rows(plan.root / "bootstrap.csv")
    assert [(row["role"], row["seed"]) for row in bootstrap] == [
        *(("student", s) for s in "01"),
        *(("teacher", s) for s in "012"),
    ]
    table = (plan.root / "table.md").read_text()
    assert signature in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    runs = rows(plan.root / "runs.csv")
    assert len(runs) == 11
    assert {row["bleu_signature"] for row in runs} == {signature}
    row = rows(plan.root / "table.csv")[0]
    chosen = [float(r["bleu"]) for r in runs if r["role"] == "student" and r["smoothing"] == "0.0"]
    assert float(row["student_bleu_mean"]) == pytest.approx(np.mean(chosen), rel=1e-6)
    assert {"figure7-small-of-big-T1-hard0.png", "curves.csv"} <= {
        path.name for path in (plan.root / "figures").iterdir()
    }


def test_a_translation_run_that_failed_is_in_no_number(translation_study, fail):
    plan = translation_study(effect=0.6, sentences=40, **ONE_STUDENT)
    failed = next(run for run in plan.runs if run.role == "teacher" and run.smoothing)
    fail(plan, failed, "epoch 7: the training loss is nan")
    answer = write_report(plan)
    assert answer.startswith("No verdict. ")
    assert "failed with its teacher" in answer
    html = (plan.root / "index.html").read_text()
    assert f"{failed.id}: epoch 7: the training loss is nan" in html.split('id="answer"')[0]
    assert html.count(", 1 failed") == 8  # four numbers of the teachers, four of their students
    assert html.count("not drawn: 1 run that failed") == 8
    assert {f.verdict for f in judge(read_results(plan))} <= {"no verdict", None}
    assert len(rows(plan.root / "bootstrap.csv")) == 0
    table = rows(plan.root / "runs.csv")
    assert next(row["failed"] for row in table if row["failed"]) == "epoch 7: the training loss is nan"


@pytest.mark.parametrize("kind", ["constant", "another's", "empty"])
def test_translations_that_do_not_follow_their_source_are_at_chance(translation_study, kind):
    plan = translation_study(sentences=60, seeds=[0, 1], **ONE_STUDENT)
    weak = plan.runs[0]
    path = plan.folder(weak) / TRANSLATIONS
    lines = lines_of(path)
    for line, other in zip(lines, [*lines[7:], *lines[:7]], strict=True):
        text = {"constant": "word0 word1 word2 .", "another's": other["reference_tokens"], "empty": ""}[kind]
        line["hypothesis"] = line["hypothesis_tokens"] = text
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(plan)
    assert list(at_chance(results)) == [weak.id]
    assert "of 60 translations" in at_chance(results)[weak.id]
