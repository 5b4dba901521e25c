"""A study with students of mmcls: its commands, its logs, its configurations, and the paper's Fig. 6."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lskd import LskdError
from lskd.teachers.outputs import Answers
from lskd_study.drawing.curves import best_accuracies, figure6
from lskd_study.results.results import BySeed, Failure, Result
from lskd_study.study.engine import make_plan
from lskd_study.trainers import TIMM, trainer_of
from lskd_study.trainers.mmcls import check_class_order
from mmcls_bnn.distil.curves import COLUMNS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MMCLS = trainer_of("mmcls", "student")


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    return make_plan("recipes/digits_bnn/study.yaml", None)


def test_teachers_are_timms_and_students_mmcls(plan):
    assert trainer_of("mmcls", "teacher") is TIMM
    assert trainer_of("mmcls", "student") is MMCLS
    student = next(run for run in plan.runs if run.role == "student" and run.smoothing and run.seed == 2)
    words = MMCLS.command(plan, student)
    assert words[:4] == ["mim", "train", "mmcls", "recipes/digits_bnn/student.py"]
    options = dict(word.split("=", 1) for word in words[words.index("--cfg-options") + 1 :])
    # One teacher file for both trainers.
    assert options["model.teacher.checkpoint"].endswith("teacher-test_resnet-smoothing0.1-seed2/last.pth.tar")
    assert (options["model.teacher.model"], options["model.teacher.smoothing"]) == ("test_resnet", "0.1")
    assert (options["randomness.seed"], options["model.distillation.temperature"]) == ("2", "1")
    assert options["train_dataloader.dataset.data_root"] == "data/digits"
    again = MMCLS.command(plan, student, "rerun")
    assert again[again.index("--work-dir") + 1] == f"rerun/{student.id}"


@pytest.mark.parametrize("name", ["my runs", "a,b", "(1,2", "[a]", "1.50", "2024", "a[1,2]"])
def test_what_mmengine_would_read_otherwise_is_refused(plan, name):
    """By its own reader, before the teachers are trained."""
    student = next(run for run in plan.runs if run.role == "student")
    MMCLS.check_run(plan, student)
    with pytest.raises(LskdError, match=r"mmcls cannot be told .*; rename that folder"):
        MMCLS.check_run(replace(plan, output=name, data=name), student)


def test_controls_name_no_teacher(plan):
    controls = [run for run in plan.runs if run.role == "control" and run.seed == 1]
    found = {}
    for run in controls:
        words = MMCLS.command(plan, run)
        options = dict(word.split("=", 1) for word in words[words.index("--cfg-options") + 1 :])
        found[run.model, run.smoothing] = options
        assert options["model.type"] == "UntaughtClassifier"
        assert options["randomness.seed"] == "1"
        assert not any("teacher" in name or "hard_weight" in name for name in options)
    name = "ReActNet-18x0.25"
    assert set(found) == {(name, 0.0), (name, 0.1), (f"{name}-real", 0.0)}
    for (model, alpha), options in found.items():
        assert options["model.distillation.alpha"] == f"{alpha:g}"
        assert options["model.distillation.convention"] == "paper"
        assert options.get("model.backbone.binarize") == ("[]" if model.endswith("-real") else None)


def test_a_change_of_a_base_changes_the_settings(plan):
    student = next(run for run in plan.runs if run.role == "student")
    content = plan.settings(student)["config"]
    assert content["train_cfg"]["max_epochs"] == 15
    assert content["val_dataloader"]["batch_size"] == 256  # of a base two files away


@pytest.mark.parametrize("names", [["1", "2", "10"], ["a2", "a10"], ["B", "a"]])
def test_classes_that_timm_and_mmcls_number_differently_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(LskdError, match="rename them in train and val"):
        check_class_order(tmp_path, "data/own")


def test_classes_with_zeros_in_front_are_numbered_alike(tmp_path):
    for name in ("01", "02", "10", "n01440764"):
        (tmp_path / "train" / name).mkdir(parents=True)
    check_class_order(tmp_path, "data/own")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = dict(type='ImageClassifier')", "not an LsKdClassifier"),
        ("model = dict(type='LsKdClassifier', teacher=dict(config='t.py'))", "must name a timm model"),
        ("model = dict(type='LsKdClassifier', teacher=dict(model='t'))", "lacks SafeCheckpointHook"),
        ("model = []", "model is no dict"),
        ("model = dict(type='LsKdClassifier', teacher='t')", "model.teacher is no dict"),
        ("custom_hooks = ['CurvesHook']", "custom_hooks is no list of dicts"),
        ("model = (", "is no configuration of mmcls"),
        (None, "no such file"),
    ],
)
def test_configurations_are_checked_before_any_run(tmp_path, text, words):
    path = tmp_path / "student.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LskdError, match=words) as error:
        MMCLS.check_config(MMCLS.read_config(path), str(path), "student", "m")
    assert "\n" not in str(error.value)


def test_a_start_that_was_taught_is_no_control(plan):
    config = plan.configs["recipes/digits_bnn/student.py"]
    config = {**config, "model": {**config["model"], "step1_checkpoint": "step1.pth"}}
    MMCLS.check_config(config, "student.py", "student", "m")
    with pytest.raises(LskdError, match="step1_checkpoint was taught, a control is not"):
        MMCLS.check_config(config, "student.py", "control", "m")


def test_curves_in_the_common_columns(tmp_path):
    with (tmp_path / "epochs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for epoch in (1, 2):
            writer.writerow(dict.fromkeys(COLUMNS, f"{epoch}.5") | {"epoch": epoch, "val_ce": ""})
    rows = MMCLS.read_curves(tmp_path, "student")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert set(TIMM.curve_columns) <= set(rows[0]) == set(MMCLS.curve_columns)
    assert (rows[1]["train_kl"], rows[1]["val_top5"], rows[1]["val_ce"]) == ("2.5", "2.5", "")
    with pytest.raises(LskdError, match=r"see .*train\.log"):
        MMCLS.read_curves(tmp_path / "nowhere", "student")


def test_a_run_goes_on_where_there_is_a_checkpoint(tmp_path):
    assert MMCLS.resume(tmp_path) is None
    (tmp_path / "last_checkpoint").write_text("epoch_1.pth")
    assert MMCLS.resume(tmp_path) == ["--resume"]
    assert TIMM.resume(tmp_path) is None
    for name in ("checkpoint-0.pth.tar", "last.pth.tar"):
        torch.save({}, tmp_path / name)
    assert TIMM.resume(tmp_path) == ["--resume", str(tmp_path / "last.pth.tar")]
    (tmp_path / "last.pth.tar").write_bytes(b"PK")  # cut off
    assert TIMM.resume(tmp_path) == ["--resume", str(tmp_path / "checkpoint-0.pth.tar")]


def result(top1, top5, loss):
    curves = {"epoch": np.arange(3.0), "val_top1": np.array(top1), "val_top5": np.array(top5)}
    curves |= {"train_ce": np.array(loss) + 0.5, "val_ce": np.array(loss)}
    return Result(None, {}, curves, [])


def test_figure_6_has_both_losses_and_the_best_accuracies():
    plain = {
        0: result([50, 80, 70], [90, 95, 99], [2, 1, 0.5]),
        1: result([40, 60, 90], [80, 85, 91], [2, 1, 1]),
    }
    smoothed = {seed: result([55, 85, 75], [91, 96, 99], [3, 2, 1.5]) for seed in (0, 1)}
    assert best_accuracies(list(plain.values())) == (85.0, 93.0)  # epoch 2 of one seed, epoch 3 of the other
    arms = {0.0: plain, 0.1: smoothed}
    figure = figure6(arms)
    losses, errors = figure.whole("title").axes
    texts = [text.get_text() for text in errors.get_legend().get_texts()]
    assert texts == ["α = 0: 85.00 / 93.00", "α = 0.1: 85.00 / 96.00"]
    names = [line.get_label() for line in losses.get_lines()]
    assert names == ["train, α = 0", "test, α = 0", "train, α = 0.1", "test, α = 0.1"]
    np.testing.assert_allclose(losses.get_lines()[3].get_ydata(), [3, 2, 1.5])
    np.testing.assert_allclose(errors.get_lines()[0].get_ydata(), [55, 30, 20])
    loss, error = figure6(arms).panels("f")
    assert "test, α = 0.1" in loss
    assert "85.00 / 96.00" in error


def test_figure_6_says_what_it_leaves_out():
    good = {0: result([50, 80, 70], [90, 95, 99], [2, 1, 0.5])}
    arms = {0.0: BySeed({}, [Failure(None, {"failed": "epoch 1: nan"})]), 0.1: good}
    figure = figure6(arms).whole("title")
    assert figure.get_supxlabel() == "not drawn: 1 run that failed"
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["train, α = 0.1", "test, α = 0.1"]
    assert all("not drawn: 1 run that failed" in panel for panel in figure6(arms).panels("f"))


def test_figure_6_needs_the_test_loss():
    old = result([1, 2, 3], [1, 2, 3], [1, np.nan, 1])
    assert figure6({0.0: {0: old}}) is None
    del old.curves["val_ce"]
    assert figure6({0.0: {0: old}}) is None
    assert figure6({0.0: {}}) is None


@pytest.mark.parametrize(("own", "kept"), [("75.0", True), ("25.0", False)])
def test_logits_are_stored_only_if_they_agree_with_the_trainer(tmp_path, monkeypatch, own, kept):
    """Evaluated under another normalisation, a student would be at chance and look like a finding."""
    batch = (torch.tensor([1, 0, 3, 2]), torch.eye(4), torch.tensor([0, 1, 2, 0]), None)
    answers = Answers([batch], 4, 4, ["a", "b", "c", "d"], None, None)
    evaluation = SimpleNamespace(evaluate_config=lambda *_: answers)
    monkeypatch.setitem(sys.modules, "mmcls_bnn.evaluation", evaluation)
    (tmp_path / "student.py").touch()
    (tmp_path / "epochs.csv").write_text(f"epoch,val_top1\n1,{own}\n")
    if not kept:
        with pytest.raises(LskdError, match=r"75.00 % .* own log 25.0 %"):
            MMCLS.collect(tmp_path, tmp_path)
        return
    found = MMCLS.collect(tmp_path, tmp_path)
    assert found.labels.tolist() == [1, 0, 0, 2]  # in the order of the keys
