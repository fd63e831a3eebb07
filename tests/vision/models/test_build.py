import sys
from pathlib import Path

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.models import NETWORKS, build_classifier, runs_user_code


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_builds_with_a_width(name: str) -> None:
    model = build_classifier(f"{name}:width=2", num_classes=4, image_shape=(1, 8, 8))
    assert model.training
    assert model.eval()(torch.rand(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("torchvision:squeezenet1_1", (3, 64, 64)),
        ("timm:resnet10t", (1, 32, 32)),  # takes any size
        ("timm:test_vit", (3, 32, 48)),  # is told its size
    ],
)
def test_other_libraries_networks(arch: str, shape: tuple[int, int, int]) -> None:
    model = build_classifier(arch, num_classes=4, image_shape=shape).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 4)


def test_normalisation_is_the_identity_unless_given() -> None:
    plain = build_classifier("small_cnn:width=2", num_classes=4, image_shape=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain.normalise(images), images)
    model = build_classifier("small_cnn:width=2", num_classes=4, image_shape=(3, 8, 8), mean=[0.5] * 3, std=[0.25] * 3)
    torch.testing.assert_close(model.normalise(images), (images - 0.5) / 0.25)


def test_weights_come_from_the_generator_and_the_global_stream_stays() -> None:
    def weights(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else child(seed, "init")
        model = build_classifier("small_cnn:width=2", num_classes=4, image_shape=(3, 8, 8), generator=generator)
        return torch.cat([p.flatten() for p in model.parameters()])

    before = torch.random.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert torch.equal(weights(None), weights(None))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("preact_resnet81", "unknown architecture 'preact_resnet81'; known: .*; did you mean 'preact_resnet18'"),
        ("nonsense", r"unknown architecture 'nonsense'; known: preact_resnet18, .*FILE\.py:FUNCTION"),
        ("small_cnn:widht=3", "unknown option 'widht' in 'small_cnn:widht=3'; known: width; did you mean 'width'"),
        ("vgg11_bn:depth=13", "unknown option 'depth' in 'vgg11_bn:depth=13'; known: classifier, dropout, gelu"),
        ("small_cnn:width=0", "expected width=1 .. 1024"),
        ("small_cnn:width=99999999", "expected width=1 .. 1024"),
        ("small_cnn:width=two", "got 'width=two'"),
        ("torchvision:resnet19", "unknown torchvision classifier 'resnet19'; did you mean .*'resnet18'"),
        ("torchvision:fcn_resnet50", "unknown torchvision classifier"),
        ("timm:resnet19", "unknown timm model 'resnet19'; did you mean .*'resnet18'"),
        ("timm:hf-hub:someone/something", "unknown timm model"),
        ("missing.py:net", "no such Python file"),
    ],
)
def test_unknown_names_and_options_are_explained(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier(arch, num_classes=4, image_shape=(3, 8, 8))


def test_other_bad_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        build_classifier("small_cnn", num_classes=1, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="expected 3 numbers in std, one per channel; got 1"):
        build_classifier("small_cnn", num_classes=4, image_shape=(3, 8, 8), std=[1.0])
    with pytest.raises(ValueError, match="3 channels; got 1"):
        build_classifier("torchvision:resnet18", num_classes=4, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"does not take images of shape \(3, 2, 2\)"):
        build_classifier("small_cnn", num_classes=4, image_shape=(3, 2, 2))


USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from my_layers import head

@dataclass
class Settings:
    hidden: int = 6

def net(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, Settings().hidden), head(Settings().hidden, num_classes))

def fixed():
    return net(7)

def passes_on(**settings):
    return net(**settings)

def broken(num_classes):
    raise KeyError("weights")

def wrong():
    return 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "my_layers.py").write_text("from torch import nn\nhead = nn.Linear\n")
    (tmp_path / "nets.py").write_text(USER_FILE)
    return tmp_path / "nets.py"


def test_a_users_own_function_builds(user_file: Path) -> None:
    path_before = list(sys.path)
    for function, classes in {"net": 4, "passes_on": 5, "fixed": 7}.items():
        assert runs_user_code(f"{user_file}:{function}")
        model = build_classifier(f"{user_file}:{function}", num_classes=classes, image_shape=(3, 4, 4))
        assert model(torch.rand(2, 3, 4, 4)).shape == (2, classes)
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fixed", "gives 7 logits; expected 4"),
        ("broken", "broken failed: KeyError: 'weights'"),
        ("wrong", "returned a int; expected a torch.nn.Module"),
        ("nett", "has no function 'nett'; did you mean 'net'"),
    ],
)
def test_a_users_faulty_function_is_explained(user_file: Path, function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier(f"{user_file}:{function}", num_classes=4, image_shape=(3, 4, 4))
