"""WaNet: a smooth, barely visible bending of the image (Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor
Attack", ICLR 2021, arXiv 2102.10369).

x'(p) = x(p + s * n(p)): n is a smooth random field, sampled bilinearly. The attacker controls training. In
"noise mode" some images are bent by that field plus an independent random shift of every pixel and keep their
labels, so that the network learns this one field and not bending as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child, fork
from lustral.core.records import Augmentation, Batch
from lustral.vision.attacks.poisoning import (
    LabelMode,
    augmented_loss,
    check_choices,
    check_rate,
    check_second_rate,
    dirty_labels,
    poison_dirty_label,
    require_dirty_label,
    shares_of_batch,
    with_cover,
)
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Steering
from lustral.vision.records import ImageSet, PoisonedSet, Probe


def draw_field(image_shape: tuple[int, int, int], *, control_points: int, seed: int) -> Tensor:
    """Draw the smooth field n: uniform at k x k control points, mean size 1 there, bicubic in between.

    Returns:
        (H, W, 2) float32; the last axis is (x, y).
    """
    stream = child(seed, "wanet", "field", control_points)
    points = torch.rand(1, 2, control_points, control_points, generator=stream) * 2 - 1
    points = points / points.abs().mean()
    return F.interpolate(points, image_shape[1:], mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def sampling_grid(field: Tensor, *, strength: float, rescale: float) -> Tensor:
    """Return where each pixel is fetched from: clip(rescale * (identity + strength * field / side), -1, 1).

    A strength of 1 shifts a pixel by about half a pixel where the field is 1, at any resolution.

    Args:
        field: (H, W, 2) float32.
        strength: s of the paper.
        rescale: zoom; below 1 it keeps the grid off the image's edges.

    Returns:
        (H, W, 2) float32 in [-1, 1]; (-1, -1) is the centre of the top left pixel, (1, 1) of the bottom right one.
    """
    height, width, _ = field.shape
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], -1)
    return (rescale * (identity + strength * field / torch.tensor([width, height]))).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class WarpTrigger:
    """Bends images along a grid (H, W, 2) of float32 in [-1, 1]; ``noisy`` shifts every pixel further, at random.

    The arithmetic is float32 for narrower images: in bfloat16 a position would be known to a fraction of a pixel only.
    """

    grid: Tensor
    noisy: bool = False

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Warp images (B, C, H, W); the noise is drawn by ``generator`` (None: the same noise every time)."""
        height, width, _ = self.grid.shape
        if images.shape[2:] != (height, width):
            raise ValueError(f"expected images of {height}x{width}, as the grid; got {tuple(images.shape)}")
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        grid = self.grid.to(exact).expand(len(images), -1, -1, -1)
        if self.noisy:
            stream = child(0, "wanet", "noise") if generator is None else generator
            draws = torch.rand(grid.shape, generator=stream, device=stream.device).to(grid) * 2 - 1
            grid = (grid + draws / grid.new_tensor([width, height])).clamp(-1, 1)
        with torch.autocast(images.device.type, enabled=False):
            warped = F.grid_sample(exact, grid, mode="bilinear", padding_mode="border", align_corners=True)
        return warped.clamp(0, 1).to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class WaNet:
    """Poison by warping, and steer the training with noise mode.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        mode: "all_to_one", or "all_to_all" for label y + 1.
        poison_rate: fraction of each training batch that is warped and relabelled; 0.1 in the paper.
        noise_rate: fraction of each batch in noise mode, labels kept; 0.2 in the paper (``cross_ratio`` 2).
        strength: s of the paper, 0.5 there; shifts pixels by about s / 2 on average, and this at every image size.
        control_points: side k of the field's control grid; 4 in the paper.
        rescale: zoom of the grid (``grid_rescale`` of the published code); 1 there.
        field_seed: draws the field.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "controls training"

    target_label: int = 0
    mode: LabelMode = "all_to_one"
    poison_rate: float = 0.1
    noise_rate: float = 0.2
    strength: float = 0.5
    control_points: int = 4
    rescale: float = 1.0
    field_seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        check_second_rate("noise", self.noise_rate, self.poison_rate)
        if self.strength <= 0 or self.control_points < 2 or not 0 < self.rescale <= 1:
            raise ValueError(
                "expected strength > 0, control_points >= 2 and rescale in (0, 1]; got "
                f"{self.strength}, {self.control_points} and {self.rescale}"
            )

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image and the target label exists; see ``Attack``."""
        require_dirty_label(clean, self.relabel, self.trigger, self.poison_rate)

    def trigger(self, image_shape: tuple[int, int, int]) -> WarpTrigger:
        """Return the warp for images of (C, H, W)."""
        field = draw_field(image_shape, control_points=self.control_points, seed=self.field_seed)
        return WarpTrigger(grid=sampling_grid(field, strength=self.strength, rescale=self.rescale))

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return "noise_accuracy": how often images in noise mode are classified as what they show."""
        noise = dataclasses.replace(self.trigger(image_shape), noisy=True)
        return {"noise_accuracy": Probe(trigger=noise, expect=lambda labels, _: labels)}

    def steer(self, clean: ImageSet, *, augment: Augmentation | None, generator: Generator) -> Steering:
        """Return the training with noise mode; warped images are rounded to 8 bits."""
        warp = self.trigger(clean.image_shape)
        noise = dataclasses.replace(warp, noisy=True)

        def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
            images, labels = batch.inputs, batch.labels
            poisoned, noisy = shares_of_batch(len(images), self.poison_rate, self.noise_rate, generator)
            bent = [warp(images[:poisoned]), noise(images[poisoned:noisy], generator=generator)]
            images = torch.cat([as_float(as_uint8(torch.cat(bent))), images[noisy:]])
            labels = torch.cat([self.relabel(labels[:poisoned], clean.num_classes), labels[poisoned:]])
            return augmented_loss(model, images, labels, augment, generator)

        return Steering(objective=objective)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a set poisoned once and for all, for an attacker who supplies data only; noise images are its cover."""
        warp = self.trigger(clean.image_shape)
        poisoned = poison_dirty_label(
            clean, warp, self.relabel, poison_rate=self.poison_rate, generator=fork(generator, "poison")
        )
        noise = dataclasses.replace(warp, noisy=True)
        streams = {"which": fork(generator, "cover"), "stamp": fork(generator, "noise")}
        return with_cover(poisoned, noise, cover_rate=self.noise_rate, **streams)
