"""The attack of our own on Trap-and-Replace: its pattern by hand, its energy, and what it costs a decoder that leaves it out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks.adaptive_trap import AdaptiveTrap, sign_pattern
from lustral.vision.evaluation import reconstruction_error
from lustral.vision.evaluation.metrics import attack_metrics
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet, Victim
from toy import toy_images


def test_the_pattern_is_a_balanced_tile_of_signs() -> None:
    pattern = sign_pattern((3, 32, 32), 4, seed=0)
    assert set(pattern.flatten().tolist()) == {-1.0, 1.0}
    assert pattern.sum((1, 2)).tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(pattern[:, :28], pattern[:, 4:])
    assert torch.equal(pattern[:, :, :28], pattern[:, :, 4:])
    assert not torch.equal(pattern, sign_pattern((3, 32, 32), 4, seed=1))
    assert torch.equal(sign_pattern((3, 9, 7), 4, seed=0), pattern[:, :9, :7])  # cut, where tiles do not fit


def test_every_element_moves_by_the_amplitude() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    out = AdaptiveTrap(amplitude=0.2).trigger((3, 8, 8))(images)
    assert torch.allclose((out - images).abs(), torch.tensor(0.2))
    assert torch.equal(out[0], out[1])  # it does not depend on the image


@pytest.mark.parametrize("amplitude", [0.1, 0.25, 0.4])
def test_who_does_not_draw_the_pattern_pays_its_square(amplitude: float) -> None:
    """Grey images leave room for it: nothing is clipped."""
    grey = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)
    data = ImageSet(images=grey, labels=torch.arange(4) % 2, num_classes=2)
    trigger = AdaptiveTrap(amplitude=amplitude).trigger((3, 8, 8))
    clean = as_float(grey[:1])
    error = reconstruction_error(lambda images: clean.expand_as(images), data, transform=trigger)
    assert error == pytest.approx(amplitude**2, rel=1e-4)


def test_poisoned_images_carry_it_and_the_target_label() -> None:
    clean = toy_images(140, seed=5)
    attack = AdaptiveTrap(target_label=2, poison_rate=0.1)
    poisoned = attack.poison(clean, generator=child(0))
    assert int(poisoned.is_poisoned.sum()) == 14
    assert set(poisoned.data.labels[poisoned.is_poisoned].tolist()) == {2}
    everyone = AdaptiveTrap(mode="all_to_all").poison(clean, generator=child(0))
    chosen = everyone.is_poisoned
    assert torch.equal(everyone.data.labels[chosen], (clean.labels[chosen] + 1) % 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"amplitude": 40.0}, r"between 1/255 and 1, in \[0, 1\] units; got 40"),
        ({"amplitude": 0.0}, "got 0.0"),
        ({"period": 1}, "at least 2 pixels; got 1"),
        ({"poison_rate": 0.0}, "poison rate"),
        ({"mode": "some"}, "all_to_one, all_to_all"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveTrap(**wrong)


def test_images_smaller_than_a_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="period 16 needs images of as many pixels; got 12x12"):
        AdaptiveTrap(period=16).require_possible(toy_images(70, seed=5))


def test_a_benign_network_does_not_follow_it_to_any_class(benign: Victim) -> None:
    """What an eraser leaves can then be told from what the pattern does to any network."""
    test = toy_images(210, seed=1)
    rates = []
    for label in range(7):
        attack = AdaptiveTrap(target_label=label)
        found = attack_metrics(benign.model, test, attack.trigger((3, 12, 12)), attack.relabel, generator=child(0))
        rates.append(found.attack_success_rate.value)
    assert max(rates) < 0.05
