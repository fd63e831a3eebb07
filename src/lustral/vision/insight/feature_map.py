"""What a network takes for alike: the inputs of its last layer in the plane in which they differ most.

The plane is that of the two first principal components (Pearson, Philosophical Magazine 1901), for each model its own: the axes
of two planes have no meaning in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lustral.vision.models.features import gather
from lustral.vision.records import ImageSet


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """Clean and triggered images as points, for two models.

    Attributes:
        before: (N, 2) float32, of the given model.
        after: (N, 2) float32, of the new model.
        shown_before: share of the variance that lies in the plane of ``before``, in [0, 1].
        shown_after: likewise.
        is_triggered: (N,) bool.
        is_target: (N,) bool: clean images of the class that the trigger leads to.
    """

    before: Tensor
    after: Tensor
    shown_before: float
    shown_after: float
    is_triggered: Tensor
    is_target: Tensor


def feature_map(given: nn.Module, new: nn.Module, clean: ImageSet, triggered: ImageSet, target: int) -> FeatureMap:
    """Place clean and triggered images by the features of two models.

    Args:
        given: classifier.
        new: classifier.
        clean: images without trigger.
        triggered: images with it, by their true classes.
        target: the class that it leads to.

    Raises:
        ValueError: a network uses no layer with weights.
    """
    planes = []
    for model in (given, new):
        features = [gather(model, images)[0] for images in (clean, triggered)]
        planes.append(principal_plane(torch.cat(features)))
    is_triggered = torch.arange(len(clean) + len(triggered)) >= len(clean)
    labels = torch.cat([clean.labels, triggered.labels]).cpu()
    return FeatureMap(
        before=planes[0][0],
        after=planes[1][0],
        shown_before=planes[0][1],
        shown_after=planes[1][1],
        is_triggered=is_triggered,
        is_target=(labels == target) & ~is_triggered,
    )


def principal_plane(features: Tensor) -> tuple[Tensor, float]:
    """Project points on their first two principal components, by the eigenvectors of their inner products.

    Args:
        features: (N, D) float; N is small, D may be large.

    Returns:
        (points (N, 2) float32 around 0, share of the variance in the plane). The point farthest out on an axis is on its positive
        side, so that equal features give equal pictures. Where the features are not finite, the points are not either.
    """
    centred = features.double() - features.double().mean(0)
    if not bool(centred.isfinite().all()):
        return torch.full((len(features), 2), torch.nan), 0.0
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # rising
    values = values.clamp_min(0)
    best = torch.arange(len(values) - 1, max(len(values) - 3, -1), -1)
    points = vectors[:, best] * values[best].sqrt()
    points = points * torch.where(points.gather(0, points.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    total = float(values.sum())
    return points.float(), float(values[best].sum()) / total if total else 0.0
