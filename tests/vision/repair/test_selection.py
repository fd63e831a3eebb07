"""Choosing weights by what a defender can measure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lustral.core.history import HistoryEntry
from lustral.training import EpochReport, TrainingDiverged
from lustral.vision.records import ImageSet, RecoveredTrigger
from lustral.vision.repair import selection
from lustral.vision.repair.selection import (
    Selection,
    accuracy_up_to,
    held_out_accuracy,
    natural_rate,
    newly_wrong,
    retry_at_lower_rates,
    retry_notes,
)


class Scripted(nn.Module):
    """A model that only carries numbers to be read by the patched measurements."""

    def __init__(self, accuracy: float, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.accuracy, self.rates = accuracy, rates


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(model: nn.Module, held_out: ImageSet) -> float:
        return model.accuracy if isinstance(model, Scripted) else held_out_accuracy(model, held_out)

    def rate(model: Scripted, held_out: ImageSet, trigger: RecoveredTrigger) -> float:
        return model.rates[trigger.target_label]

    monkeypatch.setattr(selection, "held_out_accuracy", accuracy)
    monkeypatch.setattr(selection, "firing_rate", rate)
    monkeypatch.setattr(selection, "natural_rate", lambda model, held_out, label: 0.02)


def held_out() -> ImageSet:
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[2:] = 255
    return ImageSet(images=images, labels=torch.tensor([0, 0, 1, 0]), num_classes=2)


def trigger(label: int) -> RecoveredTrigger:
    zeros = torch.zeros(1, 1, 2, 2)
    return RecoveredTrigger(
        target_label=label, masks=zeros, patterns=zeros, area=0.0, attack_success_rate=0.0, entropy=0.0
    )


def choose(epochs: list[tuple[float, tuple[float, ...]]], num_triggers: int = 1) -> int:
    watcher = Selection(held_out=held_out(), triggers=[trigger(i) for i in range(num_triggers)], floor=0.9)
    models = [Scripted(accuracy, rates) for accuracy, rates in epochs]
    for number, model in enumerate(models):
        watcher.watch(EpochReport(epoch=number + 1, epochs=len(models), loss=0.5, images_per_second=1.0, model=model))
    assert len(watcher.history) == len(models)
    assert isinstance(watcher.best_model, Scripted)
    chosen = models[watcher.best_index]
    assert (watcher.best_model.accuracy, watcher.best_model.rates) == (chosen.accuracy, chosen.rates)
    assert watcher.best_model is not chosen  # a copy: training goes on
    assert not watcher.best_model.training
    return watcher.best_index


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.95, (0.4,)), (0.92, (0.1,)), (0.93, (0.3,))], 1),  # fires least
        ([(0.92, (0.4,)), (0.89, (0.0,)), (0.91, (0.5,))], 0),  # fires least among those above the floor
        ([(0.95, (0.100,)), (0.91, (0.101,))], 1),  # a tie: the last
        ([(0.95, (0.02,)), (0.91, (0.0,)), (0.93, (0.05,))], 1),  # below the natural rate is no better than at it
        ([(0.80, (0.0,)), (0.85, (0.9,)), (0.82, (0.1,))], 1),  # none above the floor: the most accurate
        ([(0.80, (0.0,)), (0.90, (1.0,))], 1),  # the floor itself is enough
    ],
)
def test_choices_by_hand(epochs: list[tuple[float, tuple[float, ...]]], best: int) -> None:
    assert choose(epochs) == best


def test_the_worst_of_several_triggers_counts() -> None:
    assert choose([(0.95, (0.0, 0.6)), (0.95, (0.3, 0.3))], num_triggers=2) == 1


def test_without_triggers_accuracy_decides() -> None:
    assert choose([(0.91, ()), (0.97, ()), (0.93, ())], num_triggers=0) == 1


def test_history_is_what_was_measured() -> None:
    watcher = Selection(held_out=held_out(), triggers=[trigger(0)], floor=0.5, parts={"round": 3})
    watcher.measure(Scripted(0.7, (0.25,)), HistoryEntry(count=2, loss=0.1))
    rates = {"recovered_asr": 0.25, "natural_rate": 0.02}
    (entry,) = watcher.history
    assert entry.to_dict() == {"round": 3, "epoch": 2, "loss": 0.1, "clean_accuracy": 0.7, **rates}


@pytest.mark.parametrize(
    ("accuracies", "first", "tried", "said"),
    [
        ({1.0: 0.95}, 1.0, [1.0], ()),
        ({1.0: 0.5, 4.0: 0.95}, 1.0, [1.0, 4.0], ("divided by 4",)),
        ({1.0: 0.5, 4.0: 0.6, 16.0: 0.7}, 1.0, [1.0, 4.0, 16.0], ("divided by 16", "fell by more than 2 points")),
        ({4.0: 0.5, 16.0: 0.95}, 4.0, [4.0, 16.0], ("divided by 16",)),  # a later round begins where one before ended
    ],
)
def test_a_rate_that_costs_too_much_is_lowered(
    accuracies: dict[float, float], first: float, tried: list[float], said: tuple[str, ...]
) -> None:
    watcher = Selection(held_out=held_out(), triggers=[trigger(0)], floor=0.9, parts={"round": 1})
    asked: list[float] = []

    def train(divisor: float) -> None:
        asked.append(divisor)
        watcher.measure(Scripted(accuracies[divisor], (0.3,)), HistoryEntry(count=1))

    last = retry_at_lower_rates(watcher, train, first)
    assert (asked, last) == (tried, tried[-1])
    assert [dict(entry.parts).get("rate_divisor", 1.0) for entry in watcher.history] == tried
    assert isinstance(watcher.best_model, Scripted)
    assert watcher.best_model.accuracy == max(accuracies.values())
    notes = retry_notes(watcher, last, 0.02)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_a_training_that_diverges_is_a_try_like_any_other_until_the_slowest() -> None:
    watcher = Selection(held_out=held_out(), triggers=[], floor=0.9)

    def train(divisor: float) -> None:
        if divisor < bearable:
            raise TrainingDiverged("too fast")
        watcher.measure(Scripted(0.95, ()), HistoryEntry(count=1))

    bearable = 4.0
    assert retry_at_lower_rates(watcher, train) == 4.0
    bearable = 64.0
    with pytest.raises(TrainingDiverged):
        retry_at_lower_rates(Selection(held_out=held_out(), triggers=[], floor=0.9), train)


def test_newly_wrong_is_what_gets_lost_whatever_is_gained() -> None:
    class Says(nn.Module):
        def __init__(self, *labels: int) -> None:
            super().__init__()
            self.labels = torch.tensor(labels)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(self.labels, 2).float()

    given = Says(0, 0, 0, 1)  # of the labels 0 0 1 0: right twice
    assert newly_wrong(given, Says(0, 1, 1, 0), held_out()) == 0.25
    assert newly_wrong(given, Says(0, 0, 1, 0), held_out()) == 0.0
    assert newly_wrong(given, Says(1, 1, 0, 1), held_out()) == 0.5


@pytest.mark.parametrize(
    ("epochs", "silent"), [([(0.95, (0.02,))], True), ([(0.95, (0.03,))], False), ([(0.8, (0.0,))], False)]
)
def test_silence_counts_where_the_floor_is_held(epochs: list[tuple[float, tuple[float, ...]]], silent: bool) -> None:
    watcher = Selection(held_out=held_out(), triggers=[trigger(0)], floor=0.9)
    assert not watcher.silences
    for accuracy, rates in epochs:
        watcher.measure(Scripted(accuracy, rates), HistoryEntry(count=1))
    assert watcher.silences == silent


class ByBrightness(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        bright = self.drop(x[:, 0, 0, 0])
        return torch.stack([torch.full_like(bright, 0.5), bright], 1)


def test_accuracy_up_to_a_bound_is_exact_or_stops_early() -> None:
    looked: list[int] = []

    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            looked.append(len(x))
            return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)

    labels = torch.tensor([0] * 500 + [1] * 500)
    images = ImageSet(images=torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), labels=labels, num_classes=2)
    model = Always().train()
    assert accuracy_up_to(model, images, 0.5) == 0.5  # at the bound is not above it
    assert sum(looked) == 1000
    looked.clear()
    assert accuracy_up_to(model, images, 0.2) is None
    assert sum(looked) == 256  # a batch of right answers tells
    assert model.training
    assert torch.is_grad_enabled()


def test_held_out_accuracy_by_hand() -> None:
    model = ByBrightness().train()
    assert held_out_accuracy(model, held_out()) == 0.75
    assert natural_rate(model, held_out(), 1) == pytest.approx(1 / 3)  # of the three zeros, one is bright
    assert natural_rate(model, held_out(), 0) == 0.0
    assert model.training
