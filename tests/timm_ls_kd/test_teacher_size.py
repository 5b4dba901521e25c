"""A teacher sees images of the size it was trained at, whatever the student's is."""

import pytest
import timm
import torch
import yaml

from lskd import LskdError
from lskd.teachers.frozen import Normalisation
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.teacher import create_teacher, describe_teacher

pytestmark = pytest.mark.unit
NORM = Normalisation((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def make(tmp_path):
    """Make a teacher from a checkpoint with (or without) these settings beside it."""

    def make_teacher(settings=None, name="test_resnet", size=None):
        torch.save(timm.create_model(name, num_classes=4).state_dict(), tmp_path / "t.pth")
        if settings is not None:
            (tmp_path / "args.yaml").write_text(yaml.safe_dump({"model": name} | settings))
        kd = KdConfig(name, checkpoint=str(tmp_path / "t.pth"), teacher_img_size=size)
        return create_teacher(kd, 4, NORM)

    return make_teacher


def seen_sizes(teacher, size):
    seen = []
    teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    teacher(torch.zeros(2, 3, size, size))
    return seen


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({"img_size": 32, "input_size": None}, None, 32),
        ({"img_size": None, "input_size": [3, 48, 48]}, None, 48),
        ({"img_size": None, "input_size": None}, None, 160),  # the model's default, which timm trained it at
        ({"img_size": 32}, 40, 40),
        ({}, None, 64),  # unknown: the student's
        (None, None, 64),
    ],
)
def test_size_of_the_teachers_run(make, settings, size, expected):
    teacher = make(settings, size=size)
    assert seen_sizes(teacher, 64) == [(expected, expected)]
    lines = " ".join(describe_teacher(KdConfig("test_resnet"), teacher, 4))
    assert (f"resized to {expected} x {expected}" in lines) == (expected != 64)


def test_size_of_pretrained_weights(monkeypatch):
    from timm_ls_kd import teacher

    pretrained = timm.create_model("test_resnet", num_classes=4)
    monkeypatch.setattr(teacher, "_pretrained", lambda *args: (pretrained, {}, "of its pretrained weights"))
    assert seen_sizes(create_teacher(KdConfig("test_resnet"), 4, NORM), 64) == [(160, 160)]


@pytest.mark.parametrize("settings", [{"img_size": "big"}, {"mean": [0.1, 0.2]}, {"input_size": [3, 32]}])
def test_settings_that_timm_cannot_use(make, settings):
    with pytest.raises(LskdError, match=r"args\.yaml beside .*t\.pth"):
        make(settings)
