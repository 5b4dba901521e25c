"""A tiny image folder of real digits, a teacher of timm's for it, and a student's config."""

import copy
from itertools import count
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import plain_configs  # noqa: F401
from digit_teacher import teach
from image_folders import write_digits

CLASSES = 4
NUMBERS = count()
FORMAT = {"type": "ClsDataPreprocessor", "num_classes": CLASSES, "mean": [127.5], "std": [127.5]}


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """96 training and 48 validation images of 8 x 8, grey."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session", autouse=True)
def registered():
    from mmcls_bnn import compat, register

    assert register
    compat.use_registry()


@pytest.fixture(scope="session")
def teacher_file(digits, tmp_path_factory):
    """A timm teacher with BatchNorm, and dropout by `drop_rate`, that has learnt the images."""
    return teach(digits, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def student(teacher_file):
    """The config of an LsKdClassifier; a copy that the test may change."""
    return copy.deepcopy(
        {
            "type": "LsKdClassifier",
            "backbone": {"type": "ReActNet", "width": 0.125, "stem": "cifar", "in_channels": 1},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 64},
            "data_preprocessor": FORMAT,
            "teacher": {
                "model": "test_resnet",
                "checkpoint": str(teacher_file),
                "kwargs": {"drop_rate": 0.5},
                "mean": [127.5],
                "std": [127.5],
            },
        }
    )


LOADED, PACKED = {"type": "LoadImageFromFile", "color_type": "grayscale"}, {"type": "PackClsInputs"}


@pytest.fixture
def make_config(student, digits, tmp_path):
    """Return the maker of a run's config: hooks by name, training transforms between loading and packing."""

    def loader(split, *transforms):
        return {
            "batch_size": 32,
            "num_workers": 0,
            "persistent_workers": False,
            "sampler": {"type": "DefaultSampler", "shuffle": split == "train"},
            "collate_fn": {"type": "default_collate"},
            "dataset": {
                "type": "CheckedImageFolder",
                "data_root": str(digits),
                "data_prefix": split,
                "num_classes": CLASSES,
                "pipeline": [LOADED, *transforms, PACKED],
            },
        }

    def make(hooks, *transforms, **changes):
        resized = {"type": "Resize", "scale": 16}
        config = {
            "default_scope": "mmcls",
            "work_dir": str(tmp_path / "run"),
            "model": student,
            "train_dataloader": loader("train", *(transforms or [resized])),
            "val_dataloader": loader("val", resized),
            "val_evaluator": [{"type": "Accuracy", "topk": (1,)}, {"type": "DistillationMetric"}],
            "train_cfg": {"by_epoch": True, "max_epochs": 2, "val_interval": 1},
            "val_cfg": {},
            "optim_wrapper": {"optimizer": {"type": "Adam", "lr": 2.5e-3}},
            "custom_hooks": [{"type": f"{name}Hook"} for name in hooks],
            "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            "randomness": {"seed": 0},
            "log_level": "WARNING",
        }
        return copy.deepcopy(config | changes)

    return make


@pytest.fixture
def trap(tmp_path):
    """A checkpoint that would run code wherever it is read unsafely; nothing may have run it."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": {}, "message_hub": Trap()}, tmp_path / "trap.pth")
    yield tmp_path / "trap.pth"
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def runner_of():
    """Return the maker of a copy of a config's Runner, under a name and in a work folder of its own."""

    def make(config, **changes):
        name = f"run{next(NUMBERS)}"
        own = {"experiment_name": name, "work_dir": f"{config['work_dir']}/{name}"}
        return Runner.from_cfg(Config(copy.deepcopy(config | own | changes)))

    return make


@pytest.fixture
def train(runner_of):
    """Return what trains a config, and returns the runner."""

    def run(config, **changes):
        runner = runner_of(config, **changes)
        runner.train()
        return runner

    return run


@pytest.fixture
def build():
    from mmcls_bnn.compat import MODELS

    return MODELS.build


@pytest.fixture
def samples():
    from mmcls.structures import ClsDataSample

    def make(labels, scores=None):
        made = []
        for i, label in enumerate(labels):
            sample = ClsDataSample().set_gt_label(int(label))
            made.append(sample if scores is None else sample.set_gt_score(scores[i]))
        return made

    return make
