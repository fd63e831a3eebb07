"""Activation Clustering: two means, the silhouette, and which cluster is suspicious."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lustral.core.randomness import child
from lustral.vision.sifters import ActivationClustering
from lustral.vision.sifters.activation_clustering import principal_components, silhouette, two_means
from lustral.vision.suspicion.lines import draw_line
from vision.sifters.worlds import auroc, poisoned_features, seen


def inertia(points: Tensor, is_second: Tensor) -> float:
    parts = [points[chosen] for chosen in (is_second, ~is_second) if chosen.any()]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


@pytest.mark.parametrize("seed", range(4))
def test_two_means_find_the_best_of_all_splits(seed: int) -> None:
    points = torch.randn(11, 2, generator=child(seed)) + torch.tensor([[0.0, 0]] * 7 + [[4.0, 1]] * 4)
    centres, is_small = two_means(points)
    every = (torch.tensor(split) for split in product((False, True), repeat=11) if any(split) and not all(split))
    assert inertia(points, is_small) == pytest.approx(min(inertia(points, split) for split in every), rel=1e-4)
    assert int(is_small.sum()) <= 5
    torch.testing.assert_close(centres[1], points[is_small].mean(0))
    torch.testing.assert_close(centres[0], points[~is_small].mean(0))


def test_the_silhouette_is_that_of_all_pairs() -> None:
    points = torch.randn(20, 3, generator=child(0))
    is_small = torch.arange(20) < 6
    points[is_small] += 2
    squared = torch.cdist(points.double(), points.double()).square()
    values = []
    for i in range(20):
        same = is_small == is_small[i]
        own = squared[i][same].sum() / (same.sum() - 1)
        other = squared[i][~same].mean()
        values.append(float((other - own) / max(own, other)))
    assert silhouette(points, is_small) == pytest.approx(sum(values) / 20, abs=1e-6)


def test_components_are_orthogonal_and_fall_in_variance() -> None:
    features = torch.randn(200, 8, generator=child(0)) * (1 + torch.arange(8.0))
    mean, directions = principal_components(features, 3)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3), atol=1e-5, rtol=0)
    variances = ((features - mean) @ directions).var(0).tolist()
    assert variances == sorted(variances, reverse=True)
    assert variances[0] == pytest.approx(float(torch.linalg.eigvalsh(torch.cov(features.T))[-1]), rel=1e-4)
    assert principal_components(features, 30)[1].shape == (8, 8)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_smaller_cluster_of_the_poisoned_class_scores_highest(share: float) -> None:
    looked, is_poisoned = poisoned_features(share)
    assert auroc(ActivationClustering().score(looked).untrusted, is_poisoned) > 0.97


def test_clean_classes_come_out_as_clean() -> None:
    looked, _ = poisoned_features(0.0, count=3000)
    found = ActivationClustering().score(looked)
    assert not draw_line(found.untrusted).flagged.any()


def test_constant_features_and_lonely_images_are_neutral() -> None:
    assert ActivationClustering().score(seen(torch.ones(40, 5), torch.arange(40) % 2)).untrusted.tolist() == [0.0] * 40
    labels = torch.tensor([0] * 30 + [1])
    scores = ActivationClustering().score(seen(torch.randn(31, 5, generator=child(0)), labels)).untrusted
    assert float(scores[30]) == pytest.approx(float(scores[:30].median()))
    with pytest.raises(ValueError, match="at least 1 dimension"):
        ActivationClustering(dimensions=0)
