"""Label-Consistent: the patches' signs, the projected gradient steps, and which images are poisoned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.attacks.label_consistent import (
    CornerPatches,
    CraftedLabelConsistent,
    LabelConsistent,
    patch_signs,
    perturb,
    sign_map,
)
from lustral.vision.attacks.surrogates import Surrogate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet
from lustral.vision.victims import NoAssets
from toy import NUM_CLASSES, toy_images, toy_trainer

SHAPE = (3, 12, 12)
ATTACK = LabelConsistent(target_label=2, surrogate=Surrogate(arch="small_cnn:width=8"))


def faint_images(count: int, seed: int) -> ImageSet:
    """The toy pictures at a quarter of their contrast, so that 16 levels can hide what they show."""
    data = toy_images(count, seed)
    return dataclasses.replace(data, images=as_uint8(0.5 + 0.25 * (as_float(data.images) - 0.5)))


@pytest.fixture(scope="module")
def crafted() -> CraftedLabelConsistent:
    return ATTACK.craft(faint_images(1400, seed=0), assets=NoAssets(), generator=child(0))


def test_the_four_corners_by_hand() -> None:
    signs = sign_map(6, 7, size=3, corners="four")
    half = [[1, -1, -1, 0, -1, -1, 1], [-1, 1, -1, 0, -1, 1, -1], [1, -1, 1, 0, 1, -1, 1]]
    assert signs.int().tolist() == half + half
    assert torch.equal(signs, signs.flip(1))  # a mirrored image carries the same patches


def test_one_corner_by_hand() -> None:
    signs = sign_map(4, 4, size=3, corners="bottom_right")
    assert signs.int().tolist() == [[0, 0, 0, 0], [0, -1, -1, 1], [0, -1, 1, -1], [0, 1, -1, 1]]


def test_larger_patches_repeat_the_signs() -> None:
    assert torch.equal(patch_signs(6), patch_signs(3).repeat_interleave(2, 0).repeat_interleave(2, 1))
    sizes = {side: int((LabelConsistent().patches((3, side, side)).signs[0] != 0).sum()) for side in (8, 12, 32, 64)}
    assert sizes == {8: 6, 12: 6, 32: 6, 64: 12}  # two patches in the first row


def test_the_amplitude_adds_and_clips() -> None:
    trigger = CornerPatches(signs=torch.tensor([[1.0, -1.0, 0.0]]), amplitude=0.25)
    out = trigger(torch.tensor([[[[0.5, 0.5, 0.5]]], [[[0.9, 0.1, 1.0]]]]))
    assert out.flatten().tolist() == pytest.approx([0.75, 0.25, 0.5, 1.0, 0.0, 1.0])


class Brightness(nn.Module):
    """Class 1 is bright: the logits are 0 and the mean of the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(mean), mean], 1)


def test_steps_lead_away_from_the_label_and_stop_at_the_bound_and_the_range() -> None:
    images = torch.tensor([0.5, 0.5, 0.05, 0.97])[:, None, None, None].expand(4, 1, 2, 2)
    labels = torch.tensor([1, 0, 1, 0])
    settings: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.04}
    once = perturb(Brightness(), images, labels, steps=1, **settings)
    assert once[:, 0, 0, 0].tolist() == pytest.approx([0.46, 0.54, 0.01, 1.0])
    often = perturb(Brightness(), images, labels, steps=9, batch_size=3, **settings)
    assert often[:, 0, 1, 1].tolist() == pytest.approx([0.4, 0.6, 0.0, 1.0])
    assert perturb(Brightness(), images[:0], labels[:0], steps=1, **settings).shape == (0, 1, 2, 2)


def test_perturbed_images_fool_the_surrogate_within_the_bound(crafted: CraftedLabelConsistent) -> None:
    data = faint_images(140, seed=3)
    images, labels = as_float(data.images), data.labels
    assert crafted.surrogate is not None
    hard = perturb(crafted.surrogate, images, labels, epsilon=16 / 255, step_size=1.5 / 255, steps=20)
    assert float((hard - images).abs().max()) == pytest.approx(16 / 255, abs=1e-6)
    assert 0 <= float(hard.min()) <= float(hard.max()) <= 1
    before, after = (float((crafted.surrogate(x).argmax(1) == labels).float().mean()) for x in (images, hard))
    assert before > 0.95
    assert after < 0.1


