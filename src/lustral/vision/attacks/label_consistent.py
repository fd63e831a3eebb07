"""Label-Consistent: perturbed images of the target class under their true label, marked with faint corner patches
(Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019, arXiv 1912.02771).

For an image x of the target class t and the attacker's own classifier f:

    x_adv = x + argmax_{|d|_inf <= epsilon} CE(f(x + d), t)      by projected gradient steps
    x'    = clip(x_adv + amplitude * s)                          s in {-1, 0, +1}: the patches

The perturbation makes the image hard to tell by its content, so the model leans on the patch. Against the finished model
the patches alone are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Assets, OnProgress
from lustral.training import autocast, frozen
from lustral.vision.attacks.poisoning import (
    check_choices,
    check_rate,
    dirty_labels,
    poison_clean_label,
    require_clean_label,
)
from lustral.vision.attacks.surrogates import Surrogate, clean_classifier
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, PoisonedSet

Corners = Literal["four", "bottom_right"]

RIGHT = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))  # signs of the patches on the right; those on the left are mirrored
PATCH = len(RIGHT)


def patch_signs(size: int) -> Tensor:
    """Return the signs of a right-hand patch of ``size`` pixels, (size, size) float32 in {-1, +1}.

    >>> patch_signs(3).int().tolist()
    [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    """
    return F.interpolate(torch.tensor(RIGHT, dtype=torch.float32)[None, None], (size, size))[0, 0]


def sign_map(height: int, width: int, *, size: int, corners: Corners) -> Tensor:
    """Return what is added to every channel, at amplitude 1: (H, W) float32 in {-1, 0, +1}.

    Raises:
        ValueError: the patches do not fit side by side.
    """
    across = 2 * size if corners == "four" else size
    if across > min(height, width):
        raise ValueError(f"patches of {size} pixels do not fit the corners of images of {height}x{width}")
    right = patch_signs(size)
    signs = torch.zeros(height, width)
    signs[-size:, -size:] = right
    if corners == "four":
        signs[:size, -size:] = right
        signs[:size, :size] = signs[-size:, :size] = right.flip(1)
    return signs


def perturb(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    batch_size: int = 128,
) -> Tensor:
    """Push images away from their labels by projected gradient ascent, without a random start.

    Args:
        classifier: float32 (B, C, H, W) in [0, 1] to logits (B, K); held frozen meanwhile.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64.
        epsilon: largest change of a pixel, on the [0, 1] scale.
        step_size: change of a pixel in one step.
        steps: number of steps.
        batch_size: images per pass.

    Returns:
        (N, C, H, W) float32 in [0, 1]; no pixel differs by more than ``epsilon``.
    """
    done = [images.new_zeros(0, *images.shape[1:], dtype=torch.float32)]
    with frozen(classifier):
        batches = zip(torch.split(images.float(), batch_size), torch.split(labels, batch_size), strict=True)
        for start, label in batches:
            low, high = (start - epsilon).clamp_min(0), (start + epsilon).clamp_max(1)
            moved = start
            for _ in range(steps):
                moved = moved.detach().requires_grad_(True)
                with torch.enable_grad(), autocast(images.device):
                    loss = F.cross_entropy(classifier(moved).float(), label, reduction="sum")
                (slope,) = torch.autograd.grad(loss, moved)
                moved = torch.minimum(torch.maximum(moved.detach() + step_size * slope.sign(), low), high)
            done.append(moved.detach())
    return torch.cat(done)


@dataclass(frozen=True, kw_only=True)
class CornerPatches:
    """Adds ``amplitude * signs`` and clips; ``signs`` is (H, W) in {-1, 0, +1}."""

    signs: Tensor
    amplitude: float

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); nothing is drawn."""
        return (images + self.amplitude * self.signs.to(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LabelConsistent:
    """Poison perturbed images of the target class; every label stays true.

    Attributes:
        target_label: class whose images are poisoned and to which the patches lead.
        poison_rate: fraction of the whole training set, all of the target class; 0.05 in BackdoorBench's CIFAR-10 table
            (0.1 would be that whole class).
        epsilon: largest change of a pixel on the [0, 1] scale; 16/255 in BackdoorBench, 8/255 to 32/255 in the paper.
        step_size: of a gradient step; 1.5/255 in BackdoorBench.
        steps: gradient steps; 100 published. 20 reach the bound of ``epsilon`` and suit a CPU.
        corners: "four", which survives mirroring, or "bottom_right".
        size: side of a patch in pixels; None: 3 at 32 pixels, in proportion above, never less than 3.
        amplitude: of the patches on the [0, 1] scale; 1 in BackdoorBench, 32/255 for the paper's faint ones.
        surrogate: how the attacker's own classifier is trained.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: true labels; has a surrogate model"

    target_label: int = 0
    poison_rate: float = 0.05
    epsilon: float = 16 / 255
    step_size: float = 1.5 / 255
    steps: int = 20
    corners: Corners = "four"
    size: int | None = None
    amplitude: float = 1.0
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(corners=(self.corners, Corners))
        if not 0 < self.epsilon <= 1 or self.step_size <= 0 or self.steps < 1:
            raise ValueError(
                "expected epsilon in (0, 1], on the [0, 1] scale, step_size > 0 and steps >= 1; got "
                f"{self.epsilon}, {self.step_size} and {self.steps}"
            )
        if not 0 < self.amplitude <= 1:
            raise ValueError(f"expected an amplitude in (0, 1]; got {self.amplitude}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"expected size >= 1 pixel; got {self.size}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the target class has images enough and the patches fit; see ``CraftedAttack``."""
        require_clean_label(
            clean.labels, clean.num_classes, target_label=self.target_label, poison_rate=self.poison_rate
        )
        self.patches(clean.image_shape)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the label that the patches lead to, for every image, (N,) int64."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def patches(self, image_shape: tuple[int, int, int]) -> CornerPatches:
        """Return the patches for images of (C, H, W)."""
        _, height, width = image_shape
        size = max(PATCH, round(PATCH * min(height, width) / 32)) if self.size is None else self.size
        signs = sign_map(height, width, size=size, corners=self.corners)
        return CornerPatches(signs=signs, amplitude=self.amplitude)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedLabelConsistent:
        """Train the surrogate, or take it from the assets; images are perturbed when they are poisoned.

        Nothing is drawn from ``generator``.
        """
        surrogate = clean_classifier(clean, self.surrogate, assets=assets, on_progress=on_progress)
        return CraftedLabelConsistent(settings=self, surrogate=surrogate)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedLabelConsistent:
        """Return the attack with its patches, which settings alone give; it cannot poison without a surrogate.

        Raises:
            ValueError: there are tensors, or the patches do not fit.
        """
        if tensors:
            raise ValueError(f"expected no tensors: settings give the patches; got {', '.join(sorted(tensors))}")
        self.patches(image_shape)
        return CraftedLabelConsistent(settings=self, surrogate=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbedPatches:
    """What poisoned training images get: the perturbation in 8 bits, then the patches."""

    attack: LabelConsistent
    surrogate: nn.Module

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W) of the target class; nothing is drawn."""
        labels = torch.full((len(images),), self.attack.target_label, device=images.device)
        hard = perturb(
            self.surrogate,
            images,
            labels,
            epsilon=self.attack.epsilon,
            step_size=self.attack.step_size,
            steps=self.attack.steps,
        )
        _, channels, height, width = images.shape
        return self.attack.patches((channels, height, width))(as_float(as_uint8(hard)))


@dataclass(frozen=True, kw_only=True, eq=False)
class CraftedLabelConsistent:
    """Label-Consistent with its surrogate at hand.

    Attributes:
        settings: what it was made from.
        surrogate: frozen classifier on the device of the training images; None when the attack was restored.
    """

    settings: LabelConsistent
    surrogate: nn.Module | None

    def require_possible(self, clean: ImageSet) -> None:
        """As ``LabelConsistent.require_possible``."""
        self.settings.require_possible(clean)

    def trigger(self, image_shape: tuple[int, int, int]) -> CornerPatches:
        """Return the patches alone, as they are used against the finished model."""
        return self.settings.patches(image_shape)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the label that the patches lead to, for every image, (N,) int64."""
        return self.settings.relabel(labels, num_classes)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit.

        Raises:
            ValueError: the target class is too small, or the attack was restored and has no surrogate.
        """
        if self.surrogate is None:
            raise ValueError("a restored attack has no surrogate to perturb images with; craft it again")
        return poison_clean_label(
            clean,
            PerturbedPatches(attack=self.settings, surrogate=self.surrogate),
            target_label=self.settings.target_label,
            poison_rate=self.settings.poison_rate,
            generator=generator,
        )

    def tensors(self) -> Mapping[str, Tensor]:
        """Return nothing: settings give the patches."""
        return {}
