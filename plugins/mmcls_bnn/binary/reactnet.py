"""ReActNet with ResNet's layout - ReActNet-18 is the paper's binary student (Sec. 5) - and with MobileNet's.

Written from Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation
Functions", ECCV 2020.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lskd import LskdError
from mmcls_bnn.binary.layers import BinaryConv2d, RPReLU, RSign
from mmcls_bnn.compat import MODELS, BaseBackbone

DEPTHS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}
"""One-convolution blocks in each stage: twice ResNet's blocks of two convolutions."""
CHANNELS_A = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
"""Of ReActNet-A's stem and of its 13 blocks."""
BINARIZED = ("activations", "weights")


class ReActBlock(nn.Module):
    """RSign, binary 3 x 3 convolution, BatchNorm, shortcut, RPReLU.

    Where the block halves the image its shortcut is real: average pooling, 1 x 1 convolution, BatchNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        binarize: Sequence[str],
        initialisation: str,
    ) -> None:
        super().__init__()
        self.sign = _sign(in_channels, binarize)
        settings = ("weights" in binarize, initialisation, "activations" in binarize)
        self.conv = BinaryConv2d(in_channels, out_channels, 3, stride, *settings)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            # ceil_mode for odd sizes, of which the convolution keeps the larger half too.
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            norm = nn.BatchNorm2d(out_channels)
            self.shortcut = nn.Sequential(OrderedDict(pool=pool, conv=conv, norm=norm))
        self.activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        out: Tensor = self.norm(self.conv(self.sign(x)))
        result: Tensor = self.activation(out + self.shortcut(x))
        return result


class ReActNetABlock(nn.Module):
    """A 3 x 3 and a 1 x 1 binary convolution, each with sign, BatchNorm, shortcut and RPReLU.

    Where the block halves the image, average pooling is the first shortcut; where it doubles the channels,
    two 1 x 1 convolutions stand side by side and both get the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        binarize: Sequence[str],
        initialisation: str,
    ) -> None:
        super().__init__()
        settings = ("weights" in binarize, initialisation, "activations" in binarize)
        self.sign1 = _sign(in_channels, binarize)
        self.conv1 = BinaryConv2d(in_channels, in_channels, 3, stride, *settings)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        self.activation1 = RPReLU(in_channels)
        self.sign2 = _sign(in_channels, binarize)
        copies = out_channels // in_channels
        self.conv2 = nn.ModuleList(
            BinaryConv2d(in_channels, in_channels, 1, 1, *settings) for _ in range(copies)
        )
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in range(copies))
        self.activation2 = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        x = self.activation1(self.norm1(self.conv1(self.sign1(x))) + self.shortcut(x))
        signs = self.sign2(x)
        parts = [norm(conv(signs)) + x for conv, norm in zip(self.conv2, self.norm2, strict=True)]
        result: Tensor = self.activation2(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return result


class BinaryBackbone(BaseBackbone):
    """What the backbones have in common: checked settings, and BatchNorm that can be frozen.

    Step 1 of two-step training, step 2 and single-step training are one class with the same parameters under
    the same names; `binarize` alone tells them apart.

    Args:
        width: factor of all channel counts.
        stem: "imagenet" for large images, "cifar" for about 32 x 32.
        binarize: ("activations",) or ("activations", "weights").
        initialisation: see :class:`mmcls_bnn.binary.layers.BinaryConv2d`.
        norm_eval: keep BatchNorm to its running statistics while training.

    Raises:
        LskdError: for a setting that is unknown or out of range.
    """

    def __init__(
        self,
        width: float = 1.0,
        stem: str = "imagenet",
        binarize: Sequence[str] = ("activations", "weights"),
        in_channels: int = 3,
        initialisation: str = "kaiming",
        norm_eval: bool = False,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.binarize = _checked(binarize)
        if initialisation not in ("kaiming", "positive"):
            raise LskdError(
                f"initialisation is {initialisation!r}; it must be 'kaiming', or 'positive' for step 2 alone."
            )
        if stem not in ("imagenet", "cifar"):
            raise LskdError(
                f"stem is {stem!r}; it must be 'imagenet' (large images) or 'cifar' (about 32 x 32)."
            )
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
            raise LskdError(f"width is {width!r}; it must be a factor above 0, such as 0.25 or 1.")
        self.in_channels, self.width, self.large = in_channels, width, stem == "imagenet"
        self.initialisation, self.norm_eval = initialisation, norm_eval

    def _build(
        self,
        block: type[nn.Module],
        channels: int,
        stem: dict[str, nn.Module],
        plan: Iterable[tuple[int, int]],
    ) -> None:
        """Put the network together of a stem with so many channels, and of blocks: (channels, stride)."""
        self.stem = nn.Sequential(OrderedDict(stem))
        blocks: list[nn.Module] = []
        for out, stride in plan:
            blocks.append(block(channels, out, stride, self.binarize, self.initialisation))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.out_channels = channels

    def _scaled(self, channels: Sequence[int]) -> list[int]:
        """Return channel counts times the width, which must be whole numbers."""
        found = [count * self.width for count in channels]
        if any(value != int(value) for value in found):
            raise LskdError(
                f"width {self.width:g} gives {found[0]:g} channels in the first stage; "
                f"take a multiple of 1/{channels[0]}."
            )
        return [int(value) for value in found]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return the last feature map `(B, out_channels, H', W')`, as mmcls wants it, in a tuple."""
        if self.training and x.device.type == "cpu":  # where pooling and normalisation are faster so
            x = x.contiguous(memory_format=torch.channels_last)
        return (self.blocks(self.stem(x)),)

    def train(self, mode: bool = True) -> "BinaryBackbone":
        """Set the training mode; BatchNorm keeps to its running statistics under `norm_eval`."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):  # SyncBatchNorm is one, too
                    module.eval()
        return self


@MODELS.register_module()
class ReActNet(BinaryBackbone):
    """ReActNet-18 and ReActNet-34; 64, 128, 256 and 512 channels at width 1.

    The stem for large images is a 7 x 7 convolution of stride 2 and max pooling, for small ones a 3 x 3
    convolution.

    Args:
        depth: 18 or 34.

    Raises:
        LskdError: for a setting that is unknown or out of range.
    """

    def __init__(self, depth: int = 18, **settings: Any) -> None:
        super().__init__(**settings)
        if depth not in DEPTHS:
            raise LskdError(
                f"depth is {depth!r}; ReActNet has 18 and 34 layers, ReActNetA is the MobileNet one."
            )
        channels = self._scaled((64, 128, 256, 512))
        kernel, stride = (7, 2) if self.large else (3, 1)
        conv = nn.Conv2d(self.in_channels, channels[0], kernel, stride, kernel // 2, bias=False)
        stem: dict[str, nn.Module] = {"conv": conv, "norm": nn.BatchNorm2d(channels[0])}
        if self.large:
            stem["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        plan = [
            (out, 2 if stage > 0 and index == 0 else 1)
            for stage, (out, count) in enumerate(zip(channels, DEPTHS[depth], strict=True))
            for index in range(count)
        ]
        self._build(ReActBlock, channels[0], stem, plan)


@MODELS.register_module()
class ReActNetA(BinaryBackbone):
    """ReActNet-A; 32 channels in the stem and 1024 in the end at width 1.

    The stem is a 3 x 3 convolution, of stride 2 for large images.

    Raises:
        LskdError: for a setting that is unknown or out of range.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        channels = self._scaled(CHANNELS_A)
        conv = nn.Conv2d(self.in_channels, channels[0], 3, 2 if self.large else 1, padding=1, bias=False)
        # The image is halved wherever the channels double, but for the first block.
        plan = [
            (out, 2 if index > 0 and out != before else 1)
            for index, (before, out) in enumerate(pairwise(channels))
        ]
        self._build(ReActNetABlock, channels[0], {"conv": conv, "norm": nn.BatchNorm2d(channels[0])}, plan)


def _checked(binarize: Sequence[str]) -> tuple[str, ...]:
    """Return what is to be binarised, in a fixed order."""
    named = (binarize,) if isinstance(binarize, str) else tuple(binarize)
    for name in named:
        if name not in BINARIZED:
            raise LskdError(
                f"binarize names {name!r}; give ('activations',) for step 1, "
                "('activations', 'weights') for step 2 and for single-step training."
            )
    return tuple(name for name in BINARIZED if name in named)


def _sign(channels: int, binarize: Sequence[str]) -> nn.Module:
    """Return RSign, or nothing where activations stay real."""
    return RSign(channels) if "activations" in binarize else nn.Identity()
