"""Strong augmentation for contrastive learning: resized crops and colours of each image's own, as matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey value, ITU-R BT.601
CHROMA = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # I and Q of the YIQ colours
RGB = 3


def resampling(start: Tensor, length: Tensor, *, source: int, target: int) -> Tensor:
    """Return the weights by which ``target`` pixels of a resized stretch are averages of ``source`` pixels.

    Linear interpolation, by triangles as wide as a pixel of the result where that is the larger one: nothing is left out when
    a crop is made smaller.

    Args:
        start: (B,) where the stretch begins, pixels.
        length: (B,) its length, pixels; > 0.
        source: pixels of the image.
        target: pixels of the result.

    Returns:
        (B, target, source) float32, every row a mean: its sum is 1.
    """
    ratio = (length / target)[:, None, None]
    wanted = torch.arange(target, device=start.device)[None, :, None] + 0.5
    given = torch.arange(source, device=start.device)[None, None, :] + 0.5
    first, last = start[:, None, None], (start + length)[:, None, None]
    distance = (first + wanted * ratio - given).abs() / ratio.clamp_min(1)
    touched = (given > first - 0.5) & (given < last + 0.5)  # pixels outside of the crop have no part in it
    weights = (1 - distance).clamp_min(0) * touched
    return weights / weights.sum(2, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class StrongAugment:
    """Random resized crop, flip, colour jitter and grey, as SimCLR has them for small images.

    Brightness, contrast, saturation, hue and grey are one affine map of the colours of an image: the colours are cut to [0, 1]
    once, after all of them, and the hue turns in YIQ, which keeps the brightness. Images without three channels have no hue.

    Attributes:
        side: side of the crops, as a fraction of that of the image; 3/4 makes 24 of 32 pixels.
        least_area: the smallest crop, as a fraction of the image; up to 1, uniform. 0.2 in D-ST and SupCon.
        aspect: largest ratio of width to height of a crop, and of height to width; uniform in the logarithm.
        flip: mirror left-right with probability 1/2.
        brightness: largest relative change, uniform to both sides.
        contrast: likewise, of the distance from the image's mean grey.
        saturation: likewise, of the distance from the pixel's grey.
        hue: largest turn to both sides, in turns.
        jitter_rate: probability that the four change.
        grey_rate: probability of a grey image.
    """

    version: ClassVar[int] = 1

    side: float = 0.75
    least_area: float = 0.2
    aspect: float = 4 / 3
    flip: bool = True
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_rate: float = 0.8
    grey_rate: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.side <= 1 or not 0 < self.least_area <= 1 or self.aspect < 1:
            raise ValueError(f"expected a side and an area in (0, 1] and an aspect of at least 1; got {self}")
        amounts = (self.brightness, self.contrast, self.saturation, self.jitter_rate, self.grey_rate)
        if not all(0 <= amount <= 1 for amount in amounts) or not 0 <= self.hue <= 0.5:
            raise ValueError(f"expected amounts and rates in [0, 1] and a hue in [0, 0.5]; got {self}")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the crops of such images, pixels; at least 1.

        >>> StrongAugment().output_size(32, 32)
        (24, 24)
        """
        return max(round(self.side * height), 1), max(round(self.side * width), 1)

    def __call__(self, images: Tensor, *, generator: Generator) -> Tensor:
        """Return float32 (B, C, h, w) in [0, 1] of images (B, C, H, W); ``generator`` may live on either device.

        The result is in channels-last memory.
        """
        draws = torch.rand(11, len(images), generator=generator, device=generator.device).to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            pixels = self._crop(images.float(), draws[:5])
            pixels = self._recolour(pixels, draws[5:])
        return pixels.permute(0, 3, 1, 2)

    def _crop(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the crops as (B, h, w, C)."""
        batch, channels, height, width = images.shape
        tall, wide = self.output_size(height, width)
        area = self.least_area + (1 - self.least_area) * draws[0]
        ratio = torch.exp((draws[1] * 2 - 1) * math.log(self.aspect))
        rows, cols = (area / ratio).sqrt().clamp_max(1) * height, (area * ratio).sqrt().clamp_max(1) * width
        down = resampling(draws[2] * (height - rows), rows, source=height, target=tall)
        across = resampling(draws[3] * (width - cols), cols, source=width, target=wide)
        if self.flip:
            across = torch.where((draws[4] < 0.5)[:, None, None], across.flip(1), across)
        columns = images.permute(0, 3, 2, 1).reshape(batch, width, height * channels)
        pixels = torch.bmm(across, columns).view(batch, wide, height, channels).transpose(1, 2)
        pixels = torch.bmm(down, pixels.reshape(batch, height, wide * channels))
        return pixels.view(batch, tall, wide, channels)

    def _recolour(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return pixels (B, h, w, C) in other colours: each one's times a (C, C) matrix of the image, plus a constant."""
        batch, tall, wide, channels = pixels.shape
        is_changed = draws[0] < self.jitter_rate
        spread = (draws[1:5] * 2 - 1) * is_changed
        bright, contrast, saturation = (
            1 + amount * draw
            for amount, draw in zip((self.brightness, self.contrast, self.saturation), spread[:3], strict=True)
        )
        luma = pixels.new_tensor(LUMA) if channels == RGB else pixels.new_full((channels,), 1 / channels)
        mixing = torch.eye(channels, device=pixels.device).expand(batch, channels, channels)
        if channels == RGB:
            mixing = self._chroma(luma, saturation, spread[3] * self.hue, is_grey=draws[5] < self.grey_rate)
        grey = pixels.flatten(1, 2).mean(1) @ luma * bright  # (B,) mean grey; hue and saturation keep it
        mixing = mixing * (bright * contrast)[:, None, None]
        shifted = torch.baddbmm(
            ((1 - contrast) * grey)[:, None, None], pixels.view(batch, tall * wide, channels), mixing.mT
        )
        return shifted.clamp_(0, 1).view(batch, tall, wide, channels)

    def _chroma(self, luma: Tensor, saturation: Tensor, turn: Tensor, *, is_grey: Tensor) -> Tensor:
        """Return matrices (B, 3, 3) that keep the grey value, and stretch and turn the rest; a grey image has no rest."""
        to_yiq = torch.stack([luma, *luma.new_tensor(CHROMA)])
        to_yiq[1:] -= to_yiq[1:].mean(1, keepdim=True)  # grey has no chroma, to the last bit of the rounded constants
        stretch = saturation * ~is_grey
        cos, sin = (turn * 2 * torch.pi).cos() * stretch, (turn * 2 * torch.pi).sin() * stretch
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        rows = (torch.stack([one, zero, zero], 1), torch.stack([zero, cos, -sin], 1), torch.stack([zero, sin, cos], 1))
        to_rgb: Tensor = torch.linalg.inv(to_yiq)
        return to_rgb @ torch.stack(rows, 1) @ to_yiq
