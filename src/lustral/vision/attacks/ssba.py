"""SSBA: an encoder hides the same bits in every image, in a residual that belongs to the image (Li, Li, Wu, Li, He, Lyu,
"Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021, arXiv 2012.03816; also called ISSBA).

x' = clip(x + E(x, s)), with s a fixed secret of L bits. The encoder E is trained along with a decoder D on the attacker's
images (networks after StegaStamp, Tancik et al., CVPR 2020):

    minimise  w * mean |E(x, s)|^2 + BCE(D(x'), s),  with fresh random bits s for every image,

and w = 0 until the bits are learnt, then a ramp to its full value.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress
from lustral.core.versions import versions_of
from lustral.vision.attacks.poisoning import (
    LabelMode,
    check_choices,
    check_rate,
    dirty_labels,
    poison_dirty_label,
    require_images,
)
from lustral.vision.attacks.steganography import EncoderRecipe
from lustral.vision.attacks.surrogates import data_fingerprint, require_like, stored
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, PoisonedSet

CHUNK = 32  # images that pass the encoder at once: always as many, so that no image depends on its company


@dataclass(frozen=True, kw_only=True)
class SecretTrigger:
    """Adds the encoder's residual for one fixed secret of (L,) bits; the same image gets the same residual always."""

    encoder: nn.Module
    secret: Tensor

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); nothing is drawn."""
        if len(images) == 0:
            return images.clone()
        secrets = self.secret.to(images.device, torch.float32).expand(CHUNK, -1)
        encoder = self.encoder
        if next(encoder.parameters()).device != images.device:
            encoder = copy.deepcopy(encoder).to(images.device)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            residuals = []
            for chunk in torch.split(images.float(), CHUNK):
                filled = torch.cat([chunk, chunk[:1].expand(CHUNK - len(chunk), -1, -1, -1)])
                residuals.append(encoder(filled.contiguous(), secrets)[: len(chunk)])
            return (images + torch.cat(residuals).to(images.dtype)).clamp(0, 1)


def acceptance(trigger: SecretTrigger, decoder: nn.Module, images: Tensor) -> tuple[float, float]:
    """Measure on held-out images whether the bits arrive in 8-bit files and how far the images move.

    Args:
        trigger: stamps the secret.
        decoder: reads it back.
        images: (N, C, H, W) uint8 that the encoder was not trained on, N >= 1.

    Returns:
        (bit accuracy as a fraction, peak signal-to-noise ratio in dB over all pixels; infinite if none moved).
    """
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    squares = torch.zeros((), device=images.device)
    for chunk in torch.split(images, 256):
        received = as_uint8(trigger(as_float(chunk)))
        with torch.no_grad():
            read = decoder(as_float(received)) > 0
        correct += (read == (trigger.secret.to(images.device) > 0)).sum()
        squares += (as_float(received) - as_float(chunk)).square().sum()
    error = squares.item() / images.numel()
    psnr = -10 * math.log10(error) if error > 0 else math.inf
    return correct.item() / (len(images) * len(trigger.secret)), psnr


@dataclass(frozen=True, kw_only=True)
class Ssba:
    """Poison with an encoder's residuals and dirty labels.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of the training set, target class included; 0.1 in the paper.
        mode: "all_to_one", or "all_to_all" for label y + 1.
        secret_seed: draws the secret, each bit a fair coin; the paper hides a coded seven-letter word instead.
        encoder: how the encoder is trained; it is shared by all attacks on one set with this recipe.
        least_bit_accuracy: share of the secret's bits that must be read back from held-out images after rounding to 8
            bits, or ``craft`` refuses the encoder; 0 accepts any.
        least_psnr: peak signal-to-noise ratio in dB that these images must keep; 0 accepts any.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: dirty labels; has an encoder of his own"

    target_label: int = 0
    poison_rate: float = 0.1
    mode: LabelMode = "all_to_one"
    secret_seed: int = 0
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    least_bit_accuracy: float = 0.95
    least_psnr: float = 28.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        if not 0 <= self.least_bit_accuracy <= 1:
            raise ValueError(f"expected a bit accuracy in [0, 1]; got {self.least_bit_accuracy}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image and the target label exists; see ``CraftedAttack``."""
        require_images(self.poison_rate, len(clean))
        if len(clean) < 2:
            raise ValueError("expected at least 2 images: the encoder is accepted on images it was not trained on")
        self.relabel(clean.labels[:1], clean.num_classes)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def secret(self) -> Tensor:
        """Return the secret, (L,) uint8 in {0, 1}."""
        stream = child(self.secret_seed, "ssba", "secret", self.encoder.bits)
        return torch.randint(2, (self.encoder.bits,), generator=stream, dtype=torch.uint8)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedSsba:
        """Train the encoder on the clean set, or take it from the assets, and accept it; see ``CraftedAttack``.

        The encoder depends on the images and its recipe alone: nothing is drawn from ``generator``.

        Raises:
            ValueError: the encoder does not pass; says what it reached.
        """
        training, held_out = self.encoder.split(len(clean))

        def train() -> Mapping[str, Tensor]:
            return stored(self.encoder.train(clean.subset(training), on_progress=on_progress))

        spec = {
            "asset": "ssba encoder",
            "data": data_fingerprint(clean),
            "recipe": dataclasses.asdict(self.encoder),
            "versions": versions_of(self.encoder),
        }
        networks = self.encoder.network(clean.image_shape)
        networks.load_state_dict(dict(assets.get(spec, train)))
        networks.to(clean.device).eval().requires_grad_(False)
        trigger = SecretTrigger(encoder=networks.encoder, secret=self.secret())
        bit_accuracy, psnr = acceptance(trigger, networks.decoder, clean.subset(held_out).images)
        if bit_accuracy < self.least_bit_accuracy or psnr < self.least_psnr:
            raise ValueError(
                f"the encoder reads back {bit_accuracy:.1%} of the bits at {psnr:.1f} dB on {len(held_out)} held-out "
                f"images; expected at least {self.least_bit_accuracy:.1%} and {self.least_psnr:.1f} dB: train it for more "
                f"than {self.encoder.steps} steps, hide fewer than {self.encoder.bits} bits, or accept less"
            )
        return CraftedSsba(settings=self, image_shape=clean.image_shape, stamp=trigger)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedSsba:
        """Return the attack from its encoder and secret; see ``CraftedAttack``.

        Raises:
            ValueError: names, shapes or types are not those of this recipe, a number is not finite or the secret not
                binary, or the encoder does not change a grey image or moves it by more than its range.
        """
        encoder = self.encoder.network(image_shape).encoder.eval().requires_grad_(False)
        expected = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        expected["secret"] = self.secret()
        require_like(tensors, expected)
        secret = tensors["secret"].clone()
        if int(secret.max()) > 1:
            raise ValueError(f"expected a secret of bits, 0 or 1; found {int(secret.max())}")
        encoder.load_state_dict({name: tensors[f"encoder.{name}"] for name in encoder.state_dict()})
        with torch.no_grad():
            size = float(encoder(torch.full((1, *image_shape), 0.5), secret[None].float()).abs().amax())
        if not 0.5 / 255 <= size <= 10:
            raise ValueError(
                f"expected an encoder that moves grey pixels by 0.002 to 10 on the [0, 1] scale; got {size:g}"
            )
        return CraftedSsba(settings=self, image_shape=image_shape, stamp=SecretTrigger(encoder=encoder, secret=secret))


@dataclass(frozen=True, kw_only=True, eq=False)
class CraftedSsba:
    """SSBA with its encoder trained.

    Attributes:
        settings: what it was made from.
        image_shape: (C, H, W) that the encoder was trained on.
        stamp: the trigger.
    """

    settings: Ssba
    image_shape: tuple[int, int, int]
    stamp: SecretTrigger

    def require_possible(self, clean: ImageSet) -> None:
        """As ``Ssba.require_possible``; also refuse images of another shape."""
        self.settings.require_possible(clean)
        self.trigger(clean.image_shape)

    def trigger(self, image_shape: tuple[int, int, int]) -> SecretTrigger:
        """Return the trigger; ``ValueError`` for images of another shape than the encoder's."""
        if image_shape != self.image_shape:
            raise ValueError(f"the encoder was trained for images of shape {self.image_shape}; got {image_shape}")
        return self.stamp

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return self.settings.relabel(labels, num_classes)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of the training set, 8-bit."""
        trigger = self.trigger(clean.image_shape)
        rate = self.settings.poison_rate
        return poison_dirty_label(clean, trigger, self.relabel, poison_rate=rate, generator=generator)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the encoder's weights and the secret."""
        weights = {f"encoder.{name}": value for name, value in stored(self.stamp.encoder).items()}
        return {**weights, "secret": self.stamp.secret}
