"""Input-aware: the networks, their losses, both stages of training, and what is kept of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.attacks import InputAware
from lustral.vision.attacks.input_aware import (
    CraftedInputAware,
    InputAwareTrigger,
    TriggerNetwork,
    diversity_loss,
    soft_threshold,
)
from lustral.vision.attacks.poisoning import pair_offset
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Crafted, CraftedAttack, SteersTraining
from lustral.vision.victims import NoAssets, implant, load_victim, save_victim
from toy import as_batch, toy_images, toy_trainer

SHAPE = (3, 12, 12)
SMALL = InputAware(target_label=4, cross_rate=0.03, width=4, steps=2, patterns_per_batch=16, mask_epochs=1)


@pytest.fixture(scope="module")
def crafted() -> CraftedInputAware:
    """The attack with a trained mask network; do not steer it: ``fresh`` is for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lustral.vision.attacks.input_aware.LEAST_MASK_STEPS", 200)
        return SMALL.craft(toy_images(420, seed=6), assets=NoAssets(), generator=child(3))


@pytest.fixture
def fresh(crafted: CraftedInputAware) -> CraftedInputAware:
    return SMALL.restore(crafted.tensors(), SHAPE)


def pictures(count: int = 5) -> Tensor:
    return as_float(toy_images(count, seed=9).images)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (3, 15, 9), (1, 3, 5), (3, 32, 32)])
def test_a_network_keeps_the_size_of_any_image(shape: tuple[int, int, int]) -> None:
    network = TriggerNetwork(shape[0], 2, width=2, steps=3).eval()
    out = network(torch.rand(2, *shape, generator=child(0))).detach()
    assert out.shape == (2, 2, *shape[1:])
    assert 0 <= float(out.min()) < float(out.max()) <= 1


