"""A learning rate found by trying, on scripted trainings and a real one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.cost import CostMeter
from lustral.core.randomness import child
from lustral.training import Trainer, TrainingDiverged
from lustral.vision.records import DefenderView
from lustral.vision.repair.rates import LADDER, FoundRate, find_rate, first_passing
from passes import counting
from toy import clean_images, toy_images, toy_trainer


@pytest.mark.parametrize("count", range(9))
def test_bisection_finds_the_first_that_passes(count: int) -> None:
    for first in range(count + 1):
        asked: list[int] = []

        def passes(index: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(index)
            return index >= first

        assert first_passing(count, passes) == first
        assert len(asked) <= math.ceil(math.log2(count + 1))


def scripted(monkeypatch: pytest.MonkeyPatch, bears: float, diverges: float = math.inf) -> list[Trainer]:
    """Let trainings at more than ``bears`` forget everything, at ``diverges`` and more diverge; return what was asked for."""
    asked: list[Trainer] = []

    def fit(self: Trainer, model: nn.Module, data: Any, **rest: Any) -> nn.Module:
        asked.append(self)
        if self.learning_rate >= diverges:
            raise TrainingDiverged("scripted")
        if self.learning_rate <= bears:
            return model
        blank = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7))
        nn.init.zeros_(blank[1].weight)
        return blank

    monkeypatch.setattr(Trainer, "fit", fit)
    return asked


def search(view: DefenderView, trainer: Trainer, **rest: Any) -> FoundRate:
    return find_rate(view.model, trainer, view.clean, view.clean, generator=child(1), **rest)


@pytest.mark.parametrize("bears", [2.0, 0.41, 0.4, 0.1, 0.013, 0.001])
def test_the_largest_rate_that_keeps_the_accuracy_is_found(
    bears: float, monkeypatch: pytest.MonkeyPatch, toy_view: DefenderView
) -> None:
    trainer = toy_trainer(schedule="cosine", epochs=9)
    asked = scripted(monkeypatch, bears, diverges=0.5)
    found = search(toy_view, trainer)
    rates = [0.1 * factor for factor in LADDER]
    wanted = [rate for rate in rates if rate <= bears and rate < 0.5]
    assert found.trainer.learning_rate == pytest.approx(max(wanted, default=min(rates)))
    assert found.holds == bool(wanted)
    assert len(found.tried) == len(asked) <= 3
    assert (found.trainer.epochs, found.trainer.schedule, found.asked) == (9, "cosine", 0.1)
    assert {trial.schedule for trial in asked} == {"constant"}
    assert all(math.isnan(accuracy) == (rate >= 0.5) for rate, accuracy in found.tried)
    assert bool(found.notes) == (found.trainer.learning_rate != 0.1 or not found.holds)


@pytest.mark.parametrize(("images", "steps"), [(280, 2), (280, 20), (20, 5)])
def test_a_try_takes_its_steps(
    images: int, steps: int, monkeypatch: pytest.MonkeyPatch, toy_view: DefenderView
) -> None:
    taken: list[int] = []

    def fit(self: Trainer, model: nn.Module, data: Any, **rest: Any) -> nn.Module:
        taken.append(self.epochs * max(len(data) // self.batch_size, 1))
        return model

    monkeypatch.setattr(Trainer, "fit", fit)
    clean = clean_images(images)
    find_rate(toy_view.model, toy_trainer(), clean, clean, generator=child(1), steps=steps, ladder=(1.0,))
    assert steps <= taken[0] <= steps + 4
    with pytest.raises(ValueError, match="falling factors"):
        search(toy_view, toy_trainer(), ladder=(1.0, 2.0))
    with pytest.raises(ValueError, match="steps >= 1"):
        search(toy_view, toy_trainer(), steps=0)


def test_a_real_network_bears_no_giant_step_and_is_left_alone(toy_view: DefenderView) -> None:
    before = {name: value.clone() for name, value in toy_view.model.state_dict().items()}
    trainer, held_out = toy_trainer(learning_rate=1.0, augment=None), toy_images(140, seed=5)
    with counting(held_out.image_shape) as thirds, CostMeter(toy_view.model, clean_images=280) as meter:
        found = find_rate(
            toy_view.model, trainer, toy_view.clean, held_out, generator=child(1), ladder=(1000.0, 1e-2, 1e-5), steps=5
        )
    assert found.trainer.learning_rate < 1000
    assert found.holds
    assert found.tried[0][0] == pytest.approx(1e-2)  # the middle first
    assert meter.cost.image_passes == pytest.approx(thirds[0] / 3)
    again = find_rate(
        toy_view.model, trainer, toy_view.clean, held_out, generator=child(1), ladder=(1000.0, 1e-2, 1e-5), steps=5
    )
    assert repr(again.tried) == repr(found.tried)
    assert all(torch.equal(before[name], value) for name, value in toy_view.model.state_dict().items())
