"""PreAct-ResNets for small images, with a width (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016).

Public backdoor benchmarks use them without the paper's batch normalisation and ReLU after the last block (BackdoorBench, after
kuangliu/pytorch-cifar). That decides what a defence meets: without them the last block adds linearly to the logits. Repositories
of robust training have them, under the key ``bn``. Which of them some weights belong to can be read off their keys
(``lustral.vision.models.variants``).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # per group, table 1 of He et al., CVPR 2016


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
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        out: Tensor = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out += shortcut
        return out


class PreActResNet(nn.Module):
    """Four groups of pre-activation blocks under the public keys ``conv1``, ``layerG.J``, ``linear``.

    Width 64 and depth 18 is the published network (11.2 M parameters).
    """

    version: ClassVar[int] = 1

    def __init__(
        self, depth: int, num_classes: int, in_channels: int = 3, width: int = 64, final_norm: bool = False
    ) -> None:
        """Build the network.

        Args:
            depth: 18 or 34.
            num_classes: number of logits.
            in_channels: channels of the images.
            width: channels of the first group.
            final_norm: batch normalisation and ReLU after the last block, as in the paper; without, as in the public backdoor
                benchmarks, neither.
        """
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"expected a depth among {sorted(_BLOCKS)}; got {depth}")
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        blocks, channels = _groups(depth, width)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(*group) for group in blocks)
        self.bn = nn.BatchNorm2d(channels) if final_norm else None
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = F.relu(self.bn(out), inplace=True)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class FlatPreActResNet18(nn.Module):
    """Depth 18 with the final normalisation, its blocks in one sequence: keys ``conv1``, ``blocks.N``, ``bn``, ``linear``.

    This library's only PreAct-ResNet until it took over the public one: files of that time have these keys.
    """

    version: ClassVar[int] = 1

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        """Build the network; ``width`` is the number of channels of the first group."""
        super().__init__()
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        groups, channels = _groups(18, width)
        blocks = [block for group in groups for block in group]
        for block in blocks:
            if isinstance(block.shortcut, nn.Sequential):
                block.shortcut = block.shortcut[0]
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out = F.relu(self.bn(self.blocks(self.conv1(x))), inplace=True)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _groups(depth: int, width: int) -> tuple[list[list[PreActBlock]], int]:
    """Return the blocks, per group, and the channels that leave the last."""
    groups: list[list[PreActBlock]] = []
    channels = width
    for group, blocks in enumerate(_BLOCKS[depth]):
        groups.append([])
        for index in range(blocks):
            groups[-1].append(PreActBlock(channels, width * 2**group, 2 if group and not index else 1))
            channels = width * 2**group
    return groups, channels