def test_the_published_network_has_its_published_layers() -> None:
    network = InputAware(width=32).network(3, 3, seed=0)
    layers = [(m.in_channels, m.out_channels) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert layers == [
        *[(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)],
        (128, 128),
        *[(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)],
    ]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 13
    assert sum(isinstance(module, nn.ReLU) for module in network.modules()) == 12  # none after the last


def test_networks_follow_their_seed_and_leave_the_global_stream() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (SMALL.network(3, 1, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_threshold_by_hand() -> None:
    masks = soft_threshold(torch.tensor([0.0, 0.45, 0.5, 0.55, 1.0]))
    assert masks.tolist() == pytest.approx([0, 0.1192, 0.5, 0.8808, 1], abs=1e-4)  # tanh(1) = 0.7616


def test_diversity_by_hand() -> None:
    inputs = torch.tensor([0.0, 0.6]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    outputs = torch.tensor([0.1, 0.4]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert float(diversity_loss(inputs, outputs)) == pytest.approx(2.0, rel=1e-4)
    three = torch.tensor([0.0, 0.2, 0.6]).view(3, 1, 1, 1)  # distances to the one before: 0.6, 0.2, 0.4
    assert float(diversity_loss(three, three / 2)) == pytest.approx(2.0, rel=1e-3)


def test_equal_outputs_cost_much_but_stay_finite() -> None:
    inputs = torch.rand(4, 3, 2, 2, generator=child(0))
    outputs = torch.full((4, 1, 2, 2), 0.3, requires_grad=True)
    loss = diversity_loss(inputs, outputs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert 50 < loss.item() < 2000
    assert bool(outputs.grad.isfinite().all())
    assert float(diversity_loss(inputs[:1].expand(2, -1, -1, -1), outputs[:2].detach())) == 0


def test_the_mask_objective_by_hand() -> None:
    class Given(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :1]

    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)  # masks of 0 and 1
    settings = InputAware(mask_density=0.2, density_weight=10.0, diversity_weight=3.0)
    loss = settings.mask_objective(Given(), as_batch(images), child(0))
    assert float(loss) == pytest.approx(10 * 0.8 / 2 + 3 * 4, rel=1e-4)  # images are 1 / 0.25 apart, masks 1


def test_stage_1_finds_sparse_masks_that_differ(crafted: CraftedInputAware) -> None:
    images = pictures(70)
    masks = soft_threshold(crafted.mask_network.eval()(images)).detach()
    untrained = soft_threshold(SMALL.network(3, 1, 0).eval()(images)).detach()
    assert float(masks.mean()) < 0.25 < float(untrained.mean())
    assert float((masks - masks.roll(1, 0)).square().mean().sqrt()) > 0.1
    assert float(masks.amax((1, 2, 3)).mean()) > 0.6  # every image has its place


def test_the_mask_network_is_built_once_for_all_poison_rates() -> None:
    class Counting:
        def __init__(self) -> None:
            self.specs: list[Mapping[str, Any]] = []

        def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            self.specs.append(spec)
            assert spec["seed"] < 2**62
            return SMALL.network(3, 1, 77).state_dict()

    assets, clean = Counting(), toy_images(70, seed=6)
    changes: list[dict[str, Any]] = [{}, {"poison_rate": 0.01, "target_label": 2}, {"mask_density": 0.1}]
    made = [dataclasses.replace(SMALL, **change).craft(clean, assets=assets, generator=child(3)) for change in changes]
    SMALL.craft(toy_images(70, seed=7), assets=assets, generator=child(3))
    SMALL.craft(clean, assets=assets, generator=child(4))
    first, rate, density, data, seed = assets.specs
    assert first == rate
    assert density != first
    assert data != first
    assert seed != first
    kept = SMALL.network(3, 1, 77).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in made[0].mask_network.state_dict().items())


def test_the_trigger_mixes_the_pattern_in_where_the_mask_is(crafted: CraftedInputAware) -> None:
    images = pictures()
    trigger = crafted.trigger(SHAPE)
    mask, pattern = soft_threshold(trigger.mask_network(images)), trigger.pattern_network(images)
    expected = images * (1 - mask) + pattern * mask
    assert torch.allclose(trigger(images), expected, atol=1e-6)
    assert float(mask.std()) > 0.05


def test_a_crossed_trigger_is_that_of_another_image(crafted: CraftedInputAware) -> None:
    images = pictures(4)
    own = crafted.trigger(SHAPE)
    crossed = dataclasses.replace(own, crossed=True)
    others = images.roll(-2, 0)  # half a batch on
    mask, pattern = soft_threshold(own.mask_network(others)), own.pattern_network(others)
    assert torch.allclose(crossed(images), images + (pattern - images) * mask, atol=1e-6)
    assert torch.allclose(crossed(images[:1]), own(images[:1]))  # nobody else is there
    probe = crafted.probes(SHAPE)["cross_accuracy"]
    assert isinstance(probe.trigger, InputAwareTrigger)
    assert probe.trigger.crossed
    assert probe.expect(torch.tensor([3, 4]), 7).tolist() == [3, 4]


def test_nobody_is_paired_with_himself() -> None:
    stream = child(0)
    assert {pair_offset(5, stream) for _ in range(200)} == {1, 2, 3, 4}
    assert (pair_offset(6, None), pair_offset(2, stream), pair_offset(1, stream)) == (3, 1, 0)


def test_an_image_has_the_same_trigger_in_any_company(crafted: CraftedInputAware) -> None:
    trigger, images = crafted.trigger(SHAPE), pictures(70)
    together = trigger(images)
    assert torch.equal(together[40:43], trigger(images[40:43]))
    assert torch.equal(together[69:], trigger(images[69:].contiguous(memory_format=torch.channels_last)))


class Recorder(nn.Module):
    """Keeps what it is shown and answers with fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.seen = logits, torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images.detach()
        return self.logits + 0 * images.mean()


def test_a_batch_is_poisoned_crossed_and_left_clean_in_order(fresh: CraftedInputAware) -> None:
    clean = toy_images(10, seed=5)
    settings = dataclasses.replace(SMALL, poison_rate=0.3, cross_rate=0.2, diversity_weight=0.0, patterns_per_batch=8)
    attack = dataclasses.replace(fresh, settings=settings)
    images, labels = as_float(clean.images), clean.labels
    model = Recorder(torch.randn(10, 7, generator=child(0)))
    steering = attack.steer(clean, augment=None, generator=child(1))
    attack.pattern_network.eval()  # statistics of the batch would depend on the company
    loss = steering.objective(model, as_batch(images, labels), child(2))
    trigger = attack.trigger(SHAPE)
    assert torch.allclose(model.seen[:3], trigger(images[:3]), atol=1e-6)
    assert torch.equal(model.seen[5:], images[5:])
    for index in (3, 4):
        mask, pattern = soft_threshold(trigger.mask_network(images)), trigger.pattern_network(images)
        made = images[index] + (pattern - images[index]) * mask
        distances = (made - model.seen[index]).abs().amax((1, 2, 3))
        assert float(distances.min()) < 1e-6
        assert int(distances.argmin()) != index
    expected = torch.cat([torch.tensor([4, 4, 4]), labels[3:]])
    assert loss.item() == pytest.approx(float(F.cross_entropy(model.logits, expected)))


def test_steering_trains_the_pattern_network_and_not_the_mask(fresh: CraftedInputAware) -> None:
    clean = toy_images(70, seed=5)
    images = pictures()
    before = fresh.trigger(SHAPE)
    first = before(images)
    mask = {name: value.clone() for name, value in fresh.mask_network.state_dict().items()}
    steering = fresh.steer(clean, augment=None, generator=child(1))
    (optimizer,) = steering.companions
    start = {name: value.clone() for name, value in fresh.pattern_network.state_dict().items()}
    loss = steering.objective(nn.Sequential(nn.Flatten(), nn.Linear(432, 7)), next(clean.batches(len(clean))), child(2))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(torch.equal(value, mask[name]) for name, value in fresh.mask_network.state_dict().items())
    moved = [not torch.equal(value, start[name]) for name, value in fresh.pattern_network.state_dict().items()]
    assert sum(moved) > len(moved) / 2
    assert torch.equal(before(images), first)  # a trigger made earlier does not follow
    assert not torch.equal(fresh.trigger(SHAPE)(images), first)


def test_steering_starts_anew_and_follows_its_stream(fresh: CraftedInputAware) -> None:
    clean = toy_images(70, seed=5)
    starts = []
    for seed in (1, 1, 2):
        fresh.steer(clean, augment=None, generator=child(seed))
        starts.append({name: value.clone() for name, value in fresh.pattern_network.state_dict().items()})
        with torch.no_grad():
            for parameter in fresh.pattern_network.parameters():
                parameter.add_(1)
    one, again, other = starts
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_rate_below_one_image_a_batch_still_trains_the_patterns(fresh: CraftedInputAware) -> None:
    clean = toy_images(20, seed=5)
    settings = dataclasses.replace(SMALL, poison_rate=1e-3, cross_rate=0.0)
    steering = dataclasses.replace(fresh, settings=settings).steer(clean, augment=None, generator=child(1))
    model = Recorder(torch.zeros(20, 7))
    loss = steering.objective(model, next(clean.batches(20)), child(2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(model.seen, as_float(clean.images))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fresh.pattern_network.parameters())


def test_the_static_form_has_exact_counts_and_a_cover(crafted: CraftedInputAware) -> None:
    clean = toy_images(70, seed=5)
    attack = dataclasses.replace(crafted, settings=dataclasses.replace(SMALL, cross_rate=0.2))
    poisoned = attack.poison(clean, generator=child(0))
    assert poisoned.is_cover is not None
    chosen, cover = poisoned.is_poisoned, poisoned.is_cover
    assert (int(chosen.sum()), int(cover.sum()), int((chosen & cover).sum())) == (7, 14, 0)
    stamped = as_uint8(attack.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {4}
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    assert bool((poisoned.data.images[cover] != stamped[cover]).flatten(1).any(1).all())


def test_training_gives_every_image_its_trigger_and_a_folder_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lustral.vision.attacks.input_aware.LEAST_MASK_STEPS", 60)  # masks are another test's matter
    train, test = toy_images(1400, seed=0), toy_images(420, seed=1)
    attack = dataclasses.replace(SMALL, poison_rate=0.2)
    victim = implant(attack, train, test, arch="small_cnn:width=16", trainer=toy_trainer(), seed=0, data_name="toy")
    assert victim.metrics["acc"]["value"] > 0.95
    assert victim.metrics["asr"]["value"] > 0.5  # over three seeds 0.81 to 0.98
    assert victim.metrics["natural_rate"]["value"] < 0.1
    assert victim.metrics["probes"]["cross_accuracy"]["n"] == 420
    images = as_float(test.images)
    residuals = victim.trigger(images) - images
    assert float((residuals - residuals.roll(1, 0)).square().mean().sqrt()) > 0.05
    save_victim(tmp_path, victim, test)
    assert torch.equal(load_victim(tmp_path).trigger(images), victim.trigger(images))


def test_the_attack_comes_back_from_its_tensors(crafted: CraftedInputAware) -> None:
    assert isinstance(SMALL, CraftedAttack)
    assert isinstance(crafted, Crafted)
    assert isinstance(crafted, SteersTraining)
    assert not isinstance(crafted, CraftedAttack)
    back = SMALL.restore(load(save(dict(crafted.tensors()))), SHAPE)
    images = pictures()
    assert torch.equal(back.trigger(SHAPE)(images), crafted.trigger(SHAPE)(images))


@pytest.mark.parametrize(
    ("settings", "shape", "spoil", "message"),
    [
        (dataclasses.replace(SMALL, width=8), SHAPE, {}, "do not fit width 8, 2 steps and 3 channels"),
        (dataclasses.replace(SMALL, steps=3), SHAPE, {}, "do not fit width 4, 3 steps and 3 channels"),
        (SMALL, (1, 12, 12), {}, "do not fit width 4, 2 steps and 1 channels"),
        (SMALL, SHAPE, {"intruder": torch.zeros(1)}, "1 tensors are missing, unknown .* such as intruder"),
        (SMALL, SHAPE, {"mask.middle.0.bias": torch.full((8,), float("nan"))}, "damaged: mask.middle.0.bias"),
        (SMALL, SHAPE, {"pattern.middle.1.running_var": torch.full((8,), -1.0)}, "damaged: pattern.middle.1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    crafted: CraftedInputAware,
    settings: InputAware,
    shape: tuple[int, int, int],
    spoil: dict[str, Tensor],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.restore({**crafted.tensors(), **spoil}, shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\].*got 0.0"),
        ({"cross_rate": 0.95}, r"cross rate in \[0, 0.9\], what a poison rate of 0.1 leaves; got 0.95"),
        ({"diversity_weight": -1.0}, "diversity_weight >= 0.*got -1.0"),
        ({"mask_density": 1.0}, r"mask_density in \(0, 1\).*and 1.0"),
        ({"width": 0}, "width, steps.* >= 1.*got 0, 3"),
        ({"pattern_learning_rate": 0.0}, "positive learning rates.*and 0.0"),
        ({"mode": "some_to_one"}, "mode to be one of all_to_one, all_to_all"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputAware(**wrong)


def test_what_the_data_cannot_bear_is_refused() -> None:
    clean = toy_images(20, seed=0)
    with pytest.raises(ValueError, match="poisons none"):
        InputAware(poison_rate=0.01).require_possible(clean)
    with pytest.raises(ValueError, match=r"target label in 0 \.\. 6; got 7"):
        InputAware(target_label=7).require_possible(clean)
