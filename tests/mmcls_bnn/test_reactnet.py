"""The backbones: parity with a network that shares no code with them, names, shapes and wrong settings."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from lskd import LskdError
from mmcls_bnn.binary.layers import BinaryConv2d, binary_layers
from mmcls_bnn.binary.reactnet import ReActNet, ReActNetA

pytestmark = pytest.mark.unit

plain = runpy.run_path(str(Path(__file__).with_name("straightforward.py")))


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_reactnet18_is_the_straightforward_network(training):
    ours, theirs = randomise(ReActNet(18)).double(), plain["ReActNet18"]().double()
    theirs.load_state_dict(ours.state_dict())
    ours.train(training), theirs.train(training)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    found, expected = ours(images)[0], theirs(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if training:
        found.square().mean().backward(), expected.square().mean().backward()
        wanted = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-6, atol=1e-6)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, theirs.get_buffer(name))


def reactnet_a_by_hand(model, x):
    """ReActNet-A's forward from its weights alone, in eval mode and plain torch operations."""
    weights = model.state_dict()
    functional = torch.nn.functional

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def conv(x, name, stride, padding):
        weight = plain["binary_weight"](weights[f"{name}.weight"])
        return functional.conv2d(x, weight, stride=stride, padding=padding)

    def activation(x, name):
        x = x + weights[f"{name}.bias_before"]
        x = torch.where(x > 0, x, weights[f"{name}.slope"] * x)
        return x + weights[f"{name}.bias_after"]

    x = norm(functional.conv2d(x, weights["stem.conv.weight"], stride=2, padding=1), "stem.norm")
    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    for i in range(13):
        block, doubled = f"blocks.{i}", channels[i + 1] != channels[i]
        stride = 2 if doubled and i > 0 else 1
        shortcut = functional.avg_pool2d(x, 2) if stride == 2 else x
        binary = plain["sign"](x + weights[f"{block}.sign1.bias"])
        x = norm(conv(binary, f"{block}.conv1", stride, 1), f"{block}.norm1") + shortcut
        x = activation(x, f"{block}.activation1")
        binary = plain["sign"](x + weights[f"{block}.sign2.bias"])
        halves = [
            norm(conv(binary, f"{block}.conv2.{j}", 1, 0), f"{block}.norm2.{j}") + x
            for j in range(2 if doubled else 1)
        ]
        x = activation(torch.cat(halves, 1), f"{block}.activation2")
    return x


def test_reactnet_a_is_what_its_weights_say():
    model = randomise(ReActNetA()).double().eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        found, expected = model(images)[0], reactnet_a_by_hand(model, images)
    assert found.shape == (2, 1024, 2, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_reactnet34_has_twice_as_many_binary_convolutions():
    assert [len(binary_layers(ReActNet(depth))) for depth in (18, 34)] == [16, 32]


@pytest.mark.parametrize("network", [ReActNet, ReActNetA])
def test_steps_have_the_same_parameters(network):
    settings = {"width": 0.25, "stem": "cifar"}
    first = network(binarize=("activations",), **settings)
    second = network(binarize=("activations", "weights"), **settings)
    second.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(first.eval()(images)[0], second.eval()(images)[0])
    real = network(binarize=(), **settings)
    assert {k for k in first.state_dict() if "sign" not in k} == set(real.state_dict())
    assert network(binarize=["weights", "activations"], **settings).binarize == second.binarize


@pytest.mark.parametrize("network", [ReActNet, ReActNetA])
@pytest.mark.parametrize(("stem", "size"), [("cifar", 28), ("cifar", 9), ("imagenet", 75)])
def test_any_image_size(network, stem, size):
    model = network(width=0.25, stem=stem, in_channels=1)
    (features,) = model(torch.randn(2, 1, size, size))
    assert features.shape[:2] == (2, model.out_channels)
    features.sum().backward()


def test_norm_eval_holds_statistics_still():
    model = ReActNet(width=0.25, stem="cifar", norm_eval=True).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_initialisations():
    drawn = [m.weight for m in ReActNet(width=0.25).modules() if isinstance(m, BinaryConv2d)]
    positive = ReActNet(width=0.25, initialisation="positive")
    assert all(0.3 < (weight > 0).float().mean() < 0.7 for weight in drawn)
    assert all((m.weight >= 0).all() for m in positive.modules() if isinstance(m, BinaryConv2d))


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        (ReActNet, {"width": "wide"}, "width is 'wide'"),
        (ReActNet, {"width": 0}, "width is 0"),
        (ReActNet, {"width": 0.3}, "multiple of 1/64"),
        (ReActNetA, {"width": 1 / 64}, "multiple of 1/32"),
        (ReActNet, {"stem": "svhn"}, "stem is 'svhn'"),
        (ReActNetA, {"stem": None}, "stem is None"),
        (ReActNet, {"depth": 50}, "depth is 50"),
        (ReActNet, {"binarize": ("activation",)}, "binarize names 'activation'"),
        (ReActNet, {"initialisation": "xavier"}, "initialisation is 'xavier'"),
    ],
)
def test_unknown_settings_are_one_line(network, settings, words):
    with pytest.raises(LskdError, match=words) as error:
        network(**settings)
    assert "\n" not in str(error.value)
