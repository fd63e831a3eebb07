import pytest
import torch
from torch import nn

import lustral.models
from lustral.models import VGG, PreActResNet18, SmallCNN


def test_exports_are_sorted_and_importable() -> None:
    names = lustral.models.__all__
    assert all(hasattr(lustral.models, name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", [4, 8, 28, 32, 64])
@pytest.mark.parametrize(
    "network",
    [SmallCNN(5, in_channels=1, width=4), VGG(11, 5, in_channels=1, width=2), PreActResNet18(5, 1, width=2)],
    ids=lambda network: type(network).__name__,
)
def test_maps_images_of_many_sizes_to_logits(network: nn.Module, size: int) -> None:
    assert network.eval()(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_a_small_cnn_is_small() -> None:
    assert 50_000 < sum(p.numel() for p in SmallCNN(10).parameters()) < 100_000


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_as_many_layers_with_weights_as_its_name_says(depth: int) -> None:
    layers = [m for m in VGG(depth, 10, width=2).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth - 2  # one linear layer in place of three


def test_vgg16_of_the_paper_has_its_14_7_million_convolution_parameters() -> None:
    convolutions = [m for m in VGG(16, 10).modules() if isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for m in convolutions for p in m.parameters()) == 14_714_688


@pytest.mark.parametrize("build", [lambda: VGG(12, 10), lambda: VGG(11, 10, width=0), lambda: SmallCNN(10, width=0)])
def test_bad_arguments_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=r"expected a (depth|width)"):
        build()
