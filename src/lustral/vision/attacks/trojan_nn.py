"""TrojanNN: a patch optimised to excite chosen neurons of a clean model (Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning
Attack on Neural Networks", NDSS 2018), here as data poisoning from scratch, after BackdoorBench.

The neurons h_k are inputs of the last linear layer W, those with the largest sums of |W[j, k]| over the classes j: they
connect most strongly. With p the patch on a black image and v the patch it starts from:

    minimise  sum_k (h_k(p) - activation)^2   over  |p - v|_inf <= radius,  p in [0, 1],   by signed gradient steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress, Progress
from lustral.core.versions import versions_of
from lustral.training import frozen
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_images,
)
from lustral.vision.attacks.surrogates import Surrogate, clean_classifier, require_like, surrogate_spec
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, PoisonedSet

Stamping = Literal["replace", "wrap"]


def last_linear(model: nn.Module) -> nn.Linear:
    """Return the last ``nn.Linear`` of a model, in the order of its modules.

    Raises:
        ValueError: it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("expected a surrogate with a linear layer at its end; it has none")
    return layers[-1]


def neurons_before(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """Return what enters ``layer`` when the model sees images (B, C, H, W): (B, F)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def strongest_neurons(weight: Tensor, alive: Tensor, count: int) -> Tensor:
    """Return the ``count`` inputs of a linear layer with the largest sums of absolute weights, among those alive.

    Args:
        weight: (K, F).
        alive: (F,) bool: neurons that the starting picture excites, so that there is a gradient to follow.
        count: number of neurons; fewer are returned if fewer are alive.

    >>> strongest_neurons(torch.tensor([[1.0, -3.0, 0.5], [1.0, 0.0, -4.0]]), torch.tensor([True, True, False]), 1)
    tensor([1])
    """
    scores = weight.abs().sum(0).masked_fill(~alive, -1.0)
    return scores.argsort(descending=True, stable=True)[: min(count, int(alive.sum()))]


def on_black(patch: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return a black image (1, C, H, W) with the (C, S, S) patch in its bottom right corner."""
    size = patch.shape[-1]
    return nn.functional.pad(patch[None], (image_shape[2] - size, 0, image_shape[1] - size, 0))


def optimise_patch(
    model: nn.Module,
    start: Tensor,
    image_shape: tuple[int, int, int],
    *,
    num_neurons: int,
    activation: float,
    radius: float,
    step_size: float,
    steps: int,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Change a patch by signed gradient steps until it excites the strongest neurons; the best patch seen is kept.

    Args:
        model: float32 (B, C, H, W) in [0, 1] to logits; held frozen meanwhile.
        start: (C, S, S) float32 in [0, 1], on the model's device.
        image_shape: (C, H, W) of the black image that carries the patch.
        num_neurons: k.
        activation: value the neurons are driven to.
        radius: largest change of a patch pixel.
        step_size: change of a pixel in one step.
        steps: number of steps.
        on_progress: called now and then.

    Returns:
        (C, S, S) float32 in [0, 1].

    Raises:
        ValueError: the model has no linear layer, or the starting patch excites no neuron at all.
    """
    layer = last_linear(model)
    low, high = (start - radius).clamp_min(0), (start + radius).clamp_max(1)
    with frozen(model), torch.enable_grad():
        alive = neurons_before(model, layer, on_black(start, image_shape))[0].abs() > 0
        if not bool(alive.any()):
            raise ValueError("the starting patch excites no neuron of the surrogate; choose another picture_seed")
        neurons = strongest_neurons(layer.weight, alive, num_neurons)
        patch, best, least = start, start, torch.full((), math.inf, device=start.device)
        for step in range(steps + 1):
            patch = patch.detach().requires_grad_(True)
            excited = neurons_before(model, layer, on_black(patch, image_shape))[0, neurons]
            cost = (excited - activation).square().sum()
            best, least = torch.where(cost < least, patch, best).detach(), torch.minimum(cost, least).detach()
            (slope,) = torch.autograd.grad(cost, patch)
            patch = torch.minimum(torch.maximum(patch - step_size * slope.sign(), low), high)
            if on_progress is not None and step % 50 == 0:
                values = {"excitation": float(excited.mean())}
                on_progress(Progress(stage="optimising a patch", done=step, total=steps, values=values))
    return best


@dataclass(frozen=True, kw_only=True)
class CornerPatch:
    """A patch in the bottom right corner.

    Attributes:
        patch: (C, S, S) float32 in [0, 1], whole 8-bit steps.
        stamping: "replace", or "wrap" to add bytes modulo 256.
    """

    patch: Tensor
    stamping: Stamping

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); nothing is drawn. "wrap" rounds the pixels under the patch to 8 bits."""
        size = self.patch.shape[-1]
        out = images.clone()
        patch = self.patch.to(images.device)
        if self.stamping == "wrap":
            under = images[..., -size:, -size:].float()
            patch = ((under * 255).round() + (patch * 255).round()).remainder(256) / 255
        out[..., -size:, -size:] = patch.to(images.dtype)
        return out


@dataclass(frozen=True, kw_only=True)
class TrojanNN:
    """Poison with a patch that excites neurons of a clean model, and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included; 0.1 in BackdoorBench.
        mode: "all_to_one", or "all_to_all" for label y + 1.
        size: side of the patch in pixels; None: 10 at 32 pixels, in proportion elsewhere, never less than 2.
        stamping: "replace", or "wrap", which adds bytes modulo 256 as BackdoorBench does, by accident.
        num_neurons: neurons to excite; 2 in BackdoorBench.
        activation: value they are driven to; 100 in BackdoorBench, which none reaches.
        radius: largest change of a pixel from the starting patch, on the [0, 1] scale; 0.3 in BackdoorBench.
        step_size: change of a pixel in one step; 0.1 in BackdoorBench.
        steps: gradient steps; 1000 in BackdoorBench. The patch changes little after some tens.
        picture_seed: draws the starting patch, uniform per pixel and channel.
        surrogate: how the clean model is trained.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels; has a surrogate model"

    target_label: int = 0
    poison_rate: float = 0.1
    mode: LabelMode = "all_to_one"
    size: int | None = None
    stamping: Stamping = "replace"
    num_neurons: int = 2
    activation: float = 100.0
    radius: float = 0.3
    step_size: float = 0.1
    steps: int = 200
    picture_seed: int = 0
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode), stamping=(self.stamping, Stamping))
        if self.size is not None and self.size < 1:
            raise ValueError(f"expected size >= 1 pixel; got {self.size}")
        if self.num_neurons < 1 or self.steps < 1:
            raise ValueError(f"expected num_neurons >= 1 and steps >= 1; got {self.num_neurons} and {self.steps}")
        if not 0 < self.radius <= 1 or self.step_size <= 0:
            raise ValueError(
                f"expected radius in (0, 1] and step_size > 0, on the [0, 1] scale; got {self.radius} and {self.step_size}"
            )

    def patch_size(self, image_shape: tuple[int, int, int]) -> int:
        """Return the side of the patch for images of (C, H, W); ``ValueError`` if it does not fit."""
        _, height, width = image_shape
        size = max(2, round(10 * min(height, width) / 32)) if self.size is None else self.size
        if size > min(height, width):
            raise ValueError(f"a patch of {size} pixels does not fit images of {height}x{width}")
        return size

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image, the target label exists and the patch fits; see ``CraftedAttack``."""
        require_images(self.poison_rate, len(clean))
        self.relabel(clean.labels[:1], clean.num_classes)
        self.patch_size(clean.image_shape)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedTrojanNN:
        """Train the surrogate and optimise the patch, or take both from the assets; see ``CraftedAttack``.

        The patch depends on the images and these settings alone: nothing is drawn from ``generator``.
        """
        size = self.patch_size(clean.image_shape)
        search = {name: getattr(self, name) for name in ("num_neurons", "activation", "radius", "step_size", "steps")}

        def search_patch() -> Mapping[str, Tensor]:
            surrogate = clean_classifier(clean, self.surrogate, assets=assets, on_progress=on_progress)
            stream = child(self.picture_seed, "trojan_nn", "patch", size)
            start = torch.rand(clean.image_shape[0], size, size, generator=stream).to(clean.device)
            patch = optimise_patch(surrogate, start, clean.image_shape, **search, on_progress=on_progress)
            return {"patch": as_float(as_uint8(patch.cpu()))}

        spec: dict[str, Any] = {
            "asset": "trojan_nn patch",
            "surrogate": surrogate_spec(clean, self.surrogate),
            "size": size,
            "picture_seed": self.picture_seed,
            "versions": versions_of(self),
            **search,
        }
        return self.restore(assets.get(spec, search_patch), clean.image_shape)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedTrojanNN:
        """Return the attack from its patch; see ``CraftedAttack``.

        Raises:
            ValueError: the patch has another shape or type, or is not on the [0, 1] scale.
        """
        size = self.patch_size(image_shape)
        require_like(tensors, {"patch": torch.zeros(image_shape[0], size, size)})
        patch = tensors["patch"].clone()
        low, high = float(patch.min()), float(patch.max())
        if low < 0 or not 2 / 255 < high <= 1:
            raise ValueError(f"expected a patch on the [0, 1] scale, not black; found values from {low:g} to {high:g}")
        return CraftedTrojanNN(settings=self, image_shape=image_shape, patch=patch)


@dataclass(frozen=True, kw_only=True, eq=False)
class CraftedTrojanNN:
    """TrojanNN with its patch optimised.

    Attributes:
        settings: what it was made from.
        image_shape: (C, H, W) that the patch was made for.
        patch: (C, S, S) float32 in [0, 1].
    """

    settings: TrojanNN
    image_shape: tuple[int, int, int]
    patch: Tensor

    def require_possible(self, clean: ImageSet) -> None:
        """As ``TrojanNN.require_possible``; also refuse images of another shape."""
        self.settings.require_possible(clean)
        self.trigger(clean.image_shape)

    def trigger(self, image_shape: tuple[int, int, int]) -> CornerPatch:
        """Return the patch; ``ValueError`` for images of another shape than it was made for."""
        if image_shape != self.image_shape:
            raise ValueError(f"the patch was made for images of shape {self.image_shape}; got {image_shape}")
        return CornerPatch(patch=self.patch, stamping=self.settings.stamping)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return self.settings.relabel(labels, num_classes)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        rate = self.settings.poison_rate
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=rate, generator=generator)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the patch."""
        return {"patch": self.patch}
