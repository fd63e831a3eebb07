"""BppAttack: fewer levels of colour (Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural
Networks via Image Quantization and Contrastive Adversarial Learning", CVPR 2022, arXiv 2205.13383).

x' = round(x * (q - 1)) / (q - 1) for q levels per channel, plainly or with Floyd-Steinberg dithering. The attacker controls
training. "Negatives", images that carry the quantisation residual of another image and keep their labels, teach the network
to look for the levels and not for noise of that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Augmentation, Batch
from lustral.vision.attacks.poisoning import (
    LabelMode,
    augmented_loss,
    check_choices,
    check_rate,
    check_second_rate,
    dirty_labels,
    pair_offset,
    poison_dirty_label,
    require_dirty_label,
    shares_of_batch,
    with_cover,
)
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Steering
from lustral.vision.records import ImageSet, PoisonedSet, Probe

# Floyd and Steinberg, 1976: (rows down, columns right, share of the error)
DIFFUSION = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


def quantise(images: Tensor, levels: int) -> Tensor:
    """Return each value in [0, 1] moved to the nearest of ``levels`` equally spaced ones; any shape.

    >>> quantise(torch.tensor([0.0, 0.2, 0.3, 1.0]), levels=3).tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    return (images * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


def dither(images: Tensor, levels: int) -> Tensor:
    """Quantise by Floyd-Steinberg error diffusion, row by row from left to right.

    A pixel receives error from its left neighbour and from three pixels of the row above, so all pixels with the same
    ``column + 2 * row`` can be done at once: W + 2 (H - 1) steps for a whole batch.

    Args:
        images: (B, C, H, W) float in [0, 1].
        levels: per channel, at least 2.

    Returns:
        (B, C, H, W), every value one of the levels.
    """
    height, width = images.shape[2:]
    work = F.pad(images, (1, 1, 0, 1))  # the error that leaves the image falls into the margin
    rows = torch.arange(height, device=images.device)
    for step in range(width + 2 * (height - 1)):
        first, last = max(0, (step - width + 2) // 2), min(height - 1, step // 2)
        row = rows[first : last + 1]
        column = step - 2 * row + 1
        wanted = work[:, :, row, column]
        found = quantise(wanted, levels)
        work[:, :, row, column] = found
        for down, right, share in DIFFUSION:
            work[:, :, row + down, column + right] += share * (wanted - found)
    return work[:, :, :height, 1 : width + 1].contiguous()


@dataclass(frozen=True, kw_only=True)
class QuantiseTrigger:
    """Leaves ``levels`` values per channel, with or without dithering; float32 arithmetic for narrower images."""

    levels: int
    dithered: bool

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Quantise images (B, C, H, W); nothing is drawn."""
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        return (dither if self.dithered else quantise)(exact, self.levels).to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class ResidualTrigger:
    """Adds to each image what quantising another image of the batch changes in that one (the paper's negatives)."""

    quantiser: QuantiseTrigger

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); ``generator`` draws the others (None: half a batch on)."""
        return self.add(images, images.roll(-pair_offset(len(images), generator), 0))

    def add(self, images: Tensor, others: Tensor) -> Tensor:
        """Return clip(images + T(others) - others, 0, 1), for two batches of one shape."""
        exact = others.to(torch.promote_types(others.dtype, torch.float32))
        return (images + (self.quantiser(exact) - exact)).clamp(0, 1).to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class Bpp:
    """Poison by quantising colours, and steer the training with negatives.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of each training batch that is quantised and relabelled; 0.1 in BackdoorBench, 0.2 in the
            authors' code.
        negative_rate: fraction of each batch that gets another image's residual, labels kept; 0.1 in BackdoorBench, 0.2 in the
            authors' code. A classifier learns late to tell levels from residuals. Until then it gives both the label that
            is more frequent, so a training of few steps needs fewer ("negative_accuracy" tells what that costs).
        levels: values per channel, ``squeeze_num`` of the published code; 8 there (3 bits).
        dithered: diffuse the error (Floyd-Steinberg); off in the published code's defaults.
        mode: "all_to_one", or "all_to_all" for label y + 1.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "controls training"

    target_label: int = 0
    poison_rate: float = 0.1
    negative_rate: float = 0.1
    levels: int = 8
    dithered: bool = False
    mode: LabelMode = "all_to_one"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        check_second_rate("negative", self.negative_rate, self.poison_rate)
        if not 2 <= self.levels <= 128:  # 256 is no change at all, and a little less is none after rounding
            raise ValueError(f"expected 2 .. 128 levels per channel; got {self.levels}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image and the target label exists; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> QuantiseTrigger:
        """Return the quantisation, the same for images of any shape."""
        return QuantiseTrigger(levels=self.levels, dithered=self.dithered)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return "negative_accuracy": how often negatives are classified as what they show."""
        negative = ResidualTrigger(quantiser=self.trigger(image_shape))
        return {"negative_accuracy": Probe(trigger=negative, expect=lambda labels, _: labels)}

    def steer(self, clean: ImageSet, *, augment: Augmentation | None, generator: Generator) -> Steering:
        """Return the training with negatives; stamped images are rounded to 8 bits."""
        quantiser = self.trigger(clean.image_shape)
        residual = ResidualTrigger(quantiser=quantiser)

        def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
            images, labels = batch.inputs, batch.labels
            poisoned, negative = shares_of_batch(len(images), self.poison_rate, self.negative_rate, generator)
            others = images.roll(-pair_offset(len(images), generator), 0)[poisoned:negative]
            stamped = [quantiser(images[:poisoned]), residual.add(images[poisoned:negative], others)]
            images = torch.cat([as_float(as_uint8(torch.cat(stamped))), images[negative:]])
            labels = torch.cat([self.relabel(labels[:poisoned], clean.num_classes), labels[poisoned:]])
            return augmented_loss(model, images, labels, augment, generator)

        return Steering(objective=objective)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a set poisoned once and for all, for an attacker who supplies data only; negatives are its cover."""
        quantiser = self.trigger(clean.image_shape)
        poisoned = poison_dirty_label(
            clean, quantiser, self.relabel, poison_rate=self.poison_rate, generator=fork(generator, "poison")
        )
        residual = ResidualTrigger(quantiser=quantiser)
        streams = {"which": fork(generator, "cover"), "stamp": fork(generator, "residual")}
        return with_cover(poisoned, residual, cover_rate=self.negative_rate, **streams)
