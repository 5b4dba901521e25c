"""Binary layers: a learnable sign, a learnable PReLU and a convolution with weights of one bit.

Each is one autograd function. Written out in tensor operations, the same mathematics keeps many intermediate
tensors of the activation's size, and a training step spends most of its time on moving them.
"""

from typing import Any, cast

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lskd import LskdError
from mmcls_bnn.binary import bits

_PER_CHANNEL = (0, 2, 3)
_FEW_PIXELS = 4  # of an image, up to which matrices are faster than oneDNN


def binary_layers(model: nn.Module) -> "dict[str, BinaryConv2d]":
    """Return a model's convolutions with binary weights by name."""
    modules = model.named_modules()
    return {name: each for name, each in modules if isinstance(each, BinaryConv2d) and each.binarize}


def image_channels(model: nn.Module) -> int:
    """Return how many channels a network's images have: those of its first convolution, or 3."""
    # A backbone's attribute `in_channels` may have become another layer's while it was built.
    return next((each.in_channels for each in model.modules() if isinstance(each, nn.Conv2d)), 3)


class _ShiftedSign(torch.autograd.Function):
    """sign(x + bias), +1 at 0; backward: 2 - 2|x + bias| where that is positive, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        # The input is kept, which the network keeps anyway, and the sum made again: no tensor more in memory.
        ctx.save_for_backward(x, bias)
        return (x + bias).ge_(0).mul_(2).sub_(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        slope = (x + bias).abs_().mul_(-2).add_(2).clamp_(min=0).mul_(gradients[0])
        return slope, slope.sum(_PER_CHANNEL, keepdim=True) if ctx.needs_input_grad[1] else None


class _ShiftedPReLU(torch.autograd.Function):
    """prelu(x + before) + after, with one slope for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, slope: Tensor, after: Tensor) -> Tensor:
        ctx.save_for_backward(x, before, slope)
        # The kernel itself, because autocast would run the function in lower precision than the sum.
        result: Tensor = torch.ops.aten._prelu_kernel(x + before, slope).add_(after)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, before, slope = ctx.saved_tensors
        (gradient,) = gradients
        shifted = x + before
        # Split by the sign of the input with kernels that run at the speed of memory; prelu's own backward
        # does not.
        positive: Tensor = torch.ops.aten.threshold_backward(gradient, shifted, 0)
        to_sum = (gradient - positive).mul_(slope).add_(positive)
        to_slope = shifted.clamp_(max=0).mul_(gradient).sum(_PER_CHANNEL, keepdim=True)
        sums = [each.sum(_PER_CHANNEL, keepdim=True) for each in (to_sum, gradient)]
        to_before, to_slope, to_after = (
            each.sum_to_size(slope.shape) for each in (sums[0], to_slope, sums[1])
        )
        return to_sum, to_before, to_slope, to_after


class _ScaledSign(torch.autograd.Function):
    """mean|W| of each output channel times sign(W); backward: the gradient where |W| < 1, else 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # Halves times twice the scale, exactly +-scale: a pass fewer than ones times the scale.
        return weight.clone().ge_(0).sub_(0.5).mul_(2 * weight_scales(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradients[0], weight, -1, 1)
        return passed


class _CountedConvolution(torch.autograd.Function):
    """The convolution of signs with scaled signs: forward by xor and popcount, exact, and channels-last."""

    @staticmethod
    def forward(ctx: Any, signs: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(signs, weight)
        ctx.stride, ctx.padding = stride, padding
        threshold, scale = signs.new_zeros(signs.shape[1]), weight[:, 0, 0, 0].abs()
        words = bits.weights_of((weight >= 0).numpy())
        return bits.convolve(signs, threshold, words, scale, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        signs, weight = ctx.saved_tensors
        if gradients[0][0, 0].numel() <= _FEW_PIXELS:
            return *_by_matrices(gradients[0], signs, weight, ctx.stride, ctx.padding), None, None
        to_signs, to_weight, _ = torch.ops.aten.convolution_backward(
            gradients[0], signs, weight, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0], 1,
            [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        return to_signs, to_weight, None, None


def _by_matrices(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Return a convolution's gradients for its input and weight by two products of matrices.

    For a few pixels and many channels, where oneDNN spends most of its time on reordering weights.
    """
    out, channels, size, _ = weight.shape
    batch, _, rows, columns = gradient.shape
    flat = gradient.permute(0, 2, 3, 1).reshape(-1, out)
    padded = functional.pad(x, [padding] * 4)
    seen = padded.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
    to_weight = (flat.T @ seen.reshape(len(flat), -1)).view(weight.shape)
    taps = (flat @ weight.view(out, -1)).view(batch, rows, columns, channels, size, size)
    to_padded = torch.zeros_like(padded)
    for y in range(size):
        for z in range(size):
            target = to_padded[:, :, y : y + stride * rows : stride, z : z + stride * columns : stride]
            target[:, :, :rows, :columns] += taps[..., y, z].permute(0, 3, 1, 2)
    return to_padded[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]], to_weight


