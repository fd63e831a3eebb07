"""Networks that filter features by their own first answer: nothing changes at birth, each image meets its own class's filter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.models import (
    Classifier,
    Conditioned,
    ModelFileError,
    arch_of,
    build_classifier,
    load_model,
    save_model,
)
from lustral.vision.models.build import build_network
from lustral.vision.models.conditioned import ClassPolarizers

SHAPE = (3, 12, 12)
BASE = "preact_resnet18:width=4"
LAYER = "layer4.1.conv1"


def shaken(layer: str = LAYER, base: str = BASE) -> Classifier:
    """Return a conditioned classifier with polarizers that do something."""
    model = build_classifier(f"conditioned:{layer}@{base}", num_classes=4, image_shape=SHAPE, generator=child(0)).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    polarizers = next(module for module in model.modules() if isinstance(module, ClassPolarizers))
    for number, parameter in enumerate((polarizers.weight, polarizers.scale, polarizers.shift)):
        parameter += 0.5 * torch.randn(parameter.shape, generator=child(number))


def images(count: int = 24) -> Tensor:
    return torch.rand(count, *SHAPE, generator=child(9))


@pytest.mark.parametrize(
    ("base", "layer"),
    [(BASE, LAYER), ("small_cnn:width=4", "features.8"), (f"conditioned:{LAYER}@{BASE}", f"network.{LAYER}")],
)
def test_a_new_one_answers_as_the_network_inside(base: str, layer: str) -> None:
    model = build_network(f"conditioned:{layer}@{base}", num_classes=4, image_shape=SHAPE, generator=child(0)).eval()
    assert isinstance(model, Conditioned)
    assert torch.allclose(model(images()), model.network(images()), atol=1e-5)


def test_standardised_and_identical_features() -> None:
    polarizers, features = ClassPolarizers(3, 2, last=False), torch.randn(5, 2, 3, 3, generator=child(0))
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    classes = torch.tensor([2, 0, 0, 1, 2])
    polarizers.set_statistics(mean, deviation, identity=True)
    assert torch.allclose(polarizers(features, classes), features, atol=1e-5)
    polarizers.set_statistics(mean, deviation, identity=False)
    wanted = (features - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(polarizers(features, classes), wanted, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_each_image_meets_the_filter_of_its_class(last: bool) -> None:
    polarizers = ClassPolarizers(4, 3, last=last)
    shake(polarizers)
    features = torch.randn((6, 5, 3) if last else (6, 3, 2, 2), generator=child(1))
    classes = torch.tensor([3, 0, 3, 1, 1, 0])  # not in order, and one class without an image
    together = polarizers(features, classes)
    for number, label in enumerate(classes.tolist()):
        alone = polarizers(features[number : number + 1], torch.tensor([label]))
        assert torch.allclose(together[number], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], polarizers(features[:1], torch.tensor([1]))[0], atol=1e-2)


def test_the_first_answer_chooses_the_filter() -> None:
    model = shaken().network
    assert isinstance(model, Conditioned)
    with model.routed(None):
        said = model(images()).argmax(1)
        assert torch.equal(model(images()), model.network(images()))
    with model.routed(said):
        wanted = model(images())
    assert torch.equal(model(images()), wanted)
    with model.routed((said + 1) % 4):
        assert not torch.allclose(model(images()), wanted, atol=1e-3)
    assert torch.equal(model(images()), wanted)  # the block is over


def test_the_choice_ends_with_the_block_even_if_it_fails() -> None:
    model = shaken().network
    assert isinstance(model, Conditioned)
    wanted = model(images())
    with (
        pytest.raises(ValueError, match="expected the features of 3 images; got 24"),
        model.routed(torch.zeros(3).long()),
    ):
        model(images())
    assert torch.equal(model(images()), wanted)


def test_a_copy_is_a_network_of_its_own() -> None:
    model = shaken()
    wanted, copied = model(images()), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(copied(images()), wanted)
    shake(copied)
    assert not torch.allclose(copied(images()), wanted, atol=1e-3)


def test_the_slope_of_an_image_goes_through_its_filter() -> None:
    model, x = shaken(), images(2).requires_grad_(True)
    model(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    network = model.network
    assert isinstance(network, Conditioned)
    assert network.polarizers.weight.grad is not None


def test_a_file_keeps_the_filters_and_names_the_architecture(tmp_path: Path) -> None:
    model = shaken()
    path = tmp_path / "model.safetensors"
    arch = arch_of(model.network, BASE)
    assert arch == f"conditioned:{LAYER}@{BASE}"
    save_model(path, model, arch=arch, image_shape=SHAPE)
    loaded = load_model(path)
    assert (loaded.arch, loaded.num_classes) == (arch, 4)
    assert torch.equal(loaded.model(images()), model(images()))
    inside = {key.removeprefix("network.") for key in loaded.layout if key.startswith("network.")}
    assert inside == set(build_network(BASE, num_classes=4, image_shape=SHAPE).state_dict())


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (f"conditioned:nowhere@{BASE}", "there is no 'nowhere'"),
        (f"conditioned:layer4.1.bn1@{BASE}", "without groups"),
        (f"conditioned:@{BASE}", "expected conditioned:LAYER@BASE"),
        (f"conditioned:{LAYER}", "expected conditioned:LAYER@BASE"),
        (5 * "conditioned:x@" + BASE, "at most 4 inside each other"),
        (5000 * "conditioned:x@" + BASE, "at most 4 inside each other"),
        (f"conditioned:{LAYER}@preact_resnet", "unknown architecture 'preact_resnet'.*preact_resnet18"),
    ],
)
def test_names_that_make_no_sense_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(arch, num_classes=4, image_shape=SHAPE)


def test_code_inside_of_the_name_is_not_run_because_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise SystemExit('this ran')")
    path = tmp_path / "model.safetensors"
    model = shaken()
    save_model(path, model, arch=f"conditioned:{LAYER}@{tmp_path / 'net.py'}:build", image_shape=SHAPE)
    with pytest.raises(ModelFileError, match="is not run because"):
        load_model(path)
