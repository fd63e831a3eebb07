"""Waking models up: what the checks find on models that are asleep, awake and cured."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.randomness import child, fork
from lustral.training import Trainer
from lustral.vision.evaluation import Reactivation, resistance
from lustral.vision.evaluation.reactivation import Push, interpolated, joined, triggered_images
from lustral.vision.purifiers import BNRefresh
from lustral.vision.records import DefenderView, ImageSet, Victim
from toy import gentle_trainer, toy_images

QUICK = Reactivation(
    clean_share=0.2,
    trainer=gentle_trainer(epochs=3),
    clean_epochs=3,
    push_images=60,
    push_trainer=Trainer(epochs=4, batch_size=32, learning_rate=0.05, schedule="constant", channels_last=False),
    hidden=32,
    path=(0.0, 0.5, 1.0),
)


@pytest.fixture(scope="module")
def refreshed(backdoored: Victim) -> nn.Module:
    """A 'purification' that did nothing but refresh statistics: the backdoor is wide awake."""
    view = DefenderView(model=backdoored.model, clean=toy_images(280, seed=2))
    return BNRefresh().purify(view, generator=child(0)).model


@pytest.fixture(scope="module")
def checks(backdoored: Victim, refreshed: nn.Module, benign: Victim) -> dict[str, Any]:
    """The checks on it."""
    return QUICK.audit(
        backdoored,
        refreshed,
        benign=benign.model,
        train=toy_images(1400, seed=0),
        test=toy_images(210, seed=1),
        generator=child(1),
    )


def test_controls_can_be_shared_by_the_audits_of_a_victim(
    checks: dict[str, Any], backdoored: Victim, refreshed: nn.Module, benign: Victim
) -> None:
    sets: dict[str, Any] = {"train": toy_images(1400, seed=0), "test": toy_images(210, seed=1)}
    stream = fork(child(1), "controls")
    controls = QUICK.controls(backdoored, benign=benign.model, **sets, generator=stream)
    assert set(controls.rates) == {"before", "retuned", "retuned_clean"}
    given = QUICK.audit(backdoored, refreshed, benign=benign.model, **sets, generator=child(1), controls=controls)
    assert given == checks


def test_an_awake_backdoor_has_no_resistance(checks: dict[str, Any]) -> None:
    assert checks["retuned"]["purified"]["asr"] > 0.9
    assert checks["resistance"] < 0.2


def test_the_controls_have_nothing_to_wake(checks: dict[str, Any]) -> None:
    for check in ("before", "retuned", "retuned_clean"):
        assert checks[check]["benign"]["asr"] < 0.3
        assert checks[check]["exact"]["asr"] < 0.3
        assert checks[check]["exact"]["acc"] > 0.9


def test_the_path_ends_at_the_backdoored_model(checks: dict[str, Any]) -> None:
    shares = [point["share"] for point in checks["path"]]
    assert shares == [0.0, 0.5, 1.0]
    assert checks["path"][-1]["asr"] > 0.9
    assert checks["path"][-1]["acc"] > 0.9


def test_the_path_is_measured_on_some_test_images(
    backdoored: Victim, refreshed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    whole = Reactivation.rates

    def counted(victim: Victim, model: nn.Module, test: ImageSet, generator: torch.Generator) -> Any:
        counts.append(len(test))
        return whole(victim, model, test, generator)

    monkeypatch.setattr(Reactivation, "rates", staticmethod(counted))
    replace(QUICK, path_images=70).audit(
        backdoored,
        refreshed,
        benign=refreshed,
        train=toy_images(1400, seed=0),
        test=toy_images(210, seed=1),
        generator=child(1),
    )
    assert counts[-3:] == [70, 70, 70]
    assert set(counts[:-3]) == {210}


def test_every_model_is_pushed(checks: dict[str, Any]) -> None:
    assert set(checks["pushed"]) == {"purified", "benign", "exact"}
    assert all(0 <= rate <= 1 for rates in checks["pushed"].values() for rate in rates.values())


def test_resistance_says_nothing_where_the_benign_model_falls_too() -> None:
    assert math.isnan(resistance(0.99, 0.95))
    assert resistance(0.05, 0.1) > 1


def test_triggered_images_leave_out_the_target_class(backdoored: Victim) -> None:
    clean = toy_images(70, seed=3)
    poisoned = triggered_images(backdoored, clean, poisoned=True, generator=child(0))
    cured = triggered_images(backdoored, clean, poisoned=False, generator=child(0))
    assert len(poisoned) == len(cured) == 60
    assert set(poisoned.labels.tolist()) == {4}
    assert 4 not in cured.labels
    assert torch.equal(poisoned.images, cured.images)
    assert len(joined(clean, cured)) == 130


def test_interpolation_ends_at_both_models_and_changes_neither() -> None:
    clean = toy_images(64, seed=0)
    one, other = (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(200, 7)) for _ in range(2)
    )
    before = copy.deepcopy((one.state_dict(), other.state_dict()))
    middle = interpolated(one, other, 0.25, clean)
    for name, value in dict(middle.named_parameters()).items():
        expected = 0.75 * before[0][name] + 0.25 * before[1][name]
        assert torch.allclose(value, expected)
    norm = middle[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.momentum == 0.1
    with torch.no_grad():
        features = middle[0](clean.images.float() / 255)
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, features.mean((0, 2, 3)), atol=1e-5)
    for model, state in zip((one, other), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_push_is_bounded_and_drawn_from_its_seed() -> None:
    images = torch.rand(4, 3, 5, 5, generator=child(0))
    push = Push((3, 5, 5), 0.1, 8, seed=3)
    moved = push(images)
    assert moved.shape == images.shape
    assert float((moved - images).detach().abs().max()) <= 0.1 + 1e-6
    assert torch.equal(moved, Push((3, 5, 5), 0.1, 8, seed=3)(images))
    assert sum(isinstance(layer, nn.Linear) for layer in push.layers) == 4


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"clean_share": 0.0}, {"poisoned_images": 0}, {"push_images": 0}, {"path_images": 0}):
        with pytest.raises(ValueError, match="expected"):
            Reactivation(**wrong)
