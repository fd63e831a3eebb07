"""SAU's equations against hand arithmetic, and its perturbations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lustral.core.randomness import child
from lustral.vision.purifiers import SAU
from lustral.vision.purifiers.sau import jensen_shannon, shared_loss, shared_risk
from lustral.vision.records import DefenderView
from lustral.vision.repair.perturbation import Norm, lengths, project, steepest

SURE = 20.0  # a logit that decides


def logits(*winners: int) -> torch.Tensor:
    return SURE * torch.nn.functional.one_hot(torch.tensor(winners), 3).float()


def test_only_what_is_not_flipped_yet_counts_for_the_adversarial_term() -> None:
    labels = clean = torch.tensor([0, 0, 0, 0])
    f, g = logits(0, 1, 1, 0), logits(0, 1, 2, 1)
    adversarial, apart, shared = shared_loss(f, g, labels, clean, clean)
    assert shared.tolist() == [False, True, False, False]  # both flipped, and to the same class
    near = math.log(1 + 2 * math.exp(-SURE))  # cross-entropy of the right class
    assert float(adversarial) == pytest.approx(-3 * near / 8, abs=1e-7)  # f: images 0 and 3, g: image 0; 2 B = 8
    assert float(apart) == pytest.approx(2 * math.log(2) / 4, rel=1e-3)  # images 2 and 3 disagree wholly


def test_flips_are_judged_by_each_models_own_answer() -> None:
    f, g = logits(1), logits(1)
    _, _, shared = shared_loss(f, g, torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    assert shared.tolist() == [False]  # f said 1 before: nothing has changed for it


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    f, g = torch.randn(5, 4, generator=child(0)), torch.randn(5, 4, generator=child(1))
    assert torch.allclose(jensen_shannon(f, g), jensen_shannon(g, f), atol=1e-6)
    assert float(jensen_shannon(f, f).abs().max()) < 1e-6
    assert jensen_shannon(logits(0), logits(1)).tolist() == pytest.approx([math.log(2)], rel=1e-4)


def test_the_risk_is_divided_by_the_batch_and_not_by_the_images_that_count() -> None:
    f = torch.zeros(4, 3)  # every class has probability 1/3
    counted = torch.tensor([True, False, False, False])
    expected = -(math.log(1e-6 + 2 / 3) + math.log(1 + 1e-6 - 1 / 3)) / 2 / 4
    assert float(shared_risk(f, torch.tensor([2, 0, 0, 0]), counted)) == pytest.approx(expected, rel=1e-5)
    assert float(shared_risk(f, torch.tensor([2, 0, 0, 0]), torch.zeros(4, dtype=torch.bool))) == 0


def test_the_risk_stays_finite_for_a_sure_model() -> None:
    f = logits(1).requires_grad_(True)
    risk = shared_risk(f, torch.tensor([1]), torch.tensor([True]))
    assert math.isfinite(risk.item())
    (slope,) = torch.autograd.grad(risk, f)
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "none"])
@pytest.mark.parametrize("start", ["max", "min", "zero", "random"])
def test_perturbations_keep_to_their_ball(norm: str, start: str, toy_view: DefenderView) -> None:
    method = SAU(norm=norm, initial=start, radius=0.3, step_size=0.1, steps=2)  # type: ignore[arg-type]
    x, y, _ = next(toy_view.clean.batches(16))
    reference = toy_view.model
    with torch.no_grad():
        said = reference(x).argmax(1)
    delta = method.perturb(reference, reference, x, y, said, child(0))
    assert delta.shape == x.shape
    assert not delta.requires_grad
    if norm != "none":
        assert float(lengths(delta, norm).max()) <= 0.3 * (1 + 1e-4)  # type: ignore[arg-type]  # a sum of 432 in float32


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.04), ("l2", 0.5)])
def test_leaving_shared_images_out_changes_nothing(norm: Norm, radius: float) -> None:
    method = SAU(norm=norm, initial="zero", radius=radius, step_size=radius / 3, steps=5)
    reference, other = (
        linear_model(0),
        linear_model(1),
    )  # unlike a trained network's, their answers are far from 0 and 1
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter, turned in zip(model.parameters(), other.parameters(), strict=True):
            parameter.add_(0.3 * turned)
    x = torch.rand(64, 3, 12, 12, generator=child(2), dtype=torch.float64)
    with torch.no_grad():
        f_clean, g_clean = model(x).argmax(1), reference(x).argmax(1)
    y = g_clean
    delta, counts = torch.zeros_like(x), []
    for _ in range(method.steps):
        delta.requires_grad_(True)
        f, g = (each(x + delta).float() for each in (model, reference))
        adversarial, apart, shared = shared_loss(f, g, y, f_clean, g_clean)
        counts.append(int(shared.sum()))
        (slope,) = torch.autograd.grad(0.01 * adversarial + apart, delta)
        delta = project(delta.detach() - radius / 3 * steepest(slope, norm), norm, radius)
    assert 6 < counts[-1] < 58  # some of 64 are left out, and some are not
    found = method.perturb(model, reference, x, y, g_clean, child(0))
    moved = (found - delta).abs() > 0.01 * radius  # a step is a third of the radius
    assert float(moved.double().mean()) < 1e-3  # a slope of 0 but for rounding may turn its sign


def linear_model(seed: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=child(seed), dtype=torch.float64))
    return model


def test_the_shared_risk_falls(toy_view: DefenderView) -> None:
    purified = SAU(least_steps=60).purify(toy_view, generator=child(0))
    losses = [entry.loss for entry in purified.history[1:]]  # the first is of the given model
    assert losses[-1] < losses[0]


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"radius": 0.0}, {"steps": 0}, {"holdout": 1.0}, {"shared_weight": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            SAU(**wrong)
    published = SAU().published().trainer
    assert (published.epochs, published.optimizer, published.learning_rate) == (100, "amsgrad", 1e-4)
