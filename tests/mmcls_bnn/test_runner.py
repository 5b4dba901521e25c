"""A whole training run of mmengine's Runner in this process, with a teacher filled by hand."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from lskd import LskdError

pytestmark = pytest.mark.unit


@pytest.fixture
def config(student, digits, tmp_path):
    pipeline = [
        {"type": "LoadImageFromFile", "color_type": "grayscale"},
        {"type": "Resize", "scale": 16},
        {"type": "PackClsInputs"},
    ]

    def loader(split):
        return {
            "batch_size": 32,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": split == "train"},
            "collate_fn": {"type": "default_collate"},
            "dataset": {
                "type": "CheckedImageFolder",
                "data_root": str(digits),
                "data_prefix": split,
                "num_classes": 4,
                "pipeline": pipeline,
            },
        }

    return {
        "default_scope": "mmcls",
        "work_dir": str(tmp_path / "run"),
        "experiment_name": tmp_path.name,
        "model": student,
        "train_dataloader": loader("train"),
        "val_dataloader": loader("val"),
        "val_evaluator": [{"type": "Accuracy", "topk": (1,)}, {"type": "DistillationMetric"}],
        "train_cfg": {"by_epoch": True, "max_epochs": 2, "val_interval": 1},
        "val_cfg": {},
        "optim_wrapper": {"optimizer": {"type": "Adam", "lr": 2.5e-3}},
        "custom_hooks": [{"type": "SafeCheckpointHook"}, {"type": "CurvesHook"}],
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "randomness": {"seed": 0},
        "log_level": "WARNING",
    }


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
        folders = {
            f"{split}_dataloader": {"dataset": {"data_root": str(digits)}} for split in ("train", "val")
        }
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
    runner.call_hook("before_run")
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
        Runner.from_cfg(recipe).call_hook("before_run")


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
