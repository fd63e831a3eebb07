"""The default sifter: ranks of three looks at one model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from lustral.core.randomness import child
from lustral.vision.records import TrainingView, Victim
from lustral.vision.sifters import BNLikelihood, Combined, SpectralSignatures
from lustral.vision.sifters.combined import combine, surprise
from toy import clean_images, training_view


def test_surprise_is_minus_the_log_of_the_share_at_least_as_high() -> None:
    among = torch.tensor([3.0, 1.0, 2.0, 2.0])
    scores = torch.tensor([0.0, 1.5, 2.0, 3.0, 4.0])
    shares = torch.tensor([4, 3, 3, 1, 0.5]) / 4
    assert torch.allclose(surprise(scores, among), -shares.log())


def test_no_method_needs_a_scale() -> None:
    first, second = torch.randn(50, generator=child(0, "first")), torch.randn(50, generator=child(0, "second"))
    plain, stretched = {"a": first, "b": second}, {"a": (3 * first).exp(), "b": second}
    assert torch.equal(combine(plain, plain), combine(stretched, stretched))


def test_a_method_that_is_sure_outweighs_two_that_are_not() -> None:
    among = {name: torch.arange(1000.0) for name in "abc"}
    sure = {"a": torch.tensor([999.0]), "b": torch.tensor([500.0]), "c": torch.tensor([500.0])}
    unsure = {name: torch.tensor([800.0]) for name in "abc"}
    assert combine(sure, among) > combine(unsure, among)


def test_parts_are_what_each_method_says_alone(backdoored: Victim) -> None:
    view = training_view(backdoored, clean=clean_images())
    found = Combined().sift(view, generator=child(1))
    alone = {"spectral": SpectralSignatures(), "bn_likelihood": BNLikelihood()}
    assert set(found.parts) == {"spectral", "activation_clustering", "bn_likelihood"}
    for name, method in alone.items():
        assert torch.equal(found.parts[name].scores, method.sift(view, generator=child(1)).scores)


def test_it_finds_the_poison_and_says_who_agrees(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    view, truth = training_view(backdoored, clean=clean_images()), backdoored.poisoned.is_poisoned
    found = Combined().sift(view, generator=child(1))
    assert roc_auc_score(truth, found.scores) > 0.9
    assert found.flagged[truth].float().mean() > 0.5
    assert any("each method lists by itself" in note for note in found.notes)


def test_without_batch_normalisation_two_looks_are_left(backdoored: Victim) -> None:
    view = training_view(backdoored)
    side = view.untrusted.image_shape[1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 16), nn.ReLU(), nn.Linear(16, view.untrusted.num_classes))
    found = Combined().sift(replace(view, model=model), generator=child(1))
    assert set(found.parts) == {"spectral", "activation_clustering"}
    assert bool(found.scores.isfinite().all())


@pytest.mark.parametrize("with_clean", [True, False])
def test_a_clean_set_comes_out_as_clean(benign: nn.Module, with_clean: bool) -> None:
    view = TrainingView(
        untrusted=clean_images(700), build_model=lambda _: benign, clean=clean_images() if with_clean else None, model=benign
    )
    found = Combined().sift(view, generator=child(1))
    assert not found.flagged.any()
    assert found.threshold == math.inf
