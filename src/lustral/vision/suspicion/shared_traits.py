"""What the suspicious images of a class have in common: how they differ from the images beside them that were not listed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.images import shuffled
from lustral.vision.records import LabelledImages

NEIGHBOURS = 5
MOST_LISTED = 200  # listed images of a class that are compared
MOST_OTHERS = 2_000  # other images of the class that neighbours are sought among
TRUSTED_SHARE = 0.5  # of the images that are not listed: neighbours are sought among the least suspicious ones
MOST_NUMBERS = 2**26  # of images held at once: 256 MiB as float32
THUMBNAIL = 16  # pixels a side on which images are compared
SMALLEST_SPREAD = 0.02  # of a difference, on the [0, 1] scale; keeps a constant pixel from dividing by nothing
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class SharedTraits:
    """How the listed images of one class differ from their neighbours in it.

    Attributes:
        label: the class.
        listed: (L,) int64 positions of the listed images that were compared, the most suspicious first.
        nearest: (L,) int64 position of each one's nearest neighbour among the less suspicious half of the class.
        images: (L, C, H, W) float32 in [0, 1]: the listed ones.
        partners: (L, C, H, W) float32 in [0, 1]: those nearest neighbours.
        mean: (C, H, W) float32 in [0, 1]: mean of the listed images.
        mean_neighbours: (C, H, W) float32 in [0, 1]: mean of their neighbours.
        residual: (C, H, W) float32 in [-1, 1]: mean of each listed image less the mean of its neighbours.
        agreement: (H, W) float32, at least 0: the residual's size over its spread among the images, of the strongest channel.
            High where all of them differ from their neighbours in the same way, as beneath a trigger.
    """

    label: int
    listed: Tensor
    nearest: Tensor
    images: Tensor
    partners: Tensor
    mean: Tensor
    mean_neighbours: Tensor
    residual: Tensor
    agreement: Tensor


def shared_traits(data: LabelledImages, scores: Tensor, flagged: Tensor, label: int) -> SharedTraits | None:
    """Compare the listed images of a class with their nearest neighbours in it; None where either are missing.

    Args:
        data: the set.
        scores: (N,) float32, higher is more suspicious; the most suspicious of very many are compared.
        flagged: (N,) bool: the listed images.
        label: the class.
    """
    is_member = data.labels.cpu() == label
    listed = (is_member & flagged).nonzero().flatten()
    others = (is_member & ~flagged).nonzero().flatten()
    if not len(listed) or not len(others):
        return None
    most = max(MOST_NUMBERS // math.prod(data.image_shape), 8)
    listed = listed[scores[listed].argsort(descending=True, stable=True)][: min(MOST_LISTED, most)]
    others = others[scores[others] <= scores[others].quantile(TRUSTED_SHARE)]  # a missed one would hide what is sought
    others = shuffled(others, generator=child(0, "neighbours", label))[: min(MOST_OTHERS, most)]
    images, pool = fetch(data, listed), fetch(data, others)
    distances = torch.cdist(_thumbnails(images), _thumbnails(pool))
    near = distances.topk(min(NEIGHBOURS, len(others)), largest=False).indices  # (L, k)
    beside = torch.stack([pool[row].mean(0) for row in near])
    residuals = images - beside
    spread = residuals.std(0, correction=0) + SMALLEST_SPREAD
    residual = residuals.mean(0)
    return SharedTraits(
        label=label,
        listed=listed,
        nearest=others[near[:, 0]],
        images=images,
        partners=pool[near[:, 0]],
        mean=images.mean(0),
        mean_neighbours=beside.mean(0),
        residual=residual,
        agreement=(residual.abs() / spread).amax(0),
    )


def fetch(data: LabelledImages, indices: Tensor) -> Tensor:
    """Return the images at some positions, (M, C, H, W) float32 in [0, 1] on the CPU."""
    return torch.cat([batch.inputs.cpu() for batch in data.subset(indices).batches(BATCH)])


def _thumbnails(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(images, (min(height, THUMBNAIL), min(width, THUMBNAIL)))
    return small.flatten(1)
