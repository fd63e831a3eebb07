"""What every attack and every trigger keeps, whatever it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lustral.catalog import ATTACKS
from lustral.core.randomness import child
from lustral.core.settings import build, describe
from lustral.training import Augment
from lustral.vision.attacks import Additive, BadNets, Bpp
from lustral.vision.attacks.surrogates import Surrogate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Attack, Crafted, CraftedAttack, HasProbes, SteersTraining
from lustral.vision.models import build_classifier
from lustral.vision.records import Trigger
from lustral.vision.victims import implant
from toy import NUM_CLASSES, as_batch, toy_images, toy_trainer

SHAPE = (3, 12, 12)
SMALL: dict[str, dict[str, Any]] = {  # settings under which an attack is crafted in a second or two on toy images
    "additive": {"steps": 10, "surrogate": {"epochs": 1}},
    "adap_blend": {"poison_rate": 0.05, "cover_rate": 0.05},
    "adap_patch": {"poison_rate": 0.05, "cover_rate": 0.1},
    "input_aware": {"width": 4, "mask_epochs": 1},
    "label_consistent": {"steps": 3, "surrogate": {"epochs": 1}},
    "low_frequency": {"steps": 10, "grid": 3, "surrogate": {"epochs": 1}},
    "ssba": {
        "encoder": {"bits": 4, "width": 4, "steps": 40, "wait": 0, "ramp": 10},
        "least_bit_accuracy": 0.0,
        "least_psnr": 0.0,
    },
    "tact": {"poison_rate": 0.03, "cover_rate": 0.05, "cover_labels": [5, 6]},
    "trojan_nn": {"steps": 10, "surrogate": {"epochs": 1}},
}
VARIANTS: dict[str, Any] = {
    **{name: build(kind, SMALL.get(name, {})) for name, kind in ATTACKS.items()},  # type: ignore[arg-type, type-var]
    "badnets at random places": BadNets(placement="random", pattern="random"),
    "additive l0": Additive(norm="l0", steps=10, surrogate=Surrogate(epochs=1)),
    "badnets checker": BadNets(pattern="checker", margin=1),
    "bpp dithered": Bpp(dithered=True),
}


class Files:
    """Assets as a folder keeps them: bytes by specification."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        name = json.dumps(spec, sort_keys=True, allow_nan=False)
        if name not in self.held:
            self.held[name] = save({key: value.detach().cpu().contiguous() for key, value in build().items()})
        return load(self.held[name])


FILES = Files()


@cache
def ready(name: str) -> Attack:
    """Return an attack with its trigger crafted on toy images, if it has to be."""
    attack = VARIANTS[name]
    if isinstance(attack, CraftedAttack):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lustral.vision.attacks.input_aware.LEAST_MASK_STEPS", 5)
            return attack.craft(toy_images(210, seed=6), assets=FILES, generator=child(3))
    found: Attack = attack
    return found


@pytest.fixture(params=sorted(VARIANTS))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def attack(name: str) -> Attack:
    return ready(name)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_trigger_follows_its_images_to_the_gpu(trigger: Trigger) -> None:
    images = pictures()
    out = trigger(images.cuda(), generator=child(1))
    assert out.device.type == "cuda"
    assert (as_uint8(out.cpu()).int() - as_uint8(trigger(images, generator=child(1))).int()).abs().max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_attack_poisons_and_trains_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lustral.vision.attacks.input_aware.LEAST_MASK_STEPS", 5)
    train, test = toy_images(210, seed=6).to("cuda"), toy_images(70, seed=7).to("cuda")
    rest = {"arch": "small_cnn:width=4", "trainer": toy_trainer(epochs=1), "seed": 0, "data_name": "toy"}
    victim = implant(VARIANTS[name], train, test, **rest)
    assert {parameter.device.type for parameter in victim.model.parameters()} == {"cuda"}
    assert 0 <= victim.metrics["acc"]["value"] <= 1
    assert victim.provenance["num_poisoned"] > 0 or isinstance(ready(name), SteersTraining)


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
    assert torch.equal(as_uint8(batch), as_uint8(singles))
    assert torch.allclose(batch, singles, atol=1e-6)
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
def test_any_number_of_channels_will_do(name: str, channels: int) -> None:
    if isinstance(VARIANTS[name], CraftedAttack):
        pytest.skip("made for images of one shape: tests/attacks craft it for others")
    images = torch.rand(2, channels, 16, 20, generator=child(0))
    out = ready(name).trigger((channels, 16, 20))(images, generator=child(1))
    assert out.shape == images.shape


def test_poison_is_8_bit_and_leaves_the_given_set(attack: Attack) -> None:
    clean = toy_images(210, seed=6)
    images, labels = clean.images.clone(), clean.labels.clone()
    poisoned = attack.poison(clean, generator=child(1))
    again = attack.poison(clean, generator=child(1))
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)
    assert poisoned.data.images.dtype == torch.uint8
    assert (len(poisoned.data), poisoned.data.num_classes) == (210, NUM_CLASSES)
    assert torch.equal(poisoned.data.images, again.data.images)
    assert torch.equal(poisoned.is_poisoned, again.is_poisoned)
    assert 0 < int(poisoned.is_poisoned.sum()) < 210
    expected = attack.relabel(labels, NUM_CLASSES)[poisoned.is_poisoned]
    assert torch.equal(poisoned.data.labels[poisoned.is_poisoned], expected)
    stamped = poisoned.is_poisoned if poisoned.is_cover is None else poisoned.is_poisoned | poisoned.is_cover
    assert torch.equal(poisoned.data.images[~stamped], images[~stamped])
    if poisoned.is_cover is not None:
        assert not bool((poisoned.is_poisoned & poisoned.is_cover).any())
        assert torch.equal(poisoned.data.labels[poisoned.is_cover], labels[poisoned.is_cover])


