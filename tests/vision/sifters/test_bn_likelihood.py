"""The batch-norm likelihood by hand, and on networks that are backdoored."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from lustral.core.randomness import child
from lustral.vision.records import TrainingView, Victim
from lustral.vision.sifters import BNLikelihood
from lustral.vision.sifters.bn_likelihood import combined, log_distances, lower_half
from lustral.vision.suspicion.lines import draw_line
from toy import clean_images, toy_images
from vision.sifters.worlds import auroc, building, seen, training_view


def likelihoods(distances: Tensor) -> Tensor:
    """Return the log-density of a standard normal that far from its mean."""
    return torch.distributions.Normal(0.0, 1.0).log_prob(distances)


def drawn(count: int = 2000, layers: int = 5, seed: int = 0) -> Tensor:
    """Draw the largest distances of clean images, one column a layer."""
    return (1.5 + 0.2 * torch.randn(count, layers, generator=child(seed))).exp()


def test_distances_come_back_from_likelihoods() -> None:
    distances = drawn(20)
    torch.testing.assert_close(log_distances(likelihoods(distances)), distances.log(), rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(log_distances(likelihoods(torch.zeros(1, 1)))))


def test_fishers_combination_sums_the_tails() -> None:
    z = torch.tensor([[0.3, -1.0, 2.5]])
    wanted = -sum(math.log(1 - NormalDist().cdf(value)) for value in z[0].tolist())
    assert float(combined(z)) == pytest.approx(wanted, rel=1e-4)
    assert math.isfinite(float(combined(torch.tensor([[30.0]]))))


def test_the_score_is_that_of_the_plain_formula() -> None:
    distances = drawn(101, layers=3)
    found = BNLikelihood().score(seen(torch.zeros(101, 2), torch.arange(101) % 3, likelihoods(distances))).untrusted
    logs = distances.double().log().numpy()

    def standard(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(values, 0)
        return (values - ordered[50]) / ((ordered[50] - ordered[25]) / 0.6744897)

    z = standard(logs)
    score = -np.log([[1 - NormalDist().cdf(value) for value in row] for row in z]).sum(1)
    for _ in range(2):
        order = np.argsort(score)
        top, rest = z[order[-5:]], z[order[:-5]]
        covariance = np.cov(rest.T, bias=True)
        covariance += np.eye(3) * (0.1 * np.trace(covariance) / 3 + 1e-6)
        score = z @ np.linalg.inv(covariance) @ (top.mean(0) - rest.mean(0))
    wanted = standard(score)
    torch.testing.assert_close(
        found, torch.from_numpy(np.sign(wanted) * np.abs(wanted) ** 0.85).float(), rtol=5e-3, atol=5e-3
    )


def test_poisoned_images_of_all_classes_stand_out_in_one_layer() -> None:
    distances = drawn()
    is_poisoned = torch.arange(2000) % 20 == 0
    distances[is_poisoned, 3] *= 3
    looked = seen(torch.zeros(2000, 2), torch.randint(3, (2000,), generator=child(1)), likelihoods(distances))
    found = BNLikelihood().score(looked)
    assert auroc(found.untrusted, is_poisoned) > 0.98
    line = draw_line(found.untrusted)
    assert float(line.flagged[is_poisoned].float().mean()) > 0.7
    assert float(line.flagged[~is_poisoned].float().mean()) < 0.01


def test_a_clean_set_comes_out_as_clean() -> None:
    looked = seen(torch.zeros(2000, 2), torch.arange(2000) % 3, likelihoods(drawn()))
    assert not draw_line(BNLikelihood().score(looked).untrusted).flagged.any()


def test_a_layer_of_constants_says_nothing() -> None:
    distances = drawn(600)
    is_poisoned = torch.arange(600) % 20 == 0
    distances[is_poisoned, 3] *= 3
    one, other = (
        BNLikelihood().score(seen(torch.zeros(600, 2), torch.arange(600) % 3, likelihoods(d))).untrusted
        for d in (distances, torch.cat([distances, torch.ones(600, 1)], 1))
    )
    torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
    median, spread = lower_half(torch.ones(5, 2))
    assert (median.tolist(), spread.tolist()) == ([1.0, 1.0], [0.0, 0.0])
    constant = BNLikelihood().score(seen(torch.zeros(9, 2), torch.arange(9) % 3, likelihoods(torch.ones(9, 4))))
    assert constant.untrusted.tolist() == [0.0] * 9


def test_a_single_image_gets_a_score() -> None:
    for count in (1, 2, 3):
        looked = seen(torch.zeros(count, 2), torch.arange(count), likelihoods(drawn(count)))
        assert bool(BNLikelihood().score(looked).untrusted.isfinite().all())


def test_a_network_without_batch_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="another sifter"):
        BNLikelihood().score(seen(torch.zeros(6, 2), torch.arange(6) % 3))


def test_the_backdoored_toy_network_gives_its_poisoned_images_away(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    found = BNLikelihood().sift(training_view(backdoored), generator=child(0))
    assert auroc(found.scores, backdoored.poisoned.is_poisoned) > 0.95


def test_the_benign_toy_network_accuses_no_image(benign: Victim) -> None:
    data = toy_images(1400, seed=0)  # what it was trained on
    view = TrainingView(untrusted=data, build_model=building(data), model=benign.model)
    assert not BNLikelihood().sift(view, generator=child(0)).flagged.any()
    assert not BNLikelihood().sift(replace(view, clean=clean_images()), generator=child(0)).flagged.any()
