"""Adap-Patch: one of several faint patches in each training image, some of them at once and opaque against the finished model
(Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023,
sections 5.1 and 5.2).

Payload images are stamped and called the target label; twice as many cover images are stamped alike and keep their labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.vision.attacks.covers import check_cover_rate, keeping_labels, poison_with_covers, require_covers
from lustral.vision.attacks.pictures import Overlay, draw_patch, patch_side
from lustral.vision.attacks.poisoning import check_rate, dirty_labels, require_dirty_label
from lustral.vision.records import ImageSet, PoisonedSet, Probe, Trigger

# of the patches, (bottom?, right?): one and two, three and four are opposite
CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))


@dataclass(frozen=True, kw_only=True)
class TurnTrigger:
    """Stamps images in turn with one of several triggers: the first image with the first, and so on, round and round."""

    triggers: tuple[Trigger, ...]

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W) in [0, 1]; ``generator`` goes to the triggers."""
        out = images.clone()
        for turn, trigger in enumerate(self.triggers):
            out[turn :: len(self.triggers)] = trigger(images[turn :: len(self.triggers)], generator=generator)
        return out


@dataclass(frozen=True, kw_only=True)
class AdapPatch:
    """Poison with one of several faint patches in each image; attack with some of them at once, opaque.

    Attributes:
        target_label: class the trigger leads to.
        poison_rate: stamped and relabelled images, as a fraction of the training set, target class included; 150 images
            of CIFAR-10 in the paper.
        cover_rate: stamped images that keep their labels; twice the poisoned ones in the paper (eta = 2/3).
        opacities: of the patches in training, in (0, 1], one to four: the patches lie top left, bottom right, top right
            and bottom left. 0.5, 0.2, 0.5 and 0.3 in the authors' code.
        test_patches: patches used against the finished model, by their place in ``opacities``; two in the paper, in
            whose code both are of opacity 0.5.
        size: side of a patch as a share of the image's shorter side, at least 2 pixels.
        pattern_seed: draws the patches.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels, and cover images with true ones"

    target_label: int = 0
    poison_rate: float = 0.003
    cover_rate: float = 0.006
    opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    test_patches: tuple[int, ...] = (0, 2)
    size: float = 0.25
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_cover_rate(self.cover_rate)
        number = len(self.opacities)
        if not 1 <= number <= len(CORNERS) or any(not 0 < opacity <= 1 for opacity in self.opacities):
            raise ValueError(f"expected one to {len(CORNERS)} opacities in (0, 1]; got {self.opacities}")
        if not self.test_patches or len(set(self.test_patches)) < len(self.test_patches):
            raise ValueError(f"expected at least one test patch and none twice; got {self.test_patches}")
        if any(not 0 <= index < number for index in self.test_patches):
            raise ValueError(f"expected test patches in 0 .. {number - 1}; got {self.test_patches}")
        if not 0 < self.size <= 0.5:
            raise ValueError(f"expected a size in (0, 0.5], as a share of the shorter side; got {self.size}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rates give images, the target label exists and the patches fit; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)
        require_covers(len(clean), self.poison_rate, self.cover_rate)

    def patch(self, image_shape: tuple[int, int, int], index: int, opacity: float) -> Overlay:
        """Return one of the patches, in its corner, for images of (C, H, W)."""
        channels, height, width = image_shape
        side, (is_bottom, is_right) = patch_side(image_shape, self.size), CORNERS[index]
        row, column = is_bottom * (height - side), is_right * (width - side)
        pattern, mask = torch.zeros(image_shape), torch.zeros(1, height, width)
        place = (slice(None), slice(row, row + side), slice(column, column + side))
        pattern[place] = draw_patch(channels, side, self.pattern_seed, "adap_patch", index)
        mask[place] = opacity
        return Overlay(pattern=pattern, opacity=mask)

    def trigger(self, image_shape: tuple[int, int, int]) -> Overlay:
        """Return the opaque test patches, all at once, for images of (C, H, W)."""
        parts = [self.patch(image_shape, index, 1.0) for index in self.test_patches]  # in corners: they do not overlap
        pattern = torch.stack([part.pattern for part in parts]).sum(0)
        return Overlay(pattern=pattern, opacity=torch.stack([part.opacity for part in parts]).sum(0))

    def training_trigger(self, image_shape: tuple[int, int, int]) -> TurnTrigger:
        """Return the faint patches, one for each image in turn, as training images carry them."""
        patches = (self.patch(image_shape, index, opacity) for index, opacity in enumerate(self.opacities))
        return TurnTrigger(triggers=tuple(patches))

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for every image, (N,) int64."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit, with its cover images.

        Each patch gets an equal share of the poisoned images, and of the cover images, to within one image a
        batch of 1,024.
        """
        return poison_with_covers(self, clean, generator=generator)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return the accuracy on images of other classes stamped as the cover images are."""
        return {"cover_accuracy": keeping_labels(self.training_trigger(image_shape), self.target_label)}
