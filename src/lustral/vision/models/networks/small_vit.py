"""A vision transformer for small images (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1).

Two departures that small data ask for: the patches are of 4x4 pixels, and the mean of the tokens is classified
in place of a class token (the paper's appendix D.3 finds both alike).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

_HEAD = 32  # numbers per head of the attention, at least


class TransformerBlock(nn.Module):
    """Attention between the tokens and two linear layers for each, both behind a norm and beside a shortcut."""

    def __init__(self, width: int) -> None:
        """Build a block for tokens of ``width`` numbers."""
        super().__init__()
        self.heads = max(width // _HEAD, 1)
        if width % self.heads:
            raise ValueError(f"expected a width below {2 * _HEAD} or a multiple of {_HEAD}; got {width}")
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape; written out, so that every derivative exists."""
        batch, count, width = tokens.shape
        parts = self.qkv(self.norm1(tokens)).reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        seen = (weights @ value).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self.proj(seen)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class SmallViT(nn.Module):
    """Patches of 4x4 pixels, ``depth`` blocks, and a linear layer on the mean token."""

    version: ClassVar[int] = 1

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 96,
        depth: int = 4,
        image_size: tuple[int, int] = (32, 32),
    ) -> None:
        """Build the network.

        Args:
            num_classes: number of logits.
            in_channels: channels of the images.
            width: numbers per token; 32 to a head.
            depth: number of blocks.
            image_size: height and width of the images, pixels; what does not fill a patch is left out.
        """
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"expected a width and a depth of at least 1; got {width} and {depth}")
        tokens = (image_size[0] // 4) * (image_size[1] // 4)
        if tokens < 1:
            raise ValueError(f"expected images of at least 4x4 pixels; got {image_size[0]}x{image_size[1]}")
        self.patches = nn.Conv2d(in_channels, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
