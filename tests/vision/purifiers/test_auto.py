"""The default eraser: triggers of every kind, networks of every kind, and what it does where a scan named nothing."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.history import HistoryEntry
from lustral.core.randomness import child
from lustral.training import Trainer, TrainingDiverged
from lustral.vision.attacks import BadNets
from lustral.vision.erasing import erase
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import Classifier
from lustral.vision.purifiers.auto import (
    ANYWAY,
    RISING,
    Auto,
    TriggerUnlearning,
    WithoutLabel,
    doubted_labels,
    least_rate,
)
from lustral.vision.records import DefenderView, Evidence, ImageSet, Purified, RecoveredTrigger, Verdict, Victim
from lustral.vision.repair.heads import head_of
from lustral.vision.repair.run import NOTHING_TO_ERASE, PurifyRun
from lustral.vision.repair.selection import Selection, held_out_accuracy, needed_sizes, predicted_labels
from lustral.vision.repair.unused_directions import UnusedDirections
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


class Says:
    """A search that always finds the same triggers, and keeps what it was asked for."""

    def __init__(self, *triggers: Any) -> None:
        self.triggers, self.asked = triggers, list[tuple[int, ...]]()

    def invert(self, view: DefenderView, labels: Any, **_: Any) -> list[Any]:
        self.asked.append(tuple(labels))
        return [trigger for trigger in self.triggers if trigger.target_label in labels]


def quick(**changes: Any) -> Auto:
    settings: dict[str, Any] = {
        "inverter": KnownAnswer(),
        "faint": Says(),
        "trainer": gentle_trainer(batch_norm="train", learning_rate=0.1),
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


def test_a_further_round_that_costs_too_much_is_not_told_of(
    toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(Trainer, "fit", scripted_fit(lambda rate: [len(rates) == 1], rates))
    erased = purify(toy_view.model, named(true_trigger()), inverter=Says(true_trigger()), rounds=2)
    assert rates == pytest.approx([0.1, 0.1, 0.025, 0.00625])  # the second round at ever lower rates
    assert erased.selected is not None
    assert dict(erased.history[erased.selected].parts)["round"] == 1
    assert erased.notes == ("The learning rate was 1.0e-01.",)


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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The damping of every confined step that is taken from now on."""
    dampings: list[float] = []
    confine = UnusedDirections.confine

    def noted(self: UnusedDirections, loss: Tensor, model: nn.Module) -> Tensor:
        dampings.append(self.damping)
        return confine(self, loss, model)

    monkeypatch.setattr(UnusedDirections, "confine", noted)
    return dampings


