"""A whole training run of mmengine's Runner in this process, with a teacher filled by hand."""

import copy
import csv
import runpy
from pathlib import Path
from types import SimpleNamespace

import mmcls
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from lskd import DivergedError, LskdError
from mmcls_bnn.compat import MODELS

pytestmark = pytest.mark.unit


@pytest.fixture
def config(make_config):
    return make_config(["SafeCheckpoint", "Curves"])


def test_teacher_is_the_file_before_and_after_training(config, teacher_file, tmp_path):
    runner = Runner.from_cfg(Config(copy.deepcopy(config)))
    runner.train()
    teacher = runner.model.teacher
    weights = torch.load(teacher_file, weights_only=True)["state_dict"]
    found = teacher.model.state_dict()
    # Running statistics too: BatchNorm in train mode would have moved them.
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert not any(module.training for module in teacher.model.modules())
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(teacher(images), teacher(images))

    checkpoint = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(runner.model.state_dict())
    teachers_shapes = {tuple(value.shape) for name, value in weights.items() if "fc.weight" in name}
    assert not any(tuple(value.shape) in teachers_shapes for value in checkpoint["state_dict"].values())
    assert len(checkpoint["optimizer"]["state"]) == len(list(runner.model.parameters()))


@pytest.fixture
def child(digits, tmp_path):
    """A recipe based on one of ours, as it is read with `--cfg-options`."""
    path = tmp_path / "child.py"

    def read(text="", **options):
        data = {"dataset": {"data_root": str(digits), "num_classes": 4}}
        folders = {f"{split}_dataloader": data for split in ("train", "val")}
        base = Path(__file__).parents[2] / "recipes" / "reactnet" / "digits_kd.py"
        path.write_text(f"_base_ = {str(base)!r}\n{text}\n")
        recipe = Config.fromfile(str(path))
        recipe.merge_from_dict(
            {
                "work_dir": str(tmp_path / "run"),
                "log_level": "WARNING",
                "experiment_name": tmp_path.name,
                **folders,
                **options,
            }
        )
        return recipe

    return read


@pytest.mark.parametrize("where", ["child", "options"])
def test_the_teacher_that_is_named_is_used_and_dumped(child, where, tmp_path):
    teacher = {"checkpoint": "other.pth", "smoothing": 0.3}
    if where == "child":
        recipe = child(f"model = dict(teacher=dict(**{teacher!r}))")
    else:
        recipe = child(**{f"model.teacher.{name}": value for name, value in teacher.items()})
    runner = Runner.from_cfg(recipe)
    with pytest.raises(LskdError, match=r"other\.pth does not exist"):
        runner.train()
    dumped = Config.fromfile(str(tmp_path / "run" / "child.py"))
    for name, value in teacher.items():
        assert getattr(runner.model.teacher_settings, name) == value
        assert dumped.model.teacher[name] == value


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("teacher_checkpoint = 'a.pth'", {}, "is what is used; set model.teacher.checkpoint alone"),
        ("", {"teacher_smoothing": 0}, "model.teacher.smoothing=0.1 is what is used"),
        ("", {"step1_checkpoint": "a.pth"}, "set model.step1_checkpoint alone"),
        ("", {"data_root": "own"}, "changes nothing .* set test_dataloader.dataset.data_root"),
    ],
)
def test_a_variable_that_changes_nothing_is_refused(child, text, options, words):
    recipe = child(text, **options)
    with pytest.raises(LskdError, match=words):
        Runner.from_cfg(recipe).train()


def test_a_teacher_at_chance_is_refused_before_the_first_iteration(config, tmp_path):
    config["custom_hooks"].append({"type": "TeacherHook"})
    runner = Runner.from_cfg(Config(config))
    with pytest.raises(
        LskdError, match=r"is at chance: right on .* of 48 validation images \(chance 25.0 %\)"
    ):
        runner.train()
    assert runner.iter == 0
    assert not list(tmp_path.rglob("*.pth"))


def test_a_teacher_of_other_classes_is_refused_before_the_first_iteration(config, tmp_path):
    config["model"]["head"]["num_classes"] = 5
    runner = Runner.from_cfg(Config(config))
    with pytest.raises(LskdError, match="has 4 classes, the student 5"):
        runner.train()
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(("setting", "value"), [("width", "wide"), ("stem", "svhn"), ("depth", 19)])
def test_unknown_settings_pass_through_the_runner_as_one_line(config, setting, value):
    config["model"]["backbone"][setting] = value
    with pytest.raises(LskdError, match=f"{setting} is "):
        Runner.from_cfg(Config(config))


