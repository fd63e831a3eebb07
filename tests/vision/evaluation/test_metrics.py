"""Metrics against hand arithmetic, their edge cases, and properties that must always hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.rates import Rate, wilson_interval
from lustral.vision.evaluation.metrics import (
    accuracy,
    attack_metrics,
    clean_accuracy,
    der,
    per_class_accuracy,
    predict,
    rir,
)
from lustral.vision.records import ImageSet

fractions = st.floats(0, 1)


class BrightestPixel(nn.Module):
    """Classifies a (B, 1, 2, 2) image by its brightest pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def brightest_pixel_set(pixels: list[int], labels: list[int]) -> ImageSet:
    images = torch.zeros(len(pixels), 4, dtype=torch.uint8)
    images[torch.arange(len(pixels)), torch.tensor(pixels, dtype=torch.int64)] = 100
    return ImageSet(images=images.view(-1, 1, 2, 2), labels=torch.tensor(labels, dtype=torch.int64), num_classes=4)


def light_up_pixel_3(images: Tensor, *, generator: Generator | None = None) -> Tensor:
    triggered = images.clone()
    triggered[..., 1, 1] = torch.where(images[..., 0, 0] > 0.3, images[..., 1, 1], 1.0)  # class 0 resists
    return triggered


def all_to_3(labels: Tensor, num_classes: int) -> Tensor:
    return torch.full_like(labels, 3)


def test_wilson_interval_by_hand() -> None:
    # n = 10, p = 0.9, z² = 3.8416: centre (0.9 + 0.19208) / 1.38416, half 1.96 / 1.38416 √(0.009 + 0.009604)
    assert wilson_interval(9, 10) == pytest.approx((0.788984 - 0.193140, 0.788984 + 0.193140), abs=2e-6)
    assert wilson_interval(0, 100) == pytest.approx((0.0, 3.8416 / 103.8416))
    assert wilson_interval(100, 100) == pytest.approx((1 - 3.8416 / 103.8416, 1.0))
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))


@given(st.integers(1, 10**6), fractions)
def test_wilson_interval_contains_the_estimate_and_stays_in_bounds(total: int, share: float) -> None:
    rate = Rate(round(share * total), total)
    low, high = rate.interval
    assert 0 <= low <= rate.value <= high <= 1
    assert low < high


def test_rate_of_nothing_is_nan_and_null_in_json() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).to_dict() == {"value": None, "low": None, "high": None, "hits": 0, "n": 0}


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="hits"):
        Rate(hits, total)


def test_der_and_rir_by_hand() -> None:
    assert der(0.92, 0.99, 0.90, 0.01) == pytest.approx((0.98 - 0.02 + 1) / 2)
    assert der(0.90, 0.50, 0.95, 0.80) == 0.5  # gains in accuracy and rises of ASR are clipped
    assert der(1.0, 0.0, 0.0, 0.0) == 0.0
    assert rir(0.92, 0.01, 0.90, 0.85) == pytest.approx((0.84 - 0.02 + 1) / 2)
    assert rir(0.90, 0.50, 0.95, 0.10) == 0.5


@given(fractions, fractions, fractions, fractions)
def test_ratings_stay_in_bounds(acc0: float, other0: float, acc1: float, other1: float) -> None:
    assert 0 <= der(acc0, other0, acc1, other1) <= (1 + other0) / 2 + 1e-9
    assert 0 <= rir(acc0, other0, acc1, other1) <= 1


@pytest.mark.parametrize("place", range(4))
def test_nan_spreads_through_the_ratings(place: int) -> None:
    values = [0.5, 0.5, 0.5, 0.5]
    values[place] = math.nan
    assert math.isnan(der(*values))
    assert math.isnan(rir(*values))


def test_percent_is_refused() -> None:
    with pytest.raises(ValueError, match="not percent"):
        der(92.0, 0.99, 0.9, 0.01)


@pytest.mark.parametrize("batch_size", [1, 2, 512])
def test_predict_keeps_the_order_for_any_batch_size(batch_size: int) -> None:
    data = brightest_pixel_set([2, 0, 3, 1, 1], [0, 0, 0, 0, 0])
    assert predict(BrightestPixel(), data, batch_size).tolist() == [2, 0, 3, 1, 1]


def test_predict_restores_modes_and_uses_evaluation_mode_without_autocast() -> None:
    seen: list[Any] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.linear = nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.linear(self.norm(images).flatten(1))
            seen.append((self.training, self.norm.training, logits.dtype, torch.is_inference_mode_enabled()))
            return logits

    model = Spy()
    model.norm.eval()
    statistics = model.norm.running_mean
    assert statistics is not None
    before = statistics.clone()
    with torch.autocast("cpu", torch.bfloat16):
        predict(model, brightest_pixel_set([0, 1], [0, 1]))
    assert seen == [(False, False, torch.float32, True)]
    assert model.training
    assert model.linear.training
    assert not model.norm.training
    assert torch.equal(statistics, before)


