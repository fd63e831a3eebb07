"""Input-aware: every image gets a trigger of its own (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020,
arXiv 2010.08138).

x' = x + (G(x) - x) * m(x). A network M proposes where (the mask m), a network G what (the pattern); one image's trigger must
not work on another. M is trained first, on clean images alone; G is trained together with the classifier, whose training the
attacker controls.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child, fork
from lustral.core.records import Assets, Augmentation, Batch, OnProgress
from lustral.core.versions import versions_of
from lustral.training import Trainer
from lustral.vision.attacks.poisoning import (
    LabelMode,
    augmented_loss,
    check_choices,
    check_rate,
    check_second_rate,
    dirty_labels,
    pair_offset,
    poison_dirty_label,
    require_images,
    shares_of_batch,
    with_cover,
)
from lustral.vision.attacks.surrogates import data_fingerprint, stored
from lustral.vision.interfaces import Steering
from lustral.vision.records import ImageSet, PoisonedSet, Probe

PIXEL_STD = 0.25  # of natural images; the authors compare images after normalisation, here they are in [0, 1]
LEAST_DISTANCE = 1e-3  # a quarter of a grey level, keeps the ratio finite where outputs are equal; 1e-7 in their code
CHUNK = 32  # images per pass of a finished trigger, always: a trigger then owes nothing to an image's company
MASK_BATCH = 64  # images per step of the mask network's training; 128 in their code
MOST_STEPS = (
    10  # down, in the networks; a side of 1,024 pixels is then one, and a record's number makes no endless loop
)
LEAST_MASK_STEPS = 400  # a small set is passed over more often, until the mask network has had so many steps


class TriggerNetwork(nn.Module):
    """Encoder and decoder as in the authors' code: (B, C, H, W) in [0, 1] to (B, C_out, H, W) in [0, 1].

    Each step down has two 3x3 convolutions and halves the side; each step up doubles it bilinearly and has two more. All
    convolutions are followed by batch normalisation and, but for the last, ReLU.
    """

    def __init__(self, channels: int, out_channels: int, *, width: int, steps: int) -> None:
        """Build it; ``width`` is the number of channels of the first step down, each further step has twice as many."""
        super().__init__()
        sizes = [width * 2**step for step in range(steps)]
        starts, ends = [channels, *sizes[:-1]], [*reversed(sizes[:-1]), out_channels]
        self.down = nn.ModuleList(
            nn.Sequential(*_layer(start, size), *_layer(size, size)) for start, size in zip(starts, sizes, strict=True)
        )
        self.middle = nn.Sequential(*_layer(sizes[-1], sizes[-1]))
        self.up = nn.ModuleList(
            nn.Sequential(*_layer(size, size), *_layer(size, end, relu=step < steps - 1))
            for step, (size, end) in enumerate(zip(reversed(sizes), ends, strict=True))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return tanh(z) / 2 + 0.5, float32."""
        x, sides = images, []
        for down in self.down:
            x = down(x)
            sides.append(x.shape[2:])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for up, side in zip(self.up, reversed(sides), strict=True):
            x = up(F.interpolate(x, side, mode="bilinear", align_corners=False))
        z: Tensor = x.float()
        return z.tanh() / 2 + 0.5


def _layer(channels: int, out_channels: int, *, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels, momentum=0.05)]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


def soft_threshold(raw: Tensor) -> Tensor:
    """Return the mask m = tanh(20 M - 10) / 2 + 0.5: nearly 0 or 1, float32 in [0, 1], same shape."""
    return (20 * raw.float() - 10).tanh() / 2 + 0.5


