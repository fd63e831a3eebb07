"""Adaptive-Trap: a loud, regular pattern that a decoder can only draw if the stem encodes the trigger. An attack of our own
making against Trap-and-Replace (Wang et al., NeurIPS 2022); the adaptive attack of that paper's appendix is not known to us.

x'[c, i, j] = clip(x[c, i, j] + a * s[c, i mod p, j mod p]), with fixed signs s, half of them +1 and half -1 in each channel.

Trap-and-Replace pays a squared error for what it does not reconstruct. A decoder that leaves the pattern out pays a^2 per
element of a poisoned image, up to clipping. The pattern repeats with the stem's stride, so that one channel can say it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.randomness import child
from lustral.vision.attacks.pictures import Addition
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_dirty_label,
)
from lustral.vision.records import ImageSet, PoisonedSet


def sign_pattern(image_shape: tuple[int, int, int], period: int, seed: int) -> Tensor:
    """Draw a tile of signs, as many +1 as -1 in each channel (one more -1 in an odd tile), and lay it over an image.

    Returns:
        (C, H, W) float32 of +1 and -1.
    """
    channels, height, width = image_shape
    draws = torch.rand(channels, period * period, generator=child(seed, "adaptive_trap", "signs"))
    rank = draws.argsort(1).argsort(1)
    signs = torch.where(rank < period * period // 2, 1.0, -1.0).reshape(channels, period, period)
    rows, cols = torch.arange(height) % period, torch.arange(width) % period
    return signs[:, rows[:, None], cols]


@dataclass(frozen=True, kw_only=True)
class AdaptiveTrap:
    """Poison with a regular pattern of full-image energy, and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included.
        amplitude: a, change of every element in [0, 1] units; sweep it. 0.25 costs 0.0625 of squared error where it is not drawn.
        period: p, pixels after which the pattern repeats; 4 is the stride of WRN-16-1's stem on CIFAR-10.
        pattern_seed: draws the signs.
        mode: "all_to_one", or "all_to_all" for label y + 1.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels"

    target_label: int = 0
    poison_rate: float = 0.1
    amplitude: float = 0.25
    period: int = 4
    pattern_seed: int = 0
    mode: LabelMode = "all_to_one"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        if not 1 / 255 <= self.amplitude <= 1:
            raise ValueError(f"expected an amplitude between 1/255 and 1, in [0, 1] units; got {self.amplitude}")
        if self.period < 2:
            raise ValueError(f"expected a period of at least 2 pixels; got {self.period}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the trigger fits; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> Addition:
        """Return the addition of the pattern for images of (C, H, W); ``ValueError`` where not even one tile fits."""
        if min(image_shape[1:]) < self.period:
            raise ValueError(
                f"a pattern of period {self.period} needs images of as many pixels; got {image_shape[1]}x{image_shape[2]}"
            )
        return Addition(pattern=self.amplitude * sign_pattern(image_shape, self.period, self.pattern_seed))

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=self.poison_rate, generator=generator)
