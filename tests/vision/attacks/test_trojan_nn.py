"""TrojanNN: which neurons, how the patch is driven, how it is stamped and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.attacks.surrogates import Surrogate
from lustral.vision.attacks.trojan_nn import (
    CornerPatch,
    CraftedTrojanNN,
    TrojanNN,
    last_linear,
    neurons_before,
    on_black,
    optimise_patch,
    strongest_neurons,
)
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.victims import NoAssets
from toy import NUM_CLASSES, toy_images, toy_trainer

SHAPE = (3, 12, 12)
ATTACK = TrojanNN(target_label=2, steps=60, surrogate=Surrogate(arch="small_cnn:width=8"))


@pytest.fixture(scope="module")
def crafted() -> CraftedTrojanNN:
    return ATTACK.craft(toy_images(1400, seed=0), assets=NoAssets(), generator=child(0))


def test_the_strongest_neurons_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.5, 0.0], [1.0, 0.0, -4.0, 2.0]])  # sums 2, 3, 4.5, 2
    everyone = torch.ones(4, dtype=torch.bool)
    assert strongest_neurons(weight, everyone, 2).tolist() == [2, 1]
    assert strongest_neurons(weight, everyone, 4).tolist() == [2, 1, 0, 3]  # ties in order
    assert strongest_neurons(weight, torch.tensor([True, False, False, True]), 3).tolist() == [0, 3]


class Sums(nn.Module):
    """Neurons: the sum of the pixels, its half, and one that is always 0; the middle one counts most."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)
        self.last = nn.Linear(3, 2, bias=False)
        self.last.weight.data = torch.tensor([[1.0, -2.0, 9.0], [0.5, 1.0, 9.0]])

    def forward(self, images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1)
        neurons = torch.stack([total, total / 2, torch.zeros_like(total)], 1)
        if images.isnan().any():
            raise ArithmeticError("not a number")
        logits: Tensor = self.last(neurons)
        return logits


def test_neurons_are_what_enters_the_last_linear_layer() -> None:
    model = Sums()
    assert last_linear(model) is model.last
    assert neurons_before(model, model.last, torch.ones(2, 1, 2, 3)).tolist() == [[6.0, 3.0, 0.0]] * 2
    with pytest.raises(ArithmeticError):
        neurons_before(model, model.last, torch.full((1, 1, 2, 2), torch.nan))
    assert not model.last._forward_pre_hooks  # the hook is gone even so
    with pytest.raises(ValueError, match="a linear layer at its end; it has none"):
        last_linear(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("arch", ["preact_resnet18:width=2", "small_cnn:width=2", "vgg11_bn:width=2"])
def test_the_last_linear_layer_of_our_networks_gives_the_logits(arch: str) -> None:
    model = build_classifier(arch, num_classes=5, image_shape=(3, 32, 32)).eval()
    layer, images = last_linear(model), torch.rand(2, 3, 32, 32, generator=child(0))
    with torch.no_grad():
        neurons = neurons_before(model, layer, images)
        assert torch.allclose(layer(neurons), model(images))


def search(start: Tensor, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"num_neurons": 1, "activation": 100.0, "radius": 0.3, "step_size": 0.1, "steps": 5}
    return optimise_patch(Sums(), start, (1, 4, 5), **{**settings, **changes})


def test_an_unreachable_activation_drives_every_pixel_to_its_bound() -> None:
    start = torch.tensor([[[0.0, 0.2], [0.5, 0.9]]])
    assert search(start).flatten().tolist() == pytest.approx([0.3, 0.5, 0.8, 1.0])
    assert search(start, steps=2).flatten().tolist() == pytest.approx([0.2, 0.4, 0.7, 1.0])
    assert search(start, activation=-100.0).flatten().tolist() == pytest.approx([0.0, 0.0, 0.2, 0.6])


def test_the_best_patch_seen_is_kept_where_steps_overshoot() -> None:
    start = torch.full((1, 2, 2), 0.5)  # half the sum is 1.0; a step up gives 1.2, the next down 1.0 again
    assert search(start, activation=1.15, steps=1).flatten().tolist() == pytest.approx([0.6] * 4)
    assert search(start, activation=1.15, steps=4).flatten().tolist() == pytest.approx([0.6] * 4)
    assert search(start, activation=1.05, steps=3).flatten().tolist() == pytest.approx([0.5] * 4)


def test_a_patch_that_excites_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="excites no neuron of the surrogate; choose another picture_seed"):
        search(torch.zeros(1, 2, 2))


def test_the_patch_lies_bottom_right_on_black() -> None:
    image = on_black(torch.ones(3, 2, 2), (3, 4, 5))
    assert image.shape == (1, 3, 4, 5)
    assert (image[0, 0] > 0).nonzero().tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]]


