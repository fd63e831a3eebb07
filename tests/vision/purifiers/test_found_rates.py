"""Methods that look for their learning rate on the network: what is tried, and what they then train at."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.randomness import child
from lustral.training import EpochReport, Trainer
from lustral.vision.purifiers import IBAU, SAU, TSBD, Mesa, NeuralPolarizer
from lustral.vision.records import DefenderView
from lustral.vision.repair.rates import LADDER
from toy import mask_verdict, true_trigger

FINDING = "finding a learning rate"
METHODS: dict[str, tuple[Callable[..., Any], str]] = {  # with the stage that is then trained
    "i_bau": (lambda **rest: IBAU(relative_rate=None, **rest), "unlearning"),
    "mesa": (Mesa, "retraining"),
    "neural_polarizer": (lambda **rest: NeuralPolarizer(initial="identity", **rest), "polarizing"),
    "sau": (lambda **rest: SAU(relative_rate=None, **rest), "unlearning"),
    "tsbd": (lambda **rest: TSBD(neuron_ratios=(0.3,), **rest), "fine-tuning"),
}


def scripted(monkeypatch: pytest.MonkeyPatch, bears: float) -> list[tuple[str, float]]:
    """Let trials at more than ``bears`` forget everything and other trainings do nothing; return (stage, rate) of all."""
    calls: list[tuple[str, float]] = []

    def fit(self: Trainer, model: nn.Module, data: Any, *, stage: str, on_epoch: Any = None, **rest: Any) -> nn.Module:
        calls.append((stage, self.learning_rate))
        trained = copy.deepcopy(model).eval()
        if stage == FINDING and self.learning_rate > bears:
            for parameter in trained.parameters():
                nn.init.zeros_(parameter)
        if on_epoch is not None:
            on_epoch(EpochReport(epoch=1, epochs=1, loss=0.5, images_per_second=1.0, model=trained))
        return trained

    monkeypatch.setattr(Trainer, "fit", fit)
    return calls


def view_of(toy_view: DefenderView) -> DefenderView:
    verdict = mask_verdict([4.0 if label == 4 else 40.0 for label in range(7)], (4,), triggers=(true_trigger(),))
    return dataclasses.replace(toy_view, verdict=verdict)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("factor", [4.0, 1.0, 1 / 8])
def test_the_rate_that_is_found_is_trained_at(
    name: str, factor: float, toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, stage = METHODS[name]
    method = make(rate="found")
    rate = method.trainer.learning_rate
    calls = scripted(monkeypatch, bears=1.01 * factor * rate)
    found = method.purify(view_of(toy_view), generator=child(1))
    tried = [tested for told, tested in calls if told == FINDING]
    assert len(tried) == 3
    assert all(min(abs(tested - step * rate) for step in LADDER) < 1e-9 for tested in tried)
    assert {round(trained / rate, 6) for told, trained in calls if told == stage} == {factor}
    assert any("found on the held-out images" in note for note in found.notes) == (factor != 1)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_given_rate_is_not_looked_for(name: str, toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    make, stage = METHODS[name]
    calls = scripted(monkeypatch, bears=0.0)
    make(rate="given").purify(view_of(toy_view), generator=child(1))
    assert FINDING not in {told for told, _ in calls}
    assert stage in {told for told, _ in calls}
    with_published = (IBAU(rate="found"), NeuralPolarizer(rate="found"), SAU(rate="found"))
    assert {method.published().rate for method in with_published} == {"given"}


def test_a_real_polarizer_finds_its_rate_with_everything_else_frozen(toy_view: DefenderView) -> None:
    before = {name: value.clone() for name, value in toy_view.model.state_dict().items()}
    short = Trainer(epochs=1, batch_size=64, learning_rate=0.005, schedule="constant")
    found = NeuralPolarizer(trainer=short, least_steps=2, rate="found").purify(toy_view, generator=child(1))
    assert found.model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in toy_view.model.state_dict().items())
