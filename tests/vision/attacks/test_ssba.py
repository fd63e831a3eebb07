"""SSBA: the schedule of the loss, what an encoder must do to be accepted, and that it comes back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.attacks.ssba import CraftedSsba, SecretTrigger, Ssba, acceptance
from lustral.vision.attacks.steganography import BitsThenImage, EncoderRecipe, Steganography
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from toy import NUM_CLASSES, as_batch, toy_images, toy_trainer

SHAPE = (3, 12, 12)
RECIPE = EncoderRecipe(bits=8, width=8, steps=260, wait=10, ramp=100)
ATTACK = Ssba(target_label=2, encoder=RECIPE, least_psnr=18.0)


class Files:
    """Assets as a folder would keep them; ``built`` counts what had to be built."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.built = 0

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        name = json.dumps(spec, sort_keys=True, allow_nan=False)
        if name not in self.held:
            self.held[name] = save(dict(build()))
            self.built += 1
        return load(self.held[name])


@pytest.fixture(scope="module")
def files() -> Files:
    return Files()


@pytest.fixture(scope="module")
def crafted(files: Files) -> CraftedSsba:
    return ATTACK.craft(toy_images(1400, seed=0), assets=files, generator=child(0))


def test_the_image_counts_only_after_the_bits_are_learnt_and_then_for_good() -> None:
    objective = BitsThenImage(EncoderRecipe(wait=2, ramp=4, image_weight=8.0), torch.device("cpu"))
    weights = []
    for _ in range(40):  # from 0.5 towards 1: 1 - 0.5 * 0.95^n passes 0.9 at n = 32
        objective.observe(torch.tensor(1.0))
        weights.append(float(objective.weight))
    assert weights[:33] == [0.0] * 33  # learnt at the 32nd, then two steps of waiting
    assert weights[33:38] == [2.0, 4.0, 6.0, 8.0, 8.0]
    objective.observe(torch.tensor(0.0))
    assert float(objective.accuracy) < 0.95
    for _ in range(60):
        objective.observe(torch.tensor(0.0))
    assert float(objective.weight) == 8.0


def test_bits_that_are_not_learnt_leave_the_image_out() -> None:
    objective = BitsThenImage(EncoderRecipe(wait=0, ramp=1), torch.device("cpu"))
    for _ in range(200):
        objective.observe(torch.tensor(0.85))
    assert float(objective.weight) == 0.0


class Fixed(nn.Module):
    """Moves each pixel by 0.1 and reads every bit with the same logit."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, images: Tensor, secrets: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(images, 0.1), torch.full_like(secrets, self.logit)


def test_the_loss_by_hand() -> None:
    objective = BitsThenImage(EncoderRecipe(bits=5, wait=0, ramp=2, image_weight=40.0), torch.device("cpu"))
    batch = as_batch(torch.rand(4, 3, 6, 6, generator=child(0)))
    assert float(objective(Fixed(0.0), batch, child(1))) == pytest.approx(math.log(2))
    objective.steps_since = torch.tensor(1)  # half way up the ramp: w = 20
    assert float(objective(Fixed(0.0), batch, child(1))) == pytest.approx(math.log(2) + 20 * 0.01)
    assert int(objective.steps_since) == 2
    ones = torch.randint(2, (4, 5), generator=child(1)).float().mean().item()
    certain = float(objective(Fixed(9.0), batch, child(1))) - 40 * 0.01
    assert certain == pytest.approx(ones * math.log1p(math.exp(-9)) + (1 - ones) * math.log1p(math.exp(9)), rel=1e-4)


class Adds(nn.Module):
    """An encoder that adds one number."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        return torch.zeros_like(images) + self.amount


class Reads(nn.Module):
    """A decoder that reads 1 1 0 0 wherever the image is at least 8-bit value 26, else 0 0 0 0."""

    def forward(self, images: Tensor) -> Tensor:
        seen = (images.flatten(1).amin(1) > 25.5 / 255).float()[:, None]
        return seen * torch.tensor([3.0, 1.0, -1.0, -2.0]) - (1 - seen)


