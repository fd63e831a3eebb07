"""Losses at shifted weights, against hand arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.purifiers.tsbd import unit_steps
from lustral.vision.repair.shifted_weights import (
    adaptive_shift,
    gradients,
    interpolated_loss,
    loss_part_of_the_way,
    running_statistics_kept,
    trainable,
    with_gradients,
)


class Bowl(nn.Module):
    """f(x) = w * x, so that sum(f^2) / 2 is a quadratic with a known curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


SCALES = torch.tensor([3.0, 0.5])  # curvatures 9 and 0.25


def half_square(classify: object) -> Tensor:
    assert callable(classify)
    out: Tensor = classify(SCALES).square().sum() / 2
    return out


def slope_of(loss: Tensor, model: Bowl) -> Tensor:
    (found,) = torch.autograd.grad(loss, model.w)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_is_interpolated_between_here_and_there(share: float) -> None:
    model = Bowl()

    def shift(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"w": 0.1 * slopes["w"]}

    here = torch.tensor([9.0, -0.5])  # curvature times weight
    there = SCALES.square() * (torch.tensor([1.0, -2.0]) + 0.1 * here)
    loss = interpolated_loss(model, half_square, shift=shift, share=share)
    assert loss.item() == pytest.approx(5.0)  # the loss at the weights themselves: (3^2 + 1^2) / 2
    assert slope_of(loss, model).tolist() == pytest.approx(((1 - share) * here + share * there).tolist(), rel=1e-5)


def test_on_a_quadratic_it_is_the_gradient_of_the_penalty_on_the_slope() -> None:
    radius, share = 0.05, 0.7
    model = Bowl()
    got = slope_of(interpolated_loss(model, half_square, shift=unit_steps(radius), share=share), model)
    exact = Bowl()
    loss = half_square(exact)
    (slope,) = torch.autograd.grad(loss, exact.w, create_graph=True)
    wanted = slope_of(loss + share * radius * slope.norm(), exact)
    assert got.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


def test_unit_steps_normalise_every_tensor_by_itself() -> None:
    slopes = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0]), "c": torch.tensor([-2.0])}
    found = unit_steps(0.5)({}, slopes)
    assert {name: [round(v, 6) for v in step.tolist()] for name, step in found.items()} == {
        "a": [0.3, 0.4],
        "b": [0.0],
        "c": [-0.5],
    }


def test_adaptive_shifts_follow_the_squares_of_the_weights() -> None:
    weights = {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([0.0])}
    slopes = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    # |w| g = (2, 2), 0: norm sqrt(8); w^2 g = (4, 2), 0
    found = adaptive_shift(weights, slopes, rho=2.0)
    assert found["a"].tolist() == pytest.approx([8 / 8**0.5, 4 / 8**0.5])
    assert found["b"].tolist() == [0.0]


def test_batch_statistics_are_updated_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).train()
    images = torch.rand(6, 1, 4, 4, generator=child(0))
    once = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).train()
    once.load_state_dict(model.state_dict())
    once(images)
    loss = interpolated_loss(model, lambda classify: classify(images).square().sum(), shift=unit_steps(0.5), share=1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(model[1].running_mean, once[1].running_mean)
    assert torch.allclose(model[1].running_var, once[1].running_var)
    assert model[1].momentum == 0.1
    with running_statistics_kept(model), torch.no_grad():
        model(images + 5)
    assert torch.allclose(model[1].running_mean, once[1].running_mean)


def test_given_slopes_become_gradients() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    weights = trainable(model)
    assert list(weights) == ["weight"]
    slopes = {"weight": torch.tensor([[7.0, -3.0]])}
    loss = with_gradients(weights, slopes)
    assert loss.item() == 0
    assert gradients(loss, weights)["weight"].tolist() == [[7.0, -3.0]]


def test_a_look_back_takes_the_gradient_part_of_the_way_to_the_origin() -> None:
    bowl = Bowl()
    origin = {"w": torch.tensor([3.0, 2.0])}
    for share, there in ((0.0, [1.0, -2.0]), (0.25, [1.5, -1.0]), (1.0, [3.0, 2.0])):
        loss = loss_part_of_the_way(bowl, half_square, origin, share)
        (slope,) = torch.autograd.grad(loss, bowl.w)
        at = torch.tensor(there)
        assert loss.item() == pytest.approx(float((at * SCALES).square().sum() / 2))
        assert slope.tolist() == pytest.approx((at * SCALES.square()).tolist())
    assert bowl.w.tolist() == [1.0, -2.0]


def test_a_look_back_keeps_the_running_statistics() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    origin = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    data = torch.randn(8, 2, generator=child(0))
    loss_part_of_the_way(network, lambda classify: classify(data).sum(), origin, 0.5).backward()
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert norm.momentum == 0.1
