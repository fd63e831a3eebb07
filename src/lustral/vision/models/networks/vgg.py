"""VGG for small images (Simonyan and Zisserman, ICLR 2015, table 1), with batch normalisation or, as published, without."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lustral.vision.models.networks.activations import activation, dropout_rate

_CONVOLUTIONS = {  # per group, columns A, B, D and E of the table
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_MULTIPLIERS = (1, 2, 4, 8, 8)  # channels of each group, in widths


class VGG(nn.Module):
    """The published convolutions, then adaptive pooling and one linear layer in place of the three.

    The poolings round up, so that images smaller than 32x32 pass as well.
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        classifier: bool = False,
        dropout: int = 0,
        gelu: bool = False,
        leaky_relu: bool = False,
        silu: bool = False,
        *,
        norm: bool = True,
    ) -> None:
        """Build the network.

        Args:
            depth: 11, 13, 16 or 19 layers with weights, as published.
            num_classes: number of logits.
            in_channels: channels of the images.
            width: channels of the first group; 64 in the paper.
            classifier: the linear layer is called ``classifier`` instead of ``linear``, as in kuangliu/pytorch-cifar.
            dropout: before the linear layer, in percent.
            gelu: in place of ReLU; so are ``leaky_relu`` and ``silu``.
            leaky_relu: see ``gelu``.
            silu: see ``gelu``.
            norm: batch normalisation behind each convolution; starting weights without it keep the signal's size.
        """
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"expected a depth among {sorted(_CONVOLUTIONS)}; got {depth}")
        if width < 1:
            raise ValueError(f"expected a width of at least 1; got {width}")
        act, rate = activation(gelu=gelu, leaky_relu=leaky_relu, silu=silu), dropout_rate(dropout)
        layers: list[nn.Module] = []
        for multiplier, convolutions in zip(_MULTIPLIERS, _CONVOLUTIONS[depth], strict=True):
            for _ in range(convolutions):
                channels = multiplier * width
                convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
                if not norm:  # torch's own shrinks a signal to nothing within eleven layers
                    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                layers += [convolution, *([nn.BatchNorm2d(channels)] if norm else []), act()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()
        self.head = "classifier" if classifier else "linear"
        self.add_module(self.head, nn.Linear(in_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.get_submodule(self.head)(self.dropout(self.pool(self.features(x)).flatten(1)))
        return logits