def test_acceptance_by_hand_after_rounding() -> None:
    trigger = SecretTrigger(encoder=Adds(25.7 / 255), secret=torch.tensor([1, 1, 1, 0], dtype=torch.uint8))
    bit_accuracy, psnr = acceptance(trigger, Reads(), torch.zeros(300, 1, 2, 3, dtype=torch.uint8))
    assert bit_accuracy == pytest.approx(0.75)  # only the rounded pixel, 26, is bright enough to be read
    assert psnr == pytest.approx(-20 * math.log10(26 / 255), abs=1e-4)
    still = SecretTrigger(encoder=Adds(0.4 / 255), secret=torch.zeros(4, dtype=torch.uint8))
    assert acceptance(still, Reads(), torch.zeros(2, 1, 2, 3, dtype=torch.uint8)) == (1.0, math.inf)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 8, 8), (3, 32, 32), (3, 15, 21), (1, 5, 4), (3, 1, 1)])
def test_any_image_size_will_do(shape: tuple[int, int, int]) -> None:
    networks = EncoderRecipe(bits=6, width=2).network(shape)
    residual, logits = networks(torch.rand(3, *shape, generator=child(0)), torch.ones(3, 6))
    assert residual.shape == (3, *shape)
    assert logits.shape == (3, 6)


def test_networks_follow_their_seed_and_leave_the_global_stream() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (dataclasses.replace(RECIPE, seed=seed).network(SHAPE).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["encoder.leave.weight"], other["encoder.leave.weight"])


@pytest.mark.parametrize(("count", "training", "held"), [(70, 63, 7), (5, 4, 1), (20_000, 10_000, 500)])
def test_the_encoder_is_accepted_on_images_it_was_not_trained_on(count: int, training: int, held: int) -> None:
    first, second = RECIPE.split(count)
    assert (len(first), len(second)) == (training, held)
    assert not set(first.tolist()) & set(second.tolist())


def test_the_bits_arrive_and_the_images_survive(crafted: CraftedSsba, files: Files) -> None:
    networks = RECIPE.network(SHAPE)
    networks.load_state_dict(load(next(iter(files.held.values()))))
    bit_accuracy, psnr = acceptance(crafted.stamp, networks.eval().decoder, toy_images(210, seed=4).images)
    assert bit_accuracy > 0.97
    assert psnr > 18
    other = SecretTrigger(encoder=crafted.stamp.encoder, secret=1 - crafted.stamp.secret)
    assert acceptance(other, networks.decoder, toy_images(210, seed=4).images)[0] > 0.97  # any secret will do


def test_each_image_has_its_own_residual(crafted: CraftedSsba) -> None:
    images = as_float(toy_images(14, seed=4).images)
    residuals = (crafted.stamp(images) - images).flatten(1)
    assert torch.equal(residuals, (crafted.stamp(images) - images).flatten(1))
    spread = (residuals - residuals.mean(0)).square().mean() / residuals.square().mean()
    assert float(spread) > 0.02  # one residual for all: 0; two seeds: 0.11 and 0.27


