"""Batched augmentation of images on their own device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random crop, flip, affine motion and erasing, drawn for every image by itself, in one batched pass.

    Attributes:
        crop_padding: pixels of zero padding before a random crop back to size.
        flip: mirror left-right with probability 1/2.
        rotation: largest angle in degrees, uniform to both sides.
        translation: largest shift as a fraction of the side, uniform to both sides.
        scale: largest relative change of size, uniform to both sides.
        erasing: probability of setting one random rectangle (2-20 % of the area) to grey.
    """

    version: ClassVar[int] = 1

    crop_padding: int = 4
    flip: bool = True
    rotation: float = 0.0
    translation: float = 0.0
    scale: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.crop_padding < 0 or self.rotation < 0 or self.translation < 0 or not 0 <= self.scale < 1:
            raise ValueError(f"expected non-negative amounts and a scale below 1; got {self}")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"expected a probability in [0, 1] for erasing; got {self.erasing}")

    def __call__(self, images: Tensor, *, generator: Generator) -> Tensor:
        """Return augmented images, float32 (B, C, H, W) in [0, 1]; ``generator`` may live on either device."""
        out = images
        if self.crop_padding or self.flip:
            out = self._crop_and_flip(out, generator)
        if self.rotation or self.translation or self.scale:
            out = self._affine(out, generator)
        if self.erasing:
            out = self._erase(out, generator)
        return out

    def _crop_and_flip(self, images: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = images.shape
        pad = self.crop_padding
        rows = torch.arange(height, device=images.device).expand(batch, height)
        cols = torch.arange(width, device=images.device).expand(batch, width)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=generator, device=generator.device).to(images.device) < 0.5
            cols = torch.where(mirrored, width - 1 - cols, cols)
        if pad:
            shift = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=generator.device)
            dy, dx = shift.to(images.device)
            rows, cols = rows + dy, cols + dx
            images = F.pad(images, (pad, pad, pad, pad))
        which = torch.arange(batch, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[which, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)

    def _affine(self, images: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = images.shape
        draws = torch.rand(4, batch, generator=generator, device=generator.device).to(images.device) * 2 - 1
        angle = draws[0] * math.radians(self.rotation)
        size = 1 / (1 + draws[1] * self.scale)
        shift_x, shift_y = draws[2:] * 2 * self.translation
        cos, sin = angle.cos() * size, angle.sin() * size
        aspect = height / width  # rotate in pixels, not in the stretched [-1, 1] square
        rows = (torch.stack([cos, -sin * aspect, shift_x], 1), torch.stack([sin / aspect, cos, shift_y], 1))
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _erase(self, images: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = images.shape
        draws = torch.rand(5, batch, generator=generator, device=generator.device).to(images.device)
        area = 0.02 + 0.18 * draws[1]
        ratio = torch.exp((draws[2] * 2 - 1) * math.log(3.0))
        tall, wide = (area * ratio).sqrt().clamp_max(1) * height, (area / ratio).sqrt().clamp_max(1) * width
        top, left = draws[3] * (height - tall), draws[4] * (width - wide)
        rows = torch.arange(height, device=images.device) + 0.5
        cols = torch.arange(width, device=images.device) + 0.5
        inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
        inside_cols = (cols >= left[:, None]) & (cols < (left + wide)[:, None])
        inside = inside_rows[:, :, None] & inside_cols[:, None, :] & (draws[0] < self.erasing)[:, None, None]
        return images.masked_fill(inside[:, None], 0.5)
