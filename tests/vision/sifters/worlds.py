"""What sifters are tested on: features drawn by hand, and a view of the toy victim's own training set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.vision.records import ImageSet, TrainingView, Victim
from lustral.vision.suspicion.looking import Looked
from lustral.vision.victims import new_classifier


def seen(features: Tensor, labels: Tensor, likelihoods: Tensor | None = None, num_classes: int = 3) -> Looked:
    """Return what a model that is always right would have shown of images with these features."""
    return Looked(
        labels=labels,
        num_classes=num_classes,
        features=features,
        logits=nn.functional.one_hot(labels, num_classes).float(),
        likelihoods=torch.empty(len(labels), 0) if likelihoods is None else likelihoods,
        statistics={},
    )


def poisoned_features(share: float = 0.2, count: int = 900, seed: int = 0) -> tuple[Looked, Tensor]:
    """Draw three classes of normal features; ``share`` of class 1 lies eight deviations off. Returns (seen, (N,) bool)."""
    stream = child(seed, "features")
    labels = torch.arange(count) % 3
    scales = 1 + torch.arange(6.0)  # no class is round
    features = torch.randn(count, 6, generator=stream) * scales + 10 * labels[:, None]
    is_poisoned = (labels == 1) & (torch.rand(count, generator=stream) < share)
    features[is_poisoned] += torch.tensor([8.0, 0, 0, 0, 0, 40.0])
    return seen(features, labels), is_poisoned


def auroc(scores: Tensor, is_poisoned: Tensor) -> float:
    """Return the probability that a poisoned image scores higher than another, ties counting half."""
    one, other = scores[is_poisoned][:, None], scores[~is_poisoned][None]
    return float(((one > other).double() + (one == other).double() / 2).mean())


def building(data: ImageSet, arch: str = "small_cnn:width=8") -> Callable[[Generator], nn.Module]:
    """Return what draws a fresh network for a set."""
    return lambda generator: new_classifier(arch, data, int(torch.randint(2**31, (), generator=generator)))


def training_view(victim: Victim, *, clean: ImageSet | None = None) -> TrainingView:
    """Return the set that a victim was trained on, with its model."""
    assert victim.poisoned is not None
    data = victim.poisoned.data
    assert isinstance(data, ImageSet)
    return TrainingView(untrusted=data, build_model=building(data), clean=clean, model=victim.model)
