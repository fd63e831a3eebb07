"""Activation Clustering: the features of a poisoned class fall into two clusters (Chen, Carvalho, Baracaldo, Ludwig, Edwards,
Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI 2019,
arXiv 1811.03728).

Per class: reduce the features to ten dimensions, cluster them by 2-means, and suspect the smaller cluster where the two are well
apart (section 4, silhouette). The paper reduces by ICA, which spans what PCA spans: 2-means is done on the principal components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lustral.training import Trainer
from lustral.vision.suspicion.looking import Looked
from lustral.vision.suspicion.one_look import OneLook
from lustral.vision.suspicion.scores import Measure, Scores, score_by_class, shortest_half, standardise

STARTS = (0.05, 0.2, 0.5)  # shares of a class beyond a first cut along a component, at either end
ITERATIONS = 50


def principal_components(features: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of features (n, D) and their top directions (D, d), d at most ``dimensions``."""
    mean = features.mean(0)
    centred = (features - mean).double()
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :dimensions]
    return mean, directions.float()


def two_means(points: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster points (n, d) in two by the best of several starts: cuts along each axis.

    No start is drawn, so the order of the points does not matter.

    Returns:
        (centres (2, d), smaller cluster last; (n,) bool: in the smaller cluster).
    """
    shares = torch.tensor([share for start in STARTS for share in (start, 1 - start)], dtype=points.dtype)
    cuts = torch.quantile(points, shares, dim=0)  # (starts, d)
    upper = (points.T[None] > cuts[:, :, None]).flatten(0, 1)  # (starts * d, n): one run each
    for _ in range(ITERATIONS):
        weights = torch.stack([~upper, upper], 1).to(points.dtype)  # (runs, 2, n)
        centres = weights @ points / weights.sum(2, keepdim=True).clamp_min(1)
        distances = (points[None] @ centres.transpose(1, 2)) * -2 + centres.square().sum(2)[:, None]  # (runs, n, 2)
        moved = distances[..., 1] < distances[..., 0]
        if torch.equal(moved, upper):
            break
        upper = moved
    best = distances.amin(2).sum(1).argmin()
    is_second, centre = upper[best], centres[best]
    if 2 * int(is_second.sum()) > len(points):
        return centre.flip(0), ~is_second
    return centre, is_second


def silhouette(points: Tensor, is_small: Tensor) -> float:
    """Return the mean silhouette of two clusters, from squared distances; 0 where one is empty.

    Squared distances to a cluster have their mean in closed form, |x - centre|^2 + variance, so no pair is compared.
    """
    sizes = torch.stack([(~is_small).sum(), is_small.sum()])
    if int(sizes.min()) < 2:
        return 0.0
    double = points.double()
    means = torch.empty(len(points), 2, dtype=torch.float64)
    for index, is_in in enumerate((~is_small, is_small)):
        cluster = double[is_in]
        centre = cluster.mean(0)
        means[:, index] = (double - centre).square().sum(1) + (cluster - centre).square().sum(1).mean()
    own, other = torch.where(is_small, means.T.flip(0), means.T)
    own = own * (sizes / (sizes - 1))[is_small.long()]  # a point is no neighbour of its own
    return float(((other - own) / torch.maximum(own, other).clamp_min(1e-12)).mean())


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(OneLook):
    """Score images by how far they lie towards the smaller of two clusters of their class.

    Attributes:
        dimensions: of the features that are clustered; 10 in the paper.
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 2.4

    dimensions: int = 10
    trainer: Trainer | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.dimensions < 1:
            raise ValueError(f"expected at least 1 dimension; got {self.dimensions}")

    def score(self, untrusted: Looked, clean: Looked | None = None) -> Scores:
        """Score images that a model has looked at."""
        found, of_clean, notes = score_by_class(untrusted, clean, self._measure)
        basis = "A score says how far an image lies towards the smaller of the two clusters of its class."
        return Scores(untrusted=found, clean=of_clean, basis=basis, notes=notes)

    def _measure(self, features: Tensor) -> Measure:
        mean, directions = principal_components(features, self.dimensions)
        points = (features - mean) @ directions
        centres, is_small = two_means(points)
        axis, apart = centres[1] - centres[0], max(silhouette(points, is_small), 0.0)
        middle, spread = shortest_half(points @ axis)
        return lambda others: apart * standardise((others - mean) @ directions @ axis, middle, spread)