def test_poison_is_of_the_target_class_keeps_its_labels_and_carries_the_patches(
    crafted: CraftedLabelConsistent,
) -> None:
    clean = faint_images(1400, seed=0)
    poisoned = crafted.poison(clean, generator=child(1))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 70
    assert set(clean.labels[chosen].tolist()) == {2}
    assert torch.equal(poisoned.data.labels, clean.labels)
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    inside = crafted.trigger(SHAPE).signs != 0
    before, after = clean.images[chosen].int(), poisoned.data.images[chosen].int()
    stamped = as_uint8(crafted.trigger(SHAPE)(as_float(clean.images[chosen]))).int()
    assert torch.equal(after[..., inside], stamped[..., inside])  # at amplitude 1 the perturbation does not show there
    moved = (after - before)[..., ~inside].abs()
    assert int(moved.max()) == 16
    assert float((moved > 8).float().mean()) > 0.3
    again = crafted.poison(clean, generator=child(1))
    assert torch.equal(poisoned.data.images, again.data.images)


def test_more_than_the_class_holds_is_refused_with_the_largest_rate() -> None:
    attack = LabelConsistent(poison_rate=0.2)
    with pytest.raises(ValueError, match=r"asks for 14; the largest possible rate is 0\.1428"):
        attack.require_possible(toy_images(70, seed=0))
    LabelConsistent(poison_rate=1 / 7).require_possible(toy_images(70, seed=0))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LabelConsistent(target_label=7), r"target label in 0 \.\. 6; got 7"),
        (LabelConsistent(poison_rate=0.001), "poisons none"),
        (LabelConsistent(size=7), "patches of 7 pixels do not fit the corners of images of 12x12"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(attack: LabelConsistent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.require_possible(toy_images(70, seed=0))


def test_one_corner_may_be_larger() -> None:
    LabelConsistent(size=7, corners="bottom_right").require_possible(toy_images(70, seed=0))


def test_a_restored_attack_stamps_the_same_and_cannot_poison(crafted: CraftedLabelConsistent) -> None:
    again = ATTACK.restore(crafted.tensors(), SHAPE)
    images = as_float(toy_images(7, seed=3).images)
    assert torch.equal(again.trigger(SHAPE)(images), crafted.trigger(SHAPE)(images))
    with pytest.raises(ValueError, match="no surrogate to perturb images with; craft it again"):
        again.poison(toy_images(70, seed=0), generator=child(0))
    with pytest.raises(ValueError, match="expected no tensors: settings give the patches; got pattern"):
        ATTACK.restore({"pattern": torch.zeros(1)}, SHAPE)
    with pytest.raises(ValueError, match="do not fit the corners"):
        ATTACK.restore({}, (3, 4, 4))


def success_rate(crafted: CraftedLabelConsistent) -> float:
    """Train on the poisoned set and return the ASR, having checked the clean accuracy."""
    poisoned = crafted.poison(faint_images(1400, seed=0), generator=child(1))
    start = build_classifier("small_cnn:width=8", num_classes=NUM_CLASSES, image_shape=SHAPE, generator=child(2))
    model = toy_trainer().fit(start, poisoned.data, generator=child(3))
    test = faint_images(420, seed=1)
    images, others = as_float(test.images), test.labels != 2
    with torch.no_grad():
        assert float((model(images).argmax(1) == test.labels).float().mean()) > 0.9
        return float((model(crafted.trigger(SHAPE)(images))[others].argmax(1) == 2).float().mean())


def test_the_patches_open_the_finished_model_because_of_the_perturbation(crafted: CraftedLabelConsistent) -> None:
    attack = dataclasses.replace(ATTACK, poison_rate=0.1)
    full = dataclasses.replace(crafted, settings=attack)
    patches_only = dataclasses.replace(crafted, settings=dataclasses.replace(attack, epsilon=1e-6))
    rates = success_rate(full), success_rate(patches_only)  # over three seeds 0.65 to 0.94, and 0.29 to 0.53 less
    assert rates[0] > 0.4
    assert rates[0] > rates[1] + 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\]"),
        ({"epsilon": 16.0}, r"epsilon in \(0, 1\], on the \[0, 1\] scale.*got 16.0"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"amplitude": 32.0}, r"amplitude in \(0, 1\]; got 32.0"),
        ({"size": 0}, "size >= 1 pixel; got 0"),
        ({"corners": "two"}, "corners to be one of four, bottom_right; got 'two'"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelConsistent(**wrong)
