import json
import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lskd import LskdError
from lskd_study.claims import CLAIMS
from lskd_study.claims.statements import settings_of
from lskd_study.plan.plan import JOB, Plan, exact, expand
from lskd_study.trainers import trainer_of

pytestmark = pytest.mark.unit


def test_the_matrix_is_complete_paired_and_named_readably():
    runs = expand(
        [0.0, 0.1], [0, 1, 2], [("resnet10t", "t")], [("a", "s"), ("b", "s")], [1.0, 2.0], [0.0, 0.3]
    )
    teachers = [run for run in runs if run.role == "teacher"]
    students = [run for run in runs if run.role == "student"]
    assert (len(teachers), len(students)) == (6, 6 * 2 * 2 * 2)
    assert len({run.id for run in runs}) == len(runs)
    by_id = {run.id: run for run in runs}
    assert "teacher-resnet10t-smoothing0.1-seed0" in by_id
    assert "student-b-of-resnet10t-smoothing0.1-T2-hard0.3-seed2" in by_id
    for student in students:
        teacher = by_id[student.teacher]
        assert (teacher.seed, teacher.smoothing) == (student.seed, student.smoothing)
    # Whole pairs of arms come first, so that a study broken off can be compared.
    assert [(run.seed, run.smoothing) for run in teachers] == [(s, a) for s in range(3) for a in (0.0, 0.1)]


def test_names_of_models_from_elsewhere_make_file_names():
    (teacher, *_) = expand([0.0], [0], [("hf-hub:timm/resnet18.a1_in1k", "t")], [("a", "s")], [1.0], [0.0])
    assert teacher.id == "teacher-hf_hub_timm_resnet18.a1_in1k-smoothing0-seed0"


def test_a_plan_survives_its_file(tmp_path, plan_of):
    plan = plan_of(tmp_path)
    plan.write()
    assert Plan.read(tmp_path / "out" / "plan.json") == plan
    (tmp_path / "out" / "plan.json").write_text(json.dumps({"title": "x"}))
    with pytest.raises(LskdError, match="not a plan of this version"):
        Plan.read(tmp_path / "out" / "plan.json")


def test_a_run_is_finished_exactly_when_its_job_file_is_there(tmp_path, plan_of):
    plan = plan_of(tmp_path)
    run = plan.runs[0]
    plan.folder(run).mkdir(parents=True)
    assert plan.unfinished() == plan.runs
    (plan.folder(run) / JOB).write_text("{}")
    assert plan.unfinished() == plan.runs[1:]


def test_settings_follow_what_changes_a_result_and_nothing_else(tmp_path, plan_of):
    plan = plan_of(tmp_path)
    run = plan.runs[0]
    changed = replace(plan, configs={**plan.configs, "teacher.yaml": {"epochs": 6}})
    assert changed.settings(run) != plan.settings(run)
    assert replace(plan, convention="uniform").settings(run) != plan.settings(run)
    assert replace(plan, title="other", threads=4).settings(run) == plan.settings(run)


def test_an_unknown_run_is_named(tmp_path, plan_of):
    with pytest.raises(LskdError, match="no run 'nothing'"):
        plan_of(tmp_path).run("nothing")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["runs"][0].update(id="../../../home"),
        lambda plan: plan["runs"][0].update(seed="0"),
        lambda plan: plan["runs"][0].update(config="other.yaml"),
        lambda plan: plan["runs"][-1].update(teacher="nobody"),
        lambda plan: plan.update(runs={}),
        lambda plan: plan.update(runs=[[]]),
        lambda plan: plan.update(cwd=3),
        lambda plan: plan.update(a_later_key=1),
        lambda plan: plan.update(threads=float("inf")),
        lambda plan: plan.update(title={"deep": [1]}),
        lambda plan: plan.pop("configs"),
    ],
)
def test_a_plan_with_forged_fields_is_one_line(tmp_path, plan_of, change):
    plan_of(tmp_path).write()
    path = tmp_path / "out" / "plan.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(
        LskdError, match=r"plan.json is not a plan of this version|plan.json is damaged"
    ) as found:
        Plan.read(path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seeds": [' + "9" * 6000 + "]}", "\xff", "null"])
def test_a_damaged_plan_is_one_line(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LskdError) as found:
        Plan.read(path)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400


def test_settings_are_passed_on_and_named_exactly(tmp_path, plan_of):
    """Names of up to six digits are as they always were."""
    alphas, temperatures, weights = [0.1, 0.1000001], [1.0, 1.23456789], [0.0, 0.12345678]
    for ecosystem in ("timm", "fairseq"):
        plan = plan_of(
            tmp_path,
            ecosystem=ecosystem,
            smoothing=alphas,
            temperatures=temperatures,
            hard_weights=weights,
            seeds=[0],
        )
        assert len({run.id for run in plan.runs}) == len(plan.runs) == 2 + 2 * 2 * 2 * 2
        assert plan.runs[0].id == "teacher-big-smoothing0.1-seed0"
        assert plan.runs[2].id == "student-small-of-big-smoothing0.1-T1-hard0-seed0"
        for run in plan.runs:
            words = shlex.join(trainer_of(ecosystem, run.role).command(plan, run))
            wanted = [run.smoothing] if run.role == "teacher" else [run.temperature]
            assert all(re.search(rf"[ =]{re.escape(exact(value))}( |$)", words) for value in wanted), words
    assert "kd_weight=0.87654322" in words
    words = [setting.describe() for setting in settings_of(CLAIMS[0], plan)]
    assert len(set(words)) == len(words)


@given(st.floats(min_value=0, max_value=1e9))
def test_an_exact_number_is_the_number(value):
    assert float(exact(value)) == value
    assert float(f"{value:g}") != value or exact(value) == f"{value:g}"