@pytest.mark.parametrize(("area", "dampings"), [(4.0, [0.02, 0.2, 2.0]), (8.0, [0.02])])
def test_a_round_that_leaves_a_trigger_of_the_size_is_followed_by_a_freer_one(
    area: float, dampings: list[float], toy_view: DefenderView, seen: list[float]
) -> None:
    search = Says(dataclasses.replace(true_trigger(), area=area))  # again and again; the scan's needs 4 pixels
    purify(toy_view.model, named(true_trigger()), inverter=search, rounds=3, damping=0.02)
    assert sorted(set(seen)) == pytest.approx(dampings)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("newly_wrong", "fires", "is_taken"), [(0.0, 0.0, True), (0.01, 0.0, True), (0.02, 0.0, False), (0.0, 0.5, False)]
)
def test_freer_steps_are_taken_where_they_are_harmless(
    newly_wrong: float,
    fires: float,
    is_taken: bool,
    toy_view: DefenderView,
    seen: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def firing(*_: Any) -> float:
        return fires if seen and seen[-1] > 0.5 else 0.0

    monkeypatch.setattr("lustral.vision.purifiers.auto.newly_wrong", lambda *_: newly_wrong)
    monkeypatch.setattr("lustral.vision.repair.selection.firing_rate", firing)
    erased = purify(toy_view.model, named(true_trigger()), damping=0.1, lost=0.01, rate="found")
    assert sorted(set(seen)) == pytest.approx([0.1, 1.0])
    assert erased.selected is not None
    kept = dict(erased.history[erased.selected].parts)
    assert ("damping" in kept) == is_taken
    assert kept["rate_divisor"] in RISING


def test_freer_steps_that_diverge_are_not_taken(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    confine = UnusedDirections.confine

    def diverging(self: UnusedDirections, loss: Tensor, model: nn.Module) -> Tensor:
        if self.damping > 0.5:
            raise TrainingDiverged("not a number")
        return confine(self, loss, model)

    monkeypatch.setattr(UnusedDirections, "confine", diverging)
    erased = purify(toy_view.model, named(true_trigger()), damping=0.1, rate="found")
    assert erased.selected is not None
    assert "damping" not in dict(erased.history[erased.selected].parts)
    assert success(erased.model) < 0.5


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


@pytest.mark.parametrize(
    ("by_rate", "tried", "kept"),
    [
        ({16: (0.9, 0.0), 4: (0.9, 0.0)}, [16, 4], 4),  # silent, and once more
        ({16: (0.9, 0.0), 4: (0.4, 0.0)}, [16, 4], 16),  # once more holds no floor
        ({16: (0.9, 0.0), 4: (0.6, 0.0)}, [16, 4], 4),  # above the floor all are alike
        ({16: (0.9, 0.0), 4: (0.9, 0.03)}, [16, 4], 16),  # once more silences less
        ({16: (0.9, 0.5), 4: (0.9, 0.02), 1: (0.9, 0.0)}, [16, 4, 1], 1),
        ({16: (0.9, 0.5), 4: (0.9, 0.02), 1: None}, [16, 4, 1], 4),  # diverged
        ({16: (0.4, 0.0)}, [16], 16),  # no rate holds the accuracy
        ({16: (0.9, 0.5), 4: (0.4, 0.0)}, [16, 4], 16),
        (dict.fromkeys(RISING, (0.9, 0.5)), list(RISING), RISING[-1]),  # none silences it
    ],
)
def test_rates_rise_until_the_triggers_are_silent_and_once_more(
    by_rate: dict[float, tuple[float, float] | None], tried: list[float], kept: float
) -> None:
    seen: list[float] = []
    watcher = Selection(held_out=small_set(), triggers=(), floor=0.5)

    def train(divisor: float) -> None:
        seen.append(divisor)
        measured = by_rate[divisor]
        if measured is None:
            raise TrainingDiverged("not a number")
        accuracy, fires = measured
        parts = tuple(watcher.parts.items())
        watcher.history.append(HistoryEntry(count=1, clean_accuracy=accuracy, recovered_asr=fires, parts=parts))
        key = (float(accuracy >= watcher.floor), -fires, float(len(watcher.history)))
        if watcher.best is None or key > watcher.best:
            watcher.best, watcher.best_index = key, len(watcher.history) - 1

    assert least_rate(watcher, train) == kept
    assert seen == tried
    assert dict(watcher.history[watcher.best_index].parts)["rate_divisor"] == kept


def test_a_training_that_diverges_at_the_lowest_rate_is_an_error() -> None:
    watcher = Selection(held_out=small_set(), triggers=(), floor=0.5)

    def train(divisor: float) -> None:
        raise TrainingDiverged("not a number")

    with pytest.raises(TrainingDiverged):
        least_rate(watcher, train)


def test_steps_are_confined_to_what_clean_images_do_not_use(toy_view: DefenderView) -> None:
    view = dataclasses.replace(toy_view, verdict=named(true_trigger()))
    student = copy.deepcopy(toy_view.model).eval()
    batch = next(small_set().batches(21))
    with PurifyRun(view=view, holdout=0.2, generator=child(0)) as repair:
        losses = [
            TriggerUnlearning(quick(damping=damping), repair, [true_trigger()])(student, batch, child(5))
            for damping in (None, 0.01)
        ]
        asked = UnusedDirections(view.model, repair.fit, damping=0.01)
    weights = dict(student.named_parameters())
    free, confined = (torch.autograd.grad(loss, list(weights.values())) for loss in losses)
    assert losses[1].item() == pytest.approx(losses[0].item())
    for name, slope, own in zip(weights, free, confined, strict=True):
        assert torch.allclose(own, asked.projected({name: slope})[name], atol=1e-5 * float(slope.abs().max()) + 1e-9), (
            name
        )


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


@pytest.mark.parametrize(("share", "fires", "is_taken"), [(0.5, 1.0, True), (0.2, 1.0, False), (0.5, 0.4, False)])
def test_a_patch_that_stands_for_a_faint_change_gets_it_beside_it(
    share: float, fires: float, is_taken: bool, toy_view: DefenderView
) -> None:
    faint = dataclasses.replace(
        true_trigger(), kind="faint", masks=true_trigger().masks / 2, attack_success_rate=fires
    )  # a quarter of the patch's energy
    search: Any = Says(faint)
    bank = [true_trigger()]
    view = dataclasses.replace(toy_view, verdict=named(true_trigger()))
    with PurifyRun(view=view, holdout=0.2, generator=child(0)) as repair:
        found = quick(faint=search, fainter=share)._fainter(repair, bank)
        assert found == ([faint] if is_taken else [])
        assert search.asked == [(TARGET,)]
        assert quick(faint=search, fainter=share)._fainter(repair, [*bank, faint]) == []  # it has one
        assert quick(faint=search, fainter=0.0)._fainter(repair, bank) == []
        assert search.asked == [(TARGET,)]


def in_doubt(**p_values: float) -> Verdict:
    """A scan that cannot tell, with p-values of labels by "label_4" and the like; its trigger is of the first."""
    labels = {int(name.removeprefix("label_")): p for name, p in p_values.items()}
    evidence = tuple(
        Evidence(measure="mask_area", label=label, value=4.0 + label, p_value=p) for label, p in labels.items()
    )
    trigger = dataclasses.replace(true_trigger(), target_label=next(iter(labels)))
    return dataclasses.replace(named(trigger), outcome="cannot tell", suspect_labels=(), evidence=evidence)


def test_what_a_scan_doubts_is_unlearnt_as_a_precaution(backdoored: Victim) -> None:
    doubt = in_doubt(label_4=0.03, label_1=0.5)
    erased = purify(backdoored.model, doubt)
    assert success(erased.model) < 0.15
    assert accuracy(erased.model) > accuracy(backdoored.model) - 0.03
    assert erased.verdict is doubt
    assert (
        erased.notes[0]
        == "The scan cannot tell, and finds class 4 (p = 0.03) unusual: that was unlearnt as a precaution."
    )
    same = purify(backdoored.model, doubt, doubted=False)
    assert same.selected is None
    assert same.notes == (f"{NOTHING_TO_ERASE} {ANYWAY}",)


def test_who_is_in_doubt() -> None:
    assert doubted_labels(in_doubt(label_4=0.2, label_1=0.5), ()) == ((), ())
    assert doubted_labels(dataclasses.replace(in_doubt(label_4=0.03), outcome="clean"), ()) == ((), ())
    labels, (note,) = doubted_labels(in_doubt(label_3=0.09, label_4=0.002, label_0=0.1, label_1=0.5), list("abcdefg"))
    assert labels == (4, 3)  # the two most unusual
    assert "class e (p = 0.002) and d (p = 0.09) unusual" in note


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
        {"damping": 0.0},
        {"lost": -0.1},
        {"fainter": -1.0},
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
