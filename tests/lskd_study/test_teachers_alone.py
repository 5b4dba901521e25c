"""A study without students, a study with T^2, and teachers taken over from another study's folder."""

import shutil

import pytest
import yaml
from PIL import Image

from lskd import LskdError
from lskd_study.study import engine
from lskd_study.trainers import TIMM, trainer_of

pytestmark = pytest.mark.unit

STUDY = {
    "title": "Teachers",
    "data": {"path": "data", "num_classes": 3},
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}, {"model": "resnet18", "config": "t.yaml"}],
}
STUDENTS = [{"model": "test_vit", "config": "t.yaml"}]


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in "abc":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "data" / split / label / "1.png")
    (tmp_path / "t.yaml").write_text("epochs: 1\nbatch_size: 3\n")

    def plan(**changes):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
        return engine.make_plan("study.yaml", None)

    return plan


def test_teachers_are_compared_alone(make, finish, capsys):
    plan = make()
    assert plan.teachers_alone
    assert [run.role for run in plan.runs] == ["teacher"] * 4
    finish(plan)
    assert engine.run_study("study.yaml", None, 1, False, []) == 0
    page = (plan.root / "index.html").read_text()
    assert "<title>Teachers</title>" in page
    for run in plan.runs:
        assert run.id.removeprefix("teacher-") in page
    assert str(plan.root / "index.html") in capsys.readouterr().out
    assert {"stability.csv", "table1.csv"} <= {path.name for path in plan.root.iterdir()}


def test_a_missing_teacher_is_named_and_the_others_are_compared(make, finish, capsys, monkeypatch):
    plan = make()
    finish(plan)
    (plan.folder(plan.runs[2]) / "job.json").unlink()
    monkeypatch.setattr(engine, "_snakemake", lambda *args: None)
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert f"1 of 4 runs are missing: {plan.runs[2].id}" in capsys.readouterr().err
    page = (plan.root / "index.html").read_text()
    assert plan.runs[3].id.removeprefix("teacher-") in page
    assert "1 of 4 runs are missing" in page
    assert f"<code>{plan.runs[2].id}</code>" in page


def test_the_factor_t_squared_reaches_the_students_and_nothing_else(make):
    plain, squared = make(students=STUDENTS), make(students=STUDENTS, temperature_squared=True)
    for before, after in zip(plain.runs, squared.runs, strict=True):
        words, more = TIMM.command(plain, before), TIMM.command(squared, after)
        changed = before.role == "student"
        assert ("--kd-temperature-squared" in more) == changed
        assert [word for word in more if word != "--kd-temperature-squared"] == words
        assert (plain.settings(before) != squared.settings(after)) == changed
    student = squared.runs[-1]
    assert "model.distillation.temperature_squared=True" in trainer_of("mmcls", "student").command(
        squared, student
    )
    assert not any("squared" in word for word in trainer_of("mmcls", "student").command(plain, student))


def test_teachers_are_taken_over_from_a_study_that_trained_them(make, finish):
    """What the headers of some recipes offer: cp -r FIRST/teachers SECOND/."""
    first = make()
    finish(first)
    second = make(students=STUDENTS, output="second", temperatures=[1, 2])
    second.root.mkdir()
    shutil.copytree(first.root / "teachers", second.root / "teachers")
    assert {run.role for run in second.unfinished()} == {"student"}
    assert not engine._changed_settings(second)


def test_a_failed_teacher_is_named_and_not_compared(make, finish, fail, capsys):
    plan = make()
    finish(plan)
    fail(plan, plan.runs[2], "epoch 3: the training loss is nan")
    assert engine.run_study("study.yaml", None, 1, False, []) == 1
    assert f"{plan.runs[2].id}: epoch 3: the training loss is nan" in capsys.readouterr().err
    page = (plan.root / "index.html").read_text()
    assert "1 of 4 runs failed." in page.split('id="answer"')[0]
    assert f'<th scope="col" class="n">{plan.runs[2].id.removeprefix("teacher-")}</th>' not in page
    for one in plan.runs[:2] + plan.runs[3:]:
        fail(plan, one, "epoch 3: the training loss is nan")
    with pytest.raises(LskdError, match=r"there is nothing to compare: run teacher-.*, and 3 more"):
        engine.run_study("study.yaml", None, 1, False, [])
