"""PreAct-ResNet-18 for small images, with a width (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU; the shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Build a block that changes the number of channels and divides the resolution by ``stride``."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        out: Tensor = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out += shortcut
        return out


class PreActResNet18(nn.Module):
    """Four groups of two pre-activation blocks; width 64 is the published network (11.2 M parameters)."""

    version: ClassVar[int] = 1

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        """Build the network; ``width`` is the number of channels of the first group."""
        super().__init__()
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        channels = width
        for group in range(4):
            out_channels = width * 2**group
            for index in range(2):
                stride = 2 if group and not index else 1
                blocks.append(PreActBlock(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out = F.relu(self.bn(self.blocks(self.conv1(x))), inplace=True)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
