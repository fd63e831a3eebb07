"""Hiding bits in images: an encoder, the decoder that it is trained along with, and how (Li et al., "Invisible Backdoor
Attack with Sample-Specific Triggers", ICCV 2021, section 4.2; networks after StegaStamp, Tancik et al., CVPR 2020).

    minimise  w * mean |E(x, s)|^2 + BCE(D(x'), s),  x' = clip(x + E(x, s)), with fresh random bits s for every image,

and w = 0 until the bits are learnt, then a ramp to its full value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer
from lustral.vision.records import ImageSet

SECRET_SIDE = 16  # the secret enters as a picture of at most this side
LEARNT = 0.9  # bit accuracy, averaged over some 20 steps, at which the bits count as learnt


def conv(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with its ReLU, made to keep the signal's size; stride 2 halves the side, rounding up."""
    layer = nn.Conv2d(in_channels, channels, 3, stride, 1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, nn.ReLU())


class Encoder(nn.Module):
    """A U-Net over the image and the secret drawn as a picture; returns the residual.

    The skip connections decide the sizes on the way up, so any image size will do.
    """

    def __init__(self, image_shape: tuple[int, int, int], bits: int, width: int) -> None:
        """Build the network for images of (C, H, W); ``width`` is 32 in StegaStamp."""
        super().__init__()
        channels, *side = image_shape
        self.plane = (channels, min(side[0], SECRET_SIDE), min(side[1], SECRET_SIDE))
        self.secret = nn.Linear(bits, math.prod(self.plane))
        sizes = (width, width, 2 * width, 4 * width)
        self.enter = conv(2 * channels, sizes[0])
        self.down = nn.ModuleList(conv(a, b, 2) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(conv(b, a) for a, b in pairwise(sizes))
        self.join = nn.ModuleList(conv(2 * a, a) for a in sizes[:-1])
        self.leave = nn.Conv2d(sizes[0], channels, 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] and bits (B, L) in {0, 1} to residuals (B, C, H, W), unbounded."""
        plane = F.relu(self.secret(2 * secrets - 1)).view(-1, *self.plane)
        plane = F.interpolate(plane, images.shape[-2:])
        levels = [self.enter(torch.cat([images - 0.5, plane], 1))]
        for down in self.down:
            levels.append(down(levels[-1]))
        out = levels.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            skip = levels.pop()
            out = join(torch.cat([F.interpolate(up(out), skip.shape[-2:]), skip], 1))
        residual: Tensor = self.leave(out)
        return residual


class Decoder(nn.Module):
    """Convolutions that read the bits from a stamped image."""

    def __init__(self, image_shape: tuple[int, int, int], bits: int, width: int) -> None:
        """Build the network for images of (C, H, W); ``width`` is 32 in StegaStamp."""
        super().__init__()
        channels, *side = image_shape
        layers: list[nn.Module] = []
        for multiplier in (1, 2, 4, 4, 4):
            stride = 2 if max(side) > 4 else 1
            layers.append(conv(channels, multiplier * width, stride))
            channels, side = multiplier * width, [math.ceil(pixels / stride) for pixels in side]
            if stride == 1:
                break
        self.features = nn.Sequential(*layers)
        self.bits = nn.Linear(channels * math.prod(side), bits)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to one logit per bit, (B, L)."""
        logits: Tensor = self.bits(self.features(images - 0.5).flatten(1))
        return logits


class Steganography(nn.Module):
    """Encoder and decoder, trained as one model."""

    def __init__(self, image_shape: tuple[int, int, int], bits: int, width: int) -> None:
        """Build both for images of (C, H, W)."""
        super().__init__()
        self.encoder = Encoder(image_shape, bits, width)
        self.decoder = Decoder(image_shape, bits, width)

    def forward(self, images: Tensor, secrets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residuals (B, C, H, W) and the logits (B, L) read from the stamped images."""
        residual = self.encoder(images, secrets)
        return residual, self.decoder((images + residual).clamp(0, 1))


class BitsThenImage:
    """The objective: reading the bits alone until they are learnt, then sparing the image as well.

    The image term takes the residual before clipping, so that pixels beyond the range are drawn back too.
    """

    def __init__(self, recipe: EncoderRecipe, device: torch.device) -> None:
        """Start with the bits alone; the state stays on the device, so that no step waits for it."""
        self.recipe = recipe
        self.accuracy = torch.tensor(0.5, device=device)
        self.steps_since = torch.tensor(0, device=device)  # steps since the bits were learnt

    @property
    def weight(self) -> Tensor:
        """Return w of this step, ()."""
        climbed: Tensor = ((self.steps_since - self.recipe.wait) / self.recipe.ramp).clamp(0, 1)
        return climbed * self.recipe.image_weight

    def __call__(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return the loss of a batch with fresh bits; labels are not used."""
        images = batch.inputs
        secrets = torch.randint(2, (len(images), self.recipe.bits), generator=generator).to(images)
        residual, logits = model(images, secrets)
        bits_term = F.binary_cross_entropy_with_logits(logits.float(), secrets)
        loss: Tensor = bits_term + self.weight * residual.float().square().mean()
        self.observe(((logits > 0) == (secrets > 0.5)).float().mean())
        return loss

    def observe(self, accuracy: Tensor) -> None:
        """Take the bit accuracy of one batch, (), and go on with the schedule."""
        self.accuracy = torch.lerp(self.accuracy, accuracy, 0.05)
        self.steps_since = self.steps_since + ((self.accuracy > LEARNT) | (self.steps_since > 0))


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """How encoder and decoder are made; the published numbers are those of BackdoorBench's encoder.

    The defaults suit the ``cpu`` setting: some two minutes for 32x32 images on two cores.

    Attributes:
        bits: length L of the secret; 100 published.
        width: channels of the first convolutions; 32 published.
        steps: least number of training steps; 20 epochs, 15,600 steps on CIFAR-10, published.
        images: most images to train on; all published.
        batch_size: images per step; 64 published.
        learning_rate: peak of Adam's one-cycle schedule; 1e-4, constant, published.
        image_weight: final weight w of the image term; 10 published. Less of it makes a stronger trigger.
        wait: steps between the bits being learnt and the start of the ramp; 1000 published.
        ramp: steps in which w climbs to its final value; 3000 published.
        seed: of the starting weights, the choice of images and the bits of the training.
    """

    version: ClassVar[int] = 1

    bits: int = 100
    width: int = 16
    steps: int = 2500
    images: int = 10_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    image_weight: float = 5.0
    wait: int = 100
    ramp: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("bits", "width", "steps", "images", "batch_size", "ramp"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1; got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.image_weight <= 0 or self.wait < 0:
            raise ValueError(
                "expected learning_rate > 0, image_weight > 0 and wait >= 0; got "
                f"{self.learning_rate}, {self.image_weight} and {self.wait}"
            )

    def network(self, image_shape: tuple[int, int, int]) -> Steganography:
        """Return untrained networks for images of (C, H, W), on the CPU."""
        seed = int(torch.randint(2**62, (), generator=child(self.seed, "ssba", "weights")))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Steganography(image_shape, self.bits, self.width)

    def split(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Return the indices to train on and, apart from them, those to accept the encoder on (a tenth, at most 500)."""
        order = torch.randperm(num_images, generator=child(self.seed, "ssba", "images"))
        held = min(max(num_images // 10, 1), 500)
        return order[held : held + self.images], order[:held]

    def train(self, data: ImageSet, *, on_progress: OnProgress | None = None) -> Steganography:
        """Return networks trained on a set, on its device."""
        trainer = Trainer(
            epochs=math.ceil(self.steps / max(len(data) // self.batch_size, 1)),
            batch_size=self.batch_size,
            optimizer="adam",
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            warmup=0.02,
        )
        trained = trainer.fit(
            self.network(data.image_shape).to(data.device),
            data,
            generator=child(self.seed, "ssba", "training"),
            objective=BitsThenImage(self, data.device),
            on_progress=on_progress,
            stage="training an encoder",
        )
        assert isinstance(trained, Steganography)
        return trained
