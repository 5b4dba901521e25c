"""A fast teacher: what folding leaves equal, how its error is measured, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lskd.teachers.fast as fast_teacher
from lskd import LskdError
from lskd.teachers.fast import TeacherForm, choose_fast, fold_batch_norm

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """Convolutions with batch norm: in a row, by groups, with a bias, around a sum, and one shared."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.seen_twice, self.norm_of_seen = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shared, self.norm_of_shared = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.alone = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.grouped(x)))
        seen = self.seen_twice(x)
        x = seen + self.norm_of_seen(seen)
        x = self.norm_of_shared(self.shared(x)) + self.shared(x)
        return self.head(self.alone(torch.relu(x)).mean((2, 3)))


def with_statistics(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return with_statistics(Net())


@pytest.fixture
def images():
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_folding_leaves_the_function_as_it_is(net, images):
    expected = net(images)
    # Not what is seen in between, used twice, or after no convolution.
    assert fold_batch_norm(net) == "2 of 5 batch norms folded"
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(net.stem[1], nn.Identity)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_an_attribute_makes_no_layer_of_timms(net, images):
    net.stem[1].act = nn.ReLU()
    expected = net(images)
    assert fold_batch_norm(net) == "2 of 5 batch norms folded"
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dimensions", "shape"), [(1, (2, 3, 9)), (3, (2, 3, 4, 5, 6))])
def test_folding_in_other_dimensions(dimensions, shape):
    layers = getattr(nn, f"Conv{dimensions}d")(3, 4, 3), getattr(nn, f"BatchNorm{dimensions}d")(4)
    model = with_statistics(nn.Sequential(*layers))
    expected = model(torch.ones(shape))
    assert fold_batch_norm(model) == "1 of 1 batch norms folded"
    torch.testing.assert_close(model(torch.ones(shape)), expected, rtol=1e-5, atol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


class Untraceable(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else x + 0)


def test_what_cannot_be_folded_is_left(images):
    standardised = with_statistics(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)))
    namesake = type("Conv2d", (Standardised,), {})  # torch's name, but not torch's class
    named = with_statistics(nn.Sequential(namesake(3, 4, 3), nn.BatchNorm2d(4)))
    batch_statistics = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    for model in (standardised, named, batch_statistics, with_statistics(Untraceable())):
        expected = model(images)
        assert fold_batch_norm(model).startswith(("0 of 1", "batch norm not folded (it cannot be traced"))
        assert torch.equal(model(images), expected)
    assert fold_batch_norm(nn.Linear(2, 2).eval()) == "no batch norm to fold"
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(Net())


def test_deviation_is_the_divergence(images):
    exact, fast = torch.randn(7, 5), torch.randn(7, 5)
    p, q = (
        np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (exact.double().numpy(), fast.double().numpy())
    )
    expected = (p * np.log(p / q)).sum(1)
    found = TeacherForm.measured("int8", "", exact, fast)
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-9)
    assert found.max_kl == pytest.approx(expected.max(), rel=1e-9)
    assert found.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert found.images == 7


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "auto"])
def test_fast_teacher_is_close_and_leaves_the_exact_one_alone(net, images, mode, monkeypatch):
    monkeypatch.setattr(fast_teacher, "supported_modes", lambda device: ["float32", "bfloat16"])
    before = copy.deepcopy(net.state_dict())
    teacher, line = choose_fast(net, images, mode)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    error = (teacher(images).float() - net(images)).abs().max()
    assert error < (0.1 if teacher.dtype == torch.bfloat16 else 1e-5)
    assert teacher.form.images == 18  # of 24: every fourth is for ranges
    assert f"KL(exact || fast) {teacher.form.mean_kl:.2g} nats" in line
    assert "2 of 5 batch norms folded, channels-last" in line
    assert "\n" not in line


