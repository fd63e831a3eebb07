"""Wide ResNets for small images (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016), under their public keys.

The keys are those of xternalz/WideResNet-pytorch, which NAD and other defences use: WRN-16-1, WRN-40-2, WRN-28-10.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lustral.vision.models.networks.activations import dropout_rate

_STEM = 16  # channels


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, beside a shortcut; dropout between them (section 2.4)."""

    def __init__(self, in_channels: int, channels: int, stride: int, rate: float = 0.0) -> None:
        """Build a block that changes the number of channels and divides the resolution by ``stride``."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()
        self.convShortcut: nn.Module | None = None  # the public key
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        out: Tensor = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out)))))
        return out + shortcut


class _Group(nn.Module):
    """Blocks under the public key ``layer``."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int, rate: float) -> None:
        super().__init__()
        first = WideBlock(in_channels, channels, stride, rate)
        self.layer = nn.Sequential(first, *(WideBlock(channels, channels, 1, rate) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """A stem of 16 channels and three groups of 16, 32 and 64 times ``width``; keys ``blockG.layer.J``, ``bn1``, ``fc``."""

    version: ClassVar[int] = 1

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, width: int = 1, dropout: int = 0) -> None:
        """Build WRN-``depth``-``width``; the depth is six for each block of a group, and four; ``dropout`` in percent."""
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"expected a depth of 6 n + 4 and a width of at least 1; got {depth} and {width}")
        self.conv1 = nn.Conv2d(in_channels, _STEM, 3, 1, 1, bias=False)
        blocks, channels, rate = (depth - 4) // 6, _STEM * width, dropout_rate(dropout)
        self.block1 = _Group(blocks, _STEM, channels, 1, rate)
        self.block2 = _Group(blocks, channels, 2 * channels, 2, rate)
        self.block3 = _Group(blocks, 2 * channels, 4 * channels, 2, rate)
        self.bn1 = nn.BatchNorm2d(4 * channels)
        self.fc = nn.Linear(4 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
