"""A packed student: weights of one bit, and each convolution in one pass with all that stands around it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmcls_bnn.binary import bits
from mmcls_bnn.binary.layers import (
    BinaryConv2d,
    RPReLU,
    RSign,
    SignedConv2d,
    binary_activation,
    weight_scales,
)
from mmcls_bnn.binary.reactnet import BinaryBackbone, ReActBlock, ReActNetABlock


class PackedConv2d(nn.Module):
    """A :class:`BinaryConv2d` for inference, with one bit for each weight.

    Args:
        shape: of the weights, `(out, in, k, k)`.
        stride: of the kernel.
        padding: with 0, on each side.

    Buffers: `signs`, uint8, eight weights in a byte (numpy.packbits of weight >= 0, in the weight's order,
    filled up with 0); `scale`, float32 `(out, 1, 1, 1)`. They are unpacked for each forward pass: this saves
    memory, not time, and gives the logits of training to the bit. A :class:`FastUnit` does not.
    """

    signs: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int, int, int], stride: int, padding: int) -> None:
        super().__init__()
        self.shape, self.stride, self.padding = shape, stride, padding
        self.sign: nn.Module = nn.Identity()  # of a SignedConv2d, its own
        self.register_buffer("signs", torch.zeros(-(-math.prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(shape[0], 1, 1, 1))

    @classmethod
    def like(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Return a packed layer for weights of a layer's shape."""
        out, channels, size, _ = layer.weight.shape
        packed = cls((out, channels, size, size), layer.stride, layer.padding)
        if isinstance(layer, SignedConv2d):
            packed.sign = layer.sign
        return packed

    @classmethod
    def of(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Pack a layer's latent weights."""
        packed = cls.like(layer)
        weight = layer.weight.detach()
        bits = np.packbits((weight >= 0).flatten().cpu().numpy())  # sign(0) is +1 (the paper's Sec. 5)
        packed.signs.copy_(torch.from_numpy(bits))
        packed.scale.copy_(weight_scales(weight))
        return packed

    def bits(self) -> Tensor:
        """Return which weights are +1, uint8 `(out, in, k, k)`."""
        # In tensor operations, which torch.export and ONNX know.
        places = self.signs.new_tensor([128, 64, 32, 16, 8, 4, 2, 1])
        bits = (self.signs[:, None] & places).clamp(max=1).flatten()[: math.prod(self.shape)]
        return bits.view(self.shape)

    def integers(self, signs: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of signs `(B, in, H, W)`, not scaled, as compiled code counts them."""
        return functional.conv2d(signs, self.bits().to(signs.dtype) * 2 - 1, None, self.stride, self.padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        weight = self.bits().to(self.scale.dtype).sub_(0.5).mul_(2 * self.scale)
        return functional.conv2d(self.sign(x), weight, stride=self.stride, padding=self.padding)


class FastUnit(nn.Module):
    """RSign, packed convolutions side by side, BatchNorm, a shortcut's sum and RPReLU, for inference.

    By compiled code where that can run, otherwise by torch's operations, with the same numbers to the bit.

    Args:
        sign: before the convolutions.
        convs: of one shape and stride, whose outputs are concatenated.
        norms: one for each convolution, in eval mode.
        activation: after the sum.
    """

    convs: Any
    threshold: Tensor
    scale: Tensor
    shift: Tensor
    slope: Tensor
    after: Tensor

    def __init__(
        self, sign: RSign, convs: Sequence[PackedConv2d], norms: Sequence[nn.BatchNorm2d], activation: RPReLU
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        scales, shifts = zip(*map(_folded, convs, norms), strict=True)
        before = activation.bias_before.detach().double().flatten()
        self.register_buffer("threshold", sign.bias.detach().flatten().clone())
        self.register_buffer("scale", torch.cat(scales).float())
        self.register_buffer("shift", (torch.cat(shifts) + before).float())
        self.register_buffer("slope", activation.slope.detach().flatten().clone())
        self.register_buffer("after", activation.bias_after.detach().flatten().clone())
        self.weights = bits.weights_of(_signs(convs))
        self.stride, self.padding = convs[0].stride, convs[0].padding

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)` and a shortcut, repeated over channels."""
        following = bits.Following(self.shift, self.slope, self.after)
        if bits.takes(x, residual, self.scale):
            return bits.convolve(
                x, self.threshold, self.weights, self.scale, self.stride, self.padding, following, residual
            )
        column = (1, -1, 1, 1)
        signs = binary_activation(x, self.threshold.view(column))
        parts = [conv.integers(signs) for conv in self.convs]
        # Shifts are apart from factors: one operation for both would round once, and compiled code twice.
        out = torch.cat(parts, 1) * self.scale.view(column) + following.shift.view(column)
        out = out + torch.cat([residual] * (out.shape[1] // residual.shape[1]), 1)
        return functional.prelu(out, following.slope) + following.after.view(column)


class FastConv2d(nn.Module):
    """A packed convolution with the RSign before it, alone, computed as in a :class:`FastUnit`.

    Args:
        packed: with a sign of its own.
    """

    def __init__(self, packed: PackedConv2d) -> None:
        super().__init__()
        self.packed = packed
        self.weights = bits.weights_of(_signs([packed]))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        packed: Any = self.packed
        if not bits.takes(x, packed.scale):
            scaled: Tensor = packed.integers(packed.sign(x)) * packed.scale.view(1, -1, 1, 1)
            return scaled
        threshold, scale = packed.sign.bias.detach().flatten(), packed.scale.flatten()
        return bits.convolve(x, threshold, self.weights, scale, packed.stride, packed.padding)


class FastBlock(nn.Module):
    """A block of ReActNet, or of ReActNet-A, in one pass for each of its units.

    Args:
        shortcut: of the first unit; a second one has its own input.
        units: one or two.
    """

    def __init__(self, shortcut: nn.Module, *units: FastUnit) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        first, *rest = self.units
        x = first(x, self.shortcut(x))
        for unit in rest:
            x = unit(x, x)
        return x


def make_fast(model: nn.Module) -> nn.Module:
    """Give a packed model its fast blocks, in place, and return it.

    Its logits are those of the packed model but for the rounding of the real layers. Blocks with real
    activations stay as they are.
    """
    for module in model.modules():
        if isinstance(module, BinaryBackbone):
            _fold(module.stem)
            for index, block in enumerate(module.blocks):
                module.blocks[index] = _fast_block(block)
    for name, module in [*model.named_modules()]:
        if isinstance(module, PackedConv2d) and isinstance(module.sign, RSign):
            model.set_submodule(name, FastConv2d(module))
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def _fast_block(block: nn.Module) -> nn.Module:
    layers: Any = block
    if isinstance(block, ReActBlock) and isinstance(block.sign, RSign):
        if isinstance(block.shortcut, nn.Sequential):
            _fold(block.shortcut)
        unit = FastUnit(layers.sign, [layers.conv], [layers.norm], layers.activation)
        return FastBlock(block.shortcut, unit)
    if isinstance(block, ReActNetABlock) and isinstance(block.sign1, RSign):
        first = FastUnit(layers.sign1, [layers.conv1], [layers.norm1], layers.activation1)
        second = FastUnit(layers.sign2, [*layers.conv2], [*layers.norm2], layers.activation2)
        return FastBlock(block.shortcut, first, second)
    return block


def _signs(convs: Sequence[PackedConv2d]) -> NDArray[np.bool_]:
    """Return which weights of convolutions side by side are +1, `(out, in, k, k)`."""
    signs = [np.unpackbits(conv.signs.cpu().numpy(), count=math.prod(conv.shape)) for conv in convs]
    return np.concatenate(signs).view(np.bool_).reshape(-1, *convs[0].shape[1:])


def _fold(layers: Any) -> None:
    """Put the BatchNorm `norm` into the convolution `conv` before it."""
    layers.conv = fuse_conv_bn_eval(layers.conv, layers.norm)
    layers.norm = nn.Identity()


def _folded(conv: PackedConv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return what a convolution's integers are multiplied by and what is added, `(out,)` each, float64."""
    mean, variance, weight, bias = (
        each.detach().double() for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    factor = weight / torch.sqrt(variance + norm.eps)
    return conv.scale.detach().double().flatten() * factor, bias - mean * factor
