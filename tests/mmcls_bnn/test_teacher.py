"""Loading teachers from every source, in their own normalisation; and what is refused."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from mmengine.config import Config

from lskd import FrozenTeacher, LskdError
from lskd.teachers.frozen import Normalisation
from mmcls_bnn.compat import MODELS
from mmcls_bnn.distil.teacher import LogitsOf, TeacherSettings, describe_teacher, load_teacher

pytestmark = pytest.mark.unit

IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
GREY = Normalisation((127.5,), (127.5,), rgb=False)


def settings(path, **values):
    return TeacherSettings.of({"model": "test_resnet", "checkpoint": str(path), **values})


def saved(path, **settings):
    """Return a timm model whose weights lie in a file."""
    model = timm.create_model("test_resnet", num_classes=4, **settings).eval()
    torch.save({"state_dict": model.state_dict()}, path)
    return model


def pixels(channels, size=32):
    return torch.randint(
        0, 256, (3, channels, size, size), generator=torch.Generator().manual_seed(0)
    ).float()


def normalised(images, mean, std):
    return (images - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def test_one_resnet_file_for_timm_and_torchvision(tmp_path):
    """torchvision's names are timm's: one file, the same logits to the bit."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    for source in ("timm", "torchvision"):
        teacher = load_teacher(
            settings(tmp_path / "resnet18.pth", model="resnet18", source=source), 5, IMAGENET
        )
        # timm's ResNet-18 is normalised with torchvision's numbers, to float32's last digits.
        assert teacher.image_size is None
        torch.testing.assert_close(teacher.model(images), expected, rtol=0, atol=0)


def test_normalisation_beside_a_checkpoint_of_timms_trainers(tmp_path):
    model = saved(tmp_path / "last.pth.tar", in_chans=1)
    Path(tmp_path, "args.yaml").write_text(
        "model: test_resnet\nin_chans: 1\nmean: [0.2]\nstd: [0.3]\nimg_size: 32\nsmoothing: 0.1\n"
    )
    teacher = load_teacher(settings(tmp_path / "last.pth.tar"), 4, GREY)
    images = pixels(1)
    with torch.no_grad():
        expected = model(normalised(images / 255, [0.2], [0.3]))
    found = teacher(normalised(images, GREY.mean, GREY.std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (teacher.image_size, teacher.converts) == ((32, 32), True)
    small = teacher(normalised(pixels(1, 16), GREY.mean, GREY.std))  # resized to 32
    assert small.shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "run", "arguments"),
    [
        ("test_resnet", {"gp": "max"}, {"global_pool": "max"}),
        ("test_efficientnet", {"bn_eps": 0.5}, {"bn_eps": 0.5}),
        ("test_resnet", {"gp": "max", "model_kwargs": {"act_layer": "silu"}}, {"act_layer": "silu"}),
    ],
)
def test_a_run_beside_a_checkpoint_says_which_network_it_is(tmp_path, name, run, arguments):
    """The weights fit another one, which answers otherwise."""
    arguments = {"global_pool": run.get("gp"), **arguments}
    model = timm.create_model(name, num_classes=4, **arguments).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "t.pth")
    Path(tmp_path, "args.yaml").write_text(yaml.safe_dump({"model": name, **run}))
    images = torch.randn(3, 3, 64, 64)
    teacher = load_teacher(settings(tmp_path / "t.pth", model=name), 4, IMAGENET)
    with torch.no_grad():
        assert torch.equal(teacher.model(images), model(images))


@pytest.mark.parametrize(
    ("run", "given", "expected"),
    [
        ({"img_size": 48, "input_size": None}, {}, (48, 48)),
        ({"img_size": None, "input_size": [3, 48, 32]}, {}, (48, 32)),
        ({"img_size": None, "input_size": None}, {}, (160, 160)),  # the model's default, as timm trained it
        ({"img_size": 48}, {"image_size": 40}, (40, 40)),
        ({}, {}, None),
    ],
)
def test_size_of_a_teachers_run(tmp_path, run, given, expected):
    saved(tmp_path / "t.pth")
    Path(tmp_path, "args.yaml").write_text(yaml.safe_dump({"model": "test_resnet", **run}))
    asked = settings(tmp_path / "t.pth", **given)
    teacher, seen = load_teacher(asked, 4, IMAGENET), []
    assert teacher.image_size == expected
    line = describe_teacher(asked, teacher, 4)
    assert line.endswith(f", resized to {expected[0]} x {expected[1]}" if expected else "own normalisation")
    teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    teacher(torch.zeros(2, 3, 64, 64))
    assert seen == [expected or (64, 64)]


def test_settings_beat_args_yaml(tmp_path):
    saved(tmp_path / "t.pth", in_chans=1)
    Path(tmp_path, "args.yaml").write_text("model: test_resnet\nin_chans: 1\nmean: [0.2]\nstd: [0.3]\n")
    given = settings(tmp_path / "t.pth", mean=[127.5], std=[127.5])
    teacher = load_teacher(given, 4, GREY)
    assert (teacher.own, teacher.student) == (Normalisation((127.5,), (127.5,), rgb=True), GREY)


