"""ReActNet with ResNet's layout: ReActNet-18, the paper's binary student (Sec. 5), and ReActNet-34.

Written from Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation
Functions", ECCV 2020.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lskd import LskdError
from mmcls_bnn.binary.layers import (
    Binarised,
    BinaryConv2d,
    Initialisation,
    RPReLU,
    RSign,
    check_binarize,
    check_initialisation,
)
from mmcls_bnn.compat import MODELS, BaseBackbone

DEPTHS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}
"""One-convolution blocks in each stage: twice ResNet's blocks of two convolutions."""


class ReActBlock(nn.Module):
    """RSign, binary 3 x 3 convolution, BatchNorm, shortcut, RPReLU.

    Where the block halves the image its shortcut is real: average pooling, 1 x 1 convolution, BatchNorm.
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
        self.sign = sign(in_channels, binarize)
        self.conv = BinaryConv2d(
            in_channels, out_channels, 3, stride, "weights" in binarize, initialisation=initialisation
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                OrderedDict(
                    # ceil_mode for odd sizes, of which the convolution keeps the larger half too.
                    pool=nn.AvgPool2d(stride, ceil_mode=True),
                    conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                    norm=nn.BatchNorm2d(out_channels),
                )
            )
        )
        self.activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        out: Tensor = self.norm(self.conv(self.sign(x)))
        result: Tensor = self.activation(out + self.shortcut(x))
        return result


class BinaryBackbone(BaseBackbone):
    """What the binary backbones have in common: checked settings, and BatchNorm that can be held still."""

    def __init__(
        self,
        binarize: Sequence[str],
        stem: str,
        in_channels: int,
        initialisation: str,
        norm_eval: bool,
        init_cfg: Any,
    ) -> None:
        """Check the settings.

        Raises:
            LskdError: for a setting that is unknown.
        """
        super().__init__(init_cfg=init_cfg)
        self.binarize = check_binarize(binarize)
        self.initialisation = check_initialisation(initialisation)
        if stem not in ("imagenet", "cifar"):
            raise LskdError(
                f"stem is {stem!r}; it must be 'imagenet' (large images) or 'cifar' (about 32 x 32)."
            )
        self.in_channels = in_channels
        self.norm_eval = norm_eval

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
    """ReActNet-18 and ReActNet-34.

    Step 1 of two-step training, step 2 and single-step training are this one class with the same parameters
    under the same names; `binarize` alone tells them apart.

    Args:
        depth: 18 or 34.
        width: factor of all channel counts; 1 is 64, 128, 256 and 512 channels.
        stem: "imagenet" is a 7 x 7 convolution of stride 2 and max pooling, "cifar" a 3 x 3 convolution.
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
        depth: int = 18,
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
        if depth not in DEPTHS:
            raise LskdError(
                f"depth is {depth!r}; ReActNet has 18 and 34 layers, ReActNetA is the MobileNet one."
            )
        channels = scaled_channels((64, 128, 256, 512), width)
        self.stem = _stem(in_channels, channels[0], stem)
        blocks: list[nn.Module] = []
        current = channels[0]
        for stage, (out, count) in enumerate(zip(channels, DEPTHS[depth], strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ReActBlock(current, out, stride, self.binarize, self.initialisation))
                current = out
        self.blocks = nn.Sequential(*blocks)
        self.out_channels = current

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return the last feature map `(B, 512 width, H', W')`, as mmcls wants it, in a tuple."""
        return (self.blocks(self.stem(x)),)


def sign(channels: int, binarize: Sequence[Binarised]) -> nn.Module:
    """Return RSign, or nothing where activations stay real."""
    return RSign(channels) if "activations" in binarize else nn.Identity()


def scaled_channels(channels: Sequence[int], width: float) -> list[int]:
    """Return channel counts times `width`.

    Raises:
        LskdError: unless all are whole numbers above 0.
    """
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
        raise LskdError(f"width is {width!r}; it must be a factor above 0, such as 0.25 or 1.")
    scaled = [count * width for count in channels]
    if any(value != int(value) for value in scaled):
        raise LskdError(
            f"width {width:g} gives {scaled[0]:g} channels in the first stage; "
            f"take a multiple of 1/{channels[0]}."
        )
    return [int(value) for value in scaled]


def _stem(in_channels: int, out_channels: int, kind: str) -> nn.Sequential:
    if kind == "cifar":
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False),
            norm=nn.BatchNorm2d(out_channels),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
