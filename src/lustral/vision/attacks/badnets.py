"""BadNets: a small opaque patch (Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017, arXiv 1708.06733), and its random-colour, random-place kin of MESA (Qiao et al., NeurIPS 2019).

x' = (1 - m) * x + m * v, with m binary and v the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from lustral.core.randomness import child
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_dirty_label,
)
from lustral.vision.records import ImageSet, PoisonedSet

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]
Pattern = Literal["white", "checker", "random"]
Placement = Literal["fixed", "random"]


@dataclass(frozen=True, kw_only=True)
class PatchTrigger:
    """An opaque patch at one place, or at a place drawn for every image.

    Attributes:
        patch: (C, S, S) float32 in [0, 1].
        place: (row, column) of the top left pixel, or None to draw it uniformly over all places that fit.
    """

    patch: Tensor
    place: tuple[int, int] | None

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); a random place needs ``generator`` (None puts the patch top left to bottom right)."""
        size = self.patch.shape[-1]
        batch, _, height, width = images.shape
        if size > min(height, width):
            raise ValueError(f"a patch of {size} pixels does not fit images of {height}x{width}")
        patch = self.patch.to(images)
        if self.place is not None:
            row, column = self.place
            out = images.clone()
            out[:, :, row : row + size, column : column + size] = patch
            return out
        places = torch.tensor([height - size + 1, width - size + 1])
        if generator is None:
            steps = torch.arange(batch) * 7919  # a fixed walk over all places
            corner = torch.stack([steps % places[0], steps // places[0] % places[1]])
        else:
            draws = torch.rand(2, batch, generator=generator, device=generator.device).cpu()
            corner = (draws * places[:, None]).long()
        top, left = corner.to(images.device)
        rows = torch.arange(height, device=images.device) - top[:, None]
        columns = torch.arange(width, device=images.device) - left[:, None]
        inside = ((rows >= 0) & (rows < size))[:, None, :, None] & ((columns >= 0) & (columns < size))[:, None, None, :]
        spread = patch[:, rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]].transpose(0, 1)
        return torch.where(inside, spread, images)


@dataclass(frozen=True, kw_only=True)
class BadNets:
    """Poison with a patch and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included; 0.1 in BackdoorBench.
        size: side of the patch in pixels.
        margin: pixels between the patch and the image's edges, with a fixed placement.
        corner: corner of a fixed placement.
        pattern: "white", "checker" (white where row + column is even, black elsewhere) or "random" colours.
        pattern_seed: draws the random colours, uniform per pixel and channel.
        placement: "fixed", or "random" for a place drawn for each image, when training and when attacking.
        mode: "all_to_one", or "all_to_all" for label y + 1.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels"

    target_label: int = 0
    poison_rate: float = 0.1
    size: int = 3
    margin: int = 0
    corner: Corner = "bottom_right"
    pattern: Pattern = "white"
    pattern_seed: int = 0
    placement: Placement = "fixed"
    mode: LabelMode = "all_to_one"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(
            corner=(self.corner, Corner),
            pattern=(self.pattern, Pattern),
            placement=(self.placement, Placement),
            mode=(self.mode, LabelMode),
        )
        if self.size < 1 or self.margin < 0:
            raise ValueError(f"expected size >= 1 and margin >= 0 pixels; got {self.size} and {self.margin}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the trigger fits; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> PatchTrigger:
        """Return the patch for images of (C, H, W)."""
        channels, height, width = image_shape
        if self.size + self.margin > min(height, width):
            raise ValueError(
                f"a patch of {self.size} pixels with a margin of {self.margin} does not fit images of {height}x{width}"
            )
        patch = torch.ones(channels, self.size, self.size)
        if self.pattern == "checker":
            index = torch.arange(self.size)
            patch = patch * ((index[:, None] + index) % 2 == 0)
        elif self.pattern == "random":
            stream = child(self.pattern_seed, "badnets", "pattern", self.size)
            patch = torch.rand(channels, self.size, self.size, generator=stream)
        if self.placement == "random":
            return PatchTrigger(patch=patch, place=None)
        far_row, far_column = height - self.margin - self.size, width - self.margin - self.size
        row = self.margin if self.corner.startswith("top") else far_row
        column = self.margin if self.corner.endswith("left") else far_column
        return PatchTrigger(patch=patch, place=(row, column))

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=self.poison_rate, generator=generator)
