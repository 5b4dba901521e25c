"""A whole training run of mmengine's Runner in this process, with a teacher filled by hand."""

import copy

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


def test_top_level_variables_beat_the_model(config, tmp_path):
    config["custom_hooks"].append({"type": "TeacherHook"})
    config["teacher_checkpoint"] = "nosuch.pth"
    with pytest.raises(LskdError, match=r"nosuch.pth does not exist"):
        Runner.from_cfg(Config(config)).train()


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
