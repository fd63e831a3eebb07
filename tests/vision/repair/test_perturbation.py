"""Projections and steepest directions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lustral.core.randomness import child
from lustral.vision.repair.perturbation import Norm, lengths, project, steepest

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def draw(seed: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(3, 2, 3, 4, generator=child(seed))


@given(st.integers(0, 10_000), st.sampled_from(NORMS), st.floats(0.01, 10), st.floats(0.01, 10))
@example(0, "l1", 2.0, 0.010000000000000002)  # a small radius beside the sum
@settings(max_examples=60, deadline=None)
def test_projections_end_in_the_ball_and_leave_its_inside_alone(
    seed: int, norm: Norm, scale: float, radius: float
) -> None:
    delta = draw(seed, scale)
    out = project(delta, norm, radius)
    assert bool((lengths(out, norm) <= radius * (1 + 1e-4)).all())
    inside = (lengths(delta, norm) <= radius).flatten()
    assert torch.equal(out[inside], delta[inside])
    assert torch.allclose(project(out, norm, radius), out, atol=1e-5 * radius)


def test_the_l1_projection_is_the_nearest_point() -> None:
    point = torch.tensor([2.0, -1.0, 0.5, 0.1])
    found = project(point.view(1, 1, 1, 4), "l1", 1.5).flatten()
    slow = minimize(
        lambda x: float(((torch.tensor(x) - point) ** 2).sum()),
        [0.4, -0.3, 0.2, 0.1],
        constraints={"type": "ineq", "fun": lambda x: 1.5 - sum(map(abs, x))},
    )
    assert found.tolist() == pytest.approx(list(slow.x), abs=1e-3)
    assert found.tolist() == pytest.approx([1.25, -0.25, 0, 0])


def test_no_norm_no_bound() -> None:
    delta = draw(0, 5.0)
    assert torch.equal(project(delta, "none", 0.1), delta)


def test_steepest_directions_have_length_one_and_the_greatest_product() -> None:
    slope = draw(1, 2.0)
    for norm in NORMS:
        direction = steepest(slope, norm)
        assert lengths(direction, norm).flatten().tolist() == pytest.approx([1, 1, 1], abs=1e-5)
        product = (direction * slope).flatten(1).sum(1)
        other: dict[Norm, torch.Tensor] = {
            "linf": slope.flatten(1).abs().sum(1),
            "l2": slope.flatten(1).norm(dim=1),
            "l1": slope.flatten(1).abs().amax(1),
        }
        assert product.tolist() == pytest.approx(other[norm].tolist(), rel=1e-5)  # the dual norm
    assert math.isfinite(float(steepest(torch.zeros(1, 1, 2, 2), "l2").sum()))
