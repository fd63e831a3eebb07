"""IMC: the patch, its pattern as a parameter, and a training that learns both it and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Augment
from lustral.vision.attacks import Imc
from lustral.vision.attacks.imc import CraftedImc, stamp, to_pattern, to_weights
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Crafted, CraftedAttack, SteersTraining
from lustral.vision.records import ImageSet
from lustral.vision.victims import NoAssets, implant, load_victim, save_victim
from toy import as_batch, toy_images, toy_trainer

SHAPE = (3, 12, 12)


def craft(attack: Imc, clean: ImageSet, seed: int = 0) -> CraftedImc:
    return attack.craft(clean, assets=NoAssets(), generator=child(seed))


def test_the_patch_by_hand() -> None:
    images = torch.full((1, 1, 4, 4), 0.5)
    pattern = torch.tensor([[[0.0, 1.0], [1.0, 0.2]]])
    out = stamp(images, pattern, margin=1, transparency=0.0)
    assert out[0, 0].tolist() == [
        [0.5, 0.5, 0.5, 0.5],
        [0.5, 0.0, 1.0, 0.5],
        [0.5, 1.0, pytest.approx(0.2), 0.5],
        [0.5, 0.5, 0.5, 0.5],
    ]
    faint = stamp(images, pattern, margin=0, transparency=0.75)
    assert faint[0, 0, 2:, 2:].flatten().tolist() == pytest.approx([0.375, 0.625, 0.625, 0.425])
    assert bool((images == 0.5).all())


def test_weights_hold_every_grey_level_and_only_those_in_range() -> None:
    levels = as_float(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(as_uint8(to_pattern(to_weights(levels))).int(), torch.arange(256).int())
    wild = to_pattern(torch.tensor([-1e6, -5.0, 0.0, 5.0, 1e6]))
    assert wild.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-4)


def test_settings_craft_and_the_crafted_attack_is_one() -> None:
    attack = Imc(target_label=2, size=2)
    assert isinstance(attack, CraftedAttack)
    assert not hasattr(attack, "trigger")
    crafted = craft(attack, toy_images(20, seed=0))
    assert isinstance(crafted, Crafted)
    assert isinstance(crafted, SteersTraining)
    assert not isinstance(crafted, CraftedAttack)
    assert crafted.relabel(torch.arange(7), 7).tolist() == [2] * 7


def test_the_starting_pattern_is_random_and_follows_its_stream() -> None:
    clean = toy_images(20, seed=0)
    one, again, other = (craft(Imc(size=8), clean, seed).tensors()["pattern"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (3, 8, 8)
    assert float(one.min()) < 0.1
    assert float(one.max()) > 0.9


def test_a_pattern_is_kept_in_8_bit_steps_and_comes_back_exactly() -> None:
    crafted = craft(Imc(size=8), toy_images(20, seed=0))
    kept = crafted.tensors()
    assert torch.equal(as_float(as_uint8(kept["pattern"])), kept["pattern"])
    assert float((kept["pattern"] - to_pattern(crafted.weights.detach())).abs().max()) <= 0.5 / 255 + 1e-6
    back = Imc(size=8).restore(kept, SHAPE)
    assert torch.equal(back.tensors()["pattern"], kept["pattern"])
    assert torch.equal(back.trigger(SHAPE).pattern, crafted.trigger(SHAPE).pattern)


class PatchReader(nn.Module):
    """Two classes: class 1 likes the patch's red and dislikes its green."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        corner = images[:, :, -4:-2, -4:-2].mean((2, 3))
        logit = self.scale * (corner[:, 0] - corner[:, 1])
        return torch.stack([torch.zeros_like(logit), logit], 1)


def test_one_step_moves_the_pattern_towards_what_the_model_calls_the_target() -> None:
    clean = ImageSet(images=toy_images(20, seed=0).images, labels=torch.zeros(20, dtype=torch.int64), num_classes=2)
    crafted = craft(Imc(target_label=1, size=2, poison_rate=0.5), clean)
    trigger, before = crafted.trigger(SHAPE), crafted.tensors()["pattern"]
    steering = crafted.steer(clean, augment=None, generator=child(1))
    (optimizer,) = steering.companions
    loss = steering.objective(PatchReader(), next(clean.batches(20)), child(2))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = crafted.tensors()["pattern"] - before
    assert bool((moved[0] > 0).all())
    assert bool((moved[1] < 0).all())
    assert bool((moved[2] == 0).all())
    assert torch.equal(trigger.pattern, before)  # a trigger made earlier does not follow


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images.detach()
        return images.flatten(1)[:, :7]


