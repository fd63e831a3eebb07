"""What is done with images: 8-bit conversion, stratified splits, and batched augmentation on the tensors' device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lustral.protocols import ImageSet
from lustral.randomness import child, fork


def as_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.float().div_(255)


def as_uint8(images: Tensor) -> Tensor:
    """Return float images in [0, 1], rounded to 8 bits and clipped.

    >>> as_uint8(torch.tensor([0.0, 0.5, 1.2])).tolist()
    [0, 128, 255]
    """
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def channel_statistics(data: ImageSet, sample: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation over ``sample`` images of all classes, on the [0, 1] scale."""
    pixels = as_float(at_most(data, sample).images).transpose(0, 1).flatten(1)
    std = pixels.std(1).clamp_min(1e-3)
    return tuple(round(v, 4) for v in pixels.mean(1).tolist()), tuple(round(v, 4) for v in std.tolist())


def stratified_indices(
    labels: Tensor, num_classes: int, count: int, *, generator: Generator, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose about ``count`` images with every class in proportion.

    Without groups the number is exact: classes get their whole share and the largest remainders one more each. With
    groups, whole groups are drawn from each class until its share is met, at least one where a class has two.

    Args:
        labels: (N,) int64.
        num_classes: K.
        count: images to choose, 0 <= count <= N.
        generator: CPU stream.
        groups: (N,) int64; images of one group stay together (video tracks, near-duplicates).

    Returns:
        (chosen, rest): int64 indices on the CPU, together all of 0 .. N - 1, each in random order. Sets often come
        ordered by class, and whoever takes "the first n" of a drawn set relies on this order.
    """
    labels = labels.cpu()
    if not 0 <= count <= len(labels):
        raise ValueError(f"expected to choose between 0 and {len(labels)} images; got {count}")
    sizes = torch.bincount(labels, minlength=num_classes)
    share = sizes.double() * count / max(len(labels), 1)
    quota = share.floor().long()
    left = count - int(quota.sum())
    quota[(share - quota).argsort(descending=True, stable=True)[:left]] += 1
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    by_class = torch.split(labels.argsort(stable=True), sizes.tolist())
    for label, members in enumerate(by_class):
        if groups is None:
            is_chosen[members[torch.randperm(len(members), generator=generator)[: quota[label]]]] = True
            continue
        own = groups.cpu()[members]
        names = torch.unique(own)
        taken = 0
        for name in names[torch.randperm(len(names), generator=generator)][: max(len(names) - 1, 0)]:
            size = int((own == name).sum())
            if taken and taken + size / 2 > int(quota[label]):
                break
            is_chosen[members[own == name]] = True
            taken += size
    chosen, rest = is_chosen.nonzero().flatten(), (~is_chosen).nonzero().flatten()
    order = fork(generator, "order")
    return shuffled(chosen, generator=order), shuffled(rest, generator=order)


def shuffled(indices: Tensor, *, generator: Generator) -> Tensor:
    """Return the entries of a tensor (N,) in random order."""
    return indices[torch.randperm(len(indices), generator=generator).to(indices.device)]


def at_most(data: ImageSet, most: int) -> ImageSet:
    """Return ``data``, or ``most`` of its images with every class in proportion where it has more.

    The same ones each time. Taking the first ones instead would give a few classes of a set that is ordered by class.
    """
    if len(data) <= most:
        return data
    chosen, _ = stratified_indices(data.labels, data.num_classes, most, generator=child(0, "at most"))
    return data.subset(chosen)


def split(data: ImageSet, fraction: float, *, generator: Generator) -> tuple[ImageSet, ImageSet]:
    """Split a set in two, stratified by class and shuffled: the first part holds ``round(fraction * N)`` images."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected a fraction in [0, 1]; got {fraction}")
    chosen, rest = stratified_indices(data.labels, data.num_classes, round(fraction * len(data)), generator=generator)
    return data.subset(chosen), data.subset(rest)


def check_holdout(holdout: float) -> None:
    """Raise ``ValueError`` unless the held-out share is in (0, 1)."""
    if not 0 < holdout < 1:
        raise ValueError(f"expected a held-out share in (0, 1); got {holdout}")


def require_usable(clean: ImageSet, least: int = 10) -> None:
    """Raise ``ValueError`` unless the clean set can support a recovery: two classes and a handful of images."""
    present = len(torch.unique(clean.labels))
    if len(clean) == 0:
        raise ValueError("the clean set is empty; give at least a few clean images of every class")
    if present < 2:
        raise ValueError(
            f"the clean set of {len(clean)} images holds a single class; give clean images of at least two classes"
        )
    if len(clean) < least:
        raise ValueError(f"expected at least {least} clean images; got {len(clean)}")


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
