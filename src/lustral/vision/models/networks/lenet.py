"""LeNet-5 with today's poolings (LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 1998, section II.B): no normalisation inside.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lustral.vision.models.networks.activations import activation, dropout_rate


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with a maximum pooling, and three linear layers: 6, 16, 120 and 84 channels at width 6.

    Takes images from 4x4 pixels; both convolutions are padded, in the paper neither is.
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 6,
        dropout: int = 0,
        tanh: bool = False,
        leaky_relu: bool = False,
        image_size: tuple[int, int] = (32, 32),
    ) -> None:
        """Build the network.

        Args:
            num_classes: number of logits.
            in_channels: channels of the images.
            width: channels of the first convolution; the others in proportion.
            dropout: before each of the last two linear layers, in percent.
            tanh: as in the paper, in place of ReLU.
            leaky_relu: in place of ReLU.
            image_size: height and width of the images, pixels.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        sides = [side // 4 for side in image_size]
        if min(sides) < 1:
            raise ValueError(f"expected images of at least 4x4 pixels; got {image_size[0]}x{image_size[1]}")
        act, rate = activation(tanh=tanh, leaky_relu=leaky_relu), dropout_rate(dropout)
        second = 8 * width // 3
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, padding=2),
            act(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, second, 5, padding=2),
            act(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(second * sides[0] * sides[1], 20 * width),
            act(),
            nn.Dropout(rate),
            nn.Linear(20 * width, 14 * width),
            act(),
            nn.Dropout(rate),
            nn.Linear(14 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
