"""MobileNet for small images (Howard et al., "MobileNets", 2017, arXiv 1704.04861, table 1): depthwise separable convolutions.

As in kuangliu/pytorch-cifar: a 3x3 stem without stride, and one halving less in front.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

_LAYERS = (  # (channels in widths, stride) of every block before and after those that repeat
    ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2)),
    ((32, 2), (32, 1)),
)


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself and a 1x1 convolution, each with batch normalisation and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Build a block that changes the number of channels and divides the resolution by ``stride``."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNet(nn.Module):
    """The published blocks under the public keys ``conv1``, ``bn1``, ``layers.N``, ``linear``; width 32 in the paper."""

    version: ClassVar[int] = 1

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32, repeats: int = 5) -> None:
        """Build the network.

        Args:
            num_classes: number of logits.
            in_channels: channels of the images.
            width: channels of the stem; 32 in the paper.
            repeats: blocks of 16 widths that change nothing; 5 in the paper.
        """
        super().__init__()
        if width < 1 or repeats < 1:
            raise ValueError(f"expected a width of at least 1 and at least one repeat; got {width} and {repeats}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels, blocks = width, []
        for multiplier, stride in (*_LAYERS[0], *[(16, 1)] * repeats, *_LAYERS[1]):
            blocks.append(SeparableBlock(channels, multiplier * width, stride))
            channels = multiplier * width
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
