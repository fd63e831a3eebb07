"""Spectral Signatures against numpy's singular vectors, and on features drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.sifters import SpectralSignatures
from lustral.vision.sifters.spectral import top_direction
from lustral.vision.suspicion.lines import draw_line, line_by_bulk
from vision.sifters.worlds import auroc, poisoned_features, seen


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (12, 12)])
def test_the_direction_is_the_top_singular_vector(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=child(0)) + 3
    _, _, right = np.linalg.svd((features - features.mean(0)).double().numpy())
    assert abs(float(top_direction(features) @ torch.from_numpy(right[0]).float())) == pytest.approx(1, abs=1e-5)


def test_with_the_papers_centre_a_score_is_the_papers_tau() -> None:
    looked, _ = poisoned_features()
    scores = SpectralSignatures(centre="mean").score(looked).untrusted
    for label in range(3):
        own = looked.labels == label
        features = looked.features[own].double().numpy()
        centred = features - features.mean(0)
        right = np.linalg.svd(centred)[2]
        tau = torch.from_numpy((centred @ right[0]) ** 2).float()
        torch.testing.assert_close(scores[own], tau, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_poisoned_features_score_highest_among_all_classes(share: float) -> None:
    looked, is_poisoned = poisoned_features(share)
    found = SpectralSignatures().score(looked)
    assert auroc(found.untrusted, is_poisoned) > 0.97
    plain = SpectralSignatures(centre="mean").score(looked)
    assert auroc(plain.untrusted, is_poisoned) < auroc(found.untrusted, is_poisoned) + 0.01


def test_normal_features_come_out_as_clean() -> None:
    looked, _ = poisoned_features(0.0, count=3000)
    scores = SpectralSignatures().score(looked).untrusted
    assert not draw_line(scores).flagged.any()
    assert 0 < float((scores > line_by_bulk(scores, 0.005)).float().mean()) < 0.01


def test_no_feature_and_no_image_of_a_class_makes_trouble() -> None:
    constant = SpectralSignatures().score(seen(torch.ones(40, 5), torch.arange(40) % 2))
    assert constant.untrusted.tolist() == [0.0] * 40
    labels = torch.tensor([0] * 30 + [1])
    single = SpectralSignatures().score(seen(torch.randn(31, 5, generator=child(0)), labels))
    assert float(single.untrusted[30]) == pytest.approx(float(single.untrusted[:30].median()))
    assert single.notes
    everything_one = SpectralSignatures().score(seen(torch.randn(50, 5, generator=child(0)), torch.zeros(50).long()))
    assert float(everything_one.untrusted.std()) > 0
