"""The attacker's own classifiers: what names them, that they are trained once, that they come back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lustral.vision.attacks.surrogates import (
    LEAST_STEPS,
    Surrogate,
    clean_classifier,
    data_fingerprint,
    require_like,
    surrogate_spec,
)
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet
from toy import toy_images

QUICK = Surrogate(arch="small_cnn:width=8")


class Files:
    """Assets as a folder would keep them: named by JSON, held as bytes."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        name = json.dumps(spec, sort_keys=True, allow_nan=False)
        if name not in self.held:
            self.held[name] = save(dict(build()))
        return load(self.held[name])


def fingerprint(images: Tensor, labels: list[int], num_classes: int = 3, names: tuple[str, ...] = ()) -> str:
    return data_fingerprint(
        ImageSet(images=images, labels=torch.tensor(labels), num_classes=num_classes, class_names=names)
    )


def test_a_fingerprint_covers_pixels_labels_shape_and_classes_only() -> None:
    images = torch.arange(2 * 3 * 4 * 2, dtype=torch.uint8).view(2, 3, 4, 2)
    given = fingerprint(images, [0, 1])
    assert len(given) == 64
    assert given == fingerprint(images.clone(), [0, 1], names=("a", "b", "c"))
    assert given == fingerprint(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), [0, 1])  # other memory
    other = images.clone()
    other[1, 2, 3, 1] += 1
    changed = [
        fingerprint(other, [0, 1]),
        fingerprint(images, [0, 2]),
        fingerprint(images, [0, 1], num_classes=4),
        fingerprint(images.view(2, 3, 2, 4), [0, 1]),
    ]
    assert len({given, *changed}) == 5


def test_an_empty_set_has_a_fingerprint() -> None:
    assert len(data_fingerprint(toy_images(0, seed=0))) == 64


def test_small_images_get_the_small_network() -> None:
    assert Surrogate().arch_for((3, 16, 16)) == "preact_resnet18:width=16"
    assert Surrogate().arch_for((1, 28, 15)) == "small_cnn"
    assert Surrogate(arch="vgg11_bn:width=8").arch_for((1, 8, 8)) == "vgg11_bn:width=8"


def test_small_sets_are_passed_over_more_often() -> None:
    recipe = Surrogate(epochs=2)
    small, large = recipe.trainer_for(toy_images(70, seed=0)), recipe.trainer_for(toy_images(128 * 200, seed=0))
    assert small.epochs * (70 // small.batch_size) >= LEAST_STEPS
    assert (large.epochs, large.batch_size) == (2, 128)
    assert small.augment is not None
    assert small.augment.crop_padding == 1  # an eighth of 12 pixels, rounded down


def test_the_spec_is_plain_and_says_what_the_weights_depend_on() -> None:
    data = toy_images(70, seed=0)
    spec = surrogate_spec(data, Surrogate())
    assert json.loads(json.dumps(spec)) == spec
    assert spec == surrogate_spec(data, Surrogate(arch="small_cnn"))  # the default, by its name
    others = [
        surrogate_spec(toy_images(70, seed=1), Surrogate()),
        surrogate_spec(data, Surrogate(epochs=3)),
        surrogate_spec(data, Surrogate(batch_size=3)),
        surrogate_spec(data, Surrogate(crop_padding=3)),
        surrogate_spec(data, Surrogate(seed=3)),
        surrogate_spec(data, Surrogate(flip=True)),
        surrogate_spec(data, Surrogate(learning_rate=0.03)),
    ]
    assert spec not in others


def test_a_surrogate_is_trained_once_and_comes_back_from_a_file() -> None:
    data, test, assets = toy_images(1400, seed=0), as_float(toy_images(420, seed=1).images), Files()
    stages: set[str] = set()
    model = clean_classifier(data, QUICK, assets=assets, on_progress=lambda report: stages.add(report.stage))
    assert stages == {"training a surrogate"}
    assert float((model(test).argmax(1) == toy_images(420, seed=1).labels).float().mean()) > 0.95

    def refuse(_: object) -> None:
        raise AssertionError("trained a second time")

    again = clean_classifier(data, QUICK, assets=assets, on_progress=refuse)
    assert torch.equal(model(test), again(test))
    assert len(assets.held) == 1


def test_a_surrogate_is_frozen_but_lets_gradients_through() -> None:
    model = clean_classifier(toy_images(70, seed=0), QUICK, assets=Files())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_sets_that_teach_nothing_are_refused() -> None:
    data = toy_images(70, seed=0)
    with pytest.raises(ValueError, match="is empty"):
        clean_classifier(data.subset(data.labels > 6), QUICK, assets=Files())
    with pytest.raises(ValueError, match="a single class"):
        clean_classifier(data.subset(data.labels == 6), QUICK, assets=Files())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"crop_padding": -1}])
def test_impossible_recipes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected epochs >= 1"):
        Surrogate(**wrong)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"missing \['a'\], not known \[\]"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, r"missing \[\], not known \['b'\]"),
        ({"a": torch.zeros(3)}, r"expected a of shape \(2,\) and torch.float32; got \(3,\) torch.float32"),
        ({"a": torch.zeros(2, dtype=torch.float64)}, "got .* torch.float64"),
        ({"a": torch.tensor([0.0, torch.nan])}, "expected finite numbers in a"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    require_like({"a": torch.ones(2)}, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=message):
        require_like(tensors, {"a": torch.zeros(2)})