def test_fast_teacher_keeps_its_precision_under_autocast(net, images):
    teacher, _ = choose_fast(net, images, "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(images).dtype == torch.float32


def test_too_large_an_error_is_refused(net, images, monkeypatch):
    monkeypatch.setattr(fast_teacher, "supported_modes", lambda device: ["float32", "bfloat16"])
    with pytest.raises(LskdError, match=r"bfloat16\) is too far from the exact one: KL.*the bound is 1e-09"):
        choose_fast(net, images, "bfloat16", 1e-9)
    # auto takes what is within the bound instead.
    assert choose_fast(net, images, "auto", 1e-9)[0].form.mode == "float32"
    with torch.no_grad():
        net.head.bias[0] = torch.nan
    with pytest.raises(LskdError, match="too far"):
        choose_fast(net, images, "float32")


@pytest.mark.parametrize("limit", ["", "avx2"])
@pytest.mark.parametrize("mode", ["bfloat16", "int8"])
def test_without_the_arithmetic_it_is_float32_and_said(net, images, mode, limit, monkeypatch):
    """The CPU does not have it, or oneDNN is told to do without."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(limit))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: bool(limit))
    teacher, line = choose_fast(net, images, mode)
    assert teacher.form.mode == "float32"
    assert f"no {mode} on this CPU" in line


def test_images_are_needed(net, images):
    with pytest.raises(LskdError, match="needs images"):
        choose_fast(net, images[:0], "float32")


@pytest.mark.skipif("int8" not in fast_teacher.supported_modes(torch.device("cpu")), reason="CPU: no VNNI")
class TestEightBit:
    @pytest.fixture
    def net(self):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)]
        pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
        return with_statistics(nn.Sequential(*layers, *pool))

    def test_close(self, net, images):
        engine = torch.backends.quantized.engine
        teacher, line = choose_fast(net, images, "int8", bound=1)
        assert torch.backends.quantized.engine == engine
        error = (teacher(images) - net(images)).abs().max() / net(images).abs().max()
        assert 1e-6 < error < 0.1
        assert "convolutions in int8" in line

    def test_ranges_and_measuring_are_of_different_images(self, net, images, monkeypatch):
        seen = []
        make = fast_teacher.quantise_convolutions
        monkeypatch.setattr(
            fast_teacher, "quantise_convolutions", lambda model, x: (seen.append(x), make(model, x))[1]
        )
        choose_fast(net, images, "int8", bound=1)
        assert torch.equal(seen[0], images[::4])

    @pytest.mark.parametrize(
        "model",
        [Untraceable(), nn.Sequential(nn.Flatten(), nn.Linear(432, 5))],
        ids=["untraceable", "linear"],
    )
    def test_refused_by_name_or_passed_over(self, model, images):
        model = with_statistics(model)
        with pytest.raises(LskdError, match="no fast teacher in int8"):
            choose_fast(model, images, "int8")
        teacher, line = choose_fast(model, images, "auto")
        assert teacher.form.mode != "int8"
        assert "no int8: it " in line


def test_no_compiler_is_one_line(net, images, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working\nC++ compiler")

    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: no_compiler)
    with pytest.raises(LskdError, match=r"cannot be compiled here \(no working C\+\+ compiler\)"):
        choose_fast(net, images, "float32", compiled=True)


def test_compiled_for_the_batch_size_of_training(net, images, monkeypatch):
    sizes = []

    def compile_(model, **kwargs):
        return lambda x: (sizes.append(len(x)), model(x))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    teacher, line = choose_fast(net, images, "float32", compiled=True, batch_size=5)
    assert set(sizes) == {5}
    assert teacher.form.mean_kl < 1e-9
    assert "compiled" in line


def test_deviation_on_a_device_without_float64(without_float64):
    exact = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    with without_float64():
        found = TeacherForm.measured("int8", "", exact, exact + 0.1 * exact.sin())
    assert found.images == 50
    assert 0 < found.mean_kl < found.max_kl < 0.1
