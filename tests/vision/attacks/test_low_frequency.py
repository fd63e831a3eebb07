"""The smooth pattern: its range, its spectrum, what it does to a model, and what comes back from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.attacks.low_frequency import LowFrequency, SmoothPatternAttack, smooth_pattern
from lustral.vision.attacks.surrogates import Surrogate, clean_classifier
from lustral.vision.evaluation.metrics import attack_metrics
from lustral.vision.images import as_float, as_uint8
from lustral.vision.interfaces import Crafted, CraftedAttack
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet
from toy import toy_images, toy_trainer

SHAPE = (3, 12, 12)


class Kept:
    """Assets in memory, which remember what was asked for."""

    def __init__(self) -> None:
        self.specs: list[Mapping[str, Any]] = []
        self.built: list[str] = []
        self.tensors: dict[str, Mapping[str, Tensor]] = {}

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        self.specs.append(spec)
        if repr(spec) not in self.tensors:
            self.tensors[repr(spec)] = build()
            self.built.append(spec["asset"])
        return self.tensors[repr(spec)]


def quick(**changes: Any) -> LowFrequency:
    settings: dict[str, Any] = {"steps": 60, "target_label": 4, "surrogate": Surrogate(epochs=1)}
    return LowFrequency(**{**settings, **changes})


@pytest.fixture(scope="module")
def assets() -> Kept:
    return Kept()


@pytest.fixture(scope="module")
def crafted(assets: Kept) -> SmoothPatternAttack:
    return quick().craft(toy_images(700, seed=0), assets=assets, generator=child(0))


def pattern_of(values: Tensor) -> SmoothPatternAttack:
    shape = tuple(values.shape)
    return LowFrequency(amplitude=float(values.max())).restore({"pattern": values}, (shape[0], shape[1], shape[2]))


def test_stamping_by_hand() -> None:
    trigger = pattern_of(torch.tensor([[[0.0, 0.1, 0.2]]])).trigger((1, 1, 3))
    out = trigger(torch.tensor([[[[0.5, 0.5, 0.5]]], [[[1.0, 0.95, 0.9]]]]))
    assert out.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7, 1.0, 1.0, 1.0])


def test_a_pattern_runs_from_zero_to_the_amplitude() -> None:
    grid = torch.randn(3, 4, 4, generator=child(0)) * 7 - 3
    pattern = smooth_pattern(grid, (32, 24), 0.2)
    assert pattern.shape == (3, 32, 24)
    assert float(pattern.min()) == 0
    assert float(pattern.max()) == pytest.approx(0.2, abs=1e-7)
    assert torch.allclose(pattern, smooth_pattern(5 * grid + 2, (32, 24), 0.2), atol=1e-6)  # neither scale nor offset


def test_a_pattern_holds_no_high_frequency() -> None:
    """Of four points a side on 32 pixels, next to nothing lies above two periods a side; of noise, nearly all does."""
    pattern = smooth_pattern(torch.rand(3, 4, 4, generator=child(0)), (32, 32), 0.2)

    def share_above(images: Tensor, periods: float) -> float:
        mirrored = torch.cat([images, images.flip(-1)], -1)  # without the jump at the border
        power = torch.fft.fft2(torch.cat([mirrored, mirrored.flip(-2)], -2)).abs().square().sum(0)
        frequency = torch.fft.fftfreq(64, d=1 / 32).abs()
        high = torch.maximum(frequency[:, None], frequency) > periods
        power[0, 0] = 0
        return float(power[high].sum() / power.sum())

    assert share_above(pattern, 2.5) < 0.02
    assert share_above(torch.rand(3, 32, 32, generator=child(0)), 2.5) > 0.9


def test_the_pattern_is_optimised_against_the_model(crafted: SmoothPatternAttack, assets: Kept) -> None:
    clean = toy_images(210, seed=3)
    model = clean_classifier(toy_images(700, seed=0), Surrogate(epochs=1), assets=assets)
    others = as_float(clean.images[clean.labels != 4])
    start = smooth_pattern(torch.rand(3, 4, 4, generator=child(0)), (12, 12), 0.2)

    def loss(pattern: Tensor) -> float:
        with torch.no_grad():
            return float(-model((others + pattern).clamp(0, 1)).log_softmax(1)[:, 4].mean())

    assert loss(crafted.pattern) < loss(start) - 0.2
    assert loss(crafted.pattern) < loss(torch.full(SHAPE, 0.1)) - 0.2


def test_equal_settings_give_equal_patterns_and_every_setting_matters() -> None:
    clean, linear = toy_images(140, seed=0), nn.Linear(432, 7)
    linear.weight.data = torch.randn(7, 432, generator=child(0))
    model = nn.Sequential(nn.Flatten(), linear)
    pattern = quick(steps=15).optimise(model, clean)
    assert torch.equal(pattern, quick(steps=15).optimise(model, clean))
    for changes in (
        {"target_label": 2},
        {"amplitude": 0.1},
        {"grid": 3},
        {"num_images": 20},
        {"steps": 14},
        {"batch_size": 99},
        {"learning_rate": 0.02},
        {"pattern_seed": 1},
    ):
        assert not torch.equal(pattern, quick(**{"steps": 15, **changes}).optimise(model, clean)), changes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_only_images_of_other_classes_are_used() -> None:
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return images.mean((2, 3)).repeat(1, 3)[:, :7]

    images = torch.full((70, 3, 12, 12), 51, dtype=torch.uint8)
    labels = torch.arange(70) % 7
    images[labels == 4] = 255
    quick(amplitude=0.1).optimise(Watched(), ImageSet(images=images, labels=labels, num_classes=7))
    assert float(torch.cat(seen).max()) <= 0.3 + 1e-6


def test_assets_are_built_once_and_named_by_all_they_depend_on(crafted: SmoothPatternAttack, assets: Kept) -> None:
    clean = toy_images(700, seed=0)
    assert assets.built == ["clean classifier", "low-frequency pattern"]
    again = quick(poison_rate=0.01).craft(clean, assets=assets, generator=child(9))
    assert assets.built == ["clean classifier", "low-frequency pattern"]
    assert torch.equal(again.pattern, crafted.pattern)
    other = quick(target_label=2).craft(clean, assets=assets, generator=child(0))
    assert assets.built == ["clean classifier", "low-frequency pattern", "low-frequency pattern"]
    assert not torch.equal(other.pattern, crafted.pattern)
    known = {repr(spec) for spec in assets.specs}

    class Only:
        def get(self, spec: Mapping[str, Any], build: object) -> Mapping[str, Tensor]:
            assert repr(spec) not in known
            return {"pattern": crafted.pattern}

    for attack in (quick(surrogate=Surrogate(epochs=2)), quick(steps=61), quick(grid=3), quick(pattern_seed=3)):
        attack.craft(clean, assets=Only(), generator=child(0))
    quick().craft(toy_images(700, seed=1), assets=Only(), generator=child(0))  # other images


def test_progress_is_reported() -> None:
    reports: list[Progress] = []
    quick(steps=50).optimise(
        nn.Sequential(nn.Flatten(), nn.Linear(432, 7)), toy_images(70, seed=0), on_progress=reports.append
    )
    assert [(report.done, report.total) for report in reports] == [(20, 50), (40, 50), (50, 50)]


def test_what_is_saved_comes_back(crafted: SmoothPatternAttack) -> None:
    assert isinstance(quick(), CraftedAttack)
    assert isinstance(crafted, Crafted)
    tensors = load(save(dict(crafted.tensors())))
    restored = quick().restore(tensors, SHAPE)
    images = torch.rand(5, *SHAPE, generator=child(0))
    assert torch.equal(restored.trigger(SHAPE)(images), crafted.trigger(SHAPE)(images))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected one tensor, 'pattern'; got none"),
        ({"mask": torch.zeros(SHAPE)}, "got mask"),
        (
            {"pattern": torch.linspace(0, 0.2, 48).reshape(3, 4, 4)},
            r"shape \(3, 12, 12\); got torch.float32 \(3, 4, 4\)",
        ),
        ({"pattern": torch.linspace(0, 0.2, 432).double().reshape(SHAPE)}, "got torch.float64"),
        ({"pattern": torch.linspace(0, 51, 432).reshape(SHAPE)}, "0 to the amplitude 0.2; got 0 to 51"),
        ({"pattern": torch.linspace(0, 0.2 / 255, 432).reshape(SHAPE)}, "got 0 to 0.0007843"),
        ({"pattern": torch.linspace(-0.2, 0.2, 432).reshape(SHAPE)}, "got -0.2 to 0.2"),
        ({"pattern": torch.full(SHAPE, torch.nan)}, "got nan to nan"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowFrequency().restore(tensors, SHAPE)


def test_a_pattern_fits_one_shape(crafted: SmoothPatternAttack) -> None:
    with pytest.raises(ValueError, match=r"computed for images of \(3, 12, 12\); got \(3, 16, 16\)"):
        crafted.trigger((3, 16, 16))


def test_poisoned_images_equal_stamping_at_test_time(crafted: SmoothPatternAttack) -> None:
    clean = toy_images(70, seed=5)
    poisoned = crafted.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 7
    stamped = as_uint8(crafted.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {4}


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LowFrequency(grid=7), "grid of 7 points along a side is smooth on images of at least 14 pixels; got 12x12"),
        (LowFrequency(target_label=7), r"target label in 0 \.\. 6; got 7"),
        (LowFrequency(poison_rate=0.001), "poisons none"),
    ],
)
def test_what_the_data_cannot_bear_is_refused_before_any_work(attack: LowFrequency, message: str) -> None:
    class NoWork:
        def get(self, spec: object, build: object) -> Mapping[str, Tensor]:
            raise AssertionError("asked for an asset")

    clean = toy_images(70, seed=5)
    for act in (attack.require_possible, lambda data: attack.craft(data, assets=NoWork(), generator=child(0))):
        with pytest.raises(ValueError, match=message):
            act(clean)
    with pytest.raises(ValueError, match="other classes than the target label 0; got none"):
        LowFrequency().require_possible(clean.subset(clean.labels == 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"amplitude": 51.0}, r"between 1/255 and 1, in \[0, 1\] units; got 51"),
        ({"grid": 1}, "grid >= 2"),
        ({"steps": 0}, "steps >= 1"),
        ({"num_images": 0}, "num_images >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"poison_rate": 1.5}, "poison rate"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowFrequency(**wrong)


def test_a_network_learns_the_pattern(crafted: SmoothPatternAttack) -> None:
    train, test = toy_images(700, seed=0), toy_images(210, seed=1)
    network = build_classifier(
        "small_cnn:width=16",
        num_classes=7,
        image_shape=SHAPE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        generator=child(0, "w"),
    )
    data = crafted.poison(train, generator=child(0, "poison")).data
    model = toy_trainer().fit(network, data, generator=child(0, "training"))
    found = attack_metrics(model, test, crafted.trigger(SHAPE), crafted.relabel, generator=child(0))
    assert found.attack_success_rate.value > 0.9
    assert found.natural_rate.value < 0.1
