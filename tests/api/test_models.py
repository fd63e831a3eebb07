"""A module in memory becomes a classifier: its channels, its copy, and the normalisation that it expects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lustral.api.data import open_data
from lustral.api.models import NONE, as_loaded, fit_channels, own_copy, try_normalisations, with_guessed_normalisation
from lustral.vision.models import Classifier
from lustral.vision.records import ImageSet

SHADES = torch.linspace(20, 230, 8).to(torch.uint8)
GREY = ImageSet(
    images=SHADES.repeat_interleave(3).view(24, 1, 1, 1).repeat(1, 1, 4, 4), labels=torch.arange(24) // 3, num_classes=8
)


class Shades(nn.Module):
    """Tells eight shades apart: right where pixels come as ``scale * pixel + shift``."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(scale * SHADES.float() / 255 + shift)
        self.sharp = 100 / scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -self.sharp * (images.mean((1, 2, 3))[:, None] - self.centres).abs()


@pytest.mark.parametrize(
    ("scale", "shift", "name"),
    [
        (1.0, 0.0, NONE),
        (2.0, -1.0, "that to [-1, 1]"),
        (255.0, 0.0, "none (pixels in 0 .. 255)"),
        (1 / 0.3081, -0.1307 / 0.3081, "that of MNIST"),
    ],
)
def test_the_normalisation_that_a_network_expects_is_found(scale: float, shift: float, name: str) -> None:
    network = Shades(scale, shift)
    tried = try_normalisations(network, GREY, 8)
    best = min(tried, key=lambda each: (-each.hits, each.loss))
    assert best.name == name
    assert best.hits == 24
    loaded, note = with_guessed_normalisation(as_loaded(network, (1, 4, 4), (None, None)), GREY)
    assert f"{name} fits best: the model is right on 100.0% of 24 clean images" in note
    assert loaded.model.normalise.mean.item() == pytest.approx(best.mean[0])
    assert loaded.num_classes == 8


def test_outputs_that_are_no_numbers_fit_least() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None].repeat(1, 8).sub(2).log()  # nan below 2

    tried = {each.name: each.loss for each in try_normalisations(Broken(), GREY, 8)}
    assert tried[NONE] == float("inf")
    assert tried["none (pixels in 0 .. 255)"] < float("inf")


def test_channels_follow_the_network() -> None:
    source = open_data(GREY).source
    rgb = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
    assert fit_channels(rgb, source).train.image_shape == (3, 4, 4)
    assert fit_channels(Shades(1, 0), source).train.image_shape == (1, 4, 4)
    four = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 4, 4\).*give image_size="):
        fit_channels(four, source)


def test_a_copy_is_float_and_its_own() -> None:
    network = nn.Linear(3, 2).half().requires_grad_(False).train()
    copied = own_copy(network, None)
    assert next(copied.parameters()).dtype == torch.float32
    assert next(copied.parameters()).requires_grad
    assert not copied.training
    assert next(network.parameters()).dtype == torch.float16
    assert network.training
    held = nn.Linear(3, 2)
    held.lock = (each for each in ())  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the model cannot be copied"):
        own_copy(held, None)


def test_a_classifier_keeps_its_normalisation() -> None:
    given = Classifier(Shades(1, 0), (0.5,), (0.5,))
    loaded = as_loaded(given, (1, 4, 4), (None, None))
    assert loaded.model is given
    assert loaded.arch.endswith("Shades")
    with pytest.raises(ValueError, match="has its own normalisation"):
        as_loaded(given, (1, 4, 4), ((0.5,), (0.5,)))
