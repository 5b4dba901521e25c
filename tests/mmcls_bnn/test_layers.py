"""The binary layers against plain torch operations through autograd, in float64."""

import runpy
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from mmcls_bnn.binary import bits
from mmcls_bnn.binary.layers import (
    BinaryConv2d,
    RPReLU,
    RSign,
    binary_activation,
    binary_weight,
)

pytestmark = pytest.mark.unit

plain = runpy.run_path(str(Path(__file__).with_name("straightforward.py")))

EDGES = torch.tensor([-3.0, -1.0, -0.999, -0.5, -1e-12, -0.0, 0.0, 1e-12, 0.25, 1.0, 1.001, 7.0]).double()


def gradients(output, weights, *inputs):
    return torch.autograd.grad((output * weights).sum(), inputs)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def agree(ours, theirs, *inputs):
    """Compare values, and gradients with respect to the inputs."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    close(gradients(ours, weights, *inputs), gradients(theirs, weights, *inputs))


def test_sign_of_zero_is_plus_one():
    x = EDGES.reshape(1, 1, 3, 4)
    expected = np.where(x.numpy() >= 0, 1.0, -1.0)
    assert np.array_equal(binary_activation(x, torch.zeros(1, 1, 1, 1).double()).numpy(), expected)
    # -0.0 as input and as threshold: their sum is -0.0, which is not less than 0.
    assert binary_activation(torch.full((1, 1, 1, 1), -0.0), torch.full((1, 1, 1, 1), -0.0)).item() == 1
    weight = torch.tensor([0.0, -0.0, 0.5, -0.5]).reshape(1, 1, 2, 2)
    assert binary_weight(weight).flatten().tolist() == [0.25, 0.25, 0.25, -0.25]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_activation_has_the_polynomials_gradient(seed, batch, channels, size):
    torch.manual_seed(seed)
    x = (2 * torch.randn(batch, channels, size, size)).double().requires_grad_()
    bias = torch.randn(1, channels, 1, 1).double().requires_grad_()
    agree(binary_activation(x, bias), plain["binary_activation"](x + bias), x, bias)


def test_activation_gradient_at_the_edges():
    x = EDGES.reshape(1, 1, 3, 4).requires_grad_()
    bias = torch.zeros(1, 1, 1, 1).double()
    (ours,) = gradients(binary_activation(x, bias), torch.ones(()), x)
    values = EDGES.numpy()
    expected = np.where(np.abs(values) < 1, 2 - 2 * np.abs(values), 0.0)
    np.testing.assert_allclose(ours.flatten().numpy(), expected, atol=1e-12)
    (theirs,) = gradients(plain["binary_activation"](x), torch.ones(()), x)
    close([ours], [theirs])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]))
def test_weight_is_scaled_sign_with_clamps_gradient(seed, out, channels, size):
    torch.manual_seed(seed)
    weight = torch.randn(out, channels, size, size).double().requires_grad_()
    ours = binary_weight(weight)
    agree(ours, plain["binary_weight"](weight), weight)
    array = weight.detach().numpy()
    scale = np.abs(array).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(ours.detach().numpy(), np.where(array >= 0, scale, -scale), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_rprelu_is_torchs_prelu_between_shifts(seed, batch, channels, size):
    torch.manual_seed(seed)
    layer = RPReLU(channels).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(batch, channels, size, size).double().requires_grad_()
    theirs = functional.prelu(x + layer.bias_before, layer.slope.flatten()) + layer.bias_after
    agree(layer(x), theirs, x, layer.bias_before, layer.slope, layer.bias_after)


def test_step_1_is_an_ordinary_convolution():
    torch.manual_seed(0)
    layer, other = BinaryConv2d(3, 4, 3, binarize=False), BinaryConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight, padding=1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), functional.conv2d(x, binary_weight(layer.weight), padding=1))


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (3, 4), (4, 3), (9, 6)])  # by matrices, and by oneDNN
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_counted_convolution_is_the_convolution_of_signs(sides, kernel, stride):
    torch.manual_seed(0)
    layer = BinaryConv2d(40, 33, kernel, stride, of_signs=True)
    signs = torch.where(torch.randn(3, 40, *sides) >= 0, 1.0, -1.0).requires_grad_()
    ours = layer(signs)
    if bits.build() is not None:
        assert "Counted" in type(ours.grad_fn).__name__
    x, weight = signs.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    theirs = functional.conv2d(x, plain["binary_weight"](weight), stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    towards = torch.randn_like(ours)
    found = gradients(ours, towards, signs, layer.weight)
    for one, other in zip(found, gradients(theirs, towards.double(), x, weight), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(signs).dtype == torch.bfloat16
    with bits.forced(None):
        torch.testing.assert_close(layer(signs), ours, rtol=1e-5, atol=1e-5)


def test_memory_formats_and_mixed_precision():
    torch.manual_seed(0)
    block = nn.Sequential(RSign(4), BinaryConv2d(4, 4, 3), RPReLU(4))
    x = torch.randn(2, 4, 6, 6)
    expected = block(x)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = x.bfloat16().requires_grad_()
        result = block(low)
        result.float().sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.isfinite().all()
    # The signs are those of the rounded input, so only most of the sums can agree.
    assert (result.float() - expected).abs().median() < 0.05


def test_nothing_is_kept_but_the_input():
    kept = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    bias = torch.zeros(1, 3, 1, 1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        binary_activation(x, bias)
    assert sorted(t.numel() for t in kept) == [3, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
