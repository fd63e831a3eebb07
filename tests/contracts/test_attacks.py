"""What every attack and every trigger keeps, whatever it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lustral.attacks import BadNets
from lustral.catalog import ATTACKS
from lustral.images import as_float, as_uint8
from lustral.protocols import Attack, Trigger
from lustral.randomness import child
from toy import toy_images

SHAPE = (3, 12, 12)
VARIANTS: dict[str, Any] = {
    **{name: kind() for name, kind in ATTACKS.items()},
    "badnets at random places": BadNets(placement="random", pattern="random"),
    "badnets checker": BadNets(pattern="checker", margin=1),
}


@pytest.fixture(params=sorted(VARIANTS))
def attack(request: pytest.FixtureRequest) -> Attack:
    found: Attack = VARIANTS[request.param]
    return found


@pytest.fixture
def trigger(attack: Attack) -> Trigger:
    return attack.trigger(SHAPE)


def pictures(count: int = 6) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=child(0))


def test_a_trigger_changes_images_and_not_its_input(trigger: Trigger) -> None:
    images = pictures()
    before = images.clone()
    out = trigger(images, generator=child(1))
    assert torch.equal(images, before)
    assert bool((out != images).flatten(1).any(1).all())
    out.zero_()
    assert torch.equal(images, before)  # nor does the result share its memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_trigger_keeps_shape_type_device_and_range(trigger: Trigger, dtype: torch.dtype) -> None:
    images = pictures().to(dtype)
    out = trigger(images, generator=child(1))
    assert (out.shape, out.dtype, out.device) == (images.shape, dtype, images.device)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_extreme_images_stay_in_range(trigger: Trigger) -> None:
    for value in (0.0, 1.0):
        out = trigger(torch.full((2, *SHAPE), value), generator=child(1))
        assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_a_batch_equals_its_images_one_by_one(attack: Attack, trigger: Trigger) -> None:
    images = pictures()
    if getattr(attack, "placement", "fixed") == "random":  # draws belong to the batch: compare one-image streams
        alone = trigger(images[:1], generator=child(1))
        assert torch.equal(alone, trigger(images[:1].clone(), generator=child(1)))
        return
    batch = trigger(images, generator=child(1))
    singles = torch.cat([trigger(image[None], generator=child(1)) for image in images])
    assert torch.equal(batch, singles)
    assert torch.equal(batch, trigger(images))


def test_an_empty_batch_stays_empty(trigger: Trigger) -> None:
    assert trigger(pictures(0), generator=child(1)).shape == (0, *SHAPE)


def test_equal_streams_give_equal_images(trigger: Trigger) -> None:
    images = pictures()
    assert torch.equal(trigger(images, generator=child(1)), trigger(images, generator=child(1)))


def test_one_attack_has_one_trigger(attack: Attack) -> None:
    images = pictures()
    one, other = attack.trigger(SHAPE), attack.trigger(SHAPE)
    assert torch.equal(one(images, generator=child(1)), other(images, generator=child(1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_any_number_of_channels_will_do(attack: Attack, channels: int) -> None:
    images = torch.rand(2, channels, 16, 20, generator=child(0))
    out = attack.trigger((channels, 16, 20))(images, generator=child(1))
    assert out.shape == images.shape


def test_poison_is_8_bit_and_leaves_the_given_set(attack: Attack) -> None:
    clean = toy_images(70, seed=5)
    images, labels = clean.images.clone(), clean.labels.clone()
    poisoned = attack.poison(clean, generator=child(1))
    again = attack.poison(clean, generator=child(1))
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)
    assert poisoned.data.images.dtype == torch.uint8
    assert (len(poisoned.data), poisoned.data.num_classes) == (70, 7)
    assert torch.equal(poisoned.data.images, again.data.images)
    assert torch.equal(poisoned.is_poisoned, again.is_poisoned)
    assert 0 < int(poisoned.is_poisoned.sum()) < 70
    expected = attack.relabel(labels, 7)[poisoned.is_poisoned]
    assert torch.equal(poisoned.data.labels[poisoned.is_poisoned], expected)
    assert torch.equal(poisoned.data.images[~poisoned.is_poisoned], images[~poisoned.is_poisoned])


def test_rounding_to_8_bits_moves_nothing_by_more_than_half_a_step(trigger: Trigger) -> None:
    out = trigger(as_float(toy_images(7, seed=5).images), generator=child(1))
    assert float((as_float(as_uint8(out)) - out).abs().max()) <= 0.5 / 255 + 1e-6


def test_settings_show_and_make_the_attack_again(attack: Attack) -> None:
    settings = dataclasses.asdict(attack)  # type: ignore[call-overload]
    assert type(attack)(**settings) == attack
    for name in settings:
        assert f"{name}=" in repr(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.poison_rate = 0.5  # type: ignore[attr-defined]
