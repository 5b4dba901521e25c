"""A tiny image folder of real digits, a teacher of timm's for it, and a student's config."""

import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image

CLASSES = 4
FORMAT = {"type": "ClsDataPreprocessor", "num_classes": CLASSES, "mean": [127.5], "std": [127.5]}


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """96 training and 48 validation images of 8 x 8, grey."""
    from sklearn.datasets import load_digits

    data = load_digits()
    root = tmp_path_factory.mktemp("digits")
    for label in range(CLASSES):
        for i, index in enumerate(np.flatnonzero(data.target == label)[:36]):
            folder = root / ("val" if i % 3 == 0 else "train") / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((data.images[index] * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def registered():
    from mmcls_bnn import compat, register

    assert register
    compat.use_registry()


def filled_by_hand(model):
    """Give every parameter and buffer values that no initialisation would."""
    for number, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            values = torch.arange(tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
            tensor.copy_(0.3 + 0.2 * torch.sin(values + number))
    return model


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A timm teacher with BatchNorm, and dropout by `drop_rate`."""
    model = filled_by_hand(timm.create_model("test_resnet", num_classes=CLASSES, in_chans=1))
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def taught(digits, tmp_path_factory):
    """A timm model that has learnt the images, so that what it says differs from image to image."""
    torch.manual_seed(0)
    files = sorted((digits / "train").rglob("*.png"))
    images = [torch.from_numpy(np.array(Image.open(file).resize((16, 16)))).float() for file in files]
    batch = (torch.stack(images)[:, None] - 127.5) / 127.5
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), labels, label_smoothing=0.1).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


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
            "experiment_name": tmp_path.name,
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
