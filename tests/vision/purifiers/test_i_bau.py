"""I-BAU's hypergradient against a problem that can be solved by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.images import as_float
from lustral.vision.purifiers import IBAU
from lustral.vision.purifiers.i_bau import hypergradient, inner_loss
from toy import toy_images

# L_in = h d^2 / 2 - c theta d, so d*(theta) = c theta / h;   L_out = (d + theta)^2 / 2
H, C = 2.0, 3.0


def quadratic(theta: float, d: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    weight, delta = torch.tensor(theta, requires_grad=True), torch.tensor(d, requires_grad=True)
    return H * delta.square() / 2 - C * weight * delta, (delta + weight).square() / 2, delta, {"theta": weight}


def test_many_iterations_give_the_total_derivative() -> None:
    theta = 0.7
    inner, outer, delta, weights = quadratic(theta, C * theta / H)
    found = hypergradient(inner, outer, delta, weights, step_size=0.1, iterations=200)
    # d/dtheta (c theta / h + theta)^2 / 2
    assert float(found["theta"]) == pytest.approx((C / H + 1) ** 2 * theta, rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_few_iterations_give_the_partial_sum_of_the_series(iterations: int) -> None:
    theta, a = 0.7, 0.1
    inner, outer, delta, weights = quadratic(theta, C * theta / H)
    direct = C * theta / H + theta  # dL_out/dd = dL_out/dtheta
    v = direct * sum((1 - a * H) ** k for k in range(iterations))
    found = hypergradient(inner, outer, delta, weights, step_size=a, iterations=iterations)
    assert float(found["theta"]) == pytest.approx(direct + a * C * v, rel=1e-5)


def test_without_iterations_it_is_the_plain_gradient() -> None:
    inner, outer, delta, weights = quadratic(0.7, 0.2)
    found = hypergradient(inner, outer, delta, weights, step_size=0.1, iterations=0)
    assert float(found["theta"]) == pytest.approx(0.9)


def test_an_outer_loss_that_does_not_see_the_perturbation_has_no_answer_to_account_for() -> None:
    inner, _, delta, weights = quadratic(0.7, 0.2)
    found = hypergradient(inner, weights["theta"] ** 2, delta, weights, step_size=0.1, iterations=5)
    assert float(found["theta"]) == pytest.approx(1.4)


def test_the_inner_loss_is_negated_and_penalised() -> None:
    logits, delta = torch.zeros(2, 4), torch.full((1, 1, 1, 2), 3.0)
    assert float(inner_loss(logits, torch.tensor([0, 1]), delta, 0.5)) == pytest.approx(
        9.0 - float(torch.tensor(4.0).log())
    )


def test_the_perturbation_is_projected_and_hurts() -> None:
    model, data = linear_model(), toy_images(280, seed=2)  # never so sure of itself that no slope is left
    delta = IBAU(projection=1.0, delta_learning_rate=1.0).universal(model, data, 64)
    assert delta.shape == (1, 3, 12, 12)
    scale = (3 * 12 * 12 / (3 * 32 * 32)) ** 0.5
    assert float(delta.norm()) == pytest.approx(scale, rel=1e-4)
    free = IBAU(projection=None, delta_learning_rate=1.0).universal(model, data, 64)
    assert float(free.norm()) > 1.1 * scale
    images = as_float(data.images)
    with torch.no_grad():
        said = model(images).argmax(1)
        losses = [float(torch.nn.functional.cross_entropy(model(images + d), said)) for d in (-delta, 0 * delta, delta)]
    assert losses[0] < losses[1] - 0.01
    assert losses[1] < losses[2] - 0.01


def linear_model() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=child(0)))
    return model


def test_rounds_are_epochs_and_small_sets_get_more() -> None:
    method = IBAU(rounds=3, least_steps=0)
    assert method.recipe(1000).epochs == 3
    assert IBAU(rounds=3, least_steps=50).recipe(1000).epochs == 5


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"rounds": 0}, {"perturbed_share": 0.0}, {"projection": 0.0}, {"inner_step_size": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            IBAU(**wrong)


def test_the_published_settings_are_the_benchmarks() -> None:
    method = IBAU().published()
    assert (method.rounds, method.trainer.optimizer, method.trainer.learning_rate) == (5, "amsgrad", 1e-4)
    assert (method.trainer.batch_size, method.projection, method.relative_rate) == (256, None, None)
