"""The added pattern: norms, the search against a plain formula, what is kept and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.attacks.additive import (
    Additive,
    CraftedAdditive,
    Norm,
    in_steps,
    largest_pixels,
    optimise_pattern,
    scaled_to_norm,
)
from lustral.vision.attacks.surrogates import Surrogate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.victims import NoAssets
from toy import toy_images

SHAPE = (3, 12, 12)
SMALL = Surrogate(arch="small_cnn:width=4", epochs=1)


@pytest.fixture(scope="module", params=["l2", "l0"])
def crafted(request: pytest.FixtureRequest) -> CraftedAdditive:
    attack = Additive(norm=request.param, size=1.0 if request.param == "l2" else 5, target_label=2, surrogate=SMALL)
    return attack.craft(toy_images(350, seed=0), assets=NoAssets(), generator=child(0))


def test_the_norm_is_kept_in_whole_steps(crafted: CraftedAdditive) -> None:
    pattern = crafted.pattern
    assert torch.allclose(pattern * 255, (pattern * 255).round(), atol=1e-4)
    if crafted.settings.norm == "l2":
        assert 0.8 < float(pattern.norm()) <= 1.0
    else:
        assert 1 <= int((pattern != 0).any(0).sum()) <= 5


def test_the_trigger_adds_and_clips(crafted: CraftedAdditive) -> None:
    images = as_float(toy_images(20, seed=3).images)
    out = crafted.trigger(SHAPE)(images)
    assert torch.equal(out, (images + crafted.pattern).clamp(0, 1))
    assert torch.equal(as_float(as_uint8(out)), as_float(as_uint8(as_float(as_uint8(out)))))


def test_poisoned_images_carry_the_pattern_and_the_target(crafted: CraftedAdditive) -> None:
    clean = toy_images(200, seed=4)
    found = crafted.poison(clean, generator=child(1))
    chosen = found.is_poisoned
    assert int(chosen.sum()) == 20
    assert bool((found.data.labels[chosen] == 2).all())
    wanted = as_uint8((as_float(clean.images[chosen]) + crafted.pattern).clamp(0, 1))
    assert torch.equal(found.data.images[chosen], wanted)
    assert torch.equal(found.data.images[~chosen], clean.images[~chosen])


class Linear(nn.Module):
    """Two logits: 0 and the image's product with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def search(norm: Norm, size: float, steps: int) -> Tensor:
    weight = torch.tensor([[[3.0, -1.0, 0.0], [0.5, 2.0, -4.0]]])
    batch = torch.full((4, 1, 2, 3), 0.5), torch.ones(4, dtype=torch.int64)
    start = torch.zeros(1, 2, 3)
    return optimise_pattern(Linear(weight), lambda: batch, start, norm=norm, size=size, steps=steps, learning_rate=0.01)


def test_steps_equal_a_plain_adam_by_hand() -> None:
    weight = torch.tensor([[[3.0, -1.0, 0.0], [0.5, 2.0, -4.0]]])
    pattern, first, second = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    for step in range(1, 6):
        score = ((0.5 + pattern) * weight).sum()
        slope = -torch.sigmoid(-score) * weight  # of -log sigmoid(score)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        pattern = pattern - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        pattern = pattern * min(1.0, 0.06 / float(pattern.norm()))
    assert torch.allclose(search("l2", 0.06, 5), pattern, atol=1e-5)
    assert float(search("l2", 0.06, 30).norm()) == pytest.approx(0.06, abs=1e-5)


def test_l0_keeps_the_pixels_that_moved_most() -> None:
    found = search("l0", 2, 10)
    assert int((found != 0).sum()) == 2
    assert torch.equal(found.sign().nonzero(), found.nonzero())


def test_projections_by_hand() -> None:
    assert torch.equal(scaled_to_norm(torch.tensor([[[0.3, 0.4]]]), 2.0), torch.tensor([[[0.3, 0.4]]]))
    assert not bool(scaled_to_norm(torch.zeros(1, 1, 2), 1.0).any())
    two_channels = torch.tensor([[[0.6, 0.0, 0.5]], [[0.0, 0.7, 0.5]]])
    assert largest_pixels(two_channels, 1).tolist() == [[False, False, True]]
    assert (in_steps(torch.tensor([0.9, -1.9, 2.0]) / 255) * 255).round().tolist() == [0.0, -1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "norm"),
        ({"size": 0.0}, "an L2 norm above 0"),
        ({"norm": "l0", "size": 2.5}, "a whole number of pixels"),
        ({"steps": 0}, "steps >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"poison_rate": 0.0}, "poison rate"),
    ],
)
def test_odd_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Additive(**settings)  # type: ignore[arg-type]


def test_a_pattern_from_a_file_is_checked(crafted: CraftedAdditive) -> None:
    settings = crafted.settings
    assert torch.equal(settings.restore(crafted.tensors(), SHAPE).pattern, crafted.pattern)
    for odd in (torch.zeros(SHAPE), torch.ones(SHAPE), crafted.pattern * 300):
        with pytest.raises(ValueError, match=r"expected a pattern in \[-1, 1\]"):
            settings.restore({"pattern": odd}, SHAPE)
    with pytest.raises(ValueError, match="does not fit images of 4x4"):
        Additive(norm="l0", size=17).restore({"pattern": torch.zeros(3, 4, 4)}, (3, 4, 4))
    with pytest.raises(ValueError, match="made for images of shape"):
        crafted.trigger((3, 8, 8))
