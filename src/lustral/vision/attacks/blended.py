"""Blended: a full picture, faintly mixed in (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017, arXiv 1712.05526).

x' = (1 - alpha) * x + alpha * B. The picture B is drawn from a seed, so nothing has to be shipped or downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.vision.attacks.pictures import draw_picture
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_dirty_label,
)
from lustral.vision.records import ImageSet, PoisonedSet


@dataclass(frozen=True, kw_only=True)
class BlendTrigger:
    """Mixes a picture (C, H, W) in [0, 1] into images with weight ``alpha``."""

    picture: Tensor
    alpha: float

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Blend images (B, C, H, W); nothing is drawn."""
        return torch.lerp(images, self.picture.to(images).expand_as(images), self.alpha)


@dataclass(frozen=True, kw_only=True)
class Blended:
    """Poison with a blended picture and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included; 0.1 in BackdoorBench.
        alpha: weight of the picture; 0.2 in BackdoorBench.
        picture_seed: draws the picture.
        mode: "all_to_one", or "all_to_all" for label y + 1.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels"

    target_label: int = 0
    poison_rate: float = 0.1
    alpha: float = 0.2
    picture_seed: int = 0
    mode: LabelMode = "all_to_one"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        if not 0 < self.alpha <= 1:
            raise ValueError(f"expected a blending weight alpha in (0, 1]; got {self.alpha}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the trigger fits; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> BlendTrigger:
        """Return the blend for images of (C, H, W)."""
        return BlendTrigger(picture=draw_picture(image_shape, self.picture_seed), alpha=self.alpha)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=self.poison_rate, generator=generator)
