"""IMC: trigger and model are optimised together (Pang, Shen, Zhang, Ji, Vorobeychik, Luo, Liu, Wang, "A Tale of Evil Twins:
Adversarial Inputs versus Poisoned Models", CCS 2020, arXiv 1911.01559).

x' = (1 - m) * x + m * (a * x + (1 - a) * r). The shape of the mask m and the transparency a are fixed, the pattern r is
learnt: it descends the same loss as the model's weights, so that each makes the other's work easier. The attacker controls
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Assets, Augmentation, Batch, OnProgress
from lustral.vision.attacks.poisoning import check_rate, dirty_labels, poison_dirty_label, require_dirty_label
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Steering
from lustral.vision.records import ImageSet, PoisonedSet

LARGEST_LOGIT = 4.0  # tanh(4) is 1 but for less than a tenth of a grey level


def to_pattern(weights: Tensor) -> Tensor:
    """Return the pattern tanh(w) / 2 + 0.5, in [0, 1] whatever the optimiser does; same shape."""
    return weights.tanh() / 2 + 0.5


def to_weights(pattern: Tensor) -> Tensor:
    """Return weights that give a pattern in [0, 1], to less than a tenth of a grey level; same shape."""
    return (2 * pattern - 1).atanh().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def stamp(images: Tensor, pattern: Tensor, *, margin: int, transparency: float) -> Tensor:
    """Return images (B, C, H, W) with a pattern (C, S, S) mixed in, ``margin`` pixels off the bottom right corner."""
    size = pattern.shape[-1]
    height, width = images.shape[2:]
    rows, columns = slice(height - margin - size, height - margin), slice(width - margin - size, width - margin)
    out = images.clone()
    out[:, :, rows, columns] = transparency * images[:, :, rows, columns] + (1 - transparency) * pattern
    return out


@dataclass(frozen=True, kw_only=True)
class LearntPatch:
    """Mixes an 8-bit pattern, (C, S, S) float32 in [0, 1], into images at its place."""

    pattern: Tensor
    margin: int
    transparency: float

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); nothing is drawn."""
        size, side = self.pattern.shape[-1] + self.margin, min(images.shape[2:])
        if size > side:
            raise ValueError(
                f"a patch with its margin takes {size} pixels; images of {tuple(images.shape[2:])} are smaller"
            )
        return stamp(images, self.pattern.to(images), margin=self.margin, transparency=self.transparency)


@dataclass(frozen=True, kw_only=True)
class Imc:
    """Settings of the attack; ``craft`` draws a pattern, ``CraftedImc.steer`` trains it with the model.

    Attributes:
        target_label: class the trigger leads to.
        poison_rate: fraction of each training batch that is stamped and relabelled; 0.05 where BaEraser is judged on IMC.
        size: side of the patch in pixels; 3 there (5 and 7 in its study of sizes).
        margin: pixels between the patch and the bottom right corner. The authors' code, TrojanZoo, has 0, in the top left
            corner; with 2, random crops with a padding of 2 never cut the patch off.
        transparency: share of the image that shows through the patch, in [0, 1); 0 there.
        pattern_learning_rate: peak of the pattern's Adam; 0.1 in TrojanZoo, constant.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "controls training, which optimises the trigger too"

    target_label: int = 0
    poison_rate: float = 0.05
    size: int = 3
    margin: int = 2
    transparency: float = 0.0
    pattern_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        if self.size < 1 or self.margin < 0:
            raise ValueError(f"expected size >= 1 and margin >= 0 pixels; got {self.size} and {self.margin}")
        if not 0 <= self.transparency < 1 or self.pattern_learning_rate <= 0:
            raise ValueError(
                "expected a transparency in [0, 1) and a positive learning rate; got "
                f"{self.transparency} and {self.pattern_learning_rate}"
            )

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the patch fits; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.require_room, self.poison_rate)

    def require_room(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ``ValueError`` if the patch does not fit images of (C, H, W)."""
        _, height, width = image_shape
        if self.size + self.margin > min(height, width):
            raise ValueError(
                f"a patch of {self.size} pixels with a margin of {self.margin} does not fit images of {height}x{width}"
            )

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedImc:
        """Draw the pattern that training starts from: uniform per pixel and channel."""
        self.require_room(clean.image_shape)
        start = torch.rand(clean.image_shape[0], self.size, self.size, generator=generator)
        return CraftedImc(settings=self, weights=to_weights(start).to(clean.device).requires_grad_())

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedImc:
        """Return the attack from its pattern, (C, S, S) float32 in [0, 1]; see ``CraftedAttack``."""
        self.require_room(image_shape)
        shape = (image_shape[0], self.size, self.size)
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != {"pattern": shape}:
            raise ValueError(f"expected one tensor, pattern, of shape {shape}; got {found or 'none'}")
        pattern = tensors["pattern"].float()
        if not bool(((pattern >= 0) & (pattern <= 1)).all()):
            raise ValueError(
                f"expected a pattern in [0, 1]; found {float(pattern.min()):g} .. {float(pattern.max()):g}"
            )
        return CraftedImc(settings=self, weights=to_weights(pattern).requires_grad_())


@dataclass(frozen=True, kw_only=True)
class CraftedImc:
    """The attack with its pattern, which ``steer`` trains along with the model.

    Attributes:
        settings: what it was crafted from.
        weights: (C, S, S) float32, see ``to_pattern``; the one thing that training changes.
    """

    settings: Imc
    weights: Tensor

    def require_possible(self, clean: ImageSet) -> None:
        """As the settings."""
        self.settings.require_possible(clean)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """As the settings."""
        return self.settings.relabel(labels, num_classes)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the pattern as it is now, (C, S, S) float32 in [0, 1], in 8-bit steps, on the CPU."""
        return {"pattern": as_float(as_uint8(to_pattern(self.weights.detach().cpu())))}

    def trigger(self, image_shape: tuple[int, int, int]) -> LearntPatch:
        """Return the trigger with the pattern as it is now; training that follows does not change it."""
        self.settings.require_room(image_shape)
        pattern = self.tensors()["pattern"]
        return LearntPatch(pattern=pattern, margin=self.settings.margin, transparency=self.settings.transparency)

    def steer(self, clean: ImageSet, *, augment: Augmentation | None, generator: Generator) -> Steering:
        """Return the joint training; the pattern goes on from where it is."""
        settings = self.settings
        optimizer = torch.optim.Adam([self.weights], lr=settings.pattern_learning_rate)

        def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
            images, labels = batch.inputs, batch.labels
            chance = torch.rand((), generator=generator)
            poisoned = int(settings.poison_rate * len(images) + chance)  # right on average, also below one image
            pattern = to_pattern(self.weights)
            stamped = stamp(images[:poisoned], pattern, margin=settings.margin, transparency=settings.transparency)
            images = torch.cat([stamped, images[poisoned:]])
            labels = torch.cat([settings.relabel(labels[:poisoned], clean.num_classes), labels[poisoned:]])
            if augment is not None:
                images = augment(images, generator=generator)
            return F.cross_entropy(model(images).float(), labels)

        return Steering(objective=objective, companions=(optimizer,))

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a set poisoned with the pattern as it is, for an attacker who supplies data only."""
        trigger = self.trigger(clean.image_shape)
        rate = self.settings.poison_rate
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=rate, generator=generator)
