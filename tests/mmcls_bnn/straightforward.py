"""ReActNet-18 in plain torch operations, as one writes it from the paper: nothing shared with the plugin.

Parameters have the plugin's names, so that weights can be carried over. Also the peer of the benchmark.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def polynomial(x):
    """The piecewise polynomial of Bi-Real Net (ECCV 2018), whose derivative stands for the sign's."""
    below = (x < -1).to(x.dtype)
    negative = (x < 0).to(x.dtype)
    inside = (x < 1).to(x.dtype)
    left = -below + (x * x + 2 * x) * (1 - below)
    middle = left * negative + (-x * x + 2 * x) * (1 - negative)
    return middle * inside + (1 - inside)


def binary_activation(x):
    smooth = polynomial(x)
    return sign(x).detach() - smooth.detach() + smooth


def binary_weight(weight):
    scale = weight.abs().mean(dim=(1, 2, 3), keepdim=True).detach()
    clipped = weight.clamp(-1, 1)
    return (scale * sign(weight)).detach() - clipped.detach() + clipped


class Threshold(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return binary_activation(x + self.bias.expand_as(x))


class Activation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias_before = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.slope = nn.Parameter(torch.full((1, channels, 1, 1), 0.25))
        self.bias_after = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        x = x + self.bias_before.expand_as(x)
        return functional.prelu(x, self.slope.flatten()) + self.bias_after.expand_as(x)


class Convolution(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x):
        return functional.conv2d(x, binary_weight(self.weight), stride=self.stride, padding=1)


class Block(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.sign = Threshold(in_channels)
        self.conv = Convolution(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if stride == 2:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(
                OrderedDict(pool=nn.AvgPool2d(2), conv=conv, norm=nn.BatchNorm2d(out_channels))
            )
        self.activation = Activation(out_channels)

    def forward(self, x):
        out = self.norm(self.conv(self.sign(x)))
        return self.activation(out + (x if self.shortcut is None else self.shortcut(x)))


class ReActNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
                norm=nn.BatchNorm2d(64),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        plan = [(64, 64, 1)] * 4
        for channels in (64, 128, 256):
            plan += [(channels, 2 * channels, 2)] + [(2 * channels, 2 * channels, 1)] * 3
        self.blocks = nn.Sequential(*(Block(*each) for each in plan))

    def forward(self, x):
        return self.blocks(self.stem(x))