def test_modes_are_restored_when_the_model_raises() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ArithmeticError("broken on purpose")

    model = Broken().train()
    with pytest.raises(ArithmeticError):
        predict(model, brightest_pixel_set([0], [0]))
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_marked(value: float) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = images.flatten(1).clone()
            logits[0, 2] = value
            return logits

    assert predict(Broken(), brightest_pixel_set([1, 1], [1, 1])).tolist() == [-1, 1]


def test_ties_go_to_the_lowest_label() -> None:
    data = ImageSet(
        images=torch.zeros(3, 1, 2, 2, dtype=torch.uint8), labels=torch.zeros(3, dtype=torch.int64), num_classes=4
    )
    assert predict(BrightestPixel(), data).tolist() == [0, 0, 0]


def test_accuracy_and_per_class_accuracy_by_hand() -> None:
    data = brightest_pixel_set([0, 1, 1, 3], [0, 0, 1, 3])
    assert clean_accuracy(BrightestPixel(), data) == Rate(3, 4)
    rates = per_class_accuracy(predict(BrightestPixel(), data), data.labels, 4)
    assert rates == (Rate(1, 2), Rate(1, 1), Rate(0, 0), Rate(1, 1))
    assert math.isnan(rates[2].value)
    with pytest.raises(ValueError, match="one prediction per label"):
        accuracy(torch.zeros(2), torch.zeros(3))


def test_attack_metrics_by_hand() -> None:
    # attackable: the first four; class 0 resists, classes 1 and 2 fall; one of class 2 looks like 3 anyway
    data = brightest_pixel_set([0, 1, 2, 3, 3, 3], [0, 1, 2, 2, 3, 3])
    result = attack_metrics(BrightestPixel(), data, light_up_pixel_3, all_to_3, generator=child(0))
    assert result.attack_success_rate == Rate(3, 4)
    assert result.robust_accuracy == Rate(1, 4)
    assert result.natural_rate == Rate(1, 4)
    assert result.num_non_finite == 0
    known = attack_metrics(
        BrightestPixel(),
        data,
        light_up_pixel_3,
        all_to_3,
        generator=child(0),
        clean_predictions=predict(BrightestPixel(), data),
    )
    assert known == result


def test_triggered_images_are_rounded_to_8_bits() -> None:
    def below_half_a_step(images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return images + 0.001

    class AnyLight(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            lit = (images.flatten(1).amax(1) > 0).float()
            return torch.stack([1 - lit, lit], 1)

    dark = ImageSet(
        images=torch.zeros(5, 1, 2, 2, dtype=torch.uint8), labels=torch.zeros(5, dtype=torch.int64), num_classes=2
    )
    result = attack_metrics(
        AnyLight(), dark, below_half_a_step, lambda labels, _: torch.ones_like(labels), generator=child(0)
    )
    assert result.attack_success_rate == Rate(0, 5)


def test_nothing_attackable_is_nan_with_a_count_of_zero() -> None:
    data = brightest_pixel_set([3, 3], [3, 3])
    result = attack_metrics(BrightestPixel(), data, light_up_pixel_3, all_to_3, generator=child(0))
    assert result.attack_success_rate == result.robust_accuracy == result.natural_rate == Rate(0, 0)


def test_a_broken_model_gets_no_silent_credit() -> None:
    class NotANumber(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * math.nan

    data = brightest_pixel_set([0, 1, 3], [0, 1, 3])
    result = attack_metrics(NotANumber(), data, light_up_pixel_3, all_to_3, generator=child(0))
    assert result.attack_success_rate == result.robust_accuracy == Rate(0, 2)
    assert result.num_non_finite == 2


def test_relabel_of_the_wrong_shape_is_explained() -> None:
    with pytest.raises(ValueError, match="relabel"):
        attack_metrics(
            BrightestPixel(),
            brightest_pixel_set([0, 1], [0, 1]),
            light_up_pixel_3,
            lambda labels, _: labels[:1],
            generator=child(0),
        )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_attack_success_and_robust_accuracy_never_exceed_one_together(rows: list[tuple[int, int]]) -> None:
    data = brightest_pixel_set([pixel for pixel, _ in rows], [label for _, label in rows])
    result = attack_metrics(BrightestPixel(), data, light_up_pixel_3, all_to_3, generator=child(0))
    success, robust = result.attack_success_rate, result.robust_accuracy
    assert success.total == robust.total == sum(label != 3 for _, label in rows)
    assert success.hits + robust.hits <= success.total
