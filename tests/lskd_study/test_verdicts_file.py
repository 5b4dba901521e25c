"""``verdicts.json``: what the page says, for programs."""

import json
import math
import re
from html import unescape
from importlib import metadata

import numpy as np
import pytest

from lskd_study.claims import judge
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import run_teacher_list, write_teachers_report
from lskd_study.pages.verdicts import VERDICTS_FILE, read_record, study_record
from lskd_study.plan.plan import JOB
from lskd_study.plan.teacher_list import TeacherList
from lskd_study.results.read import read_results
from lskd_study.teachers.run import ComparisonSettings

pytestmark = pytest.mark.unit

ONE_STUDENT = {"students": [("small", "student.yaml")]}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def content_of(plan):
    return json.loads((plan.root / VERDICTS_FILE).read_text(), parse_constant=refuse)


def record_of(plan):
    results = read_results(plan)
    return json.loads(study_record(results, judge(results), "An answer.").text(), parse_constant=refuse)


def test_it_holds_what_the_page_and_the_intervals_say(fake_study):
    plan = fake_study(effect=2.0, temperatures=[1.0, 4.0], **ONE_STUDENT)
    answer = write_report(plan)
    content = content_of(plan)
    headline = content["headline"]
    assert answer == f"Supported. {headline['answer']}"
    assert (headline["claim"], headline["verdict"]) == ("better-student", "supported")
    expected = judge(read_results(plan))
    assert len(content["findings"]) == len(expected)
    for found, finding in zip(content["findings"], expected, strict=True):
        interval = finding.interval
        assert (found["claim"], found["verdict"]) == (finding.claim.id, finding.verdict)
        for name in ("estimate", "low", "high", "seeds", "samples", "method"):
            assert found[name] == getattr(interval, name)
        assert found["p"] == (None if math.isnan(finding.p_value) else finding.p_value)
        assert (found["null"], found["runs"]) == (finding.null, finding.runs)
        assert found["p_holm"] == (None if math.isnan(finding.adjusted_p) else finding.adjusted_p)
        of_teacher = found["role"] == "teacher"
        assert (found["setting"]["temperature"] is None) == of_teacher
        assert found["setting"]["smoothing"] == 0.1
    units = {found["claim"]: found["unit"] for found in content["findings"]}
    assert (units["better-student"], units["larger-loss"]) == ("points", "nats")
    assert content["temperatures"] == [1, 4]
    assert content["data"] == {"path": "data", "classes": 4, "samples": 240}
    seconds = content["runs"].pop("seconds")
    assert seconds == pytest.approx(18 * 12.3)
    assert content["runs"] == {"planned": 18, "finished": 18, "missing": [], "failed": []}
    assert content["versions"] == {"python": ["3.11.7"], "lskd": ["0.1.0"], "torch": ["2.14.1"]}
    assert content["last_run_finished"] == "2026-01-01T00:00:00+00:00"
    assert read_record(plan.root).text() == (plan.root / VERDICTS_FILE).read_text()


def test_what_is_not_known_is_null(fake_study):
    plan = fake_study(**ONE_STUDENT)
    lost = [run for run in plan.runs if run.role == "student" and run.smoothing]
    for run in lost:
        (plan.folder(run) / JOB).unlink()
    content = record_of(plan)
    found = content["findings"][0]
    assert [found[name] for name in ("estimate", "low", "high", "p", "p_holm")] == [None] * 5
    assert (found["verdict"], found["seeds"], found["samples"]) == ("cannot tell", 0, 0)
    assert found["note"] == "no seed has all of its runs"
    assert content["runs"]["missing"] == [run.id for run in lost]


def test_two_versions_are_both_there(translation_study):
    plan = translation_study(seeds=[0], sentences=20, **ONE_STUDENT)
    path = plan.folder(plan.runs[0]) / JOB
    job = json.loads(path.read_text())
    path.write_text(json.dumps({**job, "versions": {**job["versions"], "torch": "3.0"}}))
    content = record_of(plan)
    assert content["versions"]["torch"] == ["3.0", "2.14.1"]
    assert (content["kind"], content["data"]["samples"]) == ("translation", 20)


def test_it_opens_with_the_recommendation_of_the_page(fake_study):
    plan = fake_study(effect=2.0)
    write_report(plan)
    content = content_of(plan)["recommendation"]
    assert list(content) == ["sentence", "reason", "unknown", "cost"]
    assert content["sentence"] == "Distil from the teacher with α = 0.1."
    assert content["cost"] == "A teacher takes 12 s; a student takes 12 s; all 18 runs took 3.7 min."
    page = (plan.root / "index.html").read_text().split('id="recommendation"')[1]
    opening = re.sub("</?code>", "`", unescape(page.split("</header>")[0]))
    places = [opening.index(part) for part in (*content.values(), 'id="answer"')]
    assert places[0] < places[1] < places[4] < places[2] < places[3]  # the answer is on the first screen


def test_runs_at_chance_are_recommended_to_nobody(plan_of, finish, tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    write_report(plan)
    said = content_of(plan)["recommendation"]["sentence"]
    assert re.fullmatch(r"No recommendation: \d+ runs are no better than chance\.", said)


def test_a_study_of_teachers_alone_names_its_missing_runs(fake_study):
    plan = fake_study(students=[])
    (plan.folder(plan.runs[-1]) / JOB).unlink()
    write_teachers_report(plan)
    content = content_of(plan)
    assert content["kind"] == "teachers"
    assert {finding["role"] for finding in content["findings"]} == {"teacher"}
    assert content["headline"] == {
        "claim": None,
        "verdict": None,
        "answer": re.search(r'id="answer">(.*?)</p>', (plan.root / "index.html").read_text()).group(1),
        "chances": None,
    }
    assert content["runs"] == {
        "planned": 6,
        "finished": 5,
        "missing": [plan.runs[-1].id],
        "failed": [],
        "seconds": pytest.approx(5 * 12.3),
    }
    assert (content["teachers"], content["seeds"], content["smoothing"]) == (["big"], [0, 1, 2], [0, 0.1])
    assert content["versions"] == {"python": ["3.11.7"], "lskd": ["0.1.0"], "torch": ["2.14.1"]}
    page = (plan.root / "index.html").read_text()
    assert "A processor, 2 cores, no GPU" in page
    assert "aaaaaaaaaaaa, with local changes" in page
    for run in plan.runs[:-1]:
        assert (
            "OMP_NUM_THREADS=1 timm train.py data --config teacher.yaml --model big --num-classes 4 "
            f"--seed {run.seed} " in page
        )
    assert "A student’s command" not in page


def test_a_list_of_teachers_says_what_it_was_measured_with(tmp_path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "one.npz", logits=generator.normal(size=(40, 4)), labels=np.arange(40) % 4)
    teachers = [{"name": "one", "logits": str(tmp_path / "one.npz")}]
    study = {"kind": "stability", "title": "Mine", "output": str(tmp_path / "out"), "teachers": teachers}
    run_teacher_list(TeacherList.model_validate(study), ComparisonSettings(seed=7))
    record = read_record(tmp_path / "out")
    assert (record.kind, record.teachers, record.data.samples) == ("teachers", ["one"], 40)
    assert record.versions["torch"] == [metadata.version("torch")]
    page = (tmp_path / "out" / "index.html").read_text()
    for part in (str(tmp_path / "one.npz"), "2000, seed 7", f"torch {metadata.version('torch')}"):
        assert part in page.split("Provenance")[1]