def test_mmcls_config_and_checkpoint(tmp_path):
    config = tmp_path / "teacher.py"
    config.write_text(
        "data_preprocessor = dict(num_classes=4, mean=[100.0], std=[50.0])\n"
        "model = dict(type='ImageClassifier', pretrained='nowhere.pth',\n"
        "    backbone=dict(type='ResNet_CIFAR', depth=18, in_channels=1, stem_channels=8, base_channels=8,\n"
        "                  out_indices=(3,)),\n"
        "    neck=dict(type='GlobalAveragePooling'),\n"
        "    head=dict(type='LinearClsHead', num_classes=4, in_channels=64))\n"
    )
    description = Config.fromfile(str(config)).model.to_dict()
    del description["pretrained"]
    model = MODELS.build(description).eval()
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, tmp_path / "epoch_1.pth")
    given = TeacherSettings.of({"config": str(config), "checkpoint": str(tmp_path / "epoch_1.pth")})
    images = pixels(1)
    with torch.no_grad():
        expected = model(normalised(images, [100.0], [50.0]))
    found = load_teacher(given, 4, GREY)(normalised(images, GREY.mean, GREY.std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(LskdError, match="has 4 classes, the student 10"):
        load_teacher(given, 10, GREY)


def test_a_student_of_ours_is_the_next_teacher(student, tmp_path):
    model = MODELS.build(student).eval()
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, tmp_path / "epoch_1.pth")
    config = tmp_path / "student.py"
    config.write_text(f"model = {student!r}\n")
    given = TeacherSettings.of({"config": str(config), "checkpoint": str(tmp_path / "epoch_1.pth")})
    images = normalised(pixels(1), GREY.mean, GREY.std)
    with torch.no_grad():
        expected = model(images, mode="tensor")
    assert torch.equal(load_teacher(given, 4, GREY)(images), expected)


@pytest.mark.parametrize(
    ("values", "classes", "student", "words"),
    [
        ({"checkpoint": "nosuch.pth"}, 4, GREY, "nosuch.pth does not exist"),
        ({"model": "test_resnett"}, 4, GREY, "did you mean test_resnet"),
        ({"model": "resnet5000", "source": "torchvision"}, 4, GREY, "unknown teacher 'resnet5000'"),
        ({"config": "nosuch.py", "model": None}, 4, GREY, "config nosuch.py does not exist"),
        ({}, 5, GREY, "has 4 classes, the student 5"),
        ({}, 4, IMAGENET, r"is \[.*1, 3, 3\], the model's is \[.*3, 3, 3\]"),
        ({"mean": [1, 2, 3], "std": [1, 1, 1]}, 4, GREY, "takes 3 input channels, the student 1"),
        (
            {"model": "resnet18"},
            4,
            GREY,
            "another architecture.*; give model.teacher the model and the kwargs",
        ),
        ({"model": "resnet18", "source": "torchvision"}, 4, GREY, "takes 3 input channels"),
        ({"kwargs": {"drop_rat": 1}}, 4, GREY, "cannot be created"),
        ({"image_size": 1 << 64}, 4, GREY, "image_size is .* must be a whole number from 1 to"),
    ],
)
def test_refused(teacher_file, values, classes, student, words):
    with pytest.raises(LskdError, match=words) as error:
        load_teacher(settings(**{"path": teacher_file, **values}), classes, student)
    assert "\n" not in str(error.value)


def test_checkpoint_that_runs_code_is_refused(trap):
    with pytest.raises(LskdError, match="refused"):
        load_teacher(settings(trap), 4, GREY)


class Stages(torch.nn.Module):
    """A backbone whose last stage is what a head expects."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, images):
        pooled = images.mean((2, 3))
        return pooled * 100, self.last(pooled)


HEADS = {
    "LinearClsHead": ({"in_channels": 3}, lambda x: x),
    "ConformerHead": ({"in_channels": [3, 3]}, lambda x: [x, x.flip(1)]),
    "DeiTClsHead": ({"in_channels": 3}, lambda x: [None, x, x.flip(1)]),
    "EfficientFormerClsHead": ({"in_channels": 3}, lambda x: x),
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_what_the_head_itself_evaluates(name):
    """The last stage, and of two outputs the sum or mean that mmcls predicts from."""
    arguments, last = HEADS[name]
    torch.manual_seed(0)
    head = MODELS.build({"type": name, "num_classes": 4, "init_cfg": None, **arguments})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    model = MODELS.build({"type": "ImageClassifier", "backbone": Stages(last), "head": head}).eval()
    images = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        expected = torch.stack([sample.pred_label.score for sample in model.predict(images)])
    teacher = FrozenTeacher(LogitsOf(model), IMAGENET, IMAGENET)
    torch.testing.assert_close(teacher(images).softmax(-1), expected)


def test_a_head_of_several_tasks_is_no_teacher():
    task = {"type": "LinearClsHead", "num_classes": 4, "in_channels": 3}
    head = MODELS.build({"type": "MultiTaskHead", "task_heads": {"a": task, "b": task}})
    backbone = Stages(lambda x: x)
    for parts in ({"head": head}, {}):
        with pytest.raises(LskdError, match="no one score for each class"):
            LogitsOf(MODELS.build({"type": "ImageClassifier", "backbone": backbone, **parts}))
