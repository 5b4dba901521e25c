"""The teacher of every trainer: what it is given, what it says, and where it is not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lskd import LskdError
from lskd.teachers.frozen import FrozenTeacher, Normalisation
from lskd.teachers.outputs import answers_to

pytestmark = pytest.mark.unit
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHER = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 5))


@pytest.fixture
def batch():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def normalised(images, norm):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (norm.mean, norm.std))
    return (images - mean) / std


def test_frozen_for_good_and_outside_the_student(model, batch):
    student = nn.Linear(2, 2)
    student.teacher = teacher = FrozenTeacher(model, HALF, HALF)
    expected = teacher(batch)
    student.train().requires_grad_(True).to(torch.bfloat16)
    assert torch.equal(teacher(batch), expected)  # no dropout, no batch's statistics, no half precision
    assert set(student.state_dict()) == {"weight", "bias"}
    assert not any(each.requires_grad for each in model.parameters())
    assert not expected.is_inference()
    assert not expected.requires_grad
    assert copy.deepcopy(student).teacher is teacher


@pytest.mark.parametrize("rgb", [True, False])
def test_its_own_normalisation_and_order_of_channels(model, batch, rgb):
    student = Normalisation(HALF.mean, (0.4, 0.5, 0.6), rgb)
    teacher = FrozenTeacher(model, OTHER, student)
    given = normalised(batch if rgb else batch.flip(1), student)
    with torch.no_grad():
        torch.testing.assert_close(teacher(given), model(normalised(batch, OTHER)), rtol=1e-4, atol=1e-4)
        assert (teacher(given) - model(given)).abs().max() > 0.01
    assert teacher.converts


def test_equal_normalisation_costs_nothing(model, batch):
    teacher = FrozenTeacher(model, HALF, Normalisation(HALF.mean, HALF.std, source="elsewhere"))
    assert torch.equal(teacher(batch), model(batch))
    assert not teacher.converts


def test_channels_and_units_of_a_normalisation():
    norm = Normalisation.of((0.25, 0.5, 0.75), (0.5, 0.5, 0.5), 1, "here", scale=255)
    assert (norm.mean, norm.std, str(norm)) == ((127.5,), (127.5,), "mean (128) std (128)")


def test_resizes(model, batch):
    teacher = FrozenTeacher(model, HALF, HALF, image_size=(16, 12))
    expected = functional.interpolate(batch, size=(16, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(batch), model(expected))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtype_under_autocast(model, batch, dtype):
    reference = copy.deepcopy(model).eval()(batch)
    teacher = FrozenTeacher(model, HALF, HALF, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = teacher(batch)
    assert logits.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    torch.testing.assert_close(logits.float(), reference, rtol=0.1, atol=0.1)


def test_channels_last_and_compiled(model, batch):
    expected = copy.deepcopy(model).eval()(batch)
    teacher = FrozenTeacher(model, HALF, HALF, channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(batch), expected)
    teacher.compile(backend="eager")
    torch.testing.assert_close(teacher(batch), expected)


def test_moves_with_its_constants(model):
    teacher = FrozenTeacher(model, OTHER, HALF).to(torch.device("meta"))
    assert teacher(torch.empty(1, 3, 8, 8, device="meta")).device.type == "meta"
    assert teacher.to(None).device.type == "meta"


def test_of_several_outputs_the_first_counts(batch):
    class Network(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, images):
            return self.output(images.mean((2, 3)))

    assert torch.equal(FrozenTeacher(Network(lambda x: (x, x + 1)), HALF, HALF)(batch), batch.mean((2, 3)))
    for other, what in ((lambda x: {"logits": x}, "a dict"), (lambda x: x[None], r"a tensor \(1, 6, 3\)")):
        with pytest.raises(LskdError, match=f"returns {what}, not logits"):
            FrozenTeacher(Network(other), HALF, HALF)(batch)


def test_a_fast_copy_answers_in_its_place(model, batch):
    teacher = FrozenTeacher(model, OTHER, HALF, name="t")
    expected = teacher(batch)
    line = teacher.speed_up([batch[:4], batch[4:]], "float32", option="--fast float32")
    assert line.startswith("teacher 't', fast: float32, 1 of 1 batch norms folded")
    assert (teacher.form.mode, teacher.form.images) == ("float32", 6)
    assert teacher.model is not model
    torch.testing.assert_close(teacher(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batches", "bound"), [([], 1.0), (None, -1.0)])
def test_a_fast_copy_is_refused_in_one_line(model, batch, batches, bound):
    teacher = FrozenTeacher(model, HALF, HALF, name="t")
    with pytest.raises(LskdError, match=r"^teacher 't', --fast: .*"):
        teacher.speed_up([batch] if batches is None else batches, "float32", bound, option="--fast")
    assert teacher.form.mode == "none"


def test_answers_come_in_whole_batches(batch):
    sizes = []

    def teacher(images):
        sizes.append(len(images))
        return images.mean((2, 3))

    answers = dict(answers_to([("first", batch[:4]), ("last", batch[4:])], teacher, 4))
    assert sizes == [4, 4]
    assert torch.equal(torch.cat([answers["first"], answers["last"]]), batch.mean((2, 3)))
