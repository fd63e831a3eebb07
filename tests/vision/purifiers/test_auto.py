"""The default eraser: triggers of every kind, networks of every kind, and what it does where a scan named nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.attacks import BadNets
from lustral.vision.erasing import erase
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import Classifier
from lustral.vision.purifiers.auto import ANYWAY, Auto, TriggerUnlearning, WithoutLabel, head_of, needed_sizes
from lustral.vision.records import DefenderView, ImageSet, Purified, RecoveredTrigger, Victim
from lustral.vision.repair.run import NOTHING_TO_ERASE, PurifyRun
from lustral.vision.repair.selection import held_out_accuracy, predicted_labels
from toy import (
    KnownAnswer,
    clean_images,
    gentle_trainer,
    mask_verdict,
    scripted_fit,
    toy_images,
    toy_trainer,
    true_trigger,
)

TARGET = 4
AREAS = [4.0 if label == TARGET else 40.0 + label for label in range(7)]


@dataclass(frozen=True)
class Glow:
    """A recovered trigger of another kind, with nothing but what every kind has: it brightens a corner."""

    target_label: int = TARGET
    kind: str = "faint"
    attack_success_rate: float = 0.5

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        added = torch.zeros_like(images)
        added[..., -2:, -2:] = 1
        return (images + added).clamp(0, 1)


def quick(**changes: Any) -> Auto:
    settings: dict[str, Any] = {
        "inverter": KnownAnswer(),
        "trainer": gentle_trainer(batch_norm="train"),
        "generic": WithoutLabel(trainer=gentle_trainer(batch_norm="train", epochs=4)),
        "least_steps": 1,
        "rounds": 1,
        "rate": "given",
    }
    return Auto(**{**settings, **changes})


def named(*triggers: Any) -> Any:
    return mask_verdict(AREAS, (TARGET,), triggers=triggers)


def purify(model: nn.Module, verdict: Any, **changes: Any) -> Purified:
    view = DefenderView(model=model, clean=clean_images(), verdict=verdict)
    return quick(**changes).purify(view, generator=child(1))


def success(model: nn.Module) -> float:
    test = toy_images(420, seed=1)
    others = test.subset(test.labels != TARGET)
    stamped = dataclasses.replace(others, images=as_uint8(true_trigger()(as_float(others.images))))
    return float((predicted_labels(model, stamped) == TARGET).float().mean())


def accuracy(model: nn.Module) -> float:
    return held_out_accuracy(model, toy_images(420, seed=1))


class Plain(nn.Sequential):
    """A network without batch normalisation, with dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(24 * 9, 7),
        )


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = Classifier(Plain(), mean=(0.5,) * 3, std=(0.25,) * 3)
    poisoned = BadNets(target_label=TARGET, size=2, poison_rate=0.1).poison(
        toy_images(1400, seed=0), generator=child(8)
    )
    trainer = toy_trainer(optimizer="adam", learning_rate=3e-3, weight_decay=0.0, epochs=16, augment=None)
    return trainer.fit(model, poisoned.data, generator=child(2))


@pytest.mark.parametrize("triggers", [(true_trigger(),), (Glow(),), (true_trigger(), Glow()), ()])
def test_triggers_of_every_kind_are_unlearnt(triggers: tuple[Any, ...], backdoored: Victim) -> None:
    verdict = named(*triggers)  # without any, the inverter searches
    erased = purify(backdoored.model, verdict)
    assert success(backdoored.model) > 0.95
    assert success(erased.model) < 0.15
    assert accuracy(erased.model) > accuracy(backdoored.model) - 0.05
    assert erased.verdict is verdict
    assert erased.selected is not None
    kept = erased.history[erased.selected]
    assert kept.recovered_asr is not None
    assert kept.recovered_asr < 0.1
    assert erased.given is not None


@pytest.mark.parametrize("rate", ["found", "given"])
def test_networks_without_batch_normalisation_and_with_dropout(rate: str, plain: nn.Module) -> None:
    erased = purify(plain, named(true_trigger()), rate=rate, rounds=2)
    assert success(plain) > 0.9
    assert success(erased.model) < 0.15
    assert accuracy(erased.model) > accuracy(plain) - 0.05
    assert erased.model.state_dict().keys() == plain.state_dict().keys()


def test_nothing_named_is_nothing_changed_unless_asked(plain: nn.Module, backdoored: Victim) -> None:
    nothing = mask_verdict([40.0 + label for label in range(7)])
    for model in (plain, backdoored.model):
        same = purify(model, nothing)
        before, after = model.state_dict(), same.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert (same.selected, same.history, same.verdict) == (None, (), nothing)
        assert same.notes == (f"{NOTHING_TO_ERASE} {ANYWAY}",)
        trained = purify(model, nothing, anyway=True)
        assert trained.selected is not None
        assert not all(torch.equal(trained.model.state_dict()[name], value) for name, value in before.items())
        assert accuracy(trained.model) > accuracy(model) - 0.12
        assert "without one" in trained.notes[0]
        measured = trained.history[trained.selected].clean_accuracy
        assert measured is not None
        assert trained.verdict is nothing


