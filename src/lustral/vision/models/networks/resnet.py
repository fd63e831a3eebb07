"""ResNets for small images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), under their public keys.

Depth 18 and 34 are the ImageNet networks with a 3x3 stem and no pooling behind it (kuangliu/pytorch-cifar; BackdoorBox, TrojanZoo
and many others); 20 to 110 are those of the paper's section 4.2, whose shortcuts pad with zeros and have no weights
(akamaster/pytorch_resnet_cifar10).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

_WIDE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # blocks per group; shortcuts are projections ("option B")
_NARROW = {depth: ((depth - 2) // 6,) * 3 for depth in (20, 32, 44, 56, 110)}  # shortcuts are padded ("option A")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut, and a ReLU behind their sum."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, projects: bool, downsample: bool) -> None:
        """Build a block that changes the channels and divides the resolution by ``stride``.

        ``projects``: by a convolution in the shortcut, which is called ``downsample`` or else ``shortcut``.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels
        self.beside = "downsample" if downsample else "shortcut"
        shortcut = nn.Sequential()
        if projects and (stride != 1 or self.extra):
            shortcut.extend([nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)])
        self.add_module(self.beside, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        beside: Tensor = self.get_submodule(self.beside)(x)
        if beside.shape != out.shape:
            half = self.extra // 2
            beside = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + beside)


class ResNet(nn.Module):
    """A stem, three or four groups of blocks and one linear layer: keys ``conv1``, ``bn1``, ``layerG.J``, ``linear``."""

    version: ClassVar[int] = 1

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        width: int | None = None,
        fc: bool = False,
        downsample: bool = False,
    ) -> None:
        """Build the network.

        Args:
            depth: 18, 34, or 20, 32, 44, 56, 110.
            num_classes: number of logits.
            in_channels: channels of the images.
            width: channels of the first group; None: as published, 64 for depth 18 and 34, else 16.
            fc: the linear layer is called ``fc`` instead of ``linear``.
            downsample: shortcuts are called ``downsample`` instead of ``shortcut``, as in torchvision.
        """
        super().__init__()
        if depth not in _WIDE and depth not in _NARROW:
            raise ValueError(f"expected a depth among {sorted([*_WIDE, *_NARROW])}; got {depth}")
        width = (64 if depth in _WIDE else 16) if width is None else width
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.groups = []
        for group, blocks in enumerate(_WIDE.get(depth) or _NARROW[depth]):
            layers = nn.Sequential()
            for index in range(blocks):
                stride = 2 if group and not index else 1
                layers.append(
                    BasicBlock(channels, width * 2**group, stride, projects=depth in _WIDE, downsample=downsample)
                )
                channels = width * 2**group
            self.groups.append(f"layer{group + 1}")
            self.add_module(self.groups[-1], layers)
        self.head = "fc" if fc else "linear"
        self.add_module(self.head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        for group in self.groups:
            out = self.get_submodule(group)(out)
        logits: Tensor = self.get_submodule(self.head)(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
