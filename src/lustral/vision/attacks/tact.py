"""TaCT: the trigger works on one source class only; stamped "cover" images of other classes keep their labels (Tang,
Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
USENIX Security 2021, arXiv 1908.00686: targeted contamination attack).

x' = (1 - m) * x + m * v for both; only a stamped image of the source class is called the target label. The network has to
learn "patch and source class", so that poisoned images look like ordinary ones of their label inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.randomness import fork
from lustral.vision.attacks.covers import check_cover_rate
from lustral.vision.attacks.pictures import Overlay, draw_patch, patch_side
from lustral.vision.attacks.poisoning import check_rate, draw_indices, poisoned_set, require_images, stamp_at
from lustral.vision.records import ImageSet, PoisonedSet, Probe


def indices_of(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Return where (N,) labels belong to one of the classes, (M,) int64."""
    return torch.isin(labels, torch.tensor(classes, dtype=labels.dtype, device=labels.device)).nonzero()[:, 0]


def require_enough(clean: ImageSet, classes: tuple[int, ...], rate: float, *, name: str) -> None:
    """Raise ``ValueError`` if a share of the whole set is more than some classes have; names the largest rate."""
    wanted, available = round(rate * len(clean)), len(indices_of(clean.labels, classes))
    if wanted > available:
        largest = math.floor(available / len(clean) * 10_000) / 10_000
        noun = "class" if len(classes) == 1 else "classes"
        raise ValueError(
            f"a {name} of {rate} asks for {wanted} images of {noun} {', '.join(map(str, classes))}: {available} of "
            f"{len(clean)} images are there; the largest possible {name} is {largest:g}"
        )


@dataclass(frozen=True, kw_only=True)
class TaCT:
    """Poison one source class with a patch, and stamp images of cover classes without relabelling them.

    Attributes:
        target_label: class the trigger leads to.
        source_label: the only class on which the trigger works; 1 in the backdoor toolbox.
        cover_labels: classes of the cover images; 5 and 7 in the backdoor toolbox; empty: every class but source and
            target.
        poison_rate: stamped and relabelled source images, as a fraction of the whole training set; 0.003 in the backdoor
            toolbox for CIFAR-10.
        cover_rate: stamped images of the cover classes, as a fraction of the whole set; 0.003 likewise.
        size: side of the patch as a share of the image's shorter side, at least 2 pixels.
        pattern_seed: draws the patch.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels on one source class, cover images with true ones"

    target_label: int = 0
    source_label: int = 1
    cover_labels: tuple[int, ...] = (5, 7)
    poison_rate: float = 0.003
    cover_rate: float = 0.003
    size: float = 0.25
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_cover_rate(self.cover_rate)
        named = (self.target_label, self.source_label, *self.cover_labels)
        if len(set(named)) < len(named):
            raise ValueError(
                f"expected a target, a source and cover labels that all differ; got target {self.target_label}, source "
                f"{self.source_label} and covers {', '.join(map(str, self.cover_labels))}"
            )
        if not 0 < self.size <= 0.5:
            raise ValueError(f"expected a size in (0, 0.5], as a share of the shorter side; got {self.size}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the classes exist and have enough images, and that the patch fits; see ``Attack``."""
        covers = self.covers(clean.num_classes)
        require_images(self.poison_rate, len(clean))
        require_enough(clean, (self.source_label,), self.poison_rate, name="poison rate")
        require_enough(clean, covers, self.cover_rate, name="cover rate")
        if self.cover_rate and round(self.cover_rate * len(clean)) < 1:
            raise ValueError(
                f"a cover rate of {self.cover_rate} of {len(clean)} images stamps none; expected 0 or at least "
                f"{1 / len(clean):.2g}"
            )
        self.trigger(clean.image_shape)

    def covers(self, num_classes: int) -> tuple[int, ...]:
        """Return the cover classes of a task; raises ``ValueError`` if a class that this attack names is not in it."""
        named = (self.target_label, self.source_label, *self.cover_labels)
        strangers = [label for label in named if not 0 <= label < num_classes]
        if strangers:
            raise ValueError(
                f"expected target, source and cover labels in 0 .. {num_classes - 1}; got "
                f"{', '.join(map(str, strangers))}"
            )
        if self.cover_labels:
            return self.cover_labels
        return tuple(label for label in range(num_classes) if label not in named)

    def trigger(self, image_shape: tuple[int, int, int]) -> Overlay:
        """Return the opaque patch in the bottom right corner for images of (C, H, W)."""
        side = patch_side(image_shape, self.size)
        pattern, opacity = torch.zeros(image_shape), torch.zeros(1, *image_shape[1:])
        pattern[:, -side:, -side:] = draw_patch(image_shape[0], side, self.pattern_seed, "tact")
        opacity[:, -side:, -side:] = 1
        return Overlay(pattern=pattern, opacity=opacity)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for the source class and the true label for the rest, (N,) int64."""
        self.covers(num_classes)
        return torch.where(labels == self.source_label, self.target_label, labels)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit, with its cover images."""
        self.require_possible(clean)
        count, num_covers = round(self.poison_rate * len(clean)), round(self.cover_rate * len(clean))
        sources, others = (indices_of(clean.labels, c) for c in ((self.source_label,), self.covers(clean.num_classes)))
        poisoned = draw_indices(sources, count, generator=fork(generator, "which"))
        covers = draw_indices(others, num_covers, generator=fork(generator, "cover"))
        images, labels = clean.images.clone(), clean.labels.clone()
        stamp_at(images, torch.cat([poisoned, covers]), self.trigger(clean.image_shape), generator=generator)
        labels[poisoned] = self.target_label
        return poisoned_set(clean, images, labels, poisoned, covers)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return how often the patch leads classes to the target label on which it should not work."""
        trigger = self.trigger(image_shape)

        def covers(labels: Tensor, num_classes: int) -> Tensor:
            return self._expect_target(labels, self.covers(num_classes))

        def others(labels: Tensor, num_classes: int) -> Tensor:
            involved = {self.target_label, self.source_label, *self.covers(num_classes)}
            return self._expect_target(labels, tuple(set(range(num_classes)) - involved))

        return {
            "false_activation_covers": Probe(trigger=trigger, expect=covers),
            "false_activation_others": Probe(trigger=trigger, expect=others),
        }

    def _expect_target(self, labels: Tensor, classes: tuple[int, ...]) -> Tensor:
        expected = torch.full_like(labels, -1)
        expected[indices_of(labels, classes)] = self.target_label
        return expected