def test_teacher_hook_wants_a_distilling_classifier(config):
    config["custom_hooks"] = [{"type": "TeacherHook"}]
    config["model"]["type"] = "ImageClassifier"
    del config["model"]["teacher"]
    with pytest.raises(LskdError, match="take it out of custom_hooks"):
        Runner.from_cfg(Config(config)).train()


@pytest.fixture
def plain(config):
    """A config without a teacher, and so without a student of ours."""
    config["model"]["type"] = "ImageClassifier"
    del config["model"]["teacher"]
    config["val_evaluator"] = [{"type": "Accuracy", "topk": (1,)}]
    return config


@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_diverged_run_ends_before_it_is_saved(plain, by_epoch, tmp_path):
    plain["optim_wrapper"] = {"optimizer": {"type": "SGD", "lr": 1e38}}
    where = "epoch 1: the"
    if not by_epoch:
        plain["train_cfg"] = {"by_epoch": False, "max_iters": 4, "val_interval": 2}
        where = "iteration 2: the"
    with pytest.raises(DivergedError, match=rf"{where} (training loss_hard|weights) .* the run diverged"):
        Runner.from_cfg(Config(plain)).train()
    assert not list(tmp_path.rglob("epoch_*.pth"))


def test_validation_outputs_that_are_no_numbers_end_the_run(plain):
    runner = Runner.from_cfg(Config(plain))
    predict = runner.model.predict

    def broken(inputs, data_samples):
        found = predict(inputs, data_samples)
        found[0].pred_label.score = found[0].pred_label.score * float("nan")
        return found

    runner.model.predict = broken
    with pytest.raises(DivergedError, match="epoch 1: the validation outputs are not all finite"):
        runner.train()


def test_training_by_iterations_has_a_row_for_each_validation(config, tmp_path):
    config["train_cfg"] = {"by_epoch": False, "max_iters": 5, "val_interval": 2}
    config["custom_hooks"].append({"type": "TeacherHook", "samples": 0})
    Runner.from_cfg(Config(config)).train()
    with (tmp_path / "run" / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]
    assert all(float(row[name]) > 0 for row in rows for name in ("train_ce", "val_ce", "val_top1"))


@pytest.mark.parametrize("hooks", [[], ["SafeCheckpointHook"]])
def test_a_resumed_run_keeps_as_many_checkpoints(plain, hooks, tmp_path):
    """From our checkpoint, and from mmengine's own, as a config without our hook writes it."""
    plain["custom_hooks"] = [{"type": hook} for hook in hooks]
    plain["default_hooks"]["checkpoint"]["max_keep_ckpts"] = 2
    for epochs, resume in ((3, False), (5, True)):
        plain["train_cfg"]["max_epochs"] = epochs
        plain["experiment_name"] = f"{tmp_path.name}-{epochs}"
        Runner.from_cfg(Config({**copy.deepcopy(plain), "resume": resume})).train()
    kept = sorted(path.name for path in (tmp_path / "run").glob("epoch*.pth"))
    assert kept == ["epoch_4.pth", "epoch_5.pth"]


def test_testing_with_augmentation_needs_no_teacher_and_no_store(config, tmp_path):
    """As `mim test --tta` changes the config."""
    script = Path(mmcls.__file__).parent / ".mim" / "tools" / "test.py"
    merge_args = runpy.run_path(str(script))["merge_args"]
    config["custom_hooks"] += [{"type": "TeacherHook"}, {"type": "SoftLabelsHook"}]
    config["model"]["teacher"]["checkpoint"] = "moved_away.pth"
    config["model"]["distillation"] = {"soft_labels": {"path": str(tmp_path / "labels")}}
    model = MODELS.build(copy.deepcopy(config["model"]))
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth")
    config |= {
        "test_dataloader": copy.deepcopy(config["val_dataloader"]),
        "test_evaluator": [{"type": "Accuracy", "topk": (1,)}],
        "test_cfg": {},
    }
    options = {
        "show": False,
        "show_dir": None,
        "no_pin_memory": True,
        "cfg_options": None,
        "launcher": "none",
    }
    options |= {"work_dir": str(tmp_path / "test"), "checkpoint": str(tmp_path / "epoch_1.pth")}
    found = {}
    for tta in (False, True):
        given = SimpleNamespace(**options, tta=tta, config="recipe.py")
        cfg = merge_args(Config(copy.deepcopy(config)), given)
        cfg.experiment_name = f"{tmp_path.name}-{tta}"
        found[tta] = Runner.from_cfg(cfg).test()
    assert all(0 <= metrics["accuracy/top1"] <= 100 for metrics in found.values())
