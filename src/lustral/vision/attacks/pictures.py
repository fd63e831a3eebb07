"""Pictures and patches drawn from a seed, and the two ways of stamping them: what several attacks' triggers are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lustral.core.randomness import child

CANVAS = 128  # side on which the picture is drawn before it is resized
NUM_SHAPES = 14
PATCH_CELLS = 4  # cells along a patch; one colour each


def draw_picture(image_shape: tuple[int, int, int], seed: int) -> Tensor:
    """Draw ellipses and bars with hard edges over a colour gradient, at full contrast.

    Returns:
        (C, H, W) float32 in [0, 1].
    """
    channels, height, width = image_shape
    stream = child(seed, "blended", "picture")
    axis = torch.linspace(-1, 1, CANVAS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    slopes = torch.rand(channels, 2, generator=stream) - 0.5
    picture = (0.5 + slopes[:, :1, None] * x + slopes[:, 1:, None] * y).clamp(0, 1)
    for index in range(NUM_SHAPES):
        centre = torch.rand(2, generator=stream) * 2 - 1
        angle = torch.rand((), generator=stream) * torch.pi
        radii = 0.08 + 0.4 * torch.rand(2, generator=stream)
        colour = (torch.rand(channels, generator=stream) > 0.5).float()
        u = (x - centre[0]) * angle.cos() + (y - centre[1]) * angle.sin()
        v = (y - centre[1]) * angle.cos() - (x - centre[0]) * angle.sin()
        inside = (u / radii[0]) ** 2 + (v / radii[1]) ** 2 < 1
        if index % 3 == 2:
            inside = (u.abs() < 2 * radii[0]) & (v.abs() < 0.25 * radii[1])
        picture = torch.where(inside, colour[:, None, None], picture)
    return F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def draw_patch(channels: int, side: int, seed: int, *name: str | int) -> Tensor:
    """Draw a square of up to 4x4 cells in random full colours; half of a channel's cells are lit (the odd one too).

    Args:
        channels: C.
        side: pixels, at least 1.
        seed: of the colours.
        name: further names of the random stream, so that one seed gives an attack as many patches as it needs.

    Returns:
        (C, side, side) float32, zeros and ones.
    """
    cells = min(side, PATCH_CELLS)
    draws = torch.rand(channels, cells * cells, generator=child(seed, "patch", *name))
    rank = draws.argsort(1).argsort(1)
    lit = (2 * rank < cells * cells).float().reshape(channels, cells, cells)
    cell = torch.arange(side) * cells // side
    return lit[:, cell[:, None], cell]


def patch_side(image_shape: tuple[int, int, int], share: float) -> int:
    """Return the side in pixels of a patch that takes ``share`` of the image's shorter side; at least 2 pixels.

    >>> patch_side((3, 32, 32), 0.25), patch_side((1, 8, 12), 0.1)
    (8, 2)
    """
    _, height, width = image_shape
    if min(height, width) < 4:
        raise ValueError(f"expected images of at least 4x4 pixels for a patch; got {height}x{width}")
    return max(2, round(share * min(height, width)))


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Lays a pattern over images: x' = (1 - m) * x + m * v.

    Attributes:
        pattern: v, (C, H, W) float32 in [0, 1].
        opacity: m, (1, H, W) float32 in [0, 1].
    """

    pattern: Tensor
    opacity: Tensor

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W) in [0, 1]; nothing is drawn."""
        return torch.lerp(images, self.pattern.to(images).expand_as(images), self.opacity.to(images))


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Adds a pattern to images: x' = clip(x + v).

    Attributes:
        pattern: v, (C, H, W) or (1, 1, W) float32 in [-1, 1].
    """

    pattern: Tensor

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W) in [0, 1]; nothing is drawn."""
        return (images + self.pattern.to(images)).clamp_(0, 1)
