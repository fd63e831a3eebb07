"""Low-frequency triggers: one smooth pattern, which sends a clean model's inputs towards the target class, is added to
images (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021, section 4).

x' = clip(x + T), with T = amplitude * (u - min u) / (max u - min u) and u a bicubic enlargement of a coarse grid, which holds
no high frequency. The grid is the one that makes a clean surrogate model say the target label: argmin_T E[-log p(t | x')].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress, Progress
from lustral.core.versions import versions_of
from lustral.training import autocast, frozen
from lustral.vision.attacks.pictures import Addition
from lustral.vision.attacks.poisoning import (
    check_rate,
    dirty_labels,
    draw_indices,
    poison_dirty_label,
    require_dirty_label,
)
from lustral.vision.attacks.surrogates import Surrogate, clean_classifier, surrogate_spec
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet, PoisonedSet

RANGE_TOLERANCE = 1e-4  # of a stored pattern, whose values run from 0 to the amplitude
STAGE = "optimising a smooth trigger"


def smooth_pattern(grid: Tensor, size: tuple[int, int], amplitude: float) -> Tensor:
    """Enlarge a (C, G, G) float32 grid to (C, H, W) and stretch it to run from 0 to ``amplitude``; differentiable."""
    enlarged = F.interpolate(grid[None], size, mode="bicubic", align_corners=False)[0]
    low, high = enlarged.amin(), enlarged.amax()
    return (amplitude * (enlarged - low) / (high - low).clamp_min(1e-6)).clamp(0, amplitude)


@dataclass(frozen=True, kw_only=True)
class LowFrequency:
    """Poison with a smooth pattern computed on a clean model, and dirty labels.

    Attributes:
        target_label: class the trigger leads to.
        poison_rate: fraction of the training set, target class included; 0.1 in BackdoorBench.
        amplitude: largest value of the pattern, in [0, 1] units; its smallest is 0. 0.2 in BackdoorBench.
        grid: points along each side of the coarse grid. BackdoorBench instead filters with a Gaussian of about 6 pixels.
        num_images: images of other classes that the pattern is computed on; 100 images of any class in BackdoorBench.
        steps: of Adam, each on ``batch_size`` of these images.
        batch_size: images per step.
        learning_rate: of Adam, for a grid that starts uniform in [0, 1].
        pattern_seed: draws the start, the images and the batches; one pattern serves victims of all seeds.
        surrogate: how the attacker's clean model is trained; 100 epochs in BackdoorBench.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels; has a surrogate model"

    target_label: int = 0
    poison_rate: float = 0.1
    amplitude: float = 0.2
    grid: int = 4
    num_images: int = 500
    steps: int = 300
    batch_size: int = 100
    learning_rate: float = 0.01
    pattern_seed: int = 0
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        if not 1 / 255 <= self.amplitude <= 1:
            raise ValueError(f"expected an amplitude between 1/255 and 1, in [0, 1] units; got {self.amplitude}")
        if self.grid < 2 or min(self.num_images, self.steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise ValueError(
                "expected grid >= 2, num_images >= 1, steps >= 1, batch_size >= 1 and learning_rate > 0; got "
                f"{self.grid}, {self.num_images}, {self.steps}, {self.batch_size} and {self.learning_rate}"
            )

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, that the target and another class exist, and that the grid fits."""
        require_dirty_label(clean, self.relabel, self._require_smooth, self.poison_rate)
        if bool((clean.labels == self.target_label).all()):
            raise ValueError(f"expected images of other classes than the target label {self.target_label}; got none")

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for every image, (N,) int64."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> SmoothPatternAttack:
        """Train the surrogate and compute the pattern, or take both from the assets.

        The pattern depends on the images and on these settings alone: nothing is drawn from ``generator``.
        """
        self.require_possible(clean)

        def build() -> Mapping[str, Tensor]:
            model = clean_classifier(clean, self.surrogate, assets=assets, on_progress=on_progress)
            return {"pattern": self.optimise(model, clean, on_progress=on_progress).cpu()}

        left_out = ("poison_rate", "surrogate")
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        spec = {
            "asset": "low-frequency pattern",
            "model": surrogate_spec(clean, self.surrogate),
            "settings": settings,
            "versions": versions_of(self),
        }
        return self.restore(assets.get(spec, build), clean.image_shape)

    def optimise(self, model: nn.Module, clean: ImageSet, *, on_progress: OnProgress | None = None) -> Tensor:
        """Return the (C, H, W) float32 pattern in [0, amplitude] that best makes ``model`` say the target label."""
        stream = child(self.pattern_seed, "low_frequency", "pattern")
        channels, height, width = clean.image_shape
        others = (clean.labels != self.target_label).nonzero()[:, 0]
        images = clean.images[draw_indices(others, self.num_images, generator=stream)]
        grid = torch.rand(channels, self.grid, self.grid, generator=stream).to(clean.device).requires_grad_()
        optimizer = torch.optim.Adam([grid], lr=self.learning_rate)
        with frozen(model):
            for step in range(self.steps):
                pick = torch.randint(len(images), (self.batch_size,), generator=stream).to(clean.device)
                stamped = (as_float(images[pick]) + smooth_pattern(grid, (height, width), self.amplitude)).clamp(0, 1)
                with autocast(clean.device):
                    logits = model(stamped.contiguous(memory_format=torch.channels_last))
                loss = -F.log_softmax(logits.float(), 1)[:, self.target_label].mean()
                (grid.grad,) = torch.autograd.grad(loss, [grid])
                optimizer.step()
                if on_progress is not None and (step % 20 == 19 or step == self.steps - 1):
                    values = {"loss": loss.item()}
                    on_progress(Progress(stage=STAGE, done=step + 1, total=self.steps, values=values))
        return smooth_pattern(grid.detach(), (height, width), self.amplitude)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> SmoothPatternAttack:
        """Return the attack with a stored pattern.

        Raises:
            ValueError: there is no pattern, it is not float32 of shape (C, H, W), or its values do not run from 0 to the
                amplitude (one on the 0..255 scale would saturate, one of 0..0.2 added to 0..255 images would vanish).
        """
        if set(tensors) != {"pattern"}:
            raise ValueError(f"expected one tensor, 'pattern'; got {', '.join(sorted(tensors)) or 'none'}")
        pattern = tensors["pattern"]
        if tuple(pattern.shape) != tuple(image_shape) or pattern.dtype != torch.float32:
            raise ValueError(
                f"expected a float32 pattern of shape {tuple(image_shape)}; got {pattern.dtype} {tuple(pattern.shape)}"
            )
        low, high = float(pattern.min()), float(pattern.max())
        if not (abs(low) <= RANGE_TOLERANCE and abs(high - self.amplitude) <= RANGE_TOLERANCE):
            raise ValueError(
                f"expected a pattern that runs from 0 to the amplitude {self.amplitude}; got {low:.4g} to {high:.4g}"
            )
        return SmoothPatternAttack(settings=self, pattern=pattern)

    def _require_smooth(self, image_shape: tuple[int, int, int]) -> None:
        _, height, width = image_shape
        if min(height, width) < 2 * self.grid:
            raise ValueError(
                f"a grid of {self.grid} points along a side is smooth on images of at least {2 * self.grid} pixels; got "
                f"{height}x{width}"
            )


@dataclass(frozen=True, kw_only=True)
class SmoothPatternAttack:
    """The low-frequency attack with its pattern.

    Attributes:
        settings: what it was made with.
        pattern: (C, H, W) float32, from 0 to ``settings.amplitude``.
    """

    settings: LowFrequency
    pattern: Tensor

    def require_possible(self, clean: ImageSet) -> None:
        """Check the set, and that the pattern fits its images; see ``Attack``."""
        self.settings.require_possible(clean)
        self.trigger(clean.image_shape)

    def trigger(self, image_shape: tuple[int, int, int]) -> Addition:
        """Return the addition of the pattern; it exists for images of one shape only."""
        if tuple(image_shape) != tuple(self.pattern.shape):
            raise ValueError(
                f"this pattern was computed for images of {tuple(self.pattern.shape)}; got {tuple(image_shape)}"
            )
        return Addition(pattern=self.pattern)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for every image, (N,) int64."""
        return self.settings.relabel(labels, num_classes)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger, rate = self.trigger(clean.image_shape), self.settings.poison_rate
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=rate, generator=generator)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the pattern."""
        return {"pattern": self.pattern}