TRAINED_OTHERWISE = {  # by design, training images do not carry what test images do; tests/attacks says what they carry
    "adap_blend": "pieces of the picture, fainter",
    "adap_patch": "one of four patches, fainter",
    "badnets at random places": "a place drawn anew for each image",
    "label_consistent": "a perturbation under the patches",
}


def test_training_images_are_stamped_as_test_images_are(name: str, attack: Attack, trigger: Trigger) -> None:
    if name in TRAINED_OTHERWISE:
        pytest.skip(TRAINED_OTHERWISE[name])
    clean = toy_images(210, seed=6)
    poisoned = attack.poison(clean, generator=child(1))
    chosen = poisoned.is_poisoned
    expected = as_uint8(trigger(as_float(clean.images[chosen]), generator=child(2)))
    assert torch.equal(poisoned.data.images[chosen], expected)


@pytest.mark.parametrize(
    "name", ["bpp", "bpp dithered", "imc", "wanet"]
)  # input_aware: its generator is still being trained
def test_batches_are_stamped_as_test_images_are(name: str, attack: Attack, trigger: Trigger) -> None:
    assert isinstance(attack, SteersTraining)
    clean = toy_images(64, seed=5)
    steering = attack.steer(clean, augment=None, generator=child(1))
    seen: list[Tensor] = []

    class Witness(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return images.flatten(1)[:, :NUM_CLASSES]

    images = as_float(clean.images)
    steering.objective(Witness(), as_batch(images, clean.labels), child(2))
    (batch,) = seen
    count = int(VARIANTS[name].poison_rate * 64)
    assert count >= 3
    assert torch.equal(as_uint8(batch[:count]), as_uint8(trigger(images[:count])))
    assert not torch.equal(as_uint8(batch[:count]), clean.images[:count])


def test_poisoned_as_many_images_as_were_asked_for(name: str, attack: Attack) -> None:
    poisoned = attack.poison(toy_images(210, seed=6), generator=child(1))
    assert int(poisoned.is_poisoned.sum()) == round(VARIANTS[name].poison_rate * 210)


@pytest.mark.parametrize("rate", [1e-4, 0.0, 1.5])
def test_an_impossible_rate_is_refused_before_any_work(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate"):
        dataclasses.replace(VARIANTS[name], poison_rate=rate).require_possible(toy_images(210, seed=6))


def test_a_target_that_does_not_exist_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(ValueError, match=r"label"):
        dataclasses.replace(VARIANTS[name], target_label=NUM_CLASSES).require_possible(toy_images(210, seed=6))


def test_what_is_possible_is_accepted(name: str) -> None:
    VARIANTS[name].require_possible(toy_images(210, seed=6))


def test_a_crafted_attack_comes_back_from_its_tensors(name: str) -> None:
    attack = ready(name)
    if not isinstance(attack, Crafted):
        assert not isinstance(VARIANTS[name], CraftedAttack)
        return
    tensors = load(save({key: value.detach().cpu().contiguous() for key, value in attack.tensors().items()}))
    back = VARIANTS[name].restore(tensors, SHAPE)
    images = pictures()
    assert torch.equal(back.trigger(SHAPE)(images), attack.trigger(SHAPE)(images))
    labels = torch.arange(NUM_CLASSES)
    assert torch.equal(back.relabel(labels, NUM_CLASSES), attack.relabel(labels, NUM_CLASSES))
    with pytest.raises(ValueError):
        VARIANTS[name].restore({**tensors, "intruder": torch.zeros(1)}, SHAPE)


def test_an_attack_on_training_gives_a_loss_with_a_gradient(attack: Attack) -> None:
    if not isinstance(attack, SteersTraining):
        return
    clean = toy_images(64, seed=5)
    steering = attack.steer(clean, augment=Augment(crop_padding=1, flip=False), generator=child(1))
    images, labels = as_float(clean.images), clean.labels
    before = images.clone()
    model = build_classifier("small_cnn:width=4", num_classes=NUM_CLASSES, image_shape=SHAPE, generator=child(0))
    loss = steering.objective(model, as_batch(images, labels), child(2))
    assert loss.shape == ()
    assert bool(loss.isfinite())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.equal(images, before)
    for companion in steering.companions:
        assert any(
            p.grad is not None and bool(p.grad.any()) for group in companion.param_groups for p in group["params"]
        )


def test_probes_name_labels_that_exist(attack: Attack) -> None:
    if not isinstance(attack, HasProbes):
        return
    labels = torch.arange(NUM_CLASSES).repeat(3)
    for probe in attack.probes(SHAPE).values():
        expected = probe.expect(labels, NUM_CLASSES)
        assert expected.shape == labels.shape
        assert -1 <= int(expected.min()) <= int(expected.max()) < NUM_CLASSES
        assert bool((expected >= 0).any())
        images = pictures()
        before = images.clone()
        assert probe.trigger(images, generator=child(1)).shape == images.shape
        assert torch.equal(images, before)


def test_rounding_to_8_bits_moves_nothing_by_more_than_half_a_step(trigger: Trigger) -> None:
    out = trigger(as_float(toy_images(7, seed=5).images), generator=child(1))
    assert float((as_float(as_uint8(out)) - out).abs().max()) <= 0.5 / 255 + 1e-6


def test_settings_show_and_make_the_attack_again(name: str) -> None:
    settings = VARIANTS[name]
    assert build(type(settings), describe(settings)) == settings
    for field in dataclasses.fields(settings):
        assert f"{field.name}=" in repr(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.poison_rate = 0.5
