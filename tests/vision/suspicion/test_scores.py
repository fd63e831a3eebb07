"""The bulk of some values, and scores of one class at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lustral.core.randomness import child
from lustral.vision.suspicion.scores import LEAST_OF_CLASS, Measure, score_by_class, shortest_half, standardise
from vision.sifters.worlds import seen


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=child(seed, "normal"))


def test_the_bulk_of_normal_values_is_their_mean_and_deviation() -> None:
    centre, spread = shortest_half(5 + 3 * normal(20_000))
    assert float(centre) == pytest.approx(5, abs=0.3)
    assert float(spread) == pytest.approx(3, rel=0.05)


def test_a_far_cluster_of_a_third_hardly_moves_the_bulk() -> None:
    values = torch.cat([normal(2000), 30 + normal(1000, seed=1)])
    centre, spread = shortest_half(values)
    assert abs(float(centre)) < 0.4
    assert float(spread) < 2
    assert float(values.median()) > 0.3  # which the median does not do


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 9.0]])
def test_constant_bulks_give_finite_distances(values: list[float]) -> None:
    given_values = torch.tensor(values)
    centre, spread = shortest_half(given_values)
    assert float(centre) == values[0]
    z = standardise(given_values, centre, spread)
    assert bool(torch.isfinite(z).all())
    assert z[0] == 0
    assert values[-1] == values[0] or z[-1] > 1e5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), st.randoms())
def test_the_bulk_hangs_on_no_order_and_moves_with_the_values(values: list[float], random: object) -> None:
    one = torch.tensor(values)
    order = torch.tensor(sorted(range(len(values)), key=lambda i: math.sin(i * 12.9)))
    for a, b in zip(shortest_half(one), shortest_half(one[order]), strict=True):
        assert torch.equal(a, b)
    centre, spread = shortest_half(one)
    assert one.min() <= centre + 1e-3
    assert centre <= one.max() + 1e-3
    assert float(spread) >= 0


def first_feature(features: Tensor) -> Measure:
    """Measure the distance from the first feature's mean."""
    mean = features[:, 0].mean()
    return lambda others: others[:, 0] - mean


def test_each_class_is_measured_by_itself_and_small_ones_get_the_median() -> None:
    labels = torch.tensor([0] * 20 + [1] * (LEAST_OF_CLASS - 1) + [2])
    features = torch.arange(len(labels)).float()[:, None]
    scores, clean, notes = score_by_class(seen(features, labels), None, first_feature)
    torch.testing.assert_close(scores[:20], torch.arange(20) - 9.5)
    assert set(scores[20:].tolist()) == {float(scores[:20].median())}
    assert clean is None
    assert notes == (
        f"{LEAST_OF_CLASS} images are in classes of fewer than {LEAST_OF_CLASS}: this method says nothing of them.",
    )


def test_clean_images_count_where_the_model_is_right_and_the_class_is_known() -> None:
    labels = torch.tensor([0] * 20 + [1])
    clean = seen(torch.arange(4.0)[:, None], torch.tensor([0, 0, 1, 2]))
    clean.logits[1] = torch.tensor([0.0, 1.0, 0.0])
    _, of_clean, _ = score_by_class(seen(torch.zeros(21, 1), labels), clean, first_feature)
    assert of_clean is not None
    assert of_clean.tolist() == [0.0]


def test_classes_that_are_all_small_are_all_neutral() -> None:
    scores, _, _ = score_by_class(seen(torch.rand(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])), None, first_feature)
    assert scores.tolist() == [0.0] * 6