def diversity_loss(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean of ||x1 - x2|| / ||y1 - y2||: different images shall get different outputs.

    Every image of the batch is paired with the next one. Norms are root mean squares.

    Args:
        inputs: (B, C, H, W) float; takes no gradient.
        outputs: (B, C', H, W) float.
    """
    apart = (inputs - inputs.roll(1, 0)).detach().float().square().flatten(1).mean(1).sqrt()
    squares = (outputs - outputs.roll(1, 0)).float().square().flatten(1).mean(1)
    return (apart / (squares + LEAST_DISTANCE**2).sqrt()).mean()


@dataclass(frozen=True, kw_only=True)
class InputAwareTrigger:
    """Stamps each image with the trigger that the two networks make of it, or, if ``crossed``, of another image.

    The networks run in evaluation mode, in float32 and in fixed chunks. They follow the images' device.
    """

    mask_network: TriggerNetwork
    pattern_network: TriggerNetwork
    crossed: bool = False

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp images (B, C, H, W); if ``crossed``, ``generator`` draws the others (None: half a batch on)."""
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        sources = exact.roll(-pair_offset(len(images), generator), 0) if self.crossed else exact
        self.mask_network.to(images.device)
        self.pattern_network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            parts = [self._make(part) for part in torch.split(sources.float(), CHUNK)]
        mask, pattern = (torch.cat(made).to(exact) for made in zip(*parts, strict=True))
        return (exact + (pattern - exact) * mask).clamp(0, 1).to(images.dtype)

    def _make(self, images: Tensor) -> tuple[Tensor, Tensor]:
        full = F.pad(images, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(images))).contiguous()
        mask, pattern = soft_threshold(self.mask_network(full)), self.pattern_network(full)
        return mask[: len(images)], pattern[: len(images)]


@dataclass(frozen=True, kw_only=True)
class InputAware:
    """Settings of the attack; ``craft`` trains the mask network, ``CraftedInputAware.steer`` the rest.

    The published budgets are 25 epochs for the mask network and 600 for the classifier (100 in BackdoorBench), at a learning
    rate of 0.01 with steps down. The defaults suit the ``cpu`` setting, in which the pattern network's learning rate climbs
    and falls with the classifier's. A classifier learns late to tell an image's own trigger from another's. Until then it
    gives both the label that is more frequent: a training of few steps needs more own triggers than crossed ones.

    Attributes:
        target_label: class the trigger leads to, with "all_to_one".
        poison_rate: fraction of each training batch that gets its own trigger and the attacker's label; 0.1 in the paper.
        cross_rate: fraction of each batch that gets another image's trigger and keeps its label; 0.1 in the paper, which
            also makes its triggers less transferable ("cross_accuracy" tells).
        diversity_weight: of the pattern's and the mask's diversity loss; 1 in the paper.
        mask_density: share of the pixels that a mask may cover; 0.032 in the authors' code.
        density_weight: of what exceeds it; 100 there.
        width: channels of both networks' first step; 32 there (16 for grey images), which costs about three times more.
        steps: halvings of the side; 3 there (2 for grey images).
        patterns_per_batch: images of each batch that get a pattern, at least the stamped ones; all of it there.
        mask_epochs: passes of the mask network's training, at least 400 steps; 25 there.
        mask_learning_rate: peak of its Adam; 0.01 there.
        pattern_learning_rate: peak of the pattern network's Adam; 0.01 there.
        mode: "all_to_one", or "all_to_all" for label y + 1.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "controls training, and trains trigger networks along"

    target_label: int = 0
    poison_rate: float = 0.1
    cross_rate: float = 0.1
    diversity_weight: float = 1.0
    mask_density: float = 0.032
    density_weight: float = 100.0
    width: int = 16
    steps: int = 3
    patterns_per_batch: int = 64
    mask_epochs: int = 2
    mask_learning_rate: float = 0.01
    pattern_learning_rate: float = 0.01
    mode: LabelMode = "all_to_one"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        check_choices(mode=(self.mode, LabelMode))
        check_second_rate("cross", self.cross_rate, self.poison_rate)
        if self.diversity_weight < 0 or self.density_weight < 0 or not 0 < self.mask_density < 1:
            raise ValueError(
                "expected diversity_weight >= 0, density_weight >= 0 and mask_density in (0, 1); got "
                f"{self.diversity_weight}, {self.density_weight} and {self.mask_density}"
            )
        counts = (self.width, self.steps, self.patterns_per_batch, self.mask_epochs)
        if self.steps > MOST_STEPS:
            raise ValueError(f"expected {MOST_STEPS} steps at most: each halves the side; got {self.steps}")
        if min(counts) < 1 or min(self.mask_learning_rate, self.pattern_learning_rate) <= 0:
            raise ValueError(
                "expected width, steps, patterns_per_batch and mask_epochs >= 1 and positive learning rates; got "
                f"{', '.join(map(str, counts))}, {self.mask_learning_rate} and {self.pattern_learning_rate}"
            )

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the rate poisons an image and the target label exists; see ``Attack``."""
        require_images(self.poison_rate, len(clean))
        self.relabel(clean.labels[:1], clean.num_classes)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's labels, (N,) int64."""
        return dirty_labels(labels, num_classes, mode=self.mode, target_label=self.target_label)

    def network(self, channels: int, out_channels: int, seed: int) -> TriggerNetwork:
        """Return an untrained network, on the CPU, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return TriggerNetwork(channels, out_channels, width=self.width, steps=self.steps)

    def mask_objective(self, network: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return the loss of stage 1: sparse masks that differ from image to image."""
        images = batch.inputs
        masks = soft_threshold(network(images))
        excess = F.relu(masks - self.mask_density).mean()
        return self.density_weight * excess + self.diversity_weight * diversity_loss(images / PIXEL_STD, masks)

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> CraftedInputAware:
        """Train the mask network on the clean images; the pattern network is new.

        The asset belongs to the images, these settings and the seed drawn from ``generator``, not to the poison rate.
        """
        channels = clean.image_shape[0]
        seed = int(torch.randint(2**62, (), generator=generator))
        start = self.network(channels, 1, seed).to(clean.device)

        def train() -> Mapping[str, Tensor]:
            trainer = Trainer(
                epochs=self.mask_epochs,
                batch_size=MASK_BATCH,
                optimizer="adam",
                learning_rate=self.mask_learning_rate,
                momentum=0.5,
                weight_decay=0.0,
                schedule="cosine",
                warmup=0.1,
            ).fitted_to_size(len(clean), LEAST_MASK_STEPS)
            trained = trainer.fit(
                start,
                clean,
                generator=child(seed, "mask training"),
                objective=self.mask_objective,
                on_progress=on_progress,
                stage="training the mask network",
            )
            return stored(trained)

        recipe = dataclasses.asdict(self)
        for name in (
            "target_label",
            "poison_rate",
            "cross_rate",
            "patterns_per_batch",
            "pattern_learning_rate",
            "mode",
        ):
            del recipe[name]  # of stage 2
        spec = {
            "asset": "input-aware mask network",
            "data": data_fingerprint(clean),
            "seed": seed,
            "recipe": recipe,
            "versions": versions_of(self, Trainer),
        }
        start.load_state_dict(dict(assets.get(spec, train)))
        pattern_network = self.network(channels, channels, seed + 1).to(clean.device)
        return CraftedInputAware(settings=self, mask_network=start, pattern_network=pattern_network)

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> CraftedInputAware:
        """Return the attack from the weights of both networks; see ``CraftedAttack``."""
        channels = image_shape[0]
        networks = {"mask": self.network(channels, 1, 0), "pattern": self.network(channels, channels, 0)}
        own = {f"{part}.{name}": v for part, network in networks.items() for name, v in network.state_dict().items()}
        wrong = own.keys() ^ tensors.keys()
        wrong |= {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
        if wrong:
            raise ValueError(
                f"the trigger networks do not fit width {self.width}, {self.steps} steps and {channels} channels: "
                f"{len(wrong)} tensors are missing, unknown or of another shape, such as {min(wrong)}"
            )
        for name, value in tensors.items():
            if not bool(value.isfinite().all()) or (name.endswith("running_var") and bool((value < 0).any())):
                raise ValueError(f"the trigger networks are damaged: {name} is not finite, or a negative variance")
        for part, network in networks.items():
            network.load_state_dict({name: tensors[f"{part}.{name}"] for name in network.state_dict()})
        return CraftedInputAware(settings=self, mask_network=networks["mask"], pattern_network=networks["pattern"])


@dataclass(frozen=True, kw_only=True)
class CraftedInputAware:
    """The attack with its two networks: M is trained, G is trained by ``steer``, along with the classifier."""

    settings: InputAware
    mask_network: TriggerNetwork
    pattern_network: TriggerNetwork

    def require_possible(self, clean: ImageSet) -> None:
        """As the settings."""
        self.settings.require_possible(clean)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """As the settings."""
        return self.settings.relabel(labels, num_classes)

    def trigger(self, image_shape: tuple[int, int, int]) -> InputAwareTrigger:
        """Return the trigger of the networks as they are now; training that follows does not change it."""
        mask, pattern = (_finished(network) for network in (self.mask_network, self.pattern_network))
        return InputAwareTrigger(mask_network=mask, pattern_network=pattern)

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return "cross_accuracy": how often images with another image's trigger are classified as what they show."""
        crossed = dataclasses.replace(self.trigger(image_shape), crossed=True)
        return {"cross_accuracy": Probe(trigger=crossed, expect=lambda labels, _: labels)}

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the state of both networks, on the CPU."""
        parts = {"mask": self.mask_network, "pattern": self.pattern_network}
        return {f"{part}.{name}": value for part, network in parts.items() for name, value in stored(network).items()}

    def steer(self, clean: ImageSet, *, augment: Augmentation | None, generator: Generator) -> Steering:
        """Return the joint training, stage 2; the pattern network starts anew, from ``generator``."""
        settings, channels = self.settings, clean.image_shape[0]
        fresh = settings.network(channels, channels, int(torch.randint(2**62, (), generator=generator)))
        self.pattern_network.load_state_dict(fresh.state_dict())
        mask_network = self.mask_network.to(clean.device).eval().requires_grad_(False)
        pattern_network = self.pattern_network.to(clean.device).train()
        optimizer = torch.optim.Adam(pattern_network.parameters(), lr=settings.pattern_learning_rate, betas=(0.5, 0.9))

        def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
            images, labels = batch.inputs, batch.labels
            poisoned, stamped = shares_of_batch(len(images), settings.poison_rate, settings.cross_rate, generator)
            others = images.roll(-pair_offset(len(images), generator), 0)
            sources = torch.cat([images[:poisoned], others[poisoned : max(stamped, settings.patterns_per_batch)]])
            patterns, masks = pattern_network(sources), soft_threshold(mask_network(sources))
            changed = images[:stamped] + (patterns[:stamped] - images[:stamped]) * masks[:stamped]
            images = torch.cat([changed, images[stamped:]])
            labels = torch.cat([settings.relabel(labels[:poisoned], clean.num_classes), labels[poisoned:]])
            loss = augmented_loss(model, images, labels, augment, generator)
            return loss + settings.diversity_weight * diversity_loss(sources, patterns)

        return Steering(objective=objective, companions=(optimizer,))

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a set poisoned by the networks as they are; images with another image's trigger are its cover."""
        trigger = self.trigger(clean.image_shape)
        poisoned = poison_dirty_label(
            clean, trigger, self.relabel, poison_rate=self.settings.poison_rate, generator=fork(generator, "poison")
        )
        crossed = dataclasses.replace(trigger, crossed=True)
        streams = {"which": fork(generator, "cover"), "stamp": fork(generator, "cross")}
        return with_cover(poisoned, crossed, cover_rate=self.settings.cross_rate, **streams)


def _finished(network: TriggerNetwork) -> TriggerNetwork:
    return copy.deepcopy(network).eval().requires_grad_(False)