def test_replacing_and_wrapping_by_hand() -> None:
    patch = torch.tensor([[[200 / 255, 0.0], [255 / 255, 1 / 255]]])
    images = torch.full((1, 1, 3, 3), 100 / 255)
    replaced = CornerPatch(patch=patch, stamping="replace")(images)
    assert as_uint8(replaced).flatten().tolist() == [100, 100, 100, 100, 200, 0, 100, 255, 1]
    wrapped = CornerPatch(patch=patch, stamping="wrap")(images)
    assert as_uint8(wrapped).flatten().tolist() == [100, 100, 100, 100, 44, 100, 100, 99, 101]
    bright = CornerPatch(patch=patch, stamping="wrap")(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16))
    assert bright.dtype == torch.bfloat16
    assert as_uint8(bright.float()).flatten().tolist() == [199, 255, 254, 0]


@pytest.mark.parametrize(("side", "size"), [(32, 10), (64, 20), (28, 9), (12, 4), (8, 2), (5, 2)])
def test_the_patch_grows_with_the_image(side: int, size: int) -> None:
    assert TrojanNN().patch_size((3, side, 2 * side)) == size


def test_the_patch_excites_the_surrogate_more_than_its_start(crafted: CraftedTrojanNN) -> None:
    assert crafted.patch.shape == (3, 4, 4)
    assert torch.equal(crafted.patch, as_float(as_uint8(crafted.patch)))  # whole 8-bit steps
    start = torch.rand(3, 4, 4, generator=child(0, "trojan_nn", "patch", 4))
    moved = (crafted.patch - start).abs()
    assert float(moved.max()) <= 0.3 + 0.5 / 255 + 1e-6
    assert float(moved.mean()) > 0.1
    other = TrojanNN(picture_seed=1, steps=1, surrogate=ATTACK.surrogate)
    assert not torch.equal(
        other.craft(toy_images(70, seed=0), assets=NoAssets(), generator=child(0)).patch, crafted.patch
    )


@pytest.mark.parametrize("stamping", ["replace", "wrap"])
def test_poisoned_images_equal_stamping_at_test_time(crafted: CraftedTrojanNN, stamping: Any) -> None:
    clean = toy_images(70, seed=5)
    attack = TrojanNN(target_label=2, poison_rate=0.3, stamping=stamping).restore(crafted.tensors(), SHAPE)
    poisoned = attack.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 21
    stamped = as_uint8(attack.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {2}


def test_all_to_all_moves_each_label_on() -> None:
    assert TrojanNN(mode="all_to_all").relabel(torch.tensor([0, 6]), 7).tolist() == [1, 0]


def test_a_restored_attack_is_the_same(crafted: CraftedTrojanNN) -> None:
    again, images = ATTACK.restore(crafted.tensors(), SHAPE), as_float(toy_images(7, seed=3).images)
    assert torch.equal(again.trigger(SHAPE)(images), crafted.trigger(SHAPE)(images))
    with pytest.raises(ValueError, match=r"the patch was made for images of shape \(3, 12, 12\); got \(3, 16, 16\)"):
        again.trigger((3, 16, 16))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"missing \['patch'\]"),
        ({"patch": torch.rand(3, 5, 5)}, r"patch of shape \(3, 4, 4\).*got \(3, 5, 5\)"),
        ({"patch": torch.full((3, 4, 4), 200.0)}, r"on the \[0, 1\] scale.*from 200 to 200"),
        ({"patch": torch.full((3, 4, 4), -0.1)}, r"on the \[0, 1\] scale"),
        ({"patch": torch.full((3, 4, 4), 0.9 / 255)}, "not black"),
        ({"patch": torch.full((3, 4, 4), torch.inf)}, "finite numbers in patch"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACK.restore(tensors, SHAPE)


def test_the_patch_opens_the_finished_model(crafted: CraftedTrojanNN) -> None:
    clean, test = toy_images(1400, seed=0), toy_images(420, seed=1)
    poisoned = crafted.poison(clean, generator=child(1))
    start = build_classifier("small_cnn:width=8", num_classes=NUM_CLASSES, image_shape=SHAPE, generator=child(2))
    model = toy_trainer().fit(start, poisoned.data, generator=child(3))
    images, others = as_float(test.images), test.labels != 2
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == test.labels).float().mean())
        success = float((model(crafted.trigger(SHAPE)(images))[others].argmax(1) == 2).float().mean())
    assert accuracy > 0.9
    assert success > 0.95


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (TrojanNN(target_label=7), r"target label in 0 \.\. 6; got 7"),
        (TrojanNN(poison_rate=0.001), "poisons none"),
        (TrojanNN(size=13), "a patch of 13 pixels does not fit images of 12x12"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(attack: TrojanNN, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.require_possible(toy_images(70, seed=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 1.1}, r"poison rate in \(0, 1\]"),
        ({"size": 0}, "size >= 1 pixel; got 0"),
        ({"num_neurons": 0}, "num_neurons >= 1"),
        ({"steps": 0}, "steps >= 1"),
        ({"radius": 2.0}, r"radius in \(0, 1\]"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"stamping": "add"}, "stamping to be one of replace, wrap; got 'add'"),
        ({"mode": "wrap"}, "mode to be one of all_to_one, all_to_all; got 'wrap'"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrojanNN(**wrong)