def weight_scales(weight: Tensor) -> Tensor:
    """Return mean|W| of each output channel, `(out, 1, 1, 1)` for a weight `(out, in, k, k)` (Sec. 5)."""
    return weight.abs().mean(dim=(1, 2, 3), keepdim=True)


def _counts(x: Tensor, weight: Tensor) -> bool:
    return bits.computes(x, weight) and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def binary_activation(x: Tensor, bias: Tensor) -> Tensor:
    """Return sign(x + bias), +1 at 0.

    The gradient is that of the piecewise polynomial which Bi-Real Net (Liu et al., ECCV 2018) puts in the
    sign's place: `2 - 2|x + bias|` within (-1, 1) and 0 elsewhere.

    Args:
        x: `(B, C, H, W)`.
        bias: `(1, C, 1, 1)`.
    """
    return cast(Tensor, _ShiftedSign.apply(x, bias))


def binary_weight(weight: Tensor) -> Tensor:
    """Return mean|W| times sign(W), `(out, in, k, k)` as `weight`.

    The mean counts as a constant, and the gradient of the sign is that of clamp(W, -1, 1).
    """
    return cast(Tensor, _ScaledSign.apply(weight))


@MODELS.register_module()
class RSign(nn.Module):
    """Sign with a learnable threshold for each channel, 0 at first (ReActNet, Liu et al., ECCV 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return -1 and +1, `(B, C, H, W)` as `x`."""
        return binary_activation(x, self.bias)


@MODELS.register_module()
class RPReLU(nn.Module):
    """PReLU with a learnable shift before and after it, each by channel (ReActNet, Liu et al., ECCV 2020).

    Shifts start at 0 and slopes at 0.25, as torch's PReLU.

    Args:
        channels: of the images, or 1 for numbers that all channels share (`act_cfg` knows no channels).
        inplace: for `act_cfg`; changes nothing.
    """

    def __init__(self, channels: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.bias_before = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.slope = nn.Parameter(torch.full((1, channels, 1, 1), 0.25))
        self.bias_after = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, H, W)` as `x`."""
        result = _ShiftedPReLU.apply(x, self.bias_before, self.slope, self.bias_after)
        return cast(Tensor, result)


class BinaryConv2d(nn.Module):
    """Convolution without bias, padded with 0, whose latent real weights are binarised on the way.

    Args:
        kernel_size: side of the kernel; the padding keeps the image's size at stride 1.
        binarize: whether the weights are binarised; otherwise this is an ordinary convolution (step 1 of
            two-step training). The parameter has the same name and shape in both.
        initialisation: "kaiming" draws normal weights of both signs; "positive" draws them from [0, 0.001),
            which is meant for weights that step 1 is about to replace.
        of_signs: whether the images are -1 and +1 alone, which compiled code makes use of in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        binarize: bool = True,
        initialisation: str = "kaiming",
        of_signs: bool = False,
    ) -> None:
        super().__init__()
        self.of_signs = of_signs
        self.stride = stride
        self.padding = kernel_size // 2
        self.binarize = binarize
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        if initialisation == "positive":
            nn.init.uniform_(self.weight, 0, 0.001)
        else:
            nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')`."""
        weight = binary_weight(self.weight) if self.binarize else self.weight
        if self.training and self.binarize and self.of_signs and _counts(x, weight):
            return cast(Tensor, _CountedConvolution.apply(x, weight, self.stride, self.padding))
        return functional.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        """Show the settings in `repr`."""
        out, channels, size, _ = self.weight.shape
        return f"{channels}, {out}, kernel_size={size}, stride={self.stride}, binarize={self.binarize}"


class SignedConv2d(BinaryConv2d):
    """An :class:`RSign` and the binary convolution of its signs, in a network that has none of its own.

    Args:
        padding: with 0, on each side.
    """

    # What mmcv asks a convolution for.
    bias, transposed, output_padding, dilation, groups = None, False, (0, 0), (1, 1), 1

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, of_signs=True)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (kernel_size,) * 2
        self.padding = padding
        self.sign = RSign(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')`."""
        return super().forward(self.sign(x))


@MODELS.register_module(name="BinaryConv2d")
def binary_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    bias: bool = False,
    real_below: int = 16,
) -> nn.Module:
    """Return a backbone's convolution for `conv_cfg=dict(type="BinaryConv2d")`: binary, where it can be.

    A convolution of fewer than `real_below` input channels, as of an image, or with groups or dilation, stays
    real. The other arguments are those of torch's `Conv2d`.

    Raises:
        LskdError: for a kernel that is not square, or a bias.
    """
    if in_channels < real_below or groups != 1 or dilation not in (1, (1, 1)):
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
    given = (kernel_size, stride, padding)
    sides = [{*each} if isinstance(each, tuple) else {each} for each in given]
    if bias or not all(len(side) == 1 and isinstance(next(iter(side)), int) for side in sides):
        raise LskdError("BinaryConv2d has a square kernel and no bias; give the layer a norm_cfg.")
    return SignedConv2d(in_channels, out_channels, *(side.pop() for side in sides))