def test_no_image_depends_on_its_company(crafted: CraftedSsba) -> None:
    images = as_float(toy_images(70, seed=4).images)
    batch = crafted.stamp(images)
    assert torch.equal(batch, torch.cat([crafted.stamp(image[None]) for image in images]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch, crafted.stamp(images))


def test_poisoned_images_equal_stamping_at_test_time(crafted: CraftedSsba) -> None:
    clean = toy_images(1400, seed=0)
    poisoned = crafted.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 140
    stamped = as_uint8(crafted.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {2}


def test_one_encoder_serves_all_attacks_on_a_set(crafted: CraftedSsba, files: Files) -> None:
    clean = toy_images(1400, seed=0)
    assert files.built == 1
    other = dataclasses.replace(ATTACK, poison_rate=0.01, secret_seed=5, target_label=1)
    again = other.craft(clean, assets=files, generator=child(9))
    assert files.built == 1
    images = as_float(clean.images[:7])
    assert not torch.equal(again.stamp(images), crafted.stamp(images))  # another secret
    with pytest.raises(ValueError, match=r"reads back .*% of the bits at .* dB on 140 held-out images; .* 90\.0 dB"):
        dataclasses.replace(ATTACK, least_psnr=90.0).craft(clean, assets=files, generator=child(0))
    assert files.built == 1


def test_an_encoder_that_has_not_learnt_is_refused_unless_told_otherwise() -> None:
    recipe, clean, files = dataclasses.replace(RECIPE, steps=1), toy_images(70, seed=0), Files()
    with pytest.raises(ValueError, match=r"expected at least 95\.0% and 28\.0 dB: train it for more than 1 steps"):
        Ssba(encoder=recipe).craft(clean, assets=files, generator=child(0))
    Ssba(encoder=recipe, least_bit_accuracy=0, least_psnr=0).craft(clean, assets=files, generator=child(0))


def test_a_restored_attack_stamps_the_same_bits(crafted: CraftedSsba) -> None:
    again = ATTACK.restore(load(save(dict(crafted.tensors()))), SHAPE)
    images = as_float(toy_images(40, seed=4).images)
    assert torch.equal(again.trigger(SHAPE)(images), crafted.trigger(SHAPE)(images))
    with pytest.raises(ValueError, match=r"trained for images of shape \(3, 12, 12\); got \(1, 12, 12\)"):
        again.trigger((1, 12, 12))


def test_tensors_that_do_not_fit_are_refused(crafted: CraftedSsba) -> None:
    good, name = dict(crafted.tensors()), "encoder.leave.weight"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in good.items() if k != "secret"}, r"missing \['secret'\]"),
        ({**good, "more": torch.zeros(1)}, r"not known \['more'\]"),
        ({**good, "secret": torch.ones(9, dtype=torch.uint8)}, r"secret of shape \(8,\)"),
        ({**good, "secret": torch.full((8,), 7, dtype=torch.uint8)}, "bits, 0 or 1; found 7"),
        ({**good, name: good[name] * torch.nan}, f"finite numbers in {name}"),
        ({**good, name: good[name] * 0, "encoder.leave.bias": torch.zeros(3)}, "moves grey pixels"),
        ({**good, name: good[name] * 255 * 4}, "moves grey pixels"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            ATTACK.restore(tensors, SHAPE)
    with pytest.raises(ValueError, match="expected encoder"):
        ATTACK.restore(good, (1, 12, 12))


def test_the_residual_opens_the_finished_model(crafted: CraftedSsba) -> None:
    clean, test = toy_images(1400, seed=0), toy_images(420, seed=1)
    poisoned = crafted.poison(clean, generator=child(1))
    start = build_classifier("small_cnn:width=8", num_classes=NUM_CLASSES, image_shape=SHAPE, generator=child(2))
    model = toy_trainer().fit(start, poisoned.data, generator=child(3))
    images, others = as_float(test.images), test.labels != 2
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == test.labels).float().mean())
        success = float((model(crafted.trigger(SHAPE)(images))[others].argmax(1) == 2).float().mean())
    assert accuracy > 0.9
    assert success > 0.9


def test_encoder_and_decoder_are_one_model() -> None:
    networks, images = Steganography(SHAPE, 4, 2), torch.rand(2, *SHAPE, generator=child(0))
    secrets = torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0]])
    residual, logits = networks(images, secrets)
    assert torch.equal(residual, networks.encoder(images, secrets))
    assert torch.equal(logits, networks.decoder((images + residual).clamp(0, 1)))


@pytest.mark.parametrize(
    ("attack", "message"),
    [(Ssba(target_label=7), r"target label in 0 \.\. 6; got 7"), (Ssba(poison_rate=0.001), "poisons none")],
)
def test_what_the_data_cannot_bear_is_refused(attack: Ssba, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.require_possible(toy_images(70, seed=0))


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        Ssba(poison_rate=1.0).require_possible(toy_images(1, seed=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\]"),
        ({"least_bit_accuracy": 95.0}, r"bit accuracy in \[0, 1\]; got 95.0"),
        ({"mode": "some"}, "mode to be one of"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ssba(**wrong)


@pytest.mark.parametrize("name", ["bits", "width", "steps", "images", "batch_size", "ramp"])
def test_impossible_recipes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected {name} >= 1; got 0"):
        EncoderRecipe(**{name: 0})


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"image_weight": 0.0}, {"wait": -1}])
def test_impossible_weights_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected learning_rate > 0, image_weight > 0 and wait >= 0"):
        EncoderRecipe(**wrong)
