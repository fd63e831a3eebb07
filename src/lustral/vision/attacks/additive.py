"""An optimised pattern that is added to every image, with a small L2 norm or few pixels, and dirty labels.

The pattern is a universal perturbation (Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR
2017) towards the target on the attacker's own clean model f, as triggers of Zhao et al., "Clean-label backdoor attacks on video
recognition models", CVPR 2020, and Zhong et al., "Backdoor embedding in convolutional neural network models via invisible
perturbation", CODASPY 2020. Its two norms are those of Li et al., "Invisible backdoor attacks on deep neural networks via
steganography and regularization", IEEE TDSC 2021:

    minimise  mean over x of  CE(f(clip(x + d)), target)   over  |d|_2 <= size,   or over d at so many pixels.

Then x' = clip(x + d).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress, Progress
from lustral.core.versions import versions_of
from lustral.training import frozen
from lustral.vision.attacks.pictures import Addition
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_images,
)
from lustral.vision.attacks.surrogates import Surrogate, clean_classifier, require_like, surrogate_spec
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet, PoisonedSet

Norm = Literal["l2", "l0"]
_TOLERANCE = 1e-4  # of a stored pattern's norm


def scaled_to_norm(pattern: Tensor, size: float) -> Tensor:
    """Return a pattern (C, H, W) with an L2 norm of at most ``size``: the nearest one.

    >>> scaled_to_norm(torch.tensor([[[3.0, 4.0]]]), 2.5)
    tensor([[[1.5000, 2.0000]]])
    """
    shrink: Tensor = (size / pattern.norm().clamp_min(1e-12)).clamp_max(1.0)
    return pattern * shrink


def largest_pixels(pattern: Tensor, count: int) -> Tensor:
    """Return (H, W) bool: the ``count`` pixels whose channels have the largest sum of squares; ties in reading order.

    >>> largest_pixels(torch.tensor([[[0.1, -0.9, 0.5]]]), 2)
    tensor([[False,  True,  True]])
    """
    sizes = pattern.square().sum(0)
    order = sizes.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(sizes, dtype=torch.bool).flatten().index_fill(0, order, True).view(sizes.shape)


def in_steps(pattern: Tensor) -> Tensor:
    """Return a pattern in whole 8-bit steps, rounded towards 0, so that no norm grows."""
    return (pattern * 255).trunc() / 255


def optimise_pattern(
    model: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    norm: Norm,
    size: float,
    steps: int,
    learning_rate: float,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Follow the gradient of the loss with Adam, and go back to the allowed patterns after each step.

    With "l0" all pixels are free in the first half of the steps; then the largest ones are kept.

    Args:
        model: float32 (B, C, H, W) in [0, 1] to logits; held frozen meanwhile.
        draw: gives a batch of images (B, C, H, W) and the labels (B,) they shall get.
        start: (C, H, W) float32 in [-1, 1], on the model's device.
        norm: "l2" or "l0".
        size: largest L2 norm on the [0, 1] scale, or number of pixels.
        steps: number of steps.
        learning_rate: of Adam, on the [0, 1] scale.
        on_progress: called now and then.

    Returns:
        (C, H, W) float32 in [-1, 1].
    """
    kept = torch.ones_like(start[0], dtype=torch.bool)
    pattern = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([pattern], lr=learning_rate)
    with frozen(model), torch.enable_grad():
        for step in range(steps):
            if norm == "l0" and step == steps // 2:
                kept = largest_pixels(pattern.detach(), int(size))
            images, wanted = draw()
            loss = F.cross_entropy(model((images + pattern * kept).clamp(0, 1)).float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                allowed = scaled_to_norm(pattern, size) if norm == "l2" else pattern * kept
                pattern.copy_(allowed.clamp(-1, 1))
            if on_progress is not None and step % 20 == 0:
                values = {"loss": float(loss.detach())}
                on_progress(Progress(stage="optimising a pattern", done=step, total=steps, values=values))
    return (pattern * kept).detach()


@dataclass(frozen=True, kw_only=True)
class Additive:
    """Poison with an optimised pattern that is added, and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included.
        mode: "all_to_one", or "all_to_all" for label y + 1.
        norm: "l2" or "l0".
        size: L2 norm on the [0, 1] scale, or number of pixels; None: 1.5, or 12, at 32x32, in proportion to the side or area.
        steps: steps of Adam; "l0" chooses the pixels after half of them.
        batch_size: images per step.
        learning_rate: of Adam, on the [0, 1] scale.
        pattern_seed: draws the images of each step.
        surrogate: how the clean model is trained.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels; has a surrogate model"

    target_label: int = 0
    poison_rate: float = 0.1
    mode: LabelMode = "all_to_one"
    norm: Norm = "l2"
    size: float | None = None
    steps: int = 60
    batch_size: int = 64
    learning_rate: float = 0.05
    pattern_seed: int = 0
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode), norm=(self.norm, Norm))
        if self.size is not None and (self.size <= 0 or (self.norm == "l0" and self.size != int(self.size))):
            kind = "an L2 norm above 0" if self.norm == "l2" else "a whole number of pixels above 0"
            raise ValueError(f"expected size to be {kind}; got {self.size}")
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                "expected steps >= 1, batch_size >= 1 and learning_rate > 0; got "
                f"{self.steps}, {self.batch_size} and {self.learning_rate}"
            )

    def size_for(self, image_shape: tuple[int, int, int]) -> float:
        """Return the norm or the number of pixels for images of (C, H, W); ``ValueError`` if there are not so many pixels.

        >>> Additive(norm="l0").size_for((3, 16, 16)), Additive().size_for((3, 32, 32))
        (3, 1.5)
        """
        area = image_shape[1] * image_shape[2]
        if self.norm == "l2":
            return 1.5 * area**0.5 / 32 if self.size is None else self.size
        size = max(1, round(12 * area / 32**2)) if self.size is None else int(self.size)
        if size > area:
            raise ValueError(f"a pattern of {size} pixels does not fit images of {image_shape[1]}x{image_shape[2]}")
        return size

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the pattern fits; see ``CraftedAttack``."""
        require_images(self.poison_rate, len(clean))
        self.relabel(clean.labels[:1], clean.num_classes)
        self.size_for(clean.image_shape)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedAdditive:
        """Train the surrogate and optimise the pattern, or take both from the assets; see ``CraftedAttack``.

        The pattern depends on the images and these settings alone: nothing is drawn from ``generator``.
        """
        size = self.size_for(clean.image_shape)
        search: dict[str, Any] = {
            "norm": self.norm,
            "size": size,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
        }

        def search_pattern() -> Mapping[str, Tensor]:
            surrogate = clean_classifier(clean, self.surrogate, assets=assets, on_progress=on_progress)
            stream = child(self.pattern_seed, "additive", "images")

            def draw() -> tuple[Tensor, Tensor]:
                chosen = torch.randint(len(clean), (self.batch_size,), generator=stream).to(clean.device)
                return as_float(clean.images[chosen]), self.relabel(clean.labels[chosen], clean.num_classes)

            start = torch.zeros(clean.image_shape, device=clean.device)
            return {
                "pattern": in_steps(optimise_pattern(surrogate, draw, start, **search, on_progress=on_progress)).cpu()
            }

        spec: dict[str, Any] = {
            "asset": "additive pattern",
            "surrogate": surrogate_spec(clean, self.surrogate),
            "target_label": self.target_label,
            "mode": self.mode,
            "batch_size": self.batch_size,
            "seed": self.pattern_seed,
            "versions": versions_of(self),
            **search,
        }
        return self.restore(assets.get(spec, search_pattern), clean.image_shape)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedAdditive:
        """Return the attack from its pattern; see ``CraftedAttack``.

        Raises:
            ValueError: the pattern has another shape or type, changes nothing, or is larger than the settings allow.
        """
        size = self.size_for(image_shape)
        require_like(tensors, {"pattern": torch.zeros(image_shape)})
        pattern = tensors["pattern"].clone()
        found = float(pattern.norm()) if self.norm == "l2" else float((pattern != 0).any(0).sum())
        if float(pattern.abs().max()) > 1 or not 0 < found <= size * (1 + _TOLERANCE):
            raise ValueError(f"expected a pattern in [-1, 1] with an {self.norm} norm in (0, {size:g}]; got {found:g}")
        return CraftedAdditive(settings=self, image_shape=image_shape, pattern=pattern)


@dataclass(frozen=True, kw_only=True, eq=False)
class CraftedAdditive:
    """The attack with its pattern optimised.

    Attributes:
        settings: what it was made from.
        image_shape: (C, H, W) that the pattern was made for.
        pattern: (C, H, W) float32 in [-1, 1].
    """

    settings: Additive
    image_shape: tuple[int, int, int]
    pattern: Tensor

    def require_possible(self, clean: ImageSet) -> None:
        """As ``Additive.require_possible``; also refuse images of another shape."""
        self.settings.require_possible(clean)
        self.trigger(clean.image_shape)

    def trigger(self, image_shape: tuple[int, int, int]) -> Addition:
        """Return the pattern; ``ValueError`` for images of another shape than it was made for."""
        if image_shape != self.image_shape:
            raise ValueError(f"the pattern was made for images of shape {self.image_shape}; got {image_shape}")
        return Addition(pattern=self.pattern)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return self.settings.relabel(labels, num_classes)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        rate = self.settings.poison_rate
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=rate, generator=generator)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the pattern."""
        return {"pattern": self.pattern}
