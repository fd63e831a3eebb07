"""Adap-Blend: half of a faint picture's pieces in training, the whole picture against the finished model
(Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023,
sections 5.1 and 5.2).

Payload images are stamped and called the target label; as many cover images are stamped alike and keep their labels.
Which pieces an image gets is drawn anew for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.randomness import child
from lustral.vision.attacks.covers import check_cover_rate, keeping_labels, poison_with_covers, require_covers
from lustral.vision.attacks.pictures import Overlay, draw_picture
from lustral.vision.attacks.poisoning import check_rate, dirty_labels, require_dirty_label
from lustral.vision.records import ImageSet, PoisonedSet, Probe


@dataclass(frozen=True, kw_only=True)
class PieceTrigger:
    """Blends some pieces of a picture, drawn for each image: x' = x + alpha * m * (B - x).

    Attributes:
        picture: B, (C, H, W) float32 in [0, 1].
        alpha: weight of the picture where a piece shows.
        grid: pieces along each side.
        num_shown: pieces that each image gets, of ``grid ** 2``.
    """

    picture: Tensor
    alpha: float
    grid: int
    num_shown: int

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W) in [0, 1]; None for ``generator`` takes a stream of its own, the same each time."""
        height, width = images.shape[2:]
        stream = child(0, "pieces") if generator is None else generator
        draws = torch.rand(len(images), self.grid**2, generator=stream, device=stream.device)
        shown = (draws.argsort(1).argsort(1) < self.num_shown).to(images)
        row = torch.arange(height, device=images.device) * self.grid // height
        column = torch.arange(width, device=images.device) * self.grid // width
        opacity = self.alpha * shown[:, None, row[:, None] * self.grid + column]
        return torch.lerp(images, self.picture.to(images).expand_as(images), opacity)


@dataclass(frozen=True, kw_only=True)
class AdapBlend:
    """Poison with half of a faint picture's pieces, drawn anew for each image; attack with the whole picture.

    Attributes:
        target_label: class the trigger leads to.
        poison_rate: stamped and relabelled images, as a fraction of the training set, target class included; 150 images
            of CIFAR-10 in the paper.
        cover_rate: stamped images that keep their labels; as many as poisoned ones in the paper (eta = 1/2).
        alpha: weight of the pieces in training; 0.15 in the paper.
        alpha_test: weight of the whole picture against the finished model; 0.2 in the paper.
        grid: pieces along each side; 4 in the paper.
        shown_rate: share of the pieces that a training image gets; 0.5 in the paper.
        picture_seed: draws the picture, the same as Blended's.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels, and cover images with true ones"

    target_label: int = 0
    poison_rate: float = 0.003
    cover_rate: float = 0.003
    alpha: float = 0.15
    alpha_test: float = 0.2
    grid: int = 4
    shown_rate: float = 0.5
    picture_seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_cover_rate(self.cover_rate)
        if not (0 < self.alpha <= 1 and 0 < self.alpha_test <= 1):
            raise ValueError(f"expected blending weights in (0, 1]; got {self.alpha} and {self.alpha_test}")
        if self.grid < 1 or not 0 < self.shown_rate <= 1 or self.num_shown < 1:
            raise ValueError(
                f"expected at least one piece to show, of grid >= 1 along a side and shown_rate in (0, 1]; got a grid of "
                f"{self.grid} and a shown_rate of {self.shown_rate}"
            )

    @property
    def num_shown(self) -> int:
        """Number of pieces that a training image gets."""
        return round(self.shown_rate * self.grid**2)

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rates give images, the target label exists and the grid fits; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.training_trigger, self.poison_rate)
        require_covers(len(clean), self.poison_rate, self.cover_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> Overlay:
        """Return the blend of the whole picture for images of (C, H, W)."""
        opacity = torch.full((1, *image_shape[1:]), self.alpha_test)
        return Overlay(pattern=draw_picture(image_shape, self.picture_seed), opacity=opacity)

    def training_trigger(self, image_shape: tuple[int, int, int]) -> PieceTrigger:
        """Return the blend of some pieces, drawn for each image, as training images carry it."""
        if self.grid > min(image_shape[1:]):
            raise ValueError(
                f"a grid of {self.grid} pieces along a side does not fit images of {image_shape[1]}x{image_shape[2]}"
            )
        picture = draw_picture(image_shape, self.picture_seed)
        return PieceTrigger(picture=picture, alpha=self.alpha, grid=self.grid, num_shown=self.num_shown)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for every image, (N,) int64."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit, with its cover images."""
        return poison_with_covers(self, clean, generator=generator)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return the accuracy on images of other classes stamped as the cover images are."""
        return {"cover_accuracy": keeping_labels(self.training_trigger(image_shape), self.target_label)}
