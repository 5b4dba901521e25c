"""ReActNet-A: MobileNet's layout with shortcuts (Liu et al., ECCV 2020)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcls_bnn.binary.layers import Binarised, BinaryConv2d, Initialisation, RPReLU
from mmcls_bnn.binary.reactnet import BinaryBackbone, scaled_channels, sign
from mmcls_bnn.compat import MODELS

CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
"""Of the stem and of the 13 blocks."""


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
        binarize: Sequence[Binarised],
        initialisation: Initialisation,
    ) -> None:
        """Build the block."""
        super().__init__()
        weights = "weights" in binarize
        self.sign1 = sign(in_channels, binarize)
        self.conv1 = BinaryConv2d(in_channels, in_channels, 3, stride, weights, initialisation)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        self.activation1 = RPReLU(in_channels)
        self.sign2 = sign(in_channels, binarize)
        copies = out_channels // in_channels
        self.conv2 = nn.ModuleList(
            BinaryConv2d(in_channels, in_channels, 1, 1, weights, initialisation) for _ in range(copies)
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


@MODELS.register_module()
class ReActNetA(BinaryBackbone):
    """ReActNet-A.

    Args:
        width: factor of all channel counts; 1 is 32 channels in the stem and 1024 in the end.
        stem: "imagenet" is a 3 x 3 convolution of stride 2, "cifar" one of stride 1.
        binarize: ("activations",) or ("activations", "weights").
        in_channels: channels of the images.
        initialisation: see :class:`mmcls_bnn.binary.layers.BinaryConv2d`.
        norm_eval: hold BatchNorm at its running statistics while training.
        init_cfg: mmengine's.

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
        """Build the network."""
        super().__init__(binarize, stem, in_channels, initialisation, norm_eval, init_cfg)
        first, *channels = scaled_channels(CHANNELS, width)
        step = 2 if stem == "imagenet" else 1
        conv = nn.Conv2d(in_channels, first, 3, stride=step, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(first)))
        blocks: list[nn.Module] = []
        current = first
        for index, out in enumerate(channels):
            # The image is halved wherever the channels double, but for the first block.
            stride = 2 if index > 0 and out != current else 1
            blocks.append(ReActNetABlock(current, out, stride, self.binarize, self.initialisation))
            current = out
        self.blocks = nn.Sequential(*blocks)
        self.out_channels = current

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return the last feature map `(B, 1024 width, H', W')`, as mmcls wants it, in a tuple."""
        return (self.blocks(self.stem(x)),)
