"""Three convolutions: a network for digits and tests, trained on a CPU within seconds."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch normalisation, two poolings and one linear layer; 57 k parameters at width 32.

    Takes images from 4x4 pixels; meant for 8x8 to 64x64.
    """

    version: ClassVar[int] = 1

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32) -> None:
        """Build the network; ``width`` is the number of channels of the first convolution."""
        super().__init__()
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        layers: list[nn.Module] = []
        for index, channels in enumerate((width, 2 * width, 2 * width)):
            if index:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.linear(self.pool(self.features(x)).flatten(1))
        return logits