def test_a_batch_is_stamped_and_left_clean_in_order() -> None:
    clean = toy_images(10, seed=5)
    crafted = craft(Imc(poison_rate=0.3, margin=1), clean)
    model, images = Recorder(), as_float(clean.images)
    steering = crafted.steer(clean, augment=None, generator=child(1))
    loss = steering.objective(model, as_batch(images, clean.labels), child(2))
    labels = torch.cat([torch.zeros(3, dtype=torch.int64), clean.labels[3:]])
    assert loss.item() == pytest.approx(F.cross_entropy(model.seen.flatten(1)[:, :7], labels).item())
    assert torch.equal(as_uint8(model.seen[:3]), as_uint8(crafted.trigger(SHAPE)(images[:3])))
    assert torch.equal(model.seen[3:], images[3:])
    assert bool((model.seen[:3, :, 8:11, 8:11] != images[:3, :, 8:11, 8:11]).flatten(1).any(1).all())


def test_poisoned_images_equal_stamping_at_test_time() -> None:
    clean = toy_images(70, seed=5)
    crafted = craft(Imc(target_label=2, poison_rate=0.1, transparency=0.5), clean)
    poisoned = crafted.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 7
    stamped = as_uint8(crafted.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {2}


def test_training_learns_trigger_and_model_and_a_folder_keeps_them(tmp_path: Path) -> None:
    train, test = toy_images(1400, seed=0), toy_images(420, seed=1)
    attack = Imc(target_label=4)
    victim = implant(attack, train, test, arch="small_cnn:width=16", trainer=toy_trainer(), seed=0, data_name="toy")
    assert victim.metrics["acc"]["value"] > 0.95
    assert victim.metrics["asr"]["value"] > 0.8
    learnt = victim.tensors["pattern"]
    start = craft(attack, train).tensors()["pattern"]
    assert learnt.shape == start.shape
    assert float((learnt - 0.5).abs().mean()) > 0.35  # uniform colours: 0.25; learning drives them to the extremes
    save_victim(tmp_path, victim, test)
    images = as_float(test.images)
    assert torch.equal(load_victim(tmp_path).trigger(images), victim.trigger(images))


def test_gradients_pass_through_augmentation() -> None:
    clean = toy_images(20, seed=5)
    crafted = craft(Imc(poison_rate=0.5), clean)
    augment = Augment(crop_padding=1, flip=True)
    steering = crafted.steer(clean, augment=augment, generator=child(1))
    model = PatchReader()
    labels = clean.labels % 2
    small = ImageSet(images=clean.images, labels=labels, num_classes=2)
    loss = crafted.steer(small, augment=augment, generator=child(1)).objective(
        model, as_batch(as_float(clean.images), labels), child(2)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert crafted.weights.grad is not None
    assert bool((crafted.weights.grad[:2] != 0).any())
    assert len(steering.companions) == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"one tensor, pattern, of shape \(3, 3, 3\); got none"),
        ({"pattern": torch.zeros(3, 2, 2)}, r"of shape \(3, 3, 3\); got .*\(3, 2, 2\)"),
        ({"patch": torch.zeros(3, 3, 3)}, "one tensor, pattern"),
        ({"pattern": torch.full((3, 3, 3), 51.0)}, r"pattern in \[0, 1\]; found 51 \.\. 51"),
        ({"pattern": torch.full((3, 3, 3), -0.1)}, r"pattern in \[0, 1\]; found -0.1"),
        ({"pattern": torch.full((3, 3, 3), float("nan"))}, r"pattern in \[0, 1\]; found nan"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imc().restore(tensors, SHAPE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\].*got 0.0"),
        ({"size": 0}, "size >= 1 .* got 0 and 2"),
        ({"margin": -1}, "margin >= 0 .* got 3 and -1"),
        ({"transparency": 1.0}, r"transparency in \[0, 1\).*got 1.0"),
        ({"pattern_learning_rate": 0.0}, "positive learning rate; got 0.0 and 0.0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imc(**wrong)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Imc(size=11), "patch of 11 pixels with a margin of 2 does not fit images of 12x12"),
        (Imc(target_label=7), r"target label in 0 \.\. 6; got 7"),
        (Imc(poison_rate=0.01), "poisons none"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(attack: Imc, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.require_possible(toy_images(20, seed=0))