def test_a_costly_repair_is_taken_part_of_the_way_back(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", scripted_fit(lambda rate: [False], []))
    erased = purify(toy_view.model, named(true_trigger()))
    assert erased.selected == len(erased.history) - 1
    kept = erased.history[erased.selected]
    share = dict(kept.parts)["share"]
    assert 0 <= share < 1
    assert kept.clean_accuracy is not None
    assert erased.given is not None
    assert erased.given.clean_accuracy is not None
    assert kept.clean_accuracy > erased.given.clean_accuracy - 0.06  # 1.5 points and a standard error of 56 images
    assert max(entry.clean_accuracy or 0 for entry in erased.history[1:-1]) < 0.5
    told = " ".join(erased.notes)
    assert "of the way from the given" in told or "given weights were kept" in told


def test_rounds_end_when_a_fresh_search_needs_far_more(toy_view: DefenderView) -> None:
    class Growing(KnownAnswer):
        """Needs ten times the area of the first search, then more."""

        calls: int = 0

        def invert(self, *_: Any, **__: Any) -> list[RecoveredTrigger]:
            type(self).calls += 1
            return [dataclasses.replace(true_trigger(), area=10.0 * self.calls)]

    erased = purify(toy_view.model, named(true_trigger()), inverter=Growing(), rounds=5, grown=4.0)
    assert Growing.calls == 2  # 10 pixels are not four times 4; 20 are
    assert {dict(entry.parts).get("round") for entry in erased.history[1:]} == {1, 2}
    assert "After round 2 fresh searches needed 4 times" in " ".join(erased.notes)


def test_the_reactivation_audit_is_said_when_asked_for(toy_view: DefenderView) -> None:
    verdict = named(true_trigger())
    quiet, told = (purify(toy_view.model, verdict, reactivate=asked) for asked in (False, True))
    assert not any("Tuned on the clean images" in note for note in quiet.notes)
    (note,) = (note for note in told.notes if "Tuned on the clean images" in note)
    assert "5 with a recovered trigger" in note
    assert told.cost.image_passes > quiet.cost.image_passes
    same, other = quiet.model.state_dict(), told.model.state_dict()
    assert all(torch.equal(same[name], value) for name, value in other.items())


def test_a_verdict_handed_over_is_used_and_its_labels_alone(toy_view: DefenderView) -> None:
    elsewhere = dataclasses.replace(true_trigger(), target_label=1)
    view = dataclasses.replace(toy_view, verdict=named(elsewhere, true_trigger()))
    erased = erase(quick(), view, detector=None, audit=False, generator=child(1))
    alone = erase(
        quick(),
        dataclasses.replace(toy_view, verdict=named(true_trigger())),
        detector=None,
        audit=False,
        generator=child(1),
    )
    one, other = erased.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert any("handed over" in note for note in erased.notes)


def small_set() -> ImageSet:
    return toy_images(21, seed=3)


def test_the_loss_against_a_plain_formula(toy_view: DefenderView) -> None:
    view = dataclasses.replace(toy_view, verdict=named(true_trigger()))
    settings = quick(path_share=0.0, distil_weight=2.0, relearn_weight=0.5)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7)).eval()
    batch = next(small_set().batches(21))
    with PurifyRun(view=view, holdout=0.2, generator=child(0)) as repair:
        got = TriggerUnlearning(settings, repair, [true_trigger()])(student, batch, child(5))
    x, y = batch.inputs, batch.labels
    rows = y != TARGET
    log_f, log_0 = student(x).log_softmax(1), toy_view.model(x).float().log_softmax(1)
    held = (log_0.exp() * (log_0 - log_f)).sum(1).mean()
    stamped = student(true_trigger()(x[rows])).log_softmax(1)
    asked = log_0[rows]  # what the received model says without the trigger
    silent = (asked.exp() * (asked - stamped)).sum(1).mean()
    assert got.item() == pytest.approx(float((2.0 * held + 0.5 * silent).detach()), rel=2e-2)  # bfloat16 of the teacher


def test_what_triggers_need_is_area_or_energy() -> None:
    weak, black = dataclasses.replace(true_trigger(), attack_success_rate=0.5), small_set()
    black = dataclasses.replace(black, images=torch.zeros_like(black.images))
    assert needed_sizes([true_trigger(), weak], black) == {(TARGET, "patch"): 4.0}
    assert needed_sizes([weak], black) == {(TARGET, "patch"): 8.0}
    glow: Any = Glow()
    assert needed_sizes([glow, weak], black) == {
        (TARGET, "faint"): 8.0,
        (TARGET, "patch"): 8.0,
    }  # 4 pixels on half of them


def test_each_kind_is_searched_again_by_its_own_search(toy_view: DefenderView) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    class Named(KnownAnswer):
        """Says who was asked for which labels, and returns a trigger of its kind that needs as much as before."""

        def __init__(self, kind: Any) -> None:
            self.kind = kind

        def invert(self, view: DefenderView, labels: Any, **_: Any) -> list[RecoveredTrigger]:
            asked.append((self.kind, tuple(labels)))
            return [dataclasses.replace(true_trigger(), kind=self.kind)]

    searches: Any = {"inverter": Named("patch"), "faint": Named("faint"), "rounds": 2}
    purify(toy_view.model, named(true_trigger(), Glow()), **searches)
    assert asked == [("patch", (TARGET,)), ("faint", (TARGET,))]
    asked.clear()
    purify(toy_view.model, named(Glow()), **searches)
    assert asked == [("faint", (TARGET,))]


def test_a_network_without_a_linear_head_has_none(plain: nn.Module) -> None:
    assert head_of(plain, torch.rand(2, 3, 12, 12)) == "network.7"
    pooled = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert head_of(pooled, torch.rand(2, 3, 12, 12)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"grown": 0.0},
        {"relearn_weight": -1.0},
        {"path_share": 1.5},
        {"back": -0.1},
        {"holdout": 1.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Auto(**wrong)
    with pytest.raises(ValueError, match="rho > 0"):
        WithoutLabel(rho=0.0)
