"""The toy world: seven classes of 12x12 pictures, and networks that are truly backdoored within seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.catalog import DETECTORS
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.core.records import Batch, Cost, Evidence
from lustral.training import Augment, EpochReport, Trainer
from lustral.vision.detectors import MaskArea
from lustral.vision.detectors.weighing import SearchedLabel
from lustral.vision.evaluation import TaskCheck
from lustral.vision.images import as_uint8
from lustral.vision.inverters import MaskSearch, MaxEntropy
from lustral.vision.records import DefenderView, ImageSet, RecoveredTrigger, Sifted, TrainingView, Verdict
from lustral.vision.sifters import FCT

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


def tinted_images(count: int, seed: int, contrast: float = 0.1) -> ImageSet:
    """Draw four classes that differ by a faint tint under coarse noise: learnt slowly, and the same when turned or shifted.

    A trigger is learnt before them, which is what early losses and transformations of a training set tell poisoned images by.
    """
    stream = child(seed, "tints")
    labels = torch.arange(count) % 4
    hues = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-0.6, -0.6, -0.6]])
    light = 0.5 + 0.1 * torch.randn(count, 1, 1, 1, generator=stream)
    coarse = 0.25 * F.interpolate(torch.randn(count, 3, 4, 4, generator=stream), size=SIDE, mode="bilinear")
    noise = 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=stream)
    images = light + contrast * hues[labels][:, :, None, None] + coarse + noise
    return ImageSet(images=as_uint8(images.clamp(0, 1)), labels=labels, num_classes=4)


def as_batch(images: Tensor, labels: Tensor | None = None) -> Batch:
    """Return float images as one batch in order; labels that do not matter are 0."""
    index = torch.arange(len(images))
    return Batch(images, torch.zeros_like(index) if labels is None else labels, index)


def clean_images(count: int = 280) -> ImageSet:
    """Return a defender's images, ordered by class as image folders give them: no method may count on shuffled ones."""
    data = toy_images(count, seed=2)
    return data.subset(data.labels.argsort(stable=True))


def passes_for_good(model: nn.Module, clean: ImageSet) -> TaskCheck:
    """Stand in for ``require_task``, where an untrained network serves a test that does not depend on its task."""
    return TaskCheck(accuracy=Rate(100, 100), chance=0.1, num_not_finite=0)


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


def scans_are(monkeypatch: pytest.MonkeyPatch, inspect: Any) -> None:
    """Let every detector of the catalog answer with a stand-in."""
    for kind in DETECTORS.values():
        monkeypatch.setattr(kind, "inspect", inspect)


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


def scripted_fit(course: Callable[[float], Sequence[bool]], asked: list[float]) -> Callable[..., nn.Module]:
    """Return a stand-in for ``Trainer.fit`` that trains nothing: what a method makes of a course is then no matter of luck.

    Args:
        course: gives, for a learning rate, whether each epoch leaves the model as it was (True) or without any knowledge.
        asked: gets the learning rates of the calls.
    """

    def fit(self: Trainer, model: nn.Module, data: ImageSet, *, on_epoch: Any, **rest: Any) -> nn.Module:
        asked.append(self.learning_rate)
        kept = course(self.learning_rate)
        for number, intact in enumerate(kept):
            trained = copy.deepcopy(model)
            if not intact:
                for parameter in trained.parameters():
                    nn.init.zeros_(parameter)
            on_epoch(
                EpochReport(epoch=number + 1, epochs=len(kept), loss=0.5, images_per_second=1.0, model=trained.train())
            )
        return trained.eval()

    return fit


def true_trigger() -> RecoveredTrigger:
    """The trigger of the backdoored toy network, as a search that missed nothing would return it."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE - 2 :, SIDE - 2 :] = 1
    return RecoveredTrigger(
        target_label=4,
        masks=mask,
        patterns=torch.ones(1, 3, SIDE, SIDE),
        area=4.0,
        attack_success_rate=1.0,
        entropy=0.0,
    )


def mask_evidence(*labels: SearchedLabel) -> tuple[Evidence, ...]:
    """Return what a scan for small masks measured, figure by figure."""
    return tuple(figure for label in labels for figure in label.evidence())


def mask_verdict(
    areas: Sequence[float],
    suspects: Sequence[int] = (),
    steps: Sequence[int] = (),
    triggers: Sequence[RecoveredTrigger] = (),
) -> Verdict:
    """Return the verdict of a scan that needed these areas, label by label, and accuses the suspects."""
    labels = (
        SearchedLabel(
            label=label,
            size=area,
            attack_success_rate=1.0,
            natural_rate=0.0,
            anomaly=0.0,
            p_value=1.0,
            entropy=math.nan,
            steps=steps[label] if steps else 1,
        )
        for label, area in enumerate(areas)
    )
    return Verdict(
        outcome="backdoored" if suspects else "clean",
        suspect_labels=tuple(suspects),
        score=4.0 if suspects else 0.0,
        threshold=2.0,
        basis="known",
        evidence=mask_evidence(*labels),
        triggers=tuple(triggers),
        cost=Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=280),
    )


@dataclass(frozen=True, kw_only=True)
class CornerSifter(FCT):
    """A stand-in for a sifter that goes through one, as short as it gets, and then flags what has a white corner."""

    least_steps: int = 0
    intra_epochs: int = 0

    def sift(self, view: TrainingView, **rest: Any) -> Sifted:
        found = super().sift(view, **rest)
        corner = torch.cat([batch.inputs[..., -2:, -2:].flatten(1).mean(1) for batch in view.untrusted.batches(256)])
        flagged = corner.cpu() == 1
        return replace(found, scores=corner.cpu(), flagged=flagged, threshold=1.0)


class KnownAnswer:
    """A stand-in for a scan and for its inverter that names label 4 and returns its true trigger, without a search."""

    @property
    def inverter(self) -> KnownAnswer:
        return self

    def invert(self, *_: Any, **__: Any) -> list[RecoveredTrigger]:
        return [true_trigger()]

    def inspect(self, view: DefenderView, **_: Any) -> Verdict:
        areas = [4.0 if label == 4 else 40.0 + label for label in range(view.clean.num_classes)]
        return mask_verdict(areas, (4,), triggers=(true_trigger(),))
