"""The toy world: seven classes of 12x12 pictures, and networks that are truly backdoored within seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lustral.detectors import MaskArea
from lustral.images import Augment, as_uint8
from lustral.inverters import MaskSearch, MaxEntropy
from lustral.protocols import ImageSet
from lustral.randomness import child
from lustral.training import Trainer

NUM_CLASSES = 7
SIDE = 12


def toy_images(count: int, seed: int) -> ImageSet:
    """Draw coloured waves: the class sets direction, frequency and hue; place, contrast and noise vary."""
    stream = child(seed, "toy")
    labels = torch.arange(count) % NUM_CLASSES
    axis = torch.linspace(0, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = labels * torch.pi / NUM_CLASSES
    waves = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    phase = torch.rand(count, 1, 1, generator=stream)
    contrast = 0.2 + 0.2 * torch.rand(count, 1, 1, generator=stream)
    grey = 0.5 + contrast * torch.sin(2 * torch.pi * (2 * waves + phase))
    hue = torch.stack([(angle + shift).cos() for shift in (0.0, 2.1, 4.2)], 1)[:, :, None, None]
    noise = 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=stream)
    images: Tensor = (grey[:, None] + 0.08 * hue + noise).clamp(0, 1)
    return ImageSet(images=as_uint8(images), labels=labels, num_classes=NUM_CLASSES)


def toy_trainer(**changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "epochs": 12,
        "batch_size": 64,
        "learning_rate": 0.1,
        "augment": Augment(crop_padding=1, flip=False),
    }
    return Trainer(**{**settings, **changes})


def quick_inverter(**changes: Any) -> MaxEntropy:
    settings: dict[str, Any] = {
        "steps": 15,
        "hidden": 32,
        "batch_size": 16,
        "samples": 48,
        "search": MaskSearch(steps=150, batch_size=16),
    }
    return MaxEntropy(**{**settings, **changes})


def quick_detector() -> MaskArea:
    return MaskArea(inverter=quick_inverter())


def gentle_trainer(**changes: Any) -> Trainer:
    """Fine-tune the toy networks: as the purifiers do, with batches that fit 224 clean images."""
    settings: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 32,
        "learning_rate": 0.003,
        "schedule": "cosine",
        "warmup": 0.1,
        "weight_decay": 0.0,
        "augment": Augment(crop_padding=1, flip=False),
        "batch_norm": "frozen",
    }
    return Trainer(**{**settings, **changes})
