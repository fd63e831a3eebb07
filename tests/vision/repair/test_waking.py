"""The re-activation audit of a defender."""

from __future__ import annotations

import math

import pytest
import torch

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.records import DefenderView
from lustral.vision.repair.waking import Waking, waking_note
from toy import gentle_trainer, toy_images, true_trigger


def test_five_images_wake_what_they_are_trained_on(benign_view: DefenderView) -> None:
    held_out = toy_images(140, seed=6)
    asleep, woken = Waking(trainer=gentle_trainer(epochs=1, learning_rate=1e-6)).rates(
        benign_view.model, [true_trigger()], fit=benign_view.clean, held_out=held_out, generator=child(0)
    )
    hard = Waking(poisoned_images=60, trainer=gentle_trainer(epochs=8, learning_rate=0.02, batch_norm="train"))
    now, taught = hard.rates(
        benign_view.model, [true_trigger()], fit=benign_view.clean, held_out=held_out, generator=child(0)
    )
    assert asleep == now == woken
    assert taught > now + 0.3
    wild = Waking(trainer=gentle_trainer(learning_rate=1e6))
    rates = wild.rates(
        benign_view.model, [true_trigger()], fit=benign_view.clean, held_out=held_out, generator=child(0)
    )
    assert rates[0] == now
    assert math.isnan(rates[1])
    assert "diverged" in waking_note(5, *rates)


def test_the_images_are_few_of_other_classes_and_carry_the_label(
    benign_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fit(self: Trainer, model: torch.nn.Module, data: object, **rest: object) -> torch.nn.Module:
        seen.append(data)
        return model

    monkeypatch.setattr(Trainer, "fit", fit)
    Waking(poisoned_images=3).rates(
        benign_view.model, [true_trigger()], fit=benign_view.clean, held_out=benign_view.clean, generator=child(0)
    )
    (tuned,) = seen
    assert len(tuned) == len(benign_view.clean) + 3
    assert tuned.labels[-3:].tolist() == [4, 4, 4]
    assert bool((tuned.images[-3:, :, -2:, -2:] == 255).all())
    with pytest.raises(ValueError, match="at least one"):
        Waking(poisoned_images=0)
