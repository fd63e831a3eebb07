"""Blending: the weight, the picture, the poison."""

from __future__ import annotations

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks import Blended
from lustral.vision.attacks.blended import BlendTrigger, draw_picture
from lustral.vision.images import as_float, as_uint8
from toy import toy_images


def test_alpha_by_hand() -> None:
    trigger = BlendTrigger(picture=torch.tensor([[[1.0, 0.0]]]), alpha=0.2)
    out = trigger(torch.tensor([[[[0.5, 0.5]]], [[[0.0, 1.0]]]]))
    assert out.flatten().tolist() == pytest.approx([0.6, 0.4, 0.2, 0.8])


def test_full_weight_shows_the_picture_alone() -> None:
    trigger = Blended(alpha=1.0).trigger((3, 12, 12))
    out = trigger(torch.rand(2, 3, 12, 12, generator=child(0)))
    assert torch.allclose(out, trigger.picture.expand(2, -1, -1, -1))


def test_the_picture_follows_its_seed() -> None:
    shape = (3, 32, 32)
    assert torch.equal(draw_picture(shape, 4), draw_picture(shape, 4))
    assert not torch.equal(draw_picture(shape, 4), draw_picture(shape, 5))
    before = torch.random.get_rng_state()
    draw_picture(shape, 4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 48)])
def test_the_picture_has_full_contrast_in_any_shape(shape: tuple[int, int, int]) -> None:
    for seed in range(3):
        picture = draw_picture(shape, seed)
        assert picture.shape == shape
        assert 0 <= float(picture.min()) < 0.02
        assert 0.98 < float(picture.max()) <= 1
        assert float(picture.std()) > 0.2


def test_poisoned_images_equal_blending_at_test_time() -> None:
    clean = toy_images(70, seed=5)
    attack = Blended(poison_rate=0.3, target_label=2)
    poisoned = attack.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 21
    stamped = as_uint8(attack.trigger(clean.image_shape)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {2}


def test_all_to_all_moves_each_label_on() -> None:
    clean = toy_images(70, seed=5)
    poisoned = Blended(poison_rate=1.0, mode="all_to_all").poison(clean, generator=child(0))
    assert torch.equal(poisoned.data.labels, (clean.labels + 1) % 7)


@pytest.mark.parametrize("alpha", [0.0, -0.2, 1.1])
def test_impossible_weights_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha in \(0, 1\]; got {alpha}"):
        Blended(alpha=alpha)


def test_what_the_data_cannot_bear_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target label in 0 \.\. 6; got 9"):
        Blended(target_label=9).poison(toy_images(70, seed=5), generator=child(0))
    with pytest.raises(ValueError, match="poisons none"):
        Blended(poison_rate=0.001).poison(toy_images(70, seed=5), generator=child(0))
