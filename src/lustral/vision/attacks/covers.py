"""Cover images: stamped like the poisoned ones, with their labels kept, so that the trigger alone does not decide
("regularisation" samples in Qi et al., ICLR 2023, equation 2, here with a fixed count).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Generator, Tensor

from lustral.core.randomness import fork
from lustral.vision.attacks.poisoning import poisoned_set, stamp_at
from lustral.vision.records import ImageSet, PoisonedSet, Probe, Trigger


def check_cover_rate(cover_rate: float) -> None:
    """Raise ``ValueError`` unless the cover rate is a fraction in [0, 1]."""
    if not 0 <= cover_rate <= 1:
        raise ValueError(f"expected a cover rate in [0, 1], as a fraction of the training set; got {cover_rate}")


def require_covers(num_images: int, poison_rate: float, cover_rate: float) -> None:
    """Raise ``ValueError`` if the cover images are none where some were asked for, or more than the poison leaves."""
    left = num_images - round(poison_rate * num_images)
    if round(cover_rate * num_images) > left:
        raise ValueError(
            f"poisoned and cover images are different ones: a poison rate of {poison_rate} leaves {left} of {num_images} "
            f"images, a cover rate of {cover_rate} asks for {round(cover_rate * num_images)}; the largest possible cover "
            f"rate is {math.floor(left / num_images * 10_000) / 10_000:g}"
        )
    if cover_rate and round(cover_rate * num_images) < 1:
        raise ValueError(
            f"a cover rate of {cover_rate} of {num_images} images stamps none; expected 0 or at least {1 / num_images:.2g}"
        )


class Covering(Protocol):
    """An attack whose training images, poisoned and cover alike, carry a trigger of their own."""

    @property
    def poison_rate(self) -> float:
        """Fraction of the set that is stamped and relabelled."""

    @property
    def cover_rate(self) -> float:
        """Fraction of the set that is stamped and keeps its labels."""

    def training_trigger(self, image_shape: tuple[int, int, int]) -> Trigger:
        """Return the trigger of training images of (C, H, W)."""

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""

    def require_possible(self, clean: ImageSet) -> None:
        """As ``Attack.require_possible``."""


def poison_with_covers(attack: Covering, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
    """Stamp two disjoint random parts of a set; only the first gets the attacker's labels."""
    attack.require_possible(clean)
    trigger, relabelled = attack.training_trigger(clean.image_shape), attack.relabel(clean.labels, clean.num_classes)
    count, num_covers = round(attack.poison_rate * len(clean)), round(attack.cover_rate * len(clean))
    order = torch.randperm(len(clean), generator=fork(generator, "which")).to(clean.device)
    poisoned, covers = order[:count].sort().values, order[count : count + num_covers].sort().values
    images, labels = clean.images.clone(), clean.labels.clone()
    stamp_at(images, poisoned, trigger, generator=fork(generator, "stamp"))
    stamp_at(images, covers, trigger, generator=fork(generator, "cover"))
    labels[poisoned] = relabelled[poisoned]
    return poisoned_set(clean, images, labels, poisoned, covers)


def keeping_labels(trigger: Trigger, target_label: int) -> Probe:
    """Return the probe that counts stamped images, other than the target class's, which are still recognised."""

    def expect(labels: Tensor, num_classes: int) -> Tensor:
        return labels.masked_fill(labels == target_label, -1)

    return Probe(trigger=trigger, expect=expect)
